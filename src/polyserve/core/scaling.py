"""How many instances each tier should have, out of one budget.

What a tier needs is its arrival rate over the rate that one instance serves at best at the tier's pace
(`bound.instance_rate`), both learned: arrivals and prompts decayed over `MEMORY_S`, outputs from the length model.
Sizes are cumulative ceilings from the tightest tier, so that tight tiers are rounded up and loose ones down: a loose
request may be a guest on a tight instance, not the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from polyserve.core.bound import answer_rate, instance_rate, prompt_rate
from polyserve.core.fleet import Books, Fleet, State
from polyserve.core.lengths import BANDS, LengthModel
from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Role, Tier, TierName

# Long enough that Poisson noise of a slow tier does not move instances, short enough to follow a change of mix.
MEMORY_S = 30.0
# A second, shorter memory of all arrivals: two lags tell the slope of a ramp.
SHORT_MEMORY_S = 8.0
# Growth beyond this is a burst that nobody foresees; what pends starts the rest.
MOST_GROWTH = 2.0
# A sized boundary stays while it is this near to the exact one: moving an instance costs it a drain.
HYSTERESIS = 0.2
# A tier with less than this left of its last arrival is idle: 90 seconds after it.
IDLE_ARRIVALS = 0.05
# What the prior output length counts for, in requests.
PRIOR_REQUESTS = 8.0


@dataclass(slots=True)
class _Seen:
    arrivals: float = 0.0
    prompt: float = 0.0
    prompt_square: float = 0.0
    ended: float = 0.0
    output: float = 0.0
    context: float = 0.0  # sum of output * mean context while it was made
    bands: dict[int, float] = field(default_factory=dict)  # in PD: arrivals by row of the length table
    admitted: float = 0.0

    def take_over(self, other: _Seen, at: int) -> None:
        """Add what was seen of another tier, `at` being the place of this one."""
        for name in ("arrivals", "prompt", "prompt_square", "ended", "output", "context", "admitted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for row, count in other.bands.items():
            own = at * BANDS + row % BANDS
            self.bands[own] = self.bands.get(own, 0.0) + count

    def fade(self, factor: float) -> None:
        self.arrivals *= factor
        self.prompt *= factor
        self.prompt_square *= factor
        self.ended *= factor
        self.output *= factor
        self.context *= factor
        for row in self.bands:
            self.bands[row] *= factor
        self.admitted *= factor


class Demand:
    """What arrives, per tier, decayed."""

    def __init__(self, tiers: Sequence[Tier], prior_output: int, lengths: LengthModel | None = None) -> None:
        """`lengths` is given in PD."""
        self._lengths = lengths
        self._tiers = list(tiers)
        self._seen = {tier.name: _Seen() for tier in tiers}
        self._rank = {tier.name: i for i, tier in enumerate(tiers)}
        self._prior_output = float(prior_output)
        self._since: float | None = None
        self._faded_at = 0.0
        self._recent = 0.0  # arrivals of all tiers, faded by the short memory

    def retier(self, tiers: Sequence[Tier], into: Sequence[int]) -> None:
        """Other tiers: what was seen of tier i counts for tier `into[i]` of those to come."""
        before = [self._seen[tier.name] for tier in self._tiers]
        self._tiers = list(tiers)
        self._rank = {tier.name: i for i, tier in enumerate(tiers)}
        self._seen = {tier.name: _Seen() for tier in tiers}
        for seen, at in zip(before, into, strict=True):
            self._seen[tiers[at].name].take_over(seen, at)

    def arrived(self, now: float, tier: TierName, prompt_tokens: int) -> None:
        if self._since is None:
            self._since = self._faded_at = now
        if now - self._faded_at > 1.0:
            self.fade(now)  # nobody has looked for a while
        # The next fade takes this arrival for one of the last fade's time: it counts so much more until then.
        passed = now - self._faded_at
        weight = math.exp(passed / MEMORY_S)
        self._recent += math.exp(passed / SHORT_MEMORY_S)
        seen = self._seen[tier]
        seen.arrivals += weight
        seen.prompt += weight * prompt_tokens
        seen.prompt_square += weight * prompt_tokens * prompt_tokens
        if self._lengths is not None:
            row = self._lengths.row(self._rank[tier], prompt_tokens)
            seen.bands[row] = seen.bands.get(row, 0.0) + weight

    def admitted(self, tier: TierName) -> None:
        self._seen[tier].admitted += 1.0

    def ended(self, tier: TierName, prompt_tokens: int, output_tokens: int) -> None:
        seen = self._seen[tier]
        seen.ended += 1.0
        seen.output += output_tokens
        seen.context += output_tokens * (prompt_tokens + 0.5 * (output_tokens + 1))

    def fade(self, now: float) -> None:
        """Let the past count less; call it regularly."""
        passed = now - self._faded_at
        factor = math.exp(-passed / MEMORY_S)
        self._recent *= math.exp(-passed / SHORT_MEMORY_S)
        self._faded_at = now
        for seen in self._seen.values():
            seen.fade(factor)

    def rate(self, now: float, tier: TierName) -> float:
        """Arrivals per second."""
        if self._since is None:
            return 0.0
        return self._seen[tier].arrivals / self._horizon_s(now, MEMORY_S)

    def _horizon_s(self, now: float, memory_s: float) -> float:
        """Seconds of arrivals that a decayed count stands for."""
        since = now if self._since is None else self._since
        return max(memory_s * (1.0 - math.exp(-(now - since) / memory_s)), 1.0)

    def growth(self, now: float, ahead_s: float) -> float:
        """All arrivals expected `ahead_s` from now over those that `rate` tells of: at least 1, at most `MOST_GROWTH`.

        On a ramp a decayed rate lags by its memory, so two memories give the slope. A difference that two standard
        deviations of a Poisson count explain is none.
        """
        slow = sum(self.rate(now, tier.name) for tier in self._tiers)
        recent_s = self._horizon_s(now, SHORT_MEMORY_S)
        fast = self._recent / recent_s
        if slow <= 0.0 or fast - slow <= 2.0 * math.sqrt(fast / (2.0 * recent_s)):
            return 1.0
        slope = (fast - slow) / (MEMORY_S - SHORT_MEMORY_S)
        return min((fast + slope * (SHORT_MEMORY_S + ahead_s)) / slow, MOST_GROWTH)

    @property
    def lengths(self) -> tuple[float, float]:
        """Mean prompt tokens of what arrives and mean output tokens of what ends, all tiers together."""
        seen = self._seen.values()
        arrivals, ended = sum(each.arrivals for each in seen), sum(each.ended for each in seen)
        prompt = sum(each.prompt for each in seen) / arrivals if arrivals > 0.0 else 0.0
        output = (sum(each.output for each in seen) + PRIOR_REQUESTS * self._prior_output) / (ended + PRIOR_REQUESTS)
        return prompt, output

    def admitted_share(self, tier: TierName) -> float:
        """Admitted over arrived, for the rule under shortage."""
        seen = self._seen[tier]
        return seen.admitted / seen.arrivals if seen.arrivals > 0.0 else 1.0

    def need(self, now: float, tier: Tier, cost_s: float) -> float:
        """Instances that a tier's arrivals occupy at that cost (`seconds_per_request`); 0 without recent arrivals."""
        seen = self._seen[tier.name]
        rate = self.rate(now, tier.name)
        if rate <= 0.0 or seen.arrivals < IDLE_ARRIVALS:
            return 0.0
        return rate * cost_s

    def seconds_per_request(self, tier: Tier, profile: Profile) -> float:
        """Instance-seconds that one request of the tier costs at the fluid optimum; in PD: its answer."""
        seen = self._seen[tier.name]
        if seen.arrivals <= 0.0:
            return 0.0
        prompt = seen.prompt / seen.arrivals
        weight = PRIOR_REQUESTS
        output = (seen.output + weight * self._prior_output) / (seen.ended + weight)
        prior_context = weight * self._prior_output * (prompt + 0.5 * self._prior_output)
        context = (seen.context + prior_context) / (seen.output + weight * self._prior_output)
        attention = 0.5 * seen.prompt_square / seen.arrivals
        if self._lengths is not None:
            # Tiers share what error there is, roles do not: while a load is young those that have ended are the short
            # ones, and the length model knows of the others.
            output = sum(count * self._lengths.expected(row) for row, count in seen.bands.items()) / seen.arrivals
            answered = answer_rate(profile, output, prompt + 0.5 * (output + 1), tier.tpot_s)
            return 1.0 / answered if answered > 0.0 else 0.0
        served = instance_rate(profile, prompt, output, context, attention, tier.tpot_s)
        return 1.0 / served if served > 0.0 else 0.0

    def prefill_need(self, now: float, profile: Profile) -> float:
        """In PD: instances that the prompts of all tiers occupy."""
        need = 0.0
        for tier in self._tiers:
            seen = self._seen[tier.name]
            if seen.arrivals >= IDLE_ARRIVALS:
                prompt, attention = seen.prompt / seen.arrivals, 0.5 * seen.prompt_square / seen.arrivals
                need += self.rate(now, tier.name) / prompt_rate(profile, prompt, attention)
        return need


