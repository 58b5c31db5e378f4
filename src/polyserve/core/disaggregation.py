"""PD: prompts are computed on some instances and answered on others, and their KV goes from one to the other.

A request needs two instances. Who answers is settled first, when the prompt is dispatched, and a place is kept there:
otherwise a prompt might be computed that nobody has room for, and its second token would be late. From the forecast of
the one that answers follows how soon the KV has to be there, and so by when the prompt has to be computed. A baseline
picks who answers when the prompt is done, by what it sees then (`promise` off).

Roles are labels, changed on empty instances alone: by the load, or (`follow_split` off) where a role has died out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from polyserve.core.baselines import Given, balance, first, router
from polyserve.core.bound import best_split
from polyserve.core.fleet import Books, Fleet, Job, SplitFleet, State
from polyserve.core.forecast import Forecast, Forecaster, Hosts
from polyserve.core.pending import Pending
from polyserve.core.routing import Placement, Refusal, Router
from polyserve.core.scaling import Demand, Plan, Scaler, shares, sizes
from polyserve.core.settings import Settings
from polyserve.core.types import Role, Tier, TierName

# A split that is better by less than this is not worth draining an instance for.
WORTH_TURNING = 0.03


class PrefillPool:
    """Our choice among the instances that compute prompts: a pool, the fullest first or the emptiest.

    Each is judged by its queue, chunk by chunk, against the deadline less what has to follow it (`Job.less_s`).
    """

    wants_progress = True

    def __init__(self, settings: Settings, fleet: Fleet, forecaster: Forecaster) -> None:
        self._fleet = fleet
        self._forecaster = forecaster
        self._everybody = Hosts(fleet, [(None, 0.0)])
        self._spread = settings.placement == "spread" or (settings.placement == "auto" and not settings.max_instances)
        self.considered: list[Refusal] = []

    def place(self, now: float, job: Job) -> Placement | None:
        books, answers = self._forecaster.walk(
            job,
            self._fleet,
            now,
            self._everybody,
            pace_s=math.inf,
            least_first=self._spread,
            waive=_waived(now, job),
            role=Role.PREFILL,
        )
        return Placement(job, books, answers[-1][1]) if books is not None else None

    def try_on(self, now: float, job: Job, books: Books) -> Forecast | None:
        """The forecast on one instance, if it admits."""
        forecast = self._forecaster.of(job, books, now, pace_s=math.inf, waive=_waived(now, job))
        return forecast if forecast.admits else None

    def refill(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        raise AssertionError("who waits needs a second instance: `Relay.refill` asks")

    def pace_s(self, books: Books) -> float:
        return math.inf


def _waived(now: float, job: Job) -> bool:
    return job.late or now > job.due_at


class Relay:
    """One router for those that compute prompts, one for those that answer, and what a request needs of both."""

    def __init__(self, settings: Settings, fleet: SplitFleet, prefill: Router, decode: Router) -> None:
        self._settings = settings
        self._fleet = fleet
        self._prefill = prefill
        self._decode = decode
        self.considered: list[Refusal] = []
        self.wants_progress = prefill.wants_progress or decode.wants_progress

    def pace_s(self, books: Books) -> float:
        return (self._prefill if books.role is Role.PREFILL else self._decode).pace_s(books)

    def place(self, now: float, job: Job) -> Placement | None:
        then = None
        if self._settings.promise:
            then = self._decode.place(now, job)
            self.considered = self._decode.considered
            if then is None:
                return None
        elif all(books.id in job.avoid for books in self._fleet.decode.ready()):
            return None
        return self._with_prompt(now, job, then)

    def _with_prompt(self, now: float, job: Job, then: Placement | None) -> Placement | None:
        job.less_s = _less_s(job, then)
        placement = self._prefill.place(now, job)
        return None if placement is None else dataclasses.replace(placement, then=then)

    def promise(self, now: float, job: Job) -> Placement | None:
        """A new place for the answer of a job whose prompt is being computed, if it is to have one already."""
        return self._decode.place(now, job) if self._settings.promise else None

    def onward(self, now: float, job: Job) -> Placement | None:
        """Who answers a job whose prompt is computed: it has to go somewhere; None: nobody is there."""
        if placement := self._decode.place(now, job):
            return placement
        ready = self._fleet.decode.ready()
        able = [books for books in ready if books.id not in job.avoid] or ready
        return Placement(job, min(able, key=lambda b: (b.load, len(b.jobs), b.id))) if able else None

    # ------------------------------------------------------------------------------------------------ room again

    def refill(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        if not self._settings.promise:
            return self._anywhere(now, pending)
        if books.role is not Role.PREFILL:
            return self._to_answer(now, books, pending)
        return self._to_compute(now, books, pending)

    def _anywhere(self, now: float, pending: Pending) -> Iterator[Placement]:
        refused = 0
        for job in first(pending, len(pending)):
            if placement := self.place(now, job):
                yield placement
            elif (refused := refused + 1) > self._settings.head_walk:
                return

    def _to_answer(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        """Jobs that an instance would answer, as long as their prompts find a place."""
        for then in self._decode.refill(now, books, pending):
            placement = self._with_prompt(now, then.job, then)
            if placement is None:
                return
            yield placement

    def _to_compute(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        """Jobs whose prompts an instance would compute in time, if somebody would answer them.

        Of a tier that found nobody to answer it, or that an instance has no room for, no more are asked.
        """
        full: set[TierName | None] = set()
        refused = 0
        for job in first(pending, 1 + self._settings.head_walk):
            if job.tier in full or books.id in job.avoid:
                continue
            if not self._in_time(now, job, books):
                refused += 1
                if refused > self._settings.head_walk:
                    return
                continue
            then = self._decode.place(now, job)
            if then is None:
                full.add(job.tier)
                continue
            job.less_s = _less_s(job, then)
            placement = self._on(now, job, books)
            if placement is not None:
                yield dataclasses.replace(placement, then=then)

    def _in_time(self, now: float, job: Job, books: Books) -> bool:
        """A look before the search for who answers: whether the prompt fits, nothing kept for what follows."""
        job.less_s = 0.0
        return self._on(now, job, books) is not None

    def _on(self, now: float, job: Job, books: Books) -> Placement | None:
        if not isinstance(self._prefill, PrefillPool):
            return self._prefill.place(now, job)
        forecast = self._prefill.try_on(now, job, books)
        return None if forecast is None else Placement(job, books, forecast)


def _less_s(job: Job, then: Placement | None) -> float:
    """Seconds of the first token's deadline that the second one needs.

    It is due a TPOT later, and takes the hand-over, an iteration on the instance that answers and, beside others, up
    to another one until that begins.
    """
    if job.slo is None:
        return 0.0
    if then is None or then.forecast is None:
        return max(job.transfer_s - job.slo.tpot_s, 0.0)
    iterations = 2.0 if then.books.jobs else 1.0
    return max(job.transfer_s + iterations * then.forecast.peak_s - job.slo.tpot_s, 0.0)


def relay(given: Callable[[Fleet], Given], fleet: SplitFleet) -> Relay:
    """The routers that the settings name, one for each role."""
    decode, prompts = router(given(fleet.decode)), given(fleet.prefill)
    settings = prompts.settings
    prefill: Router
    if settings.router == "tiers":
        prefill = PrefillPool(settings, fleet.prefill, prompts.forecaster)
    elif settings.router == "static":  # tiers are of those that answer
        prefill = balance(prompts)
    else:
        prefill = router(prompts)
    return Relay(settings, fleet, prefill, decode)


# ----------------------------------------------------------------------------------------------------- the split


class SplitScaler(Scaler):
    """Sizes both roles, and the tiers of those that answer, out of one budget."""

    def __init__(self, settings: Settings, tiers: Sequence[Tier], fleet: SplitFleet, demand: Demand) -> None:
        super().__init__(settings, tiers, fleet, demand)
        self._split = fleet
        self._sizes = settings.router == "tiers"
        self.wanted_prefill = 0  # 0: nothing is known yet

    @property
    def least(self) -> int:
        return max(super().least, 2) if self.elastic else 0

    @property
    def total(self) -> int:
        return super().total + self.wanted_prefill

    @property
    def _sized(self) -> bool:
        return True  # who waits says which tier lacks instances, not whether prompts or answers do

    def role(self) -> Role:
        """The role of an instance that has none yet."""
        prefill, decode = self._counts()
        if not prefill or not decode:
            return Role.DECODE if prefill else Role.PREFILL
        wanted = self.wanted_prefill or self._settings.prefill_instances or decode
        return Role.PREFILL if prefill < wanted else Role.DECODE

    def _counts(self) -> tuple[int, int]:
        """Instances of each role, as they will be when all have turned that are to."""
        roles = [books.turns_to or books.role for books in self._split if books.state is not State.DRAINING]
        prefill = sum(role is Role.PREFILL for role in roles)
        return prefill, len(roles) - prefill

    def look(self, now: float, waiting: Sequence[TierName], starting: int) -> Plan:
        plan = Plan([], 0, [])
        self._keep_both(plan)
        if plan.roles or not self._sizes:
            return plan
        return super().look(now, waiting, starting)

    def _keep_both(self, plan: Plan) -> None:
        """Nobody is served without both roles: one that has died out gets an instance of the other's."""
        prefill, decode = self._counts()
        if prefill and not decode and len(self._split.prefill.ready()) > 1:
            plan.roles.append((_emptiest(self._split.prefill.ready()), Role.DECODE))
        if decode and not prefill and len(self._split.decode.ready()) > 1:
            plan.roles.append((_emptiest(self._split.decode.ready()), Role.PREFILL))

    def _size(self, now: float, ready: list[Books], plan: Plan) -> None:
        profile = ready[0].profile
        prompts = self._demand.prefill_need(now, profile)
        costs = [self._demand.seconds_per_request(tier, profile) for tier in self._tiers]
        needs = [self._demand.need(now, tier, cost) for tier, cost in zip(self._tiers, costs, strict=True)]
        there = sum(books.state in (State.READY, State.TURNING) for books in self._split)
        budget = self._settings.max_instances if self.elastic else there
        if prompts + sum(needs) <= 0.0 or budget < 2:
            if self.elastic:
                self.wanted = {tier.name: tier.min_instances for tier in self._tiers}
                self.wanted_prefill = 1
            return
        foresees = self.elastic and self._settings.predictive
        growth = self._demand.growth(now, self._settings.start_up_s) if foresees else 1.0
        factor = growth / self._settings.planned_load
        tight = not self.elastic or (prompts + sum(needs)) * factor >= budget
        if tight:
            self.wanted_prefill = self._share(budget, prompts, sum(needs))
            total = float(budget - self.wanted_prefill)
        else:
            self.wanted_prefill = min(max(math.ceil(prompts * factor), 1), budget - 1)
            total = max(sum(needs) * factor, 1.0)
        have = [len(self._fleet.of_tier(tier.name)) for tier in self._tiers]
        exact = shares([need * factor for need in needs], self._tiers, costs, total, self._settings.shortage)
        wanted = sizes(exact, budget - self.wanted_prefill, have, [tier.min_instances for tier in self._tiers])
        self.wanted = {tier.name: size for tier, size in zip(self._tiers, wanted, strict=True)}
        if self._settings.follow_split:
            self._turn(wanted, have, plan)
        tiered = self._settings.sizing == "demand" and not plan.roles  # who turns is seen at the next look
        if tiered and (self._settings.relabel or not self.elastic):
            self._move(wanted, have, relabel=self._settings.relabel and tight, plan=plan)

    def _share(self, budget: int, prompts: float, answers: float) -> int:
        """Instances for prompts; those there are, unless others would serve more."""
        have, _ = self._counts()
        best = best_split(budget, prompts, answers)

        def served(count: int) -> float:
            return min(count / (prompts or math.inf), (budget - count) / (answers or math.inf))

        worth = 0 < have < budget and served(best) <= served(have) * (1.0 + WORTH_TURNING)
        return have if worth else best

    def _turn(self, wanted: list[int], have: list[int], plan: Plan) -> None:
        """Change roles until there are as many instances for prompts as wanted; at least one of each stays."""
        prefill, decode = self._counts()
        more = self.wanted_prefill - prefill
        role, kept = (Role.PREFILL, decode) if more > 0 else (Role.DECODE, prefill)
        recalled = [b for b in self._split if b.role is role and b.turns_to not in (None, role)]
        spare = {tier.name: there - size for tier, there, size in zip(self._tiers, have, wanted, strict=True)}

        def last(books: Books) -> tuple[bool, int, float, str]:
            return (books.tier is not None, -spare.get(books.tier or "", 0), books.load, books.id)

        given = self._split.part(Role.DECODE if role is Role.PREFILL else Role.PREFILL).ready()
        able = [*recalled, *sorted(given, key=last)][: max(min(abs(more), kept - 1), 0)]
        plan.roles += [(books, role) for books in able]


def _emptiest(ready: Sequence[Books]) -> Books:
    return min(ready, key=lambda b: (len(b.jobs) + len(b.parting), b.id))
