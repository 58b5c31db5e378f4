"""The brain: `step(now, event) -> actions`, and `wake_at`, when it wants to be woken though nothing happens.

It has no clock, no chance of its own, no I/O. A body (simulator or gateway) tells it everything that happens and
carries out everything it asks. The first event is `Configured`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import NormalDist
from typing import assert_never

import numpy as np

from polyserve.core.admission import Admission
from polyserve.core.autoscaling import Autoscaler, autoscaler
from polyserve.core.baselines import Given, router
from polyserve.core.breaker import Breakers
from polyserve.core.disaggregation import SplitScaler, relay
from polyserve.core.fairness import Turns
from polyserve.core.fleet import Books, Fleet, Job, SplitFleet, State
from polyserve.core.forecast import Forecast, Forecaster, compile_kernels
from polyserve.core.lengths import LengthModel
from polyserve.core.pending import Pending, Queue
from polyserve.core.profile import Profile
from polyserve.core.quota import Quotas
from polyserve.core.retiering import heirs, rebin
from polyserve.core.routing import Placement, Refusal, Router
from polyserve.core.scaling import Demand
from polyserve.core.settings import Settings
from polyserve.core.types import (
    Action,
    Arrived,
    Assign,
    Broken,
    Cancel,
    Cancelled,
    Configured,
    Corrected,
    Dispatch,
    Drain,
    DrainAsked,
    Event,
    Evict,
    Failed,
    Finished,
    FirstToken,
    HandOver,
    InstanceId,
    Joined,
    Lost,
    Preempted,
    Progressed,
    Ready,
    Received,
    Reconfigured,
    Refuse,
    RefuseCode,
    Reported,
    Request,
    RequestId,
    Restarted,
    Resume,
    Role,
    SetPace,
    SetRole,
    Silent,
    Slo,
    Start,
    Stop,
    Suspend,
    Tenant,
    Tick,
    Tier,
    TierName,
    to_microsecond,
)

EXPLAINED = 256  # decisions kept for `Controller.explanations`
LEAST_LOOK_S = 0.01  # a look that is due again at once would never let time pass
RETRY_FLOOR_S = 0.1  # a client that is told to come back sooner only adds load
# A second start of a failing launcher comes after this, then after twice as long, up to a minute.
BACKOFF_S, LONGEST_BACKOFF_S = 2.0, 60.0


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request went where it went: every instance that was asked, and what each lacked."""

    at: float
    request: RequestId
    tier: TierName | None
    chosen: InstanceId | None
    forecast: Forecast | None
    considered: tuple[Refusal, ...]