def shares(
    needs: Sequence[float],
    tiers: Sequence[Tier],
    costs: Sequence[float],
    total: float,
    rule: Literal["demand", "weight", "cost"],
) -> list[float]:
    """Split `total` instances among tiers (tightest first) by what they need and, when short, by the rule.

    demand: everybody gets the same part of its need; weight: parts in proportion to tier weights; cost: the tiers
    whose requests cost least (`costs`, instance-seconds per request) are filled first.
    """
    whole = sum(needs)
    if whole <= 0.0:
        return [0.0] * len(needs)
    if total >= whole or rule == "demand":
        return [need * total / whole for need in needs]
    if rule == "cost":
        given = [0.0] * len(needs)
        left = total
        for i in sorted(range(len(needs)), key=lambda i: (costs[i], i)):
            given[i] = min(needs[i], left)
            left -= given[i]
        return given
    return _filled(needs, [tier.weight for tier in tiers], total)


def _filled(needs: Sequence[float], weights: Sequence[float], total: float) -> list[float]:
    """Water filling: in proportion to need times weight, nobody above its need."""
    given = [0.0] * len(needs)
    open_ = [i for i in range(len(needs)) if needs[i] > 0.0 and weights[i] > 0.0]
    left = total
    while open_ and left > 1e-9:
        sum_ = sum(needs[i] * weights[i] for i in open_)
        level = left / sum_
        full = [i for i in open_ if given[i] + level * needs[i] * weights[i] >= needs[i]]
        if not full:
            for i in open_:
                given[i] += level * needs[i] * weights[i]
            return given
        for i in full:
            left -= needs[i] - given[i]
            given[i] = needs[i]
            open_.remove(i)
    return given


