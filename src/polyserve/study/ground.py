"""What is known of a case before anything runs: who is feasible, the bounds, the residency, the window.

All of it is exact over the trace, not drawn: each pace's requests are the trace's rows that are feasible at it, evenly
(`polyserve.demand` draws another row where one is not). So the load axis is the same for every seed and policy.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from polyserve.core import bound
from polyserve.core.bound import TierMix
from polyserve.core.profile import Profile
from polyserve.core.types import ChunkRule, Slo
from polyserve.profiles.store import load, shipped_names
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

    def profile(self, name: str | None = None) -> Profile:
        """The true profile: how long iterations last."""
        believed = profile_of(name or self.fleet.profile)
        return believed.slowed(1.0 + self.world.bias) if self.world.bias else believed

    # ------------------------------------------------------------------------------------------------- requests

    @cached_property
    def feasible(self) -> list[NDArray[np.bool_]]:
        """Which rows of the trace an idle instance could serve in time, per pace."""
        trace, true = trace_of(self.workload), self.profile()
        return [
            bound.feasible(true, ChunkRule(), trace.prompt_tokens, trace.output_tokens, Slo(max(self.ttfts), pace))
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

    def bound_of(self, profile: Profile, *, strict: bool = False) -> float:
        """The fluid optimum in requests per second; where shares change, that of the worse mix."""
        mixes = [self.mixes(shares) for shares in (self.paces, self.world.later) if shares]
        return min(bound.optimal_rate(profile, self.fleet.instances, mix, strict=strict) for mix in mixes)

    @cached_property
    def optimal_rate(self) -> float:
        """The bound that loads are shares of; raises `StudyError` when there is none."""
        rate = self.bound_of(self.profile())
        if rate <= 0:
            raise StudyError(f"{self.fleet.name} cannot hold every pace of {self.workload}, so there is no optimum")
        return rate

    @cached_property
    def bounds(self) -> dict[str, float | None]:
        """Every bound by name: additive and mixed laws where both are shipped, strict, believed, the ceiling."""
        own = self.fleet.profile
        plain = own.removesuffix("-mixed")
        laws = {"additive": plain, "mixed": f"{plain}-mixed"}
        known = {kind: name for kind, name in laws.items() if name == own or name in shipped_names()}
        return {
            "optimal_rate": self.optimal_rate,
            **{f"{kind}_rate": self.bound_of(self.profile(known[kind])) if kind in known else None for kind in laws},
            "strict_rate": self.bound_of(self.profile(), strict=True),
            "believed_rate": self.bound_of(profile_of(own)),
            "ceiling": bound.ceiling(self.profile(), self.mixes(self.paces)),
        }

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


def _rounded_up(seconds: float, step_s: float = ROUNDED_S) -> float:
    return math.ceil(seconds / step_s - 1e-9) * step_s
