"""What an operator would tune before comparing: each baseline's knobs, on one seed at one load, a few values each.

Knobs are tuned one after the other, each at the best of those before it, at most six runs altogether. What is best
attains most in its worst tier, then overall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from polyserve.core import bound
from polyserve.study.ground import Case
from polyserve.study.settings import Entry, Pairs

# Fixed chunks that are tried, where nothing else is tuned, beside another knob, and where time is short; those beyond
# the engine's limit come down to it.
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
FEWER_CHUNKS = (512, 1024, 2048, 8192)
QUICK_CHUNKS = (512, 2048, 8192)


class Choice(NamedTuple):
    """How an entry is run."""

    chunk: int | None  # fixed; None: the policy's own rule
    values: Pairs = ()


Knob = Callable[[Case, Entry, bool], list[object]]


def stages(case: Case, entry: Entry, quick: bool) -> list[tuple[str, list[object]]]:
    """Each knob with the values to try, in the order in which they are tuned."""
    return [(name, KNOBS[name](case, entry, quick)) for name in entry.tunes if name in KNOBS]


def tried(best: Choice, knob: str, value: object) -> Choice:
    """The best so far with one knob turned."""
    if knob == "chunk":
        assert isinstance(value, int)
        return Choice(value, best.values)
    return Choice(best.chunk, (*((key, old) for key, old in best.values if key != knob), (knob, value)))


def _chunks(case: Case, entry: Entry, quick: bool) -> list[object]:
    values = QUICK_CHUNKS if quick else CHUNKS if len(entry.tunes) == 1 else FEWER_CHUNKS
    limit = case.profile().limits.max_num_batched_tokens
    return [*sorted({min(chunk, limit) for chunk in values})]


def _sizes(case: Case, entry: Entry, quick: bool) -> list[object]:
    """Partitions by the instances that each tier needs: to the nearest, tight tiers rounded up, and roomier ones."""
    needs = needed(case)
    sized = [rounded(needs), tight_up(needs)]
    if case.world.later:
        sized.append(rounded(_needs_of(case, case.paces)))
    if not quick:
        roomier = [need * (1.15 if n < len(needs) / 2 else 1.0) for n, need in enumerate(needs)]
        sized.append(rounded([need * sum(needs) / sum(roomier) for need in roomier]))
    return list(dict.fromkeys(",".join(map(str, sizes)) for sizes in sized))


KNOBS: dict[str, Knob] = {
    "chunk": _chunks,
    "static_sizes": _sizes,
    "balance": lambda case, entry, quick: ["least-requests", "round-robin"],
    "slo_buffer": lambda case, entry, quick: [1.0, 0.85] if quick else [1.0, 0.9, 0.75],
}


def needed(case: Case) -> list[float]:
    """Instances that each tier needs at the optimum, tightest first; the mean of both mixes where shares change."""
    both = [_needs_of(case, shares) for shares in (case.paces, case.world.later) if shares]
    return [sum(needs) / len(both) for needs in zip(*both, strict=True)]


def _needs_of(case: Case, shares: tuple[tuple[float, float], ...]) -> list[float]:
    true, mixes = case.profile(), case.mixes(shares)
    each = [m.share / bound.instance_rate(true, m.prompt, m.output, m.context, m.attention, m.tpot_s) for m in mixes]
    return [need * case.fleet.instances / sum(each) for need in each]


def rounded(needs: Sequence[float]) -> list[int]:
    """Whole sizes of the same sum, by largest remainders; nobody below one while there are instances enough."""
    total = round(sum(needs))
    least = 1 if total >= len(needs) else 0
    sizes = [max(math.floor(need), least) for need in needs]
    while sum(sizes) < total:
        n = max(range(len(needs)), key=lambda n: (needs[n] - sizes[n], -n))
        sizes[n] += 1
    while sum(sizes) > total:
        n = min((n for n in range(len(needs)) if sizes[n] > least), key=lambda n: (needs[n] - sizes[n], -n))
        sizes[n] -= 1
    return sizes


def tight_up(needs: Sequence[float]) -> list[int]:
    """Cumulative ceilings from the tightest, so that loose tiers get what is left."""
    total = round(sum(needs))
    ends = [min(math.ceil(upto - 1e-9), total) for upto in accumulate(needs)]
    ends[-1] = total
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