def sizes(exact: Sequence[float], total: int, now: Sequence[int], floors: Sequence[int]) -> list[int]:
    """Whole instances per tier, tightest first: cumulative ceilings, with hysteresis towards the sizes of `now`.

    Never more than `total` together; `floors` are minimum counts, served tightest first.
    """
    boundary, held = 0.0, 0
    result: list[int] = []
    for i, part in enumerate(exact):
        before = sum(result)
        boundary += part
        held += now[i]
        ideal = math.ceil(boundary - 1e-9)
        keep = boundary - HYSTERESIS <= held <= boundary + 1.0 + HYSTERESIS
        up_to = min(held if keep else ideal, total) if part > 0.0 else before
        result.append(max(up_to - before, floors[i], 0))
    for i in range(len(result) - 1, -1, -1):
        excess = sum(result) - total
        if excess > 0:
            result[i] -= min(excess, result[i])
    return result


@dataclass(slots=True)
class Plan:
    """What one look at the fleet asks for."""

    assign: list[tuple[Books, TierName | None]]
    start: int
    stop: list[Books]
    roles: list[tuple[Books, Role]] = field(default_factory=list)  # in PD: whom to give another one


class Scaler:
    """Looks at the fleet now and then, and says which instances change tier, start or stop."""

    def __init__(self, settings: Settings, tiers: Sequence[Tier], fleet: Fleet, demand: Demand) -> None:
        self._settings = settings
        self._tiers = list(tiers)
        self._fleet = fleet
        self._demand = demand
        self.wanted: dict[TierName, int] = {tier.name: tier.min_instances for tier in tiers}

    @property
    def elastic(self) -> bool:
        """Whether instances may be started and stopped at all."""
        return self._settings.max_instances > 0 and self._settings.autoscaler == "own"

    @property
    def least(self) -> int:
        """Instances that an elastic fleet keeps whatever the load."""
        floors = sum(tier.min_instances for tier in self._tiers)
        return max(self._settings.min_instances, floors) if self.elastic else 0

    @property
    def _sized(self) -> bool:
        """Whether demand says how many instances there should be of what."""
        return self._settings.sizing == "demand"

    @property
    def total(self) -> int:
        """Instances that all should be together."""
        return sum(self.wanted.values())

    def look(self, now: float, waiting: Sequence[TierName], starting: int) -> Plan:
        """One look: `waiting` tiers have pending requests, `starting` instances are on their way."""
        plan = Plan([], 0, [])
        ready = self._fleet.ready()
        self._demand.fade(now)
        if self._sized and ready:
            self._size(now, ready, plan)
        self._release_tails(plan)
        if self.elastic:
            self._grow(ready, waiting, starting, plan)
            self._shrink(now, ready, waiting, starting, plan)
        return plan

    # --------------------------------------------------------------------------------------------- tier sizes

    def _size(self, now: float, ready: list[Books], plan: Plan) -> None:
        profile = ready[0].profile
        costs = [self._demand.seconds_per_request(tier, profile) for tier in self._tiers]
        needs = [self._demand.need(now, tier, cost) for tier, cost in zip(self._tiers, costs, strict=True)]
        if sum(needs) <= 0.0:
            if self.elastic:
                self.wanted = {tier.name: tier.min_instances for tier in self._tiers}
            return
        have = [len(self._fleet.of_tier(tier.name)) for tier in self._tiers]
        floors = [tier.min_instances for tier in self._tiers]
        budget = self._settings.max_instances if self.elastic else len(ready)
        foresees = self.elastic and self._settings.predictive
        growth = self._demand.growth(now, self._settings.start_up_s) if foresees else 1.0
        planned = [need * growth / self._settings.planned_load for need in needs]
        tight = not self.elastic or sum(planned) >= budget
        total = float(budget) if tight else sum(planned)
        exact = shares(planned, self._tiers, costs, total, self._settings.shortage)
        wanted = sizes(exact, budget, have, floors)
        self.wanted = {tier.name: size for tier, size in zip(self._tiers, wanted, strict=True)}
        if self._settings.relabel or not self.elastic:
            self._move(wanted, have, relabel=self._settings.relabel and tight, plan=plan)

    def _move(self, wanted: list[int], have: list[int], *, relabel: bool, plan: Plan) -> None:
        """Bring tiers to their sizes: from the pool, then from the least loaded of tiers that have too many."""
        pool = sorted(self._fleet.of_tier(None), key=lambda b: (len(b.jobs), b.id))
        for i, tier in enumerate(self._tiers):
            while have[i] < wanted[i]:
                if pool:
                    books = pool.pop(0)
                else:
                    donor = self._donor(wanted, have, plan) if relabel else None
                    if donor is None:
                        break
                    at, books = donor
                    have[at] -= 1
                plan.assign.append((books, tier.name))
                have[i] += 1

    def _donor(self, wanted: list[int], have: list[int], plan: Plan) -> tuple[int, Books] | None:
        moved = {books.id for books, _ in plan.assign}
        surplus = max(range(len(have)), key=lambda i: (have[i] - wanted[i], -i))
        if have[surplus] <= wanted[surplus]:
            return None
        able = [b for b in self._fleet.of_tier(self._tiers[surplus].name) if b.id not in moved]
        return (surplus, min(able, key=lambda b: (b.load, b.id))) if able else None

    # ------------------------------------------------------------------------------------------------- the tail

    def _release_tails(self, plan: Plan) -> None:
        """Give the pool what a tier's gradient has left empty at two looks."""
        if not self.elastic and self._settings.sizing == "demand":
            return
        moved = {books.id for books, _ in plan.assign}
        for tier in self._tiers:
            mine = self._fleet.of_tier(tier.name)
            keep = max(tier.min_instances, self.wanted[tier.name] if self._settings.predictive else 0)
            for books in sorted(mine, key=lambda b: (b.load, b.id)):
                if any(job.slo for job in books.jobs.values()):
                    books.empty_looks = 0
                    continue
                books.empty_looks += 1
                if books.empty_looks >= 2 and len(mine) > keep and books.id not in moved:
                    plan.assign.append((books, None))
                    mine.remove(books)

    # ------------------------------------------------------------------------------------------------ the budget

    def _grow(self, ready: list[Books], waiting: Sequence[TierName], starting: int, plan: Plan) -> None:
        settings = self._settings
        have = len(ready) + starting
        wanted = self.least
        if settings.predictive and settings.sizing == "demand":
            wanted = max(wanted, self.total)
        pool = len(self._fleet.of_tier(None))
        if waiting and pool == 0:
            wanted = max(wanted, len(ready) + len(waiting))  # one each, those already starting counted
        paid = sum(books.state is not State.STARTING for books in self._fleet) + starting  # those that drain, too
        room = min(settings.max_instances - paid, settings.start_step - starting)
        plan.start = max(0, min(wanted - have, room))

    def _shrink(self, now: float, ready: list[Books], waiting: Sequence[TierName], starting: int, plan: Plan) -> None:
        settings = self._settings
        if waiting or starting:
            return
        wanted = self.least
        if settings.predictive and settings.sizing == "demand":
            wanted = max(wanted, self.total)
        taken = {books.id for books, _ in plan.assign}
        left = len(ready)
        for books in self._fleet.of_tier(None):
            idle = not books.jobs and now - books.since >= settings.keep_warm_s
            if idle and left > wanted and books.id not in taken:
                plan.stop.append(books)
                left -= 1
