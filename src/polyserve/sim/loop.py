"""Virtual time: a heap of (time, named rank, sequence), so that the same run happens twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from heapq import heappop, heappush
from itertools import count
from typing import Any


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


END = len(Rank)  # of the run: after everything else


class Loop:
    """Runs things in order of their time; `now` is the time of the one that is running."""

    __slots__ = ("_heap", "_order", "_stopped", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._stopped = False
        self._heap: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._order = count()

    def __repr__(self) -> str:
        return f"<loop at {self.now:.6f}, {len(self._heap)} to run>"

    def at(self, time: float, rank: Rank, act: Callable[[Any], None], subject: Any = None) -> None:
        """Call `act(subject)` at the whole microsecond nearest to `time`, which is not in the past."""
        if time != self.now:
            time = round(time * 1e6) / 1e6
            assert time >= self.now, f"{time} is before {self.now}"
        heappush(self._heap, (time, rank, next(self._order), act, subject))

    def stop(self) -> None:
        """End `run` after what is running now."""
        self._stopped = True

    def run(self, until: float = math.inf, before: Callable[[float, int], bool] | None = None) -> None:
        """Run things in order, up to and including `until`, or to `stop`.

        `before(time, rank)` does what is kept elsewhere and comes before the next thing here; True when it did
        something that may have put other things here.
        """
        heap = self._heap
        while not self._stopped:
            time, rank = (heap[0][0], heap[0][1]) if heap and heap[0][0] <= until else (until, END)
            if before is not None and before(time, rank):
                continue
            if rank == END:
                return
            self.now, _, _, act, subject = heappop(heap)
            act(subject)
