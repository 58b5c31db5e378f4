"""What is known of a case before anything runs: who is feasible, the bounds, the residency, the window.

All of it is exact over the trace, not drawn: each pace's requests are the trace's rows that are feasible at it, evenly
(`polyserve.demand` draws another row where one is not). So the load axis is the same for every seed and policy.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from polyserve.core import bound
from polyserve.core.bound import TierMix
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Slo
from polyserve.profiles.store import load, shipped_names
from polyserve.sim.scenario import feasible, link
from polyserve.study.settings import PACES, QUIET, TTFTS, Fleet, StudyError, World
from polyserve.traces import Trace, read_trace

Shares = tuple[tuple[float, float], ...]

# Residencies are this many times shorter than the window, and the fleet has had that many to get warm.
WINDOW_RESIDENCIES = 5.0
WARM_RESIDENCIES = 1.0
# Windows and warm-ups are whole multiples of this, so that commands are short.
ROUNDED_S = 5.0
# Rows in the file of a day's rates, each for as long as the others.
DAY_PIECES = 144


@cache
def trace_of(name: str) -> Trace:
    return read_trace(name)


@cache
def profile_of(name: str) -> Profile:
    return load(name)


@cache
def day_of(service: str) -> tuple[float, ...]:
    """A day's rates over their mean, in `DAY_PIECES` equal pieces."""
    text = (resources.files("polyserve") / "data" / "rates" / "servegen-day.csv").read_text(encoding="utf-8")
    rates = [float(row[f"{service}_rps"]) for row in csv.DictReader(text.splitlines())]
    assert len(rates) == DAY_PIECES
    return tuple(rate * len(rates) / sum(rates) for rate in rates)


@dataclass(frozen=True)
class Case:
    """One fleet under one workload; every policy of a setting meets the same cases."""

    fleet: Fleet
    workload: str
    world: World = QUIET
    paces: Shares = PACES
    ttfts: tuple[float, ...] = TTFTS
    least_requests: int = 20_000  # in a window at the optimum

    @property
    def name(self) -> str:
        world = self.world
        day = f", a day of {world.day}, start-up {world.start_up_s:g} s" if world.day else ""
        return f"{self.fleet.name}, {self.workload}{day}"

    def true(self, name: str) -> Profile:
        """The true profile of that name: how long iterations last."""
        believed = profile_of(name)
        return believed.slowed(1.0 + self.world.bias) if self.world.bias else believed

    @cached_property
    def limits(self) -> Limits:
        """The tightest of the fleet's limits on an iteration's tokens decides which fixed chunks can be tried."""
        each = [profile_of(group.profile).limits for group in self.fleet.groups]
        return min(each, key=lambda limits: limits.max_num_batched_tokens)

    @property
    def link(self) -> tuple[float, float] | None:
        """What handing KV over takes, to begin with and per token; None where nothing is handed over."""
        return link(Settings(), self.true(self.fleet.profile)) if self.fleet.disaggregated else None

    # ------------------------------------------------------------------------------------------------- requests

    @cached_property
    def feasible(self) -> list[NDArray[np.bool_]]:
        """Which rows of the trace an idle instance could serve in time, per pace."""
        trace, true = trace_of(self.workload), [self.true(group.profile) for group in self.fleet.groups]
        return [
            feasible(true, trace.prompt_tokens, trace.output_tokens, Slo(max(self.ttfts), pace), self.link)
            for pace, _ in self.paces
        ]

    def mixes(self, shares: Shares) -> list[TierMix]:
        """The means per pace; raises `StudyError` where nothing is feasible."""
        trace = trace_of(self.workload)
        mixes = []
        for (pace, share), able in zip(shares, self.feasible, strict=True):
            if not able.any():
                raise StudyError(
                    f"workload {self.workload}: no request is feasible on {self.fleet.profile} at {pace * 1e3:g} ms"
                )
            mixes.append(bound.tier_mix(pace, share, trace.prompt_tokens[able], trace.output_tokens[able]))
        return mixes

    @cached_property
    def infeasible_share(self) -> float:
        """Share of the drawn requests that are replaced, since no idle instance could serve them in time."""
        total = sum(share for _, share in self.paces)
        missing = zip(self.paces, self.feasible, strict=True)
        return sum(share * (1.0 - float(able.mean())) for (_, share), able in missing) / total

    # --------------------------------------------------------------------------------------------------- bounds

    def bound_of(self, law: Callable[[str], Profile], *, strict: bool = False, one_pace: bool = False) -> float:
        """The fluid optimum in requests per second where a group's engines run by `law` of its profile's name.

        Where shares change it is that of the worse mix. `one_pace`: everybody at the tightest pace.
        """
        kinds = [(law(group.profile), group.instances) for group in self.fleet.groups]
        mixes = [self.mixes(shares) for shares in (self.paces, self.world.later) if shares]
        if one_pace:
            tightest = min(pace for pace, _ in self.paces)
            mixes = [[tier._replace(tpot_s=tightest) for tier in mix] for mix in mixes]
        if self.fleet.disaggregated:
            return min(bound.split_rate(kinds[0][0], self.fleet.instances, mix) for mix in mixes)
        return min(fleet_optimum(kinds, mix, strict=strict) for mix in mixes)

    @cached_property
    def optimal_rate(self) -> float:
        """The bound that loads are shares of; raises `StudyError` when there is none."""
        rate = self.bound_of(self.true)
        if rate <= 0:
            raise StudyError(f"{self.fleet.name} cannot hold every pace of {self.workload}, so there is no optimum")
        return rate

    @cached_property
    def bounds(self) -> dict[str, float | None]:
        """Every bound by name: additive and mixed laws where both are shipped, strict, believed, the ceiling."""
        pooled = self.bound_of(self.true, one_pace=True)
        return {
            "optimal_rate": self.optimal_rate,
            "additive_rate": self._under(""),
            "mixed_rate": self._under("-mixed"),
            "strict_rate": self.bound_of(self.true, strict=True),
            "believed_rate": self.bound_of(profile_of),
            "ceiling": self.optimal_rate / pooled if pooled > 0 else None,
        }

    def _under(self, law: str) -> float | None:
        """The bound under the profiles with that ending; None where one of them is not known."""
        own = {group.profile for group in self.fleet.groups}
        names = {name: f"{name.removesuffix('-mixed')}{law}" for name in own}
        if not set(names.values()) <= own | set(shipped_names()):
            return None
        return self.bound_of(lambda name: self.true(names[name]))

    # --------------------------------------------------------------------------------------------------- window

    @cached_property
    def residency_p99_s(self) -> float:
        """The 99th percentile of the longest a request may stay: its TTFT and its whole answer at its tier's pace."""
        outputs = trace_of(self.workload).output_tokens
        stays, weights = [], []
        for shares in (self.paces, self.world.later):
            for (pace, share), able in zip(shares, self.feasible, strict=False):
                stays.append(max(self.ttfts) + outputs[able] * pace)
                weights.append(np.full(len(stays[-1]), share / max(len(stays[-1]), 1)))
        stay, weight = np.concatenate(stays), np.concatenate(weights)
        order = np.argsort(stay)
        upto = np.cumsum(weight[order]) / weight.sum()
        return float(stay[order][min(int(np.searchsorted(upto, 0.99)), len(stay) - 1)])

    @cached_property
    def window_s(self) -> float:
        """Seconds measured: five residencies, of each mix where shares change, and requests enough for a 99 %."""
        if self.world.day:
            return self.world.day_s
        parts = 2 if self.world.later else 1
        least = max(parts * WINDOW_RESIDENCIES * self.residency_p99_s, self.least_requests / self.optimal_rate)
        return _rounded_up(least)

    @cached_property
    def warm_up_s(self) -> float:
        residencies_s = WARM_RESIDENCIES * self.residency_p99_s
        return _rounded_up(residencies_s, self.world.day_s / DAY_PIECES if self.world.day else ROUNDED_S)

    @cached_property
    def curve(self) -> tuple[float, ...]:
        """Relative rates over warm-up and window, 1 the day's mean; none where the rate is steady."""
        if not self.world.day:
            return ()
        day = day_of(self.world.day)
        return (*[day[0]] * round(self.warm_up_s / self.world.day_s * DAY_PIECES), *day)


