"""The door to the brain: one inbox, one place that steps it, effects outside.

Other tasks only post events. The inbox is emptied from a callback of the loop, a bounded number of steps at a time, so
that streams keep moving while many requests arrive. Every step goes to the journal and then to whoever acts on it;
an action never runs inside a step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Protocol

from polyserve.core.types import Action, Arrived, Configured, Event, Tick, to_microsecond
from polyserve.journal import JournalWriter

log = logging.getLogger(__name__)

# Steps between two turns of the loop: at 200 microseconds a step the streams wait at most 5 ms.
STEPS_PER_TURN = 25
# Arrivals that wait for a step; more than this is seconds of work, which no deadline survives.
LONGEST_INBOX = 5_000
FLUSH_EVERY_S = 1.0


class Brain(Protocol):
    """What `polyserve.core.controller.Controller` is to its body."""

    def step(self, now: float, event: Event) -> list[Action]: ...

    @property
    def wake_at(self) -> float | None: ...


Observer = Callable[[float, Event, list[Action], float], None]  # (now, event, actions, seconds the step took)


class Driver:
    """Steps one brain in real time; times are seconds since the driver was made."""

    def __init__(
        self,
        brain: Brain,
        configured: Configured,
        act: Callable[[Action], None],
        observe: Observer,
        journal: IO[bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._brain = brain
        self._act = act
        self._observe = observe
        self._journal = None if journal is None else JournalWriter(journal)
        self.epoch = clock()  # when the brain's clock was 0
        self._now = 0.0
        self._inbox: deque[Event] = deque([configured])
        self._arrivals = 0
        self._loop = asyncio.get_running_loop()
        self._turn: asyncio.Handle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at: float | None = None
        self._flush: asyncio.TimerHandle | None = None
        self._closed = False
        self.failed: asyncio.Future[BaseException] = self._loop.create_future()

    def __repr__(self) -> str:
        return f"<driver at {self._now:.3f} s, {len(self._inbox)} events waiting>"

    def start(self) -> None:
        """Tell the brain what it rests on: the first step of every journal."""
        self._empty_inbox()

    def now(self) -> float:
        """Seconds on the brain's clock, whole microseconds; never runs back."""
        now = to_microsecond(self.clock() - self.epoch)
        if now > self._now:
            self._now = now
        return self._now

    def at(self, monotonic_s: float) -> float:
        """When something happened on the brain's clock, from `time.monotonic`."""
        return max(0.0, to_microsecond(monotonic_s - self.epoch))

    def post(self, event: Event) -> None:
        """Tell the brain what has happened."""
        self._inbox.append(event)
        if self._turn is None and not self._closed:
            self._turn = self._loop.call_soon(self._empty_inbox)

    def offer(self, event: Arrived) -> bool:
        """Post an arrival, unless so many wait already that it could only be late."""
        if self._arrivals >= LONGEST_INBOX or self._closed:
            return False
        self._arrivals += 1
        self.post(event)
        return True

    def close(self) -> None:
        """Step no more; what is in the journal is kept."""
        self._closed = True
        for handle in (self._turn, self._alarm, self._flush):
            if handle is not None:
                handle.cancel()
        self._turn = self._alarm = self._flush = None
        if self._journal is not None:
            self._journal.flush()

    def _empty_inbox(self) -> None:
        self._turn = None
        for _ in range(STEPS_PER_TURN):
            if not self._inbox or self._closed:
                break
            event = self._inbox.popleft()
            self._arrivals -= isinstance(event, Arrived)
            self._step(event)
        if self._closed:
            return
        if self._inbox:
            self._turn = self._loop.call_soon(self._empty_inbox)
        else:
            self._set_alarm()

    def _step(self, event: Event) -> None:
        now = self.now()
        started = time.perf_counter()
        try:
            actions = self._brain.step(now, event)
        except Exception as error:
            # A broken invariant is ours. What streams already may go on; the owner of `failed` shuts down.
            log.exception("the controller failed at %.6f on %r", now, event)
            self.close()
            self.failed.set_result(error)
            return
        took_s = time.perf_counter() - started
        if self._journal is not None:
            self._write(now, event, actions)
        for action in actions:
            self._act(action)
        self._observe(now, event, actions, took_s)

    def _write(self, now: float, event: Event, actions: list[Action]) -> None:
        assert self._journal is not None
        try:
            self._journal.write(now, event, actions)
            if self._flush is None:
                self._flush = self._loop.call_later(FLUSH_EVERY_S, self._flush_journal)
        except OSError as error:
            log.error("the journal cannot be written, and is given up: %s", error)
            self._journal = None

    def _flush_journal(self) -> None:
        self._flush = None
        if self._journal is not None:
            try:
                self._journal.flush()
            except OSError as error:
                log.error("the journal cannot be written, and is given up: %s", error)
                self._journal = None

    def _set_alarm(self) -> None:
        wake_at = self._brain.wake_at
        if wake_at == self._alarm_at and self._alarm is not None:
            return
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_at = wake_at
        if wake_at is not None:
            self._alarm = self._loop.call_later(max(0.0, wake_at - self.now()), self._ring)

    def _ring(self) -> None:
        self._alarm = None
        now = self.now()
        if self._alarm_at is not None and now < self._alarm_at:  # the loop's timers are coarser than the clock
            self._alarm = self._loop.call_later(self._alarm_at - now, self._ring)
        else:
            self.post(Tick(now))
