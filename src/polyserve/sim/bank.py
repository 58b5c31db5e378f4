"""The arrays of engines: one row per engine in each, so that a compiled loop can run them all.

An engine alone has a bank of one row to itself; the engines of a world share one, and `advance` runs them. Rows and
slots are added by doubling, and the engines then take hold of their rows anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from polyserve.core.profile import Profile
from polyserve.sim import layout as lay
from polyserve.sim import turns as t

FIRST_SLOTS = 64
NOISE = 64  # draws handed over at a time
FIRST_LENGTHS = 32  # of iterations between two reports, 50 ms apart

_advance: Callable[..., tuple[int, int, float, int, float, float]] = t.advance


class Holder(Protocol):
    """An engine that lives in a row."""

    row: int

    def take_hold(self) -> None:
        """Look up the row's arrays again: they were replaced."""
        ...

    def draw(self) -> float:
        """What an iteration's true time is stretched by."""
        ...


# What a gateway notices at once, in the columns `turns.T_*`: when, whether it is a first token, a preemption or an end
# (`turns.FIRST_TOKEN` and so on), the engine's row, the slot, its tokens, worst lateness and time of its first token.
Told = list[float]


class Bank:
    """Arrays for engines, and the loop that runs them."""

    def __init__(self, rows: int = 1, slots: int = FIRST_SLOTS) -> None:
        self.next_at = math.inf  # when the next iteration ends
        self.woken: list[int] = []  # rows that have work since they were last run
        self.reported = -1  # the row that the last `advance` has a report of
        self.seconds = math.nan  # the length of the iteration that it says
        self.last_at = -math.inf  # when the latest of the iterations ended that it ran; -inf: it ran none
        self._holders: dict[int, Holder] = {}
        self._unused = list(range(rows - 1, -1, -1))
        self._known: dict[bytes, int] = {}
        self.profiles = np.zeros((0, 0))
        self._own = np.zeros(t.OWN_LENGTH, np.int64)
        self.heading = np.zeros(t.H_COLUMNS, np.int64)
        self._allocate(rows, slots, FIRST_LENGTHS)

    def __repr__(self) -> str:
        return f"<bank of {len(self._holders)} engines in {len(self.state)} rows of {self.slots} slots>"

    def _allocate(self, rows: int, slots: int, lengths: int) -> None:
        self.slots = slots
        self.ints = np.zeros((rows, lay.INT_ROWS, slots), np.int64)
        self.floats = np.zeros((rows, lay.FLOAT_ROWS, slots))
        self.lists = np.zeros((rows, lay.LIST_ROWS, slots), np.int64)
        self.state = np.zeros((rows, lay.STATE_LENGTH), np.int64)
        self.clock = np.zeros((rows, lay.CLOCK_LENGTH))
        self.noise = np.ones((rows, NOISE))
        self.work = np.zeros((lay.WORK_ROWS, slots))
        self._lengths = np.zeros((rows, lengths))
        self._heap = np.zeros(rows, np.int64)
        self._rows = np.zeros(rows, np.int64)
        self._told = np.zeros((3 * slots + 256, t.T_COLUMNS))
        self.report = np.zeros((t.R_ROWS, slots), np.int64)
        self._take_stock()

    def _take_stock(self) -> None:
        """Everything that the compiled loop works on, in its order."""
        self._arrays: Any = (
            self.profiles,
            self.ints,
            self.floats,
            self.lists,
            self.state,
            self.clock,
            self.work,
            self.noise,
            self._lengths,
            self._heap,
            self._own,
            self._told,
            self.report,
            self.heading,
            self._rows,
        )

    def _enlarge(self, rows: int, slots: int, lengths: int) -> None:
        kept = {
            name: getattr(self, name)
            for name in ("ints", "floats", "lists", "state", "clock", "noise", "_lengths", "_heap")
        }
        self._allocate(rows, slots, lengths)
        for name, old in kept.items():
            getattr(self, name)[tuple(slice(size) for size in old.shape)] = old
        for holder in self._holders.values():
            holder.take_hold()

    def widen(self) -> None:
        """Twice the slots for every engine."""
        self._enlarge(len(self.state), 2 * self.slots, self._lengths.shape[1])

    def take(self, holder: Holder) -> int:
        """A row of zeros for an engine."""
        if not self._unused:
            rows = len(self.state)
            self._enlarge(2 * rows, self.slots, self._lengths.shape[1])
            self._unused = list(range(2 * rows - 1, rows - 1, -1))
        row = self._unused.pop()
        for array in (self.ints, self.floats, self.lists, self.state, self.clock):
            array[row] = 0
        self._holders[row] = holder
        return row

    def give_back(self, row: int) -> None:
        """An engine has gone; its iteration does not end any more."""
        if self.state[row, lay.BUSY]:
            t.take_out(self._heap, self._own, self.state, self.clock, row)
            self.next_at = self.clock.item(int(self._heap[0]), lay.ENDS_AT) if self._own[t.HEAPED] else math.inf
        if row in self.woken:
            self.woken.remove(row)
        del self._holders[row]
        self._unused.append(row)

    def learn_profile(self, profile: Profile) -> int:
        """The row of `profiles` that holds this one."""
        packed = profile.packed
        if packed.tobytes() not in self._known:
            rows, width = self.profiles.shape
            grown = np.zeros((rows + 1, max(width, len(packed))))
            grown[:rows, :width] = self.profiles
            grown[rows, : len(packed)] = packed
            self.profiles = grown
            self._take_stock()
            self._known[packed.tobytes()] = rows
        return self._known[packed.tobytes()]

    def advance(
        self, now: float, horizon: float, *, inclusive: bool, wake: bool, quiet_until: float, sight: int
    ) -> list[Told]:
        """Run iterations up to a time, or to the first end of which there is something to tell.

        What ends before `quiet_until` is only collected. `reported` is -1 or the row of which there is a report, to be
        read (`report`, `heading`, `seconds`) before the next `advance`; there may be one with nothing told.
        """
        wakes = self._wake() if wake and self.woken else 0
        self.last_at = -math.inf
        while True:
            why, row, at, count, self.seconds, self.next_at = _advance(
                *self._arrays, wakes, now, horizon, inclusive, quiet_until, sight
            )
            if at > self.last_at:
                self.last_at = at
            told: list[Told] = self._told[:count].tolist() if count else []
            if why <= t.TOLD:
                self.reported = row
                return told
            assert why != t.STUCK, f"{self._holders[row]} stands still"
            if why == t.DRAW:
                self._draw(row)
            else:
                self._enlarge(len(self.state), self.slots, 2 * self._lengths.shape[1])
            if told:
                self.reported = -1
                return told
            wakes = 0

    def wake(self, row: int) -> None:
        """An engine has work: it begins when those that are woken are next run, if it is idle then."""
        if not self.state[row, lay.BUSY] and row not in self.woken:
            self.woken.append(row)

    def _wake(self) -> int:
        """Write down who is woken; returns how many."""
        wakes = len(self.woken)
        self._rows[:wakes] = self.woken
        for row in self.woken:
            if self.state[row, lay.JITTERS] and self.state[row, lay.DRAWN] == NOISE:
                self._draw(row)
        self.woken.clear()
        return wakes

    def _draw(self, row: int) -> None:
        holder = self._holders[row]
        self.noise[row] = [holder.draw() for _ in range(NOISE)]
        self.state[row, lay.DRAWN] = 0
