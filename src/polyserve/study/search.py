"""The highest load a policy holds, from as few runs as will do.

Loads are whole multiples of the resolution, so that searches for several measures share their runs. A measure's
goodput is the highest load such that attainment at it *and at every lower load that was run* reaches the target:
attainment is noisy and need not fall evenly, and a policy that fails at 70 % load does not hold 90 % because a luckier
run passed there. Every search ends with a load that holds next to one that does not, one resolution apart; between the
two the rate is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

# Below and beyond these shares of the optimum nobody looks: what fails at the first holds nothing, and nothing that
# keeps its tiers on time has been seen near the second.
LEAST_LOAD = 0.1
MOST_LOAD = 2.0
# Where a search starts without a hint, and its first stride: goodput of anything tuned lies between 0.6 and 1.2.
FIRST_LOAD = 0.8
FIRST_STRIDE = 0.1
# Strides double up to this: farther, and a search would halve its way back.
LONGEST_STRIDE = 0.2


@dataclass(frozen=True, slots=True)
class Measure:
    """A goodput: the highest load at which attainment, overall or of the worst tier, reaches `target`."""

    name: str
    target: float
    of: Literal["overall", "worst_tier"]


MEASURES = {
    measure.name: measure
    for measure in (
        Measure("G90", 0.90, "overall"),
        Measure("G90t", 0.90, "worst_tier"),
        Measure("G99t", 0.99, "worst_tier"),
    )
}


class Point(NamedTuple):
    """What one run showed."""

    load: float
    overall: float
    worst_tier: float


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where attainment falls below a target."""

    load: float  # interpolated; 0 when nothing that was run holds
    holds: float | None  # the highest load that holds, as do all below it
    fails: float | None  # the lowest that does not; None: everything that was run holds

    @property
    def at_least(self) -> bool:
        """Whether the goodput may be higher than any load that was run."""
        return self.fails is None


def crossing(points: Iterable[Point], measure: Measure) -> Crossing:
    """The goodput that these runs show."""
    ordered = sorted((p.load, getattr(p, measure.of)) for p in points)
    holds: tuple[float, float] | None = None
    for load, attained in ordered:
        if attained < measure.target:
            if holds is None:
                return Crossing(0.0, None, load)
            share = (holds[1] - measure.target) / (holds[1] - attained)
            return Crossing(holds[0] + share * (load - holds[0]), holds[0], load)
        holds = load, attained
    return Crossing(holds[0], holds[0], None) if holds else Crossing(0.0, None, None)


def next_load(
    points: Iterable[Point],
    measures: Iterable[Measure],
    resolution: float,
    hints: Mapping[str, float] | None = None,
) -> float | None:
    """The load to run next, a multiple of the resolution; None when every measure is known to one resolution.

    `hints` say by measure where the goodput likely is, as another seed showed it.
    """
    known = list(points)
    for measure in measures:
        hint = (hints or {}).get(measure.name)
        start, stride = (FIRST_LOAD, FIRST_STRIDE) if hint is None else (hint, resolution)
        load = _next_of(known, measure, resolution, start, stride)
        if load is not None:
            return round(load * resolution, 9)
    return None


def _next_of(points: list[Point], measure: Measure, resolution: float, start: float, stride: float) -> int | None:
    """The next load of one measure, in steps of the resolution: gallop from `start`, then close in."""
    found = crossing(points, measure)
    least, most = math.ceil(LEAST_LOAD / resolution - 1e-6), math.floor(MOST_LOAD / resolution + 1e-6)
    first = min(max(math.floor(start / resolution + 1e-6), least), most)
    step = max(round(stride / resolution), 1)
    low = least - 1 if found.holds is None else round(found.holds / resolution)
    high = most + 1 if found.fails is None else round(found.fails / resolution)
    if high - low <= 1:
        return None
    if low < first < high:
        return first
    longest = max(round(LONGEST_STRIDE / resolution), step)
    if low >= first:
        galloped = low + min(max(step, low - first), longest)
    else:
        galloped = high - min(max(step, first - high), longest)
    galloping = found.holds is None or found.fails is None
    if low < galloped < high and (galloping or stride <= resolution):
        return galloped
    if galloping:
        return low + 1 if found.holds is None else high - 1
    # Halved, not interpolated: attainment is flat up to a cliff, so that its value says little about where that is.
    return (low + high) // 2


def cheapest(holds: Mapping[int, bool], count: int, first: int) -> tuple[int | None, int | None]:
    """Of `count` options, rising in cost: the cheapest that holds, as do all dearer ones that were tried, and the next.

    The answer is None while it is not known, or when the dearest does not hold; nothing is next at the end.
    """
    low = max((i for i, held in holds.items() if not held), default=-1)
    high = min((i for i, held in holds.items() if held and i > low), default=count)
    if high - low <= 1:
        return (high if high < count else None), None
    if low < first < high:
        return None, first
    if high == count:
        return None, min(low + max(1, 2 * (low - first)), count - 1)
    if low == -1:
        return None, max(high - max(1, 2 * (first - high)), 0)
    return None, (low + high) // 2
