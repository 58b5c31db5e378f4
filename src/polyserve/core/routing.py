"""Who serves a request by PolyServe's ladder over tiers.

The ladder, for one request: (1) its own tier, most loaded first where instances can be given back (`fill`) or least
loaded first on a fixed fleet (`spread`), the first that admits; (2) tighter tiers, whose instances it joins as a
guest under a reserve (lazy promotion); (3) an instance from the pool; (4) with `tight_on_loose`, a looser tier's
instance, which takes over the tighter pace; (5) a place that best-effort residents must leave; (6) wait. When room
appears on an instance, waiting requests are tried there: the instance's own tier first, then those who may be guests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from polyserve.core.fleet import Books, Fleet, Job
from polyserve.core.forecast import DEADLINE_CAUSES, Forecast, Forecaster, Hosts
from polyserve.core.pending import Pending, Queue
from polyserve.core.scaling import Demand
from polyserve.core.settings import Settings
from polyserve.core.types import InstanceId, RequestId, Tier, TierName


@dataclass(frozen=True, slots=True)
class Placement:
    """An answer of a router: the instance, why, and what has to happen to it first."""

    job: Job
    books: Books
    forecast: Forecast | None = None
    takes: bool = False  # the instance changes to the job's tier, or to `label`
    evicts: tuple[RequestId, ...] = ()
    label: TierName | None = None
    then: Placement | None = None  # in PD: the place that is kept for the answer


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one instance was not chosen."""

    instance: InstanceId
    tier: TierName | None
    load: float
    forecast: Forecast


