"""Other tiers while requests are served: who takes over from whom, and the books of an instance brought in line.

A request keeps the SLO that it came with and is binned anew by it, so nobody is promised less than before; what was
learned of a tier goes to the one that takes over from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from polyserve.core.fleet import Books
from polyserve.core.kernels import I_GAUGED, R_BAND
from polyserve.core.types import Tier


def heirs(before: Sequence[Tier], after: Sequence[Tier]) -> list[int]:
    """Of each tier of `before` the place in `after` (tightest first) of the one that takes over from it.

    That is its namesake, else the loosest that is no looser, else the tightest.
    """
    names = {tier.name: at for at, tier in enumerate(after)}
    places = []
    for tier in before:
        tighter = [at for at, other in enumerate(after) if other.tpot_s <= tier.tpot_s]
        places.append(names.get(tier.name, tighter[-1] if tighter else 0))
    return places


def rebin(books: Books) -> None:
    """Bring an instance's books in line with the tiers that its jobs have now."""
    books.by_tier = dict(Counter(job.tier for job in books.jobs.values()))
    for row, request in zip(books.rows, books.ids, strict=True):
        row[R_BAND] = books.jobs[request].length_row
    books.numbers[0][I_GAUGED] = -1.0
