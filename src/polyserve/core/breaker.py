"""Circuit breaking: an instance that fails, hangs or is slow beside its peers rests; then one request tries it.

A rest lasts `breaker_s`, twice as long each time until an instance has been sound for a while. Errors and slowness
never put more than half of the instances to rest, since a fleet that is bad all over is better than none; one that
hangs rests in any case: nothing comes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from polyserve.core.fleet import Books, Fleet, State
from polyserve.core.settings import Settings
from polyserve.core.types import InstanceId, RequestId, to_microsecond

# Of the latest outcome in the share of failures: four failures in a row pass one half.
NEWS = 0.2
LONGEST_REST_S = 60.0
# An instance that was sound for so long starts anew; one that is lost twice within it is in a loop of crashes.
SOUND_S = 60.0
MOST_DOUBLINGS = 6


@dataclass(slots=True)
class _Record:
    """What is held against one instance."""

    errors: float = 0.0  # share of its latest requests that failed
    rests: int = 0  # in a row
    until: float = -math.inf  # it rests
    sound_since: float = -math.inf
    lost_at: float = -math.inf
    on_trial: bool = False  # the next request that it gets decides
    trial: RequestId | None = None  # that request


class Breakers:
    """What is held against each instance, and who rests."""

    def __init__(self, settings: Settings, fleet: Fleet) -> None:
        # In PD the other role's instances would wait for one that rests.
        self._off = settings.disaggregated or settings.breaker_s <= 0.0
        self._settings = settings
        self._fleet = fleet
        self._records: dict[InstanceId, _Record] = {}

    def __repr__(self) -> str:
        return f"<breakers: {', '.join(b.id for b in self._fleet if b.state is State.RESTING) or 'nobody rests'}>"

    def failed(self, books: Books, request: RequestId) -> bool:
        """Take in a failure; whether the instance is to rest."""
        if self._off:
            return False
        record = self._records.setdefault(books.id, _Record())
        record.errors += NEWS * (1.0 - record.errors)
        if request == record.trial:
            return True
        bound = self._settings.breaker_errors
        return 0.0 < bound <= record.errors and books.state is State.READY and self._may_rest()

    def succeeded(self, books: Books, request: RequestId, whole: bool, now: float) -> bool:
        """Take in a first token, or a whole answer; whether it ends the instance's trial."""
        record = self._records.get(books.id)
        if record is None:
            return False
        if whole:
            record.errors -= NEWS * record.errors
        if request != record.trial:
            return False
        record.on_trial, record.trial, record.errors, record.sound_since = False, None, 0.0, now
        return True

    def hangs(self, books: Books, since: float, now: float) -> bool:
        """Whether an instance that owes tokens, and has given none `since` then, is to be given up."""
        iterations = self._settings.hang_iterations
        if self._off or iterations <= 0.0 or not books.jobs or books.state is State.STARTING:
            return False
        iteration_s, prompts_s = books.next_token_s()
        patience_s = max(self._settings.hang_s, iterations * iteration_s) + 2.0 * prompts_s
        # Who was given up before may be slow rather than dead: ever more patience, or nothing would ever end on it.
        record = self._records.get(books.id)
        return now - since > patience_s * 2.0 ** min(record.rests if record else 0, MOST_DOUBLINGS)

    def slow(self) -> list[Books]:
        """Instances that are to rest because their peers are so much faster."""
        bound, ready = self._settings.breaker_slowness, self._fleet.ready()
        if self._off or bound <= 0.0 or len(ready) < 2:
            return []
        usual = median(books.correction.ratio for books in ready)
        found = sorted((b for b in ready if b.correction.ratio > bound * usual), key=lambda b: -b.correction.ratio)
        return found[:1] if self._may_rest() else []

    def rest(self, books: Books, now: float) -> float:
        """Put an instance to rest; says until when."""
        record = self._records.setdefault(books.id, _Record())
        if now - record.sound_since > SOUND_S and record.until + SOUND_S < now:
            record.rests = 0
        pause_s = min(self._settings.breaker_s * 2.0 ** min(record.rests, MOST_DOUBLINGS), LONGEST_REST_S)
        record.rests += 1
        record.until = to_microsecond(now + pause_s)
        record.on_trial, record.trial, record.errors = False, None, 0.0
        books.unlearn()
        if books.state is State.READY:
            books.state = State.RESTING
        return record.until

    def lost(self, books: Books, now: float) -> None:
        """An instance has gone, or its process was replaced: one that does so time and again rests when it is back."""
        if self._off:
            return
        record = self._records.setdefault(books.id, _Record())
        loop = now - record.lost_at < SOUND_S
        record.lost_at = now
        record.on_trial, record.trial, record.errors = False, None, 0.0
        if loop:
            self.rest(books, now)

    def resting(self, instance: InstanceId, now: float) -> float | None:
        """Until when an instance that is ready again rests all the same; None: it does not."""
        record = self._records.get(instance)
        return record.until if record is not None and record.until > now else None

    def rested(self, now: float) -> list[Books]:
        """Instances that have rested long enough: each gets one request, and what becomes of it decides."""
        found = []
        for books in self._fleet:
            record = self._records.get(books.id)
            if books.state is State.RESTING and record is not None and record.trial is None and record.until <= now:
                record.on_trial = True
                books.state = State.READY
                found.append(books)
        return found

    def dispatched(self, books: Books, request: RequestId) -> None:
        """An instance got a request: one that is on trial gets no second."""
        record = self._records.get(books.id)
        if record is not None and record.on_trial and record.trial is None:
            record.trial = request
            books.state = State.RESTING

    def left(self, books: Books, request: RequestId) -> bool:
        """A request left without a verdict; whether its instance may try another one."""
        record = self._records.get(books.id)
        if record is None or record.trial != request:
            return False
        record.trial = None
        if books.state is State.RESTING:
            books.state = State.READY
        return True

    def forget(self, instance: InstanceId) -> None:
        """An instance was stopped: its name never means it again."""
        self._records.pop(instance, None)

    def _may_rest(self) -> bool:
        """Whether at most half of the instances would rest with one more."""
        resting = sum(books.state is State.RESTING for books in self._fleet)
        return 2 * (resting + 1) <= resting + len(self._fleet.ready())