class Controller:
    """Admission, routing and scaling of one fleet for one model."""

    def __init__(self) -> None:
        self._now = -math.inf
        self._actions: list[Action] = []
        self._configured = False
        self.placed: dict[RequestId, Placement] = {}  # by the latest step

    # ------------------------------------------------------------------------------------------------- the door

    def step(self, now: float, event: Event) -> list[Action]:
        """Take in one event and say what to do about it; `now` never falls."""
        assert now >= self._now, f"time runs one way: {now} after {self._now}"
        assert self._configured or isinstance(event, Configured), "the first event is Configured"
        self._now = now
        self._actions = []
        self.placed = {}
        match event:
            case Arrived():
                self._arrived(event.request)
            case Progressed():
                self._progressed(event)
            case FirstToken():
                self._first_token(event)
            case Finished():
                self._finished(event)
            case Received():
                self._received(event)
            case Tick():
                pass
            case Corrected():
                self._corrected(event)
            case Cancelled():
                self._cancelled(event.request)
            case Preempted():
                books, job = self._resident(event.instance, event.request)
                if books is not None and job is not None:
                    books.recompute(event.request)
            case Broken():
                self._broken(event)
            case Silent():
                self._silent(event)
            case Reported():
                self._reported(event)
            case Joined():
                self._joined(event)
            case Ready():
                self._ready(event.instance)
            case Lost():
                self._lost(event.instance)
            case Restarted():
                self._restarted(event)
            case Failed():
                self._failed(event.instance)
            case DrainAsked():
                self._drain_asked(event.instance)
            case Configured():
                self._configure(event)
            case Reconfigured():
                self._reconfigure(event)
            case _:
                assert_never(event)
        self._refuse_the_hopeless()
        if now >= self._look_at:
            self._look()
        return self._actions

    @property
    def wake_at(self) -> float | None:
        """When to send a `Tick` if nothing else happens before; None: never."""
        if not self._configured:
            return None
        if not (len(self._fleet) or len(self._pending) or self._starting or self._scaler.least):
            return None
        beyond = self._pending.next_beyond_at
        return self._look_at if beyond is None else min(self._look_at, max(beyond, self._now))

    # ------------------------------------------------------------------------------------------- configuration

    def _configure(self, event: Configured) -> None:
        assert not self._configured, "a controller is configured once"
        self._configured = True
        compile_kernels()
        self._settings = Settings().replaced(event.settings)
        self._tiers = sorted(event.tiers, key=lambda t: t.tpot_s)
        self._tier: dict[TierName, Tier] = {tier.name: tier for tier in self._tiers}
        self._profiles = {name: Profile.from_dict(plain) for name, plain in event.profiles.items()}
        self._lengths = LengthModel(len(self._tiers), self._settings.length_prior_tokens, self._settings.lengths)
        split = self._settings.disaggregated
        names = [tier.name for tier in self._tiers]
        self._fleet: Fleet = SplitFleet(names) if split else Fleet(names)
        self._breakers = Breakers(self._settings, self._fleet)
        self._admission = Admission(self._settings, self._tiers, self._profiles, self._lengths)
        self._pending = Pending([tier.name for tier in self._tiers], self._turns(event.tenants))
        self._demand = Demand(self._tiers, self._settings.length_prior_tokens, self._lengths if split else None)
        self._forecaster = Forecaster(self._settings, self._lengths)
        self._quotas = Quotas(event.tenants, self._now)
        self._random = Random(event.seed)
        self._appoint()
        self._quantile = NormalDist().inv_cdf(min(max(self._settings.confidence, 0.001), 0.999))
        # Not at once: a body tells of the instances that exist right after this.
        self._look_at = to_microsecond(self._now + self._settings.look_s)
        self._lengths_at = self._now
        self._starting: dict[InstanceId, float] = {}  # asked to start, and when
        self._started = 0
        self._failures = 0
        self._start_after = -math.inf
        self._drained: dict[TierName | None, float] = dict.fromkeys((*names, None), 0.0)
        # Whose pace is tighter than every tier, the tier it came for having gone.
        self._tighter: dict[RequestId, float] = {}
        self.explanations: deque[Explanation] = deque(maxlen=EXPLAINED)

    def _appoint(self) -> None:
        """Make who routes and who scales, for the tiers of now."""

        def given(fleet: Fleet) -> Given:
            return Given(self._settings, self._tiers, fleet, self._forecaster, self._demand, self._random)

        self._scaler: Autoscaler
        if isinstance(self._fleet, SplitFleet):
            self._relay = relay(given, self._fleet)
            self._router: Router = self._relay
            self._scaler = SplitScaler(self._settings, self._tiers, self._fleet, self._demand)
        else:
            self._router = router(given(self._fleet))
            self._scaler = autoscaler(self._settings, self._tiers, self._fleet, self._demand, self._pending)
        on_late = {self._settings.on_late, *(tier.on_late for tier in self._tiers)}
        self._admission.counts_only = not self.wants_progress and on_late <= {None, "never"}

    def _reconfigure(self, event: Reconfigured) -> None:
        """Change the tiers: nobody is refused for it, and nobody moves to another instance."""
        self._profiles |= {name: Profile.from_dict(plain) for name, plain in event.profiles.items()}
        self._quotas.replace(event.tenants, self._now)
        before, self._tiers = self._tiers, sorted(event.tiers, key=lambda t: t.tpot_s)
        into, names = heirs(before, self._tiers), [tier.name for tier in self._tiers]
        self._tier = {tier.name: tier for tier in self._tiers}
        self._lengths.regroup(into, len(self._tiers))
        self._demand.retier(self._tiers, into)
        self._admission.retier(self._tiers)
        jobs = {job.id: job for job in self._pending} | {id: job for b in self._fleet for id, job in b.jobs.items()}
        for job in jobs.values():
            self._admission.rebin(job)
        for books in self._fleet:
            rebin(books)
        self._learn_lengths()
        self._appoint()
        for job in self._pending:  # policies that count do not know when a job is beyond hope
            if job.slo is not None and job.made == 0:
                self._admission.set_latest(job)
        self._pending.retier(names, self._turns(event.tenants))
        self._drained = {name: self._drained.get(name, 0.0) for name in (*names, None)}
        self._tighter = {
            id: job.slo.tpot_s for id, job in jobs.items() if job.slo and job.slo.tpot_s < self._tiers[0].tpot_s
        }
        self._relabel_to_heirs({tier.name: names[at] for tier, at in zip(before, into, strict=True)})
        self._look_at = self._now

    def _turns(self, tenants: tuple[Tenant, ...]) -> Callable[[], Turns] | None:
        """What makes the turns of a queue; None: there is nobody to take turns with."""
        shares = {tenant.name: tenant.share for tenant in tenants}
        return partial(Turns, shares, self._settings.length_prior_tokens) if len(shares) > 1 else None

    def _relabel_to_heirs(self, heir: dict[TierName, TierName]) -> None:
        """Instances of tiers that have gone serve the tier that takes over, or are in the pool when they are empty."""
        for books in self._fleet:
            if books.tier is not None and books.tier not in self._tier:
                self._assign(books, heir[books.tier] if any(job.slo for job in books.jobs.values()) else None)
            self._repace(books)

    @property
    def fleet(self) -> Fleet:
        """The books, to be read only."""
        return self._fleet

    @property
    def pending(self) -> Pending:
        """The waiting requests, to be read only."""
        return self._pending

    @property
    def tiers(self) -> list[Tier]:
        """Tightest first."""
        return self._tiers

    @property
    def wanted(self) -> dict[TierName, int]:
        """Instances that each tier should have."""
        return self._scaler.wanted

    @property
    def router(self) -> Router:
        """Who decides where requests go, to be read only."""
        return self._router

    @property
    def wants_progress(self) -> bool:
        """Whether reports of progress change any decision; a body may keep them back where they do not."""
        return self._router.wants_progress

    @property
    def settings(self) -> Settings:
        return self._settings

    def bin(self, slo: Slo) -> TierName:
        """The tier that a request with this SLO is counted under."""
        return (self._admission.bin(slo) or self._tiers[0]).name

    @property
    def forecasts(self) -> int:
        """How many forecasts were asked for so far."""
        return self._forecaster.asked

    # ------------------------------------------------------------------------------------------------- requests

    def _arrived(self, request: Request) -> None:
        if self._quotas and (excess := self._quotas.admit(self._now, request)) is not None:
            retry_s = to_microsecond(max(excess.retry_after_s, RETRY_FLOOR_S))
            self._actions.append(Refuse(request.id, "rate_limit_exceeded", None, retry_s, excess.limit))
            return
        job = self._admission.admit(request)
        if isinstance(job, str):
            self._refuse(request.id, job, None, None)
            return
        if job.tier is not None:
            self._demand.arrived(self._now, job.tier, job.prompt_tokens)
        placement = None if self._queue_first(job) else self._router.place(self._now, job)
        self._explain(job, placement)
        if placement is not None:
            self._carry_out(placement)
        elif not self._refuse_early(job):
            self._pending.push(job, self._now)

    def _queue_first(self, job: Job) -> bool:
        """Whether others of the tier wait already and are due earlier: then nobody overtakes them."""
        if job.tier is None:
            return len(self._pending.best_effort) > 0
        queue = self._pending.queues[job.tier]
        return len(queue) > 0 and queue.before(job) > self._settings.head_walk

    def _refuse(self, request: RequestId, code: RefuseCode, tier: TierName | None, retry_s: float | None) -> None:
        retry = None if retry_s is None else to_microsecond(max(retry_s, RETRY_FLOOR_S))
        self._quotas.ended(self._now, request)
        self._actions.append(Refuse(request, code, tier, retry))

    def _explain(self, job: Job, placement: Placement | None) -> None:
        if not self._settings.explain:
            return
        chosen, forecast = (placement.books.id, placement.forecast) if placement else (None, None)
        considered = tuple(self._router.considered)
        self.explanations.append(Explanation(self._now, job.id, job.tier, chosen, forecast, considered))

    # ----------------------------------------------------------------------------------------------- carrying out

    def _carry_out(self, placement: Placement) -> None:
        job, books = placement.job, placement.books
        self.placed[job.id] = placement
        self._make_way(placement)
        if placement.then is not None:
            self._keep_place(placement.then)
        if job.id in self._pending:
            if job.tier is not None:
                self._pending.queues[job.tier].served(job)
            self._pending.remove(job.id)
            self._drained[job.tier] += job.prefill_tokens
        job.instance = books.id
        job.seen = job.made
        books.add(job, self._now)
        books.empty_looks = 0
        self._breakers.dispatched(books, job.id)
        if job.tier is not None:
            self._demand.admitted(job.tier)
        first_at = placement.forecast.first_token_at if placement.forecast else math.inf
        predicted = to_microsecond(first_at - job.request.arrived_at) if math.isfinite(first_at) else None
        self._repace(books)
        self._actions.append(Dispatch(job.id, books.id, job.tier, books.tier, job.slo, job.made, predicted))

    def _make_way(self, placement: Placement) -> None:
        """What has to happen to an instance before it takes the job."""
        books = placement.books
        for request in placement.evicts:
            self._evict(books, request)
        label = placement.label or placement.job.tier
        if placement.takes and books.tier != label:
            self._assign(books, label)

    def _assign(self, books: Books, tier: TierName | None) -> None:
        books.tier = tier
        books.since = self._now
        books.empty_looks = 0
        self._actions.append(Assign(books.id, tier))
        self._repace(books)

    def _repace(self, books: Books) -> None:
        """Tell an instance the pace that its router wants of it now."""
        pace = self._router.pace_s(books)
        if self._tighter and pace < math.inf:
            pace = min((self._tighter.get(request, pace) for request in books.jobs), default=pace)
        if pace != books.pace_s:
            books.pace_s = pace
            if books.law.kind == 0 and pace < math.inf:
                self._actions.append(SetPace(books.id, to_microsecond(pace)))

    def _evict(self, books: Books, request: RequestId) -> None:
        job = books.jobs.get(request)
        if job is None:
            return
        on = self._fleet.get(job.instance or "")
        assert on is not None, f"{request} is nowhere"
        on.remove(request)
        self._breakers.left(on, request)
        self._actions.append(Evict(request, on.id))  # before what it leaves may be stopped
        for left in (on, self._part(job)):
            if left is not None and left is not books:
                self._empty_out(left)
        self._requeue(job)

    def _requeue(self, job: Job) -> None:
        """A job that lost its instance waits again, with the tokens it has."""
        job.made, job.instance = job.seen, None
        if job.made > 0:
            job.late = True  # its stream has begun: it is never refused
            if job.link is not None:
                self._admission.set_latest(job)  # its prompt is to be computed again
        elif job.slo is not None:
            self._admission.set_latest(job)
        self._pending.push(job, self._now)

    def _refill(self, books: Books) -> None:
        """Room may have appeared on an instance."""
        if not len(self._pending) or books.state is not State.READY:
            return
        for placement in self._router.refill(self._now, books, self._pending):
            self._carry_out(placement)
            if books.state is not State.READY:  # it was to be tried with one
                return

    def _vacated(self, books: Books) -> None:
        """A resident has left."""
        if books.state in (State.DRAINING, State.TURNING):
            self._empty_out(books)
            self._refill(books)
            return
        self._relabel_for_guests(books)
        self._repace(books)
        self._refill(books)

    def _empty_out(self, books: Books) -> None:
        """A resident has left an instance that is to be stopped, or to turn, when it is empty."""
        if books.state is State.DRAINING:
            self._stop_if_drained(books)
        elif books.state is State.TURNING:
            self._turn_if_empty(books)
        if books.jobs:
            self._repace(books)

    def _relabel_for_guests(self, books: Books) -> None:
        """An instance whose hosts have gone takes the tier of its tightest guest, where tiers are not sized."""
        if books.tier is None or self._settings.router != "tiers" or self._settings.sizing == "demand":
            return
        there = [tier.name for tier in self._tiers if books.by_tier.get(tier.name)]
        if there and books.tier not in there:
            self._assign(books, there[0])

    # --------------------------------------------------------------------------------------------- what happens

    def _progressed(self, event: Progressed) -> None:
        books = self._fleet.get(event.instance)
        if books is None:
            return
        books.progressed(event.tokens, event.prefilling, event.iteration, self._now)
        self._refill(books)

    def _first_token(self, event: FirstToken) -> None:
        books, job = self._resident(event.instance, event.request)
        if books is None or job is None:
            return
        self._proved(books, job.id, whole=False)
        if books.role is Role.PREFILL and job.link is not None:
            self._computed(books, job, event.at)
        else:
            books.first_token(event.request)

    def _resident(self, instance: InstanceId, request: RequestId) -> tuple[Books | None, Job | None]:
        """An instance and a request on it; in PD not one that is only promised to it."""
        books = self._fleet.get(instance)
        job = books.jobs.get(request) if books is not None else None
        return books, job if job is not None and job.instance == instance else None

    def _finished(self, event: Finished) -> None:
        self._quotas.ended(self._now, event.request, event.output_tokens)
        books, job = self._resident(event.instance, event.request)
        if books is None or job is None:
            return
        self._proved(books, job.id, whole=True)
        books.remove(event.request)
        other = self._part(job)
        self._lengths.ended(job.length_row, event.output_tokens)
        if job.tier is not None:
            self._demand.ended(job.tier, job.prompt_tokens, event.output_tokens)
        self._vacated(books)
        if other is not None:
            self._vacated(other)

    def _corrected(self, event: Corrected) -> None:
        job = self._pending.get(event.request)
        if job is not None:
            self._pending.remove(job.id)
            self._admission.correct(job, event.prompt_tokens)
            self._pending.push(job, self._now)
            return
        holding = [books for books in self._fleet if event.request in books.jobs]
        for books in holding:
            books.correct_prompt(event.request, event.prompt_tokens)
        for books in holding:
            books.jobs[event.request].prompt_tokens = event.prompt_tokens

    def _cancelled(self, request: RequestId) -> None:
        if request in self._pending:
            self._quotas.ended(self._now, request, self._pending.remove(request).seen)
            return
        for books in self._fleet:
            job = books.jobs.get(request)
            if job is None or job.instance != books.id:
                continue
            books.remove(request)
            self._quotas.ended(self._now, request, job.seen)
            self._breakers.left(books, request)
            other = self._part(job)
            self._actions.append(Cancel(request, books.id))
            self._vacated(books)
            if other is not None:
                self._vacated(other)
            return
        self._quotas.ended(self._now, request)

    def _broken(self, event: Broken) -> None:
        books, job = self._resident(event.instance, event.request)
        other = None
        if books is None and event.request in self._pending:
            job = self._pending.remove(event.request)
        if job is None:
            return
        if books is not None:
            books.remove(job.id)
            other = self._part(job)
        job.seen = max(event.tokens, job.made)
        job.avoid.add(event.instance)
        if books is not None and not event.fault:
            self._breakers.left(books, job.id)
        elif books is not None and self._breakers.failed(books, job.id):
            self._rest(books)
        self._replace(job)
        for left in (books, other):
            if left is not None:
                self._vacated(left)

    def _replace(self, job: Job) -> None:
        """Find a new place for a job whose stream broke."""
        self._requeue(job)
        others = all(any(b.id not in job.avoid for b in part) for part in self._fleet.parts)
        if not others and not self._starting and not self._scaler.elastic:
            if job.made == 0:
                self._pending.remove(job.id)
                self._refuse(job.id, "no_instances", job.tier, BACKOFF_S)
                return
            job.avoid.clear()
        placement = self._router.place(self._now, job)
        self._explain(job, placement)
        if placement is not None:
            self._carry_out(placement)

    def _silent(self, event: Silent) -> None:
        """Take everybody off an instance that hangs."""
        books = self._fleet.get(event.instance)
        if books is None or not self._breakers.hangs(books, event.since, self._now):
            return
        self._rest(books)
        jobs = [job for job in books.jobs.values() if job.instance == books.id]
        for job in jobs:
            books.remove(job.id)
            job.avoid.add(books.id)
            self._actions.append(Evict(job.id, books.id))
        self._replace_all(jobs)
        self._vacated(books)

    def _replace_all(self, jobs: list[Job]) -> None:
        """Find new places for jobs that lost theirs together."""
        for job in jobs:
            other = self._part(job)
            self._replace(job)
            if other is not None:
                self._vacated(other)

    def _rest(self, books: Books) -> None:
        """Give an instance no new requests for a while."""
        self._actions.append(Suspend(books.id, self._breakers.rest(books, self._now)))

    def _proved(self, books: Books, request: RequestId, whole: bool) -> None:
        """Something has come of an instance; the end of its trial, where it was on one."""
        if self._breakers.succeeded(books, request, whole, self._now) and books.state is State.RESTING:
            books.state = State.READY
            self._actions.append(Resume(books.id))
            self._refill(books)

    def _try_the_rested(self) -> None:
        """Slow instances rest; those that have rested are tried."""
        for books in self._breakers.slow():
            self._rest(books)
        for books in self._breakers.rested(self._now):
            self._refill(books)

    def _forgive(self) -> None:
        """A job that avoids an instance, and has found no other for a while, takes what there is."""
        limit = self._now - AVOIDED_S
        queued = [queue.named(name) for queue in self._pending.queues.values() for name in queue.wary]
        wary = [*queued, *(job for job in self._pending.best_effort.values() if job.avoid)]
        for job in [job for job in wary if job.pending_since < limit]:
            since, _ = job.pending_since, self._pending.remove(job.id)
            job.avoid.clear()
            self._pending.push(job, since)
            placement = self._router.place(self._now, job)
            if placement is not None:
                self._carry_out(placement)

    def _reported(self, event: Reported) -> None:
        books = self._fleet.get(event.instance)
        if books is not None:
            books.reported_at = event.at
            self._host(books, max(event.running + event.waiting - len(books.jobs), 0), event.kv_tokens)

    def _host(self, books: Books, strangers: int, kv_tokens: int | None) -> None:
        """Take in how much of an instance others use; room that they leave is filled."""
        before = books.foreign
        books.host(strangers, kv_tokens)
        if books.foreign < before:
            self._refill(books)

    # ---------------------------------------------------------------------------------------------- two instances

    def _keep_place(self, placement: Placement) -> None:
        """Promise a job a place on the instance that will answer it."""
        self._make_way(placement)
        job, books = placement.job, placement.books
        job.partner = books.id
        books.add(job, self._now)
        books.empty_looks = 0
        self._repace(books)

    def _part(self, job: Job) -> Books | None:
        """Free what a job has besides the instance it is on: a place kept, or KV on its way; returns where that was."""
        other = self._fleet.get(job.partner) if job.partner is not None else None
        job.partner = None
        if other is not None:
            seen = job.seen
            other.remove(job.id)
            other.parting.pop(job.id, None)
            job.seen = seen
        return other

    def _computed(self, source: Books, job: Job, at: float) -> None:
        """A prompt is computed: its KV goes to the instance that answers, unless the first token is the only one."""
        if job.request.max_tokens is not None and job.request.max_tokens - job.made <= 1:
            source.first_token(job.id)
            return
        source.computed(job.id, at, self._now)
        job.seen = job.made + 1
        target = self._fleet.get(job.partner) if job.partner is not None else None
        if target is not None and target.state is State.READY:
            self._send_on(source, target, job)
            return
        kept = self._part(job)
        self._hand_over(source, job)
        if kept is not None:
            self._vacated(kept)

    def _hand_over(self, source: Books, job: Job) -> None:
        """Find who answers a job whose KV lies on `source`; nobody there: it waits, to be computed again."""
        job.solo_s = 0.0
        placement = self._relay.onward(self._now, job)
        if placement is None:
            self._actions.append(Evict(job.id, source.id))
            self._replace(job)
            self._vacated(source)
            return
        self._keep_place(placement)
        self._send_on(source, placement.books, job)

    def _send_on(self, source: Books, target: Books, job: Job) -> None:
        source.parting[job.id] = job
        target.handed(job.id)
        job.instance, job.partner = target.id, source.id
        self._actions.append(HandOver(job.id, source.id, target.id, job.tier, target.tier, job.slo))

    def _received(self, event: Received) -> None:
        books, job = self._resident(event.instance, event.request)
        if books is None or job is None:
            return
        books.received(job.id)
        source, job.partner = self._fleet.get(job.partner or ""), None
        if source is not None:
            source.parting.pop(job.id, None)
            if source.state is not State.READY:
                self._vacated(source)

    def _promise_again(self, job: Job) -> None:
        """The instance that was to answer has gone while the prompt is being computed."""
        job.partner = None
        placement = self._relay.promise(self._now, job)
        if placement is not None:
            self._keep_place(placement)

    def _kv_lost(self, job: Job) -> None:
        """An instance went with KV that was on its way."""
        target, job.partner = self._fleet.get(job.instance or ""), None
        if target is not None:
            target.remove(job.id)
        job.seen = max(job.seen, job.made + 1)
        self._replace(job)
        if target is not None:
            self._vacated(target)

    def _turn(self, books: Books, role: Role) -> None:
        """Give an instance another role when it is empty; its own: it was to turn, and stays."""
        if role is books.role:
            books.state, books.turns_to = State.READY, None
            self._refill(books)
            return
        books.state, books.turns_to = State.TURNING, role
        self._turn_if_empty(books)
        self._refill(books)

    def _turn_if_empty(self, books: Books) -> None:
        if not books.empty or books.turns_to is None:
            return
        assert isinstance(self._fleet, SplitFleet)
        self._fleet.turn(books, books.turns_to)
        books.state, books.turns_to, books.since, books.empty_looks = State.READY, None, self._now, 0
        self._actions.append(SetRole(books.id, books.role))
        self._repace(books)

    # ------------------------------------------------------------------------------------------------- instances

    def _joined(self, event: Joined) -> None:
        instance = event.instance
        ours = self._starting.pop(instance.id, None) is not None
        if instance.id in self._fleet.books:
            return
        watched = self._router.wants_progress
        books = Books(instance, self._profiles[instance.profile], self._settings, self._lengths, watched)
        books.since = self._now
        self._admission.joined(books)
        if isinstance(self._scaler, SplitScaler) and (ours or books.role is Role.MIXED):
            books.role = self._scaler.role()
        self._fleet.add(books)
        if books.role is not instance.role:
            self._actions.append(SetRole(books.id, books.role))

    def _ready(self, instance: InstanceId) -> None:
        books = self._fleet.get(instance)
        if books is None or books.state is not State.STARTING:
            return
        self._failures = 0
        resting_until = self._breakers.resting(instance, self._now)
        books.state = State.READY if resting_until is None else State.RESTING
        books.since = self._now
        books.pace_s = math.inf
        self._repace(books)
        if resting_until is not None:
            self._actions.append(Suspend(instance, resting_until))
        self._refill(books)

    def _lost(self, instance: InstanceId) -> None:
        books = self._fleet.remove(instance)
        self._starting.pop(instance, None)
        if books is None:
            return
        if books.state is State.DRAINING:  # it was to go when it is empty
            self._actions.append(Stop(instance))
        elif books.state is not State.STARTING:
            self._breakers.lost(books, self._now)
        for job in list(books.jobs.values()):
            books.remove(job.id)
            if job.instance != instance:
                self._promise_again(job)
                continue
            other = self._part(job)
            if other is not None and books.role is not Role.PREFILL:
                self._hand_over(other, job)  # its KV is there still
                continue
            self._replace(job)
            if other is not None:
                self._vacated(other)
        for job in list(books.parting.values()):
            self._kv_lost(job)

    def _restarted(self, event: Restarted) -> None:
        """Its process is another one: what was on it is lost, and it may well be placed there again."""
        books = self._fleet.get(event.instance)
        if books is None:
            return
        books.restarted()
        jobs = [books.jobs[name] for name in event.lost if name in books.jobs]
        for job in jobs:
            books.remove(job.id)
        self._breakers.lost(books, self._now)
        if books.state is State.RESTING and (until := self._breakers.resting(books.id, self._now)) is not None:
            self._actions.append(Suspend(books.id, until))
        self._replace_all(jobs)
        self._vacated(books)

    def _failed(self, instance: InstanceId) -> None:
        self._starting.pop(instance, None)
        self._fleet.remove(instance)
        self._start_after = self._now + min(BACKOFF_S * 2.0**self._failures, LONGEST_BACKOFF_S)
        self._failures += 1

    def _drain_asked(self, instance: InstanceId) -> None:
        books = self._fleet.get(instance)
        if books is None or books.state is State.DRAINING:
            return
        books.state = State.DRAINING
        books.since = self._now
        self._actions.append(Drain(instance))
        self._stop_if_drained(books)

    def _stop_if_drained(self, books: Books) -> None:
        if books.empty:
            self._fleet.remove(books.id)
            self._breakers.forget(books.id)
            self._actions.append(Stop(books.id))

    # ------------------------------------------------------------------------------------------------ being late

    def _on_late(self, job: Job) -> str:
        tier = self._tier[job.tier] if job.tier is not None else None
        return (tier.on_late if tier else None) or self._settings.on_late

    def _refuse_early(self, job: Job) -> bool:
        """Refuse an arrival whose chance to be on time, behind everybody who goes before it, is below 1 - confidence.

        The wait is the prompt tokens ahead over the rate at which the queue has been draining; its spread that of
        a sum of as many independent services. Also bounds the queue.
        """
        if self._nobody_home(job):
            return True
        if job.tier is not None and self._on_late(job) == "refuse" and not job.late:
            ahead = self._pending.queues[job.tier].before(job)
            wait = self._drain_s(job) if ahead else 0.0
            if wait > 0.0 and wait * (1.0 - self._quantile / math.sqrt(ahead + 1)) > job.latest_at - self._now:
                self._refuse(job.id, "overloaded", job.tier, wait)
                return True
        return self._refuse_full(job)

    def _refuse_full(self, job: Job) -> bool:
        """Bound the queue: refuse an arrival, or whoever else has to make way for it."""
        queue = self._pending.best_effort if job.tier is None else self._pending.queues[job.tier]
        if not self._settings.queue_limit or len(queue) < self._settings.queue_limit:
            return False
        given_up = queue.to_make_way(job) if isinstance(queue, Queue) else None
        if given_up is not None:
            self._pending.remove(given_up.id)
        refused = given_up or job
        self._refuse(refused.id, "queue_full", refused.tier, self._drain_s(refused))
        return given_up is None

    def _nobody_home(self, job: Job) -> bool:
        """Refuse when no instance exists and none is coming."""
        if len(self._fleet) or self._starting or self._scaler.elastic:
            return False
        self._refuse(job.id, "no_instances", job.tier, BACKOFF_S)
        return True

    def _drain_s(self, job: Job) -> float:
        """Predicted wait of a job behind those due before it; 0 when nothing is known."""
        if job.tier is None:
            tokens = sum(other.prefill_tokens for other in self._pending.best_effort.values())
        else:
            tokens = self._pending.queues[job.tier].before_tokens(job)
        rate = self._drained[job.tier] / DRAIN_MEMORY_S
        return tokens / rate if rate > 0.0 else 0.0

    def _refuse_the_hopeless(self) -> None:
        """Requests that no idle instance could serve in time any more: refused, or served late, by `on_late`."""
        for job in self._pending.beyond_hope(self._now):
            rule = self._on_late(job)
            if rule == "refuse" and not job.late:
                self._pending.remove(job.id)
                code: RefuseCode = "overloaded" if self._fleet.ready() else "no_instances"
                self._refuse(job.id, code, job.tier, self._drain_s(job))
            elif rule == "serve_late" and not job.late:
                self._pending.remove(job.id)
                job.late = job.behind = True
                self._pending.push(job, self._now)

    # ------------------------------------------------------------------------------------------------- the look

    def _look(self) -> None:
        """What is looked at now and then: lengths, tier sizes, empty tails, the budget, the aged."""
        now, settings = self._now, self._settings
        self._look_at = to_microsecond(now + max(settings.look_s, LEAST_LOOK_S))
        for name in self._drained:
            self._drained[name] *= math.exp(-settings.look_s / DRAIN_MEMORY_S)
        if self.wants_progress and self._lengths.unlearned and now - self._lengths_at >= LENGTHS_EVERY_S:
            self._learn_lengths()
        self._tighter = {id: pace for id, pace in self._tighter.items() if self._holds(id)}
        self._time_out_queues()
        self._age_best_effort()
        self._time_out_starts()
        for books in self._fleet:
            if books.foreign and now - books.reported_at > STALE_S:
                self._host(books, 0, None)
        self._forgive()
        self._try_the_rested()
        for books in self._fleet.ready():
            if not books.jobs:  # nothing will happen on it that could bring anybody in
                self._refill(books)
        self._scale()

    def _learn_lengths(self) -> None:
        self._lengths_at = self._now
        self._lengths.refresh(np.concatenate([np.zeros((0, 2)), *(books.made() for books in self._fleet)]))

    def _holds(self, request: RequestId) -> bool:
        """Whether a request is still to be answered."""
        return request in self._pending or any(request in books.jobs for books in self._fleet)

    def _scale(self) -> None:
        waiting = [name for name, queue in self._pending.queues.items() if len(queue)]
        if self._pending.best_effort and not self._fleet.ready():
            waiting.append(self._tiers[-1].name)
        starting = len(self._starting) + len(self._fleet.starting())
        plan = self._scaler.look(self._now, waiting, starting)
        for books, role in plan.roles:
            self._turn(books, role)
        for books, tier in plan.assign:
            if books.tier != tier:
                self._assign(books, tier)
                self._refill(books)
        if self._now >= self._start_after:
            for _ in range(plan.start):
                self._start()
        for books in plan.stop:
            self._drain_asked(books.id)

    def _start(self) -> None:
        while True:
            self._started += 1
            instance = f"i{self._started}"
            if instance not in self._fleet.books:
                break
        self._starting[instance] = self._now
        self._actions.append(Start(instance))

    def _time_out_starts(self) -> None:
        """A start that never gets ready is not waited for for ever."""
        limit = self._now - self._settings.start_timeout_s
        late = [name for name, asked in self._starting.items() if asked < limit]
        if self._scaler.elastic:
            late += [b.id for b in self._fleet.starting() if b.since < limit]
        for instance in late:
            self._failed(instance)
            self._actions.append(Stop(instance))

    def _time_out_queues(self) -> None:
        limit = self._settings.queue_timeout_s
        if not limit:
            return
        waiting = [job for queue in self._pending.queues.values() for job in queue]
        for job in [*waiting, *self._pending.best_effort.values()]:
            if self._now - job.pending_since > limit and not job.late:
                self._pending.remove(job.id)
                self._refuse(job.id, "queue_timeout", job.tier, self._drain_s(job))

    def _age_best_effort(self) -> None:
        """Best effort that has waited too long is a request of the loosest tier, from now on."""
        limit = self._now - self._settings.best_effort_max_age_s
        for job in [j for j in self._pending.best_effort.values() if j.request.arrived_at < limit]:
            self._pending.remove(job.id)
            tier = self._tiers[-1]
            waited_s = to_microsecond(self._now - job.request.arrived_at)
            aged = self._admission.job(job.request, tier, Slo(waited_s + tier.ttft_s, tier.tpot_s))
            aged.made = aged.seen = job.made
            aged.late = job.made > 0  # a stream that has begun is never refused
            aged.avoid = job.avoid
            self._demand.arrived(self._now, tier.name, aged.prefill_tokens)
            placement = self._router.place(self._now, aged)
            if placement is not None:
                self._carry_out(placement)
            else:
                self._pending.push(aged, self._now)


AVOIDED_S = 3.0  # a job that waits longer goes back to an instance that broke it, rather than nowhere
STALE_S = 5.0  # what was reported longer ago says nothing of who else is there
DRAIN_MEMORY_S = 5.0  # over which the rate of a queue's drain is taken
LENGTHS_EVERY_S = 2.0  # the table costs about 2 ms