class Router(Protocol):
    """Where a request goes, and what may go to an instance that has room again."""

    considered: list[Refusal]  # of the last `place`
    wants_progress: bool  # whether `place` or `refill` read more of the books than who is resident

    def place(self, now: float, job: Job) -> Placement | None:
        """The place of one job now; None: it waits."""
        ...

    def refill(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        """Waiting jobs that fit an instance; the caller carries out each before asking for the next."""
        ...

    def pace_s(self, books: Books) -> float:
        """The bound that an instance with a dynamic chunk keeps its iterations in; inf: none but its residents'."""
        ...


class Ladder:
    """PolyServe's tiers: load gradient, lazy promotion, pool."""

    wants_progress = True

    def __init__(self, settings: Settings, tiers: list[Tier], fleet: Fleet, forecaster: Forecaster, demand: Demand):
        self._settings = settings
        self._tiers = tiers  # tightest first
        self._rank = {tier.name: i for i, tier in enumerate(tiers)}
        self._fleet = fleet
        self._forecaster = forecaster
        self._demand = demand
        self.considered: list[Refusal] = []
        fixed = settings.max_instances == 0
        self._spread = settings.placement == "spread" or (settings.placement == "auto" and fixed)
        self._hosts_of = {tier.name: Hosts(fleet, self._hosts(tier)) for tier in tiers}
        looser = {tier.name: tiers[at + 1 :] for at, tier in enumerate(tiers)}
        self._looser_of = {name: Hosts(fleet, [(t.name, 0.0) for t in hosts]) for name, hosts in looser.items()}

    # --------------------------------------------------------------------------------------------- one request

    def place(self, now: float, job: Job) -> Placement | None:
        self.considered = []
        if job.tier is None:
            return self._place_best_effort(now, job)
        tier = self._tiers[self._rank[job.tier]]
        if placement := self._join(now, job, tier, self._hosts_of[tier.name]):
            return placement
        return self._take(now, job, tier) or self._slow_down(now, job, tier) or self._evict(now, job, tier)

    def pace_s(self, books: Books) -> float:
        """The tightest of its tier's pace and its residents'."""
        for tier in self._tiers:  # tightest first
            if tier.name == books.tier or books.by_tier.get(tier.name):
                return tier.tpot_s
        return self._tiers[-1].tpot_s

    def _hosts(self, tier: Tier) -> list[tuple[TierName, float]]:
        """The tiers whose instances a request joins, in order, each with the reserve that it leaves there."""
        own = [(tier.name, 0.0)]
        if self._settings.promotion == "off":
            return own
        tighter = self._tiers[: self._rank[tier.name]]
        if self._settings.promotion_order == "nearest":
            tighter = tighter[::-1]
        guests = [(host.name, self._settings.guest_reserve) for host in tighter]
        return [*guests, *own] if self._settings.promotion == "eager" else [*own, *guests]

    def _join(self, now: float, job: Job, tier: Tier, hosts: Hosts) -> Placement | None:
        """A place beside others, on the first instance of those tiers that admits."""
        explain = self._settings.explain
        books, answers = self._forecaster.walk(
            job,
            self._fleet,
            now,
            hosts,
            pace_s=tier.tpot_s,
            least_first=self._spread,
            waive=self._waived(now, job),
            whole=explain,
        )
        if explain:
            refusals = answers if books is None else answers[:-1]
            self.considered += [Refusal(b.id, b.tier, b.load, forecast) for b, forecast in refusals]
        return Placement(job, books, answers[-1][1]) if books is not None else None

    def _by_load(self, instances: Iterable[Books]) -> list[Books]:
        sign = 1.0 if self._spread else -1.0
        return sorted(instances, key=lambda b: (sign * b.load, b.id))

    def _forecast(
        self, now: float, job: Job, tier: Tier, books: Books, without: frozenset[RequestId] = frozenset()
    ) -> Forecast:
        return self._forecaster.of(
            job,
            books,
            now,
            pace_s=min(books.pace_s, tier.tpot_s),
            reserve=self._reserve(books, tier),
            waive=self._waived(now, job),
            without=without,
            whole=self._settings.explain,
        )

    def _reserve(self, books: Books, tier: Tier) -> float:
        """The share of an instance's pace that a tier's requests leave free: guests leave some."""
        guest = books.tier is not None and self._rank[books.tier] < self._rank[tier.name]
        return self._settings.guest_reserve if guest else 0.0

    def _waived(self, now: float, job: Job) -> bool:
        return job.late or now > job.due_at

    def holds(self, books: Books, tier: Tier) -> bool:
        """Whether an instance can keep a tier's pace at all."""
        return books.profile.holds(tier.tpot_s, books.scale)

    def _take(self, now: float, job: Job, tier: Tier) -> Placement | None:
        """An instance from the pool; failing that, for a tier without any, one from the tier with most to spare.

        An instance that the job avoids is none of its tier.
        """
        pool = self._fleet.of_tier(None)
        for books in sorted(pool, key=lambda b: (len(b.jobs), b.id)):
            if books.id in job.avoid or not self.holds(books, tier) or len(pool) <= self._owed(tier):
                continue
            if not books.jobs:  # as good as it gets
                return Placement(job, books, self._at_pace(now, job, tier, books), takes=True)
            if placement := self._cleared(now, job, tier, books, takes=True):
                return placement
        if any(b.id not in job.avoid for b in self._fleet.of_tier(tier.name)):
            return None
        donors = [b for b in self._fleet.ready() if b.id not in job.avoid and self._spares(b, tier)]
        for books in sorted(donors, key=lambda b: (b.load, b.id)):
            forecast = self._at_pace(now, job, tier, books)
            if forecast.admits:
                return Placement(job, books, forecast, takes=True)
        return None

    def _spares(self, books: Books, tier: Tier) -> bool:
        """Whether another tier can give an instance: its last one only to a tighter tier, where it stays a guest."""
        if books.tier is None or not self.holds(books, tier):
            return False
        left = len(self._fleet.of_tier(books.tier)) - 1
        donor = self._rank[books.tier]
        return left >= self._tiers[donor].min_instances and (left > 0 or donor > self._rank[tier.name])

    def _owed(self, tier: Tier) -> int:
        """Pool instances that other tiers' minimum counts have a claim to."""
        others = [t for t in self._tiers if t.min_instances and t.name != tier.name]
        return sum(max(t.min_instances - len(self._fleet.of_tier(t.name)), 0) for t in others)

    def _at_pace(
        self, now: float, job: Job, tier: Tier, books: Books, without: frozenset[RequestId] = frozenset()
    ) -> Forecast:
        """The forecast as if the instance ran at the tier's own pace."""
        tightest = min((j.slo.tpot_s for j in books.jobs.values() if j.slo), default=tier.tpot_s)
        return self._forecaster.of(
            job,
            books,
            now,
            pace_s=min(tier.tpot_s, tightest) if tightest < tier.tpot_s else tier.tpot_s,
            waive=self._waived(now, job),
            without=without,
        )

    def _slow_down(self, now: float, job: Job, tier: Tier) -> Placement | None:
        """Tight on loose: a looser tier's instance that can take over the tighter pace."""
        if not self._settings.tight_on_loose:
            return None
        return self._join(now, job, tier, self._looser_of[tier.name])

    # ---------------------------------------------------------------------------------------------- best effort

    def _place_best_effort(self, now: float, job: Job) -> Placement | None:
        """Pool instances first, then leftover capacity; never the last of an instance's KV or pace."""
        pool = sorted(self._fleet.of_tier(None), key=lambda b: (b.load, b.id))
        rest = sorted((b for b in self._fleet.ready() if b.tier is not None), key=lambda b: (b.load, b.id))
        for books in (*pool, *rest):
            if books.id not in job.avoid and (placement := self._try_best_effort(now, job, books)):
                return placement
        return None

    def _try_best_effort(self, now: float, job: Job, books: Books) -> Placement | None:
        loosest = self._tiers[-1].tpot_s
        headroom = self._settings.best_effort_headroom
        forecast = self._forecaster.of(job, books, now, pace_s=min(books.pace_s, loosest), reserve=headroom, waive=True)
        # Queued prompts keep a part of their time: a forecast that best effort has used up has no room to be wrong.
        kept_s = headroom * self._tiers[-1].ttft_s
        return Placement(job, books, forecast) if forecast.admits and forecast.queued_s >= kept_s else None

    def _evict(self, now: float, job: Job, tier: Tier) -> Placement | None:
        """A place on the own tier's instances, or as a guest, once best-effort residents have left it."""
        for host in self._hosts_of[tier.name].names:
            able = [b for b in self._fleet.of_tier(host) if b.by_tier.get(None) and b.id not in job.avoid]
            for books in self._by_load(able):
                if placement := self._cleared(now, job, tier, books, takes=False):
                    return placement
        return None

    def _cleared(self, now: float, job: Job, tier: Tier, books: Books, *, takes: bool) -> Placement | None:
        """The instance as it is, or without the newest of its best-effort residents, as few as will do."""
        free = [j.id for j in books.jobs.values() if j.slo is None][::-1]
        leave = 0
        while True:
            evicts = frozenset(free[:leave])
            judge = self._at_pace if takes else self._forecast
            forecast = judge(now, job, tier, books, evicts)
            if forecast.admits:
                return Placement(job, books, forecast, takes, tuple(free[:leave]))
            if leave >= len(free):
                return None
            leave = min(max(2 * leave, 1), len(free))

    # ------------------------------------------------------------------------------------------------ room again

    def refill(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        for tier in self._may_come(books, pending):
            yield from self._from_queue(now, books, tier, pending.queues[tier.name])
        for job in list(pending.best_effort.values())[: 1 + self._settings.head_walk]:
            if books.id in job.avoid:
                continue
            placement = self._try_best_effort(now, job, books)
            if placement is None:
                return
            yield placement

    def _may_come(self, books: Books, pending: Pending) -> list[Tier]:
        """Tiers whose waiting requests may join an instance: its own, then guests, then (optional) tighter ones.

        Nobody waits beside an idle instance: any tier whose pace it holds may take it over.
        """
        waiting = [t for t in self._tiers if len(pending.queues[t.name])]
        if books.tier is None:
            pool = len(self._fleet.of_tier(None))
            able = [t for t in waiting if self.holds(books, t) and pool > self._owed(t)]
            return sorted(able, key=lambda t: self._demand.admitted_share(t.name))[:1]
        at = self._rank[books.tier]
        own = [t for t in waiting if t.name == books.tier]
        guests = [t for t in waiting if self._rank[t.name] > at] if self._settings.promotion != "off" else []
        if self._settings.shortage == "demand":
            guests.sort(key=lambda t: self._demand.admitted_share(t.name))
        elif self._settings.shortage == "weight":
            guests.sort(key=lambda t: self._demand.admitted_share(t.name) / max(t.weight, 1e-9))
        tighter = [t for t in waiting if self._rank[t.name] < at] if self._settings.tight_on_loose else []
        able = [*own, *guests, *tighter]
        return able if books.jobs else [*able, *(t for t in waiting if t not in able and self.holds(books, t))]

    def _takes(self, books: Books, tier: Tier) -> bool:
        """Whether a waiting request of a tier would take an instance over rather than join it."""
        if books.tier is None:
            return True
        own, other = self._rank[books.tier], self._rank[tier.name]
        joins = self._settings.promotion != "off" if other > own else self._settings.tight_on_loose
        return not books.jobs and own != other and not joins

    def _from_queue(self, now: float, books: Books, tier: Tier, queue: Queue) -> Iterator[Placement]:
        """Jobs of one queue that fit: past a head that its own deadline refuses, not past one the instance refuses."""
        if not books.jobs or queue.wary or self._takes(books, tier):
            yield from self._one_by_one(now, books, tier, queue)
            return
        at = refusals = 0
        while len(queue) > at:
            pace_s = min(books.pace_s, tier.tpot_s) * (1.0 - self._reserve(books, tier))
            at, refusals, forecast = self._forecaster.pick(
                books, queue, now, pace_s=pace_s, first=at, refusals=refusals
            )
            if at < 0:
                return
            yield Placement(queue.job(at), books, forecast)

    def _one_by_one(self, now: float, books: Books, tier: Tier, queue: Queue) -> Iterator[Placement]:
        """The same where an instance would change hands, or some of the queue avoid it."""
        refused = 0
        for job in queue.head(64):
            if books.id in job.avoid:
                continue
            takes = self._takes(books, tier)
            forecast = self._at_pace(now, job, tier, books) if takes else self._forecast(now, job, tier, books)
            # An empty instance is as good as it gets for one that is late anyway.
            if forecast.admits or (not books.jobs and self._waived(now, job)):
                yield Placement(job, books, forecast, takes)
                continue
            refused += 1
            if forecast.lacks not in DEADLINE_CAUSES or refused > self._settings.head_walk:
                return
