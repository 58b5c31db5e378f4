"""Virtual time: a heap of (time, named rank, sequence), so that the same run happens twice."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from enum import IntEnum
from itertools import count
from typing import Any

from polyserve.core.types import to_microsecond


class Rank(IntEnum):
    """Who goes first at equal times, and why."""

    LOSS = 0  # what dies at t makes no token at t
    ITERATION = 1  # tokens made at t exist before anybody decides at t
    SIGHT = 2  # the gateway hears of them before it takes in anything new
    INSTANCE = 3  # an instance that is ready at t can serve who arrives at t
    LEAVING = 4  # room that a client leaves at t is free for who arrives at t
    ARRIVAL = 5
    DELIVERY = 6  # what was decided at t reaches its engine
    TICK = 7  # the core's own clock: all that happened at t is known
    BEGIN = 8  # an idle engine starts with everything that reached it at t
    SAMPLE = 9  # looking changes nothing, so it comes last


class Loop:
    """Runs things in order of their time; `now` is the time of the one that is running."""

    __slots__ = ("_heap", "_order", "now", "ran")

    def __init__(self) -> None:
        self.now = 0.0
        self.ran = 0
        self._heap: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._order = count()

    def __repr__(self) -> str:
        return f"<loop at {self.now:.6f}, {len(self._heap)} to run>"

    def at(self, time: float, rank: Rank, act: Callable[[Any], None], subject: Any = None) -> None:
        """Call `act(subject)` at the whole microsecond nearest to `time`, which is not in the past."""
        time = to_microsecond(time)
        assert time >= self.now, f"{time} is before {self.now}"
        heapq.heappush(self._heap, (time, rank, next(self._order), act, subject))

    @property
    def next_at(self) -> float:
        """When the next thing runs; infinite when there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def step(self) -> None:
        """Run the next thing."""
        self.now, _, _, act, subject = heapq.heappop(self._heap)
        self.ran += 1
        act(subject)
