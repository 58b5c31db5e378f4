"""Decide and leave it at that: an incumbent rule routes, and the ladder says beside it what it would have done.

The books are true, since requests go where the incumbent sends them and the controller is told of everything as
always; nothing is refused for being late, and no pace is set. For every request the ladder is asked first, about the
fleet as the incumbent has left it, and its forecast about the instance that the incumbent then takes. A request that
the ladder would let wait is tried again as others arrive, until it has a place or no idle instance could be in time any
more.

What it cannot tell is what the fleet would look like had the ladder routed all along: every answer is about one
request in the incumbent's world, where instances serve all tiers together. One that waits is resident meanwhile, so
that its own load is held against it: waits are told as longer than they would be.

    polyserve simulate --policy polyserve.core.observing:OverRoundRobin
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from polyserve.core.baselines import Given, LeastRequests, OnePool, RoundRobin
from polyserve.core.fleet import Books, Job
from polyserve.core.forecast import Forecast
from polyserve.core.routing import Ladder, Placement
from polyserve.core.settings import EngineWish
from polyserve.core.types import InstanceId, RequestId, Tier, TierName

KEPT = 256  # disagreements
# Waiting requests that are tried again at a time, and how often.
RETRIED, RETRY_S = 8, 0.05


@dataclass(slots=True)
class Tally:
    """What became of one tier's requests, and what would have by the forecast."""

    requests: int = 0
    agreed: int = 0  # the ladder would have taken the same instance
    elsewhere: int = 0  # it would have taken another one, at once
    waited: int = 0  # it had no place at once
    placed_later: int = 0  # of these: it had one while that was still in time
    refused: int = 0  # of these: none before the last moment; the rest still wait
    in_time: int = 0  # as routed, by the forecast

    @property
    def own_in_time(self) -> int:
        """How many the ladder would have served in time."""
        return self.agreed + self.elsewhere + self.placed_later


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One request that the ladder would not have sent where it went."""

    at: float
    request: RequestId
    tier: TierName
    went_to: InstanceId
    forecast: Forecast  # there
    own: InstanceId | None  # None: it would have waited
    own_forecast: Forecast | None


class Observed(OnePool):
    """An incumbent's placements, and the ladder's opinion of each."""

    wants_progress = True
    incumbent: ClassVar[type[OnePool]]
    name: ClassVar[str]  # of the incumbent
    settings: ClassVar[dict[str, object]] = {"on_late": "never", "autoscaler": "off"}
    engine = EngineWish("dynamic", "deadline", ())

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._rule = self.incumbent(given)
        self._ladder = Ladder(given.settings, given.tiers, given.fleet, given.forecaster, given.demand)
        self._tiers = {tier.name: tier for tier in given.tiers}
        self._waiting: dict[RequestId, Job] = {}
        self._retried_at = 0.0
        self.tallies = {tier.name: Tally() for tier in given.tiers}
        self.disagreements: deque[Disagreement] = deque(maxlen=KEPT)

    def place(self, now: float, job: Job) -> Placement | None:
        placement = self._rule.place(now, job)
        if placement is None or job.slo is None or job.tier is None:
            return placement
        self._retry(now)
        there = self._forecast(now, job, placement.books, self._tiers[job.tier])
        if job.made == 0 and not job.avoid:  # else it was judged before its stream broke
            self._judge(now, job, placement.books, there)
        return Placement(job, placement.books, there)

    def _forecast(self, now: float, job: Job, books: Books, tier: Tier) -> Forecast:
        """What joining an instance means for everybody there, at the pace of the tightest of them."""
        pace_s = min((j.slo.tpot_s for j in books.jobs.values() if j.slo), default=tier.tpot_s)
        late = job.late or now > job.due_at
        return self._given.forecaster.of(job, books, now, pace_s=min(pace_s, tier.tpot_s), waive=late, whole=True)

    def _judge(self, now: float, job: Job, books: Books, there: Forecast) -> None:
        assert job.tier is not None
        tally = self.tallies[job.tier]
        tally.requests += 1
        tally.in_time += there.admits and now <= job.due_at
        own = self._ladder.place(now, job)
        if own is None:
            tally.waited += 1
            self._waiting[job.id] = job
        elif own.books is books:
            tally.agreed += 1
            return
        else:
            tally.elsewhere += 1
        place, forecast = (own.books.id, own.forecast) if own is not None else (None, None)
        self.disagreements.append(Disagreement(now, job.id, job.tier, books.id, there, place, forecast))

    def _retry(self, now: float) -> None:
        """Ask the ladder again about those that it let wait, the most urgent first."""
        if now < self._retried_at + RETRY_S:
            return
        self._retried_at = now
        for job in [job for job in self._waiting.values() if now > self._latest_at(job)]:
            del self._waiting[job.id]
            self.tallies[job.tier or ""].refused += 1
        urgent = sorted(self._waiting.values(), key=lambda job: (job.due_at, job.id))[:RETRIED]
        for job in urgent:
            if self._ladder.place(now, job) is not None:
                del self._waiting[job.id]
                self.tallies[job.tier or ""].placed_later += 1

    def _latest_at(self, job: Job) -> float:
        """The last moment at which an idle instance would be in time for the first token it had to make."""
        assert job.slo is not None
        return job.slo.due_at(job.request.arrived_at, 0) - job.solo_s


class OverRoundRobin(Observed):
    """One after the other routes."""

    incumbent, name = RoundRobin, "round-robin"


class OverLeastRequests(Observed):
    """The instance with the fewest requests gets the next one."""

    incumbent, name = LeastRequests, "least-requests"