def fleet_optimum(kinds: Sequence[tuple[Profile, int]], mix: Sequence[TierMix], *, strict: bool = False) -> float:
    """The fluid optimum of instances of one or two kinds; raises `StudyError` for more.

    Of two kinds each serves the tiers that it is relatively better at: in that order the first kind takes tiers until
    it is full, and what is left, part of a tier perhaps, goes to the second. The best rate fills both.
    """
    if len(kinds) == 1:
        ((profile, instances),) = kinds
        return bound.optimal_rate(profile, instances, mix, strict=strict)
    if len(kinds) > 2:
        raise StudyError("a fleet of more than two kinds of instances has no bound yet")
    rates = [[_tier_rate(profile, tier, strict) for tier in mix] for profile, _ in kinds]
    if any(first <= 0 and second <= 0 for first, second in zip(*rates, strict=True)):
        return 0.0
    (_, first_count), (_, second_count) = kinds
    order = sorted(range(len(mix)), key=lambda n: -rates[0][n] / rates[1][n] if rates[1][n] > 0 else -math.inf)
    total = sum(tier.share for tier in mix)

    def holds(rate: float) -> bool:
        left, needed = float(first_count), 0.0
        for n in order:
            wanted = rate * mix[n].share / total
            here = min(wanted, left * rates[0][n])
            left -= here / rates[0][n] if here > 0 else 0.0
            if wanted - here > 1e-12 and rates[1][n] <= 0:
                return False
            needed += (wanted - here) / rates[1][n] if wanted > here else 0.0
        return needed <= second_count

    low, high = 0.0, sum(max(kind) * count for kind, (_, count) in zip(rates, kinds, strict=True))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _tier_rate(profile: Profile, tier: TierMix, strict: bool) -> float:
    return bound.instance_rate(
        profile, tier.prompt, tier.output, tier.context, tier.attention, tier.tpot_s, strict=strict
    )


def _rounded_up(seconds: float, step_s: float = ROUNDED_S) -> float:
    return math.ceil(seconds / step_s - 1e-9) * step_s
