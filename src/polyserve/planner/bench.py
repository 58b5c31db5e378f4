"""Fleets tried out: one load on one fleet, simulated under one seed or several, and remembered.

The same seed draws the same requests for every fleet and policy, so that two fleets differ by nothing but themselves.
A run is as long as its scarcest tier needs for the target to be told from luck, and at least as long as requests
stay; it is preceded by a warm-up in which the fleet fills.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from polyserve.core import bound
from polyserve.core.profile import Profile
from polyserve.core.types import ChunkRule
from polyserve.demand import Workload, draw_requests
from polyserve.planner.ask import Ask, Load, PlanError
from polyserve.planner.saying import Quiet, Saying, fleet_of
from polyserve.planner.trial import Fleet, Trial, folded, pooled
from polyserve.profiles.store import load as load_profile
from polyserve.report import tier_key
from polyserve.sim.scenario import Prepared, Scenario, evaluate, prepare
from polyserve.traces import Trace, read_trace

# The scarcest tier has this many requests for every one that may miss, within bounds.
PER_MISS, FEWEST, MOST = 4.0, 100, 400
# Bursts shorter than this decide nothing.
SHORTEST_S = 20.0
# With less of its TTFT to spare, a request can be in time on an instance that is idle, or nearly.
SPARE = 0.2
# Lengths and paces are drawn this many times to learn their means.
MEANS_OF = 10_000


@dataclass(frozen=True, slots=True)
class Window:
    """How long a run is. Seconds; `residency_s`: how long a request stays at most, on average."""

    warm_up_s: float
    measured_s: float
    residency_s: float
    cut: bool  # fewer requests than the target asks for, since their number is bounded

    @property
    def whole_s(self) -> float:
        return self.warm_up_s + self.measured_s

    def shortened(self, by: float) -> Window:
        """The same requests in less time."""
        return dataclasses.replace(
            self, warm_up_s=round(self.warm_up_s / by, 6), measured_s=round(self.measured_s / by, 6)
        )


class Bench:
    """Tries fleets out. Everything it says is a function of the question; what it has simulated it remembers."""

    def __init__(self, ask: Ask, saying: Saying | None = None) -> None:
        self.ask = ask
        self.saying = saying or Quiet()
        self._recorded = ask.arrivals.kind == "recorded"
        self._trace = read_trace(ask.trace, ask.columns)
        if self._trace.recorded_rate <= 0 and (self._recorded or ask.rate is None):
            raise PlanError(f"rate: trace {ask.trace} has no arrival times; give requests per second")
        if self._recorded:
            self._trace = busiest(self._trace, ask.requests)
        self._workloads: dict[tuple[str, Load], Workload] = {}
        self._leasts: dict[tuple[str, Load], float] = {}
        self._windows: dict[tuple[str, Load], Window] = {}
        self._trials: dict[tuple[Fleet, Load, int], Trial] = {}

    # ------------------------------------------------------------------------------------------ the demand

    def rate(self, profile: str, load: Load) -> float:
        """Requests per second that a load sends to a fleet; recorded ones that no instance could serve are not sent."""
        if self.ask.rate is not None:
            return self.ask.rate * load.rate_by
        sent = 1.0 - self.infeasible_share(profile, load) if self._recorded else 1.0
        return self._trace.recorded_rate * sent * load.rate_by

    def least(self, profile: str, load: Load) -> float:
        """Instances that the fluid optimum needs, a fraction; raises `PlanError` where a pace cannot be held."""
        if (profile, load) not in self._leasts:
            kind = load_profile(profile)
            check_paces(kind, load)
            one = bound.optimal_rate(kind, 1, self._workload(profile, load).mixes())
            if one <= 0:
                raise PlanError("no number of instances of this kind can hold every pace asked for")
            self._leasts[profile, load] = self.rate(profile, load) / one
        return self._leasts[profile, load]

    def infeasible_share(self, profile: str, load: Load) -> float:
        """Of the requests drawn, those that even an idle instance of this kind would serve too late."""
        workload = self._workload(profile, load)
        return workload.infeasible / (len(workload) + (workload.infeasible if self._recorded else 0))

    def barely_share(self, profile: str, load: Load) -> float:
        """Of the requests, those that leave even an idle instance of this kind less than `SPARE` of their TTFT."""
        asked = [(r.prompt_tokens, r.slo.ttft_s) for r, _ in self._workload(profile, load) if r.slo is not None]
        prompts, ttfts = (np.array(column) for column in zip(*asked, strict=True))
        alone = bound.solo_ttft_s(load_profile(profile), ChunkRule(), prompts)
        return float((alone > (1.0 - SPARE) * ttfts).mean())

    def window(self, profile: str, load: Load) -> Window:
        """How long runs of this load are: the same at any rate, save that a recording is simulated once through."""
        usual = dataclasses.replace(load, rate_by=1.0)
        if (profile, usual) not in self._windows:
            stays = self._workload(profile, usual)
            self._windows[profile, usual] = window(stays, self.rate(profile, usual), usual, self.ask)
        span = self._windows[profile, usual]
        return span.shortened(load.rate_by) if self._recorded else span

    def _workload(self, profile: str, load: Load) -> Workload:
        """Enough requests to know the means of the load; their times say nothing."""
        usual = dataclasses.replace(load, rate_by=1.0)
        if (profile, usual) not in self._workloads:
            nominal = (None, None) if self._recorded else (1.0, float(max(MEANS_OF, len(self._trace))))
            self._workloads[profile, usual] = self._drawn(profile, usual, self.ask.seed, *nominal)
        return self._workloads[profile, usual]

    def _drawn(self, profile: str, load: Load, seed: int, rate: float | None, duration_s: float | None) -> Workload:
        return draw_requests(
            longer(self._trace, load.prompts_by, load.outputs_by),
            rate=rate,
            duration_s=duration_s,
            tpots=load.tpots,
            ttfts=self.ask.ttfts,
            feasible=partial(bound.feasible, load_profile(profile), ChunkRule()),
            arrivals=self.ask.arrivals,
            seed=seed,
        )

    # ------------------------------------------------------------------------------------------ the trials

    def holds(self, fleet: Fleet, load: Load) -> bool:
        """Whether the fleet attains the target, over as many seeds as it takes to tell, and a search may ask."""
        trial = self.judged(fleet, load)
        verdict = trial.verdict(self.ask.target)
        return trial.attains(self.ask.target) if verdict is None else verdict

    def judged(self, fleet: Fleet, load: Load) -> Trial:
        """Seeds pooled until the verdict is clear, or as many as a search may ask."""
        for count in range(1, min(max(self.ask.search_seeds, 1), self.ask.seeds) + 1):
            trial = self.over(fleet, load, self.ask.all_seeds[:count])
            if trial.verdict(self.ask.target) is not None:
                break
        return trial

    def over(self, fleet: Fleet, load: Load, seeds: Sequence[int]) -> Trial:
        """The fleet under the load, over these seeds."""
        return pooled([self.trial(fleet, load, seed) for seed in seeds])

    def trial(self, fleet: Fleet, load: Load, seed: int) -> Trial:
        """One run."""
        key = (fleet, load, seed)
        if key not in self._trials:
            prepared = self._prepared(fleet, load, seed)
            with self.saying.run(fleet_of(fleet.instances), len(prepared.spec.requests)) as advance:
                result = evaluate(prepared, None, lambda _, arrived: advance(arrived))
            self._trials[key] = folded(result, prepared, seed)
            self.saying.tried(fleet.instances, self._trials[key].worst)
        return self._trials[key]

    def tried(self, fleet: Fleet, load: Load) -> dict[int, Trial]:
        """Every size of this fleet that was tried under the load, its seeds pooled, by size."""
        sizes: dict[int, list[Trial]] = defaultdict(list)
        for (other, under, _), trial in self._trials.items():
            if under == load and other.of(fleet.instances) == fleet:
                sizes[other.instances].append(trial)
        return {size: pooled(trials) for size, trials in sorted(sizes.items())}

    def _prepared(self, fleet: Fleet, load: Load, seed: int) -> Prepared:
        """The scenario as `polyserve simulate` would run it, with the requests of the load."""
        ask, span = self.ask, self.window(fleet.profile, load)
        as_recorded = self._recorded and ask.rate is None and load.rate_by == 1
        rate = None if as_recorded else self.rate(fleet.profile, load)
        scenario = Scenario(
            trace=ask.trace,
            columns=ask.columns,
            profile=fleet.profile,
            instances=fleet.instances,
            rate=rate,
            duration_s=span.measured_s,
            warm_up_s=span.warm_up_s,
            tpots=load.tpots,
            ttfts=ask.ttfts,
            arrivals=ask.arrivals,
            policy=fleet.policy,
            values=ask.values,
            seed=seed,
            chunk=fleet.chunk,
        )
        prepared = prepare(scenario)
        workload = self._drawn(fleet.profile, load, seed, rate, span.whole_s)
        facts = dataclasses.replace(prepared.facts, infeasible=workload.infeasible)
        spec = dataclasses.replace(prepared.spec, requests=list(workload))
        return dataclasses.replace(prepared, spec=spec, facts=facts)


def check_paces(profile: Profile, load: Load) -> None:
    """Raise `PlanError` naming the tier whose pace no instance of this kind can hold, if there is one."""
    for tpot_s, _ in load.tpots:
        if not profile.holds(tpot_s):
            raise PlanError(
                f"an iteration with a single decode takes {profile.tightest_pace_s * 1e3:.3g} "
                f"ms, so no instance of this kind can hold TPOT {tier_key(tpot_s)} ms"
            )


def window(workload: Workload, rate: float, load: Load, ask: Ask) -> Window:
    """How long a run of this load should be, within the bound on its requests."""
    stays = np.array([r.slo.ttft_s + n * r.slo.tpot_s for r, n in workload if r.slo is not None])
    mean = float(stays.mean())
    # What share of those present at last is present after t: those who stay s contribute min(s, t).
    low, warm = 0.0, float(stays.max())
    for _ in range(30):
        middle = (low + warm) / 2
        low, warm = (middle, warm) if np.minimum(stays, middle).mean() < ask.warm * mean else (low, middle)
    scarcest = min(share for _, share in load.tpots)
    wanted = min(max(PER_MISS / (1 - ask.target), FEWEST), MOST) / scarcest / rate
    if ask.arrivals.kind == "recorded":
        wanted = len(workload) / rate - warm  # once through
    measured = max(min(wanted, ask.requests / rate), ask.residencies * mean, SHORTEST_S)
    return Window(round(warm, 6), round(measured, 6), mean, measured < 0.99 * wanted)


def longer(trace: Trace, prompts_by: float, outputs_by: float) -> Trace:
    """The trace with its lengths scaled, at least a token each."""
    if prompts_by == outputs_by == 1:
        return trace
    return dataclasses.replace(
        trace,
        prompt_tokens=np.maximum(np.rint(trace.prompt_tokens * prompts_by), 1).astype(np.int64),
        output_tokens=np.maximum(np.rint(trace.output_tokens * outputs_by), 1).astype(np.int64),
        blocks=None,
    )


def busiest(trace: Trace, requests: int) -> Trace:
    """The trace, or where it is longer than so many requests, its busiest stretch of so many."""
    arrived = trace.arrived_s
    if arrived is None or len(trace) <= requests:
        return trace
    first = int(np.argmin(arrived[requests - 1 :] - arrived[: len(arrived) - requests + 1]))
    rows = slice(first, first + requests)
    return dataclasses.replace(
        trace,
        prompt_tokens=trace.prompt_tokens[rows],
        output_tokens=trace.output_tokens[rows],
        arrived_s=arrived[rows] - arrived[first],
        blocks=None,
    )
