"""A simulation as people describe it: a trace, a fleet of one profile, a policy, and what may go wrong."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Literal

import numpy as np

from polyserve.core import bound
from polyserve.core.profile import Profile
from polyserve.core.settings import EngineWish, SettingError, Settings, engine_wish, policy
from polyserve.core.types import ChunkRule, InstanceId, RequestId, Slo, Tier, to_microsecond
from polyserve.demand import Arrivals, Bools, DemandError, Ints, Workload, draw_requests
from polyserve.journal import JournalWriter
from polyserve.profiles.store import load, shipped_names
from polyserve.report import Facts, Score, score, tier_key
from polyserve.sim.spec import Faults, Group, Run, SimulationSpec
from polyserve.sim.world import simulate
from polyserve.traces import read_trace

# Long enough for most of a fleet's residents to have come and gone, where the run itself is long enough.
WARM_UP_S = 60.0
# Beyond it a run would not end within days.
MOST_INSTANCES = 100_000


@dataclass(frozen=True)
class Scenario:
    """One run, with the defaults of `polyserve simulate`. Rates in requests per second."""

    trace: str = "azure-conv"
    profile: str = "a100-llama-3-8b"
    instances: int = 20
    others: tuple[tuple[str, int], ...] = ()  # further instances of other profiles; those that start are of the first
    rate: float | None = None  # None: as recorded
    of_optimal: float | None = None  # instead of a rate: this share of the optimum
    duration_s: float | None = 300.0  # measured, after the warm-up; None: a recorded trace once through
    warm_up_s: float | None = None  # None: a minute, or half the duration where that is less
    tpots: tuple[tuple[float, float], ...] = ((0.02, 0.1), (0.03, 0.2), (0.05, 0.3), (0.1, 0.4))
    ttfts: tuple[float, ...] = (0.3, 0.5, 1.0)
    later: tuple[tuple[float, float], ...] = ()  # the same paces, with their shares from the window's middle on
    curve: tuple[float, ...] = ()  # relative rates over the whole duration, evenly spaced; none: a steady rate
    arrivals: Arrivals = field(default_factory=Arrivals)
    columns: Mapping[str, str] = field(default_factory=dict)
    best_effort: float = 0.0
    policy: str = "polyserve"
    values: Mapping[str, object] = field(default_factory=dict)  # settings other than the policy's own
    seed: int = 0
    chunk: ChunkRule | None = None  # None: as the policy wishes, a fixed one at the engine's maximum
    order: Literal["deadline", "fcfs"] | None = None  # None: as the policy wishes
    jitter: float = 0.0  # standard deviation of single iterations, as a share
    bias: float = 0.0  # true iterations take 1 + bias times what is believed
    sight: Literal["gateway", "perfect"] = "gateway"
    lag_s: float = 0.0
    network_s: float = 0.0
    start_up_s: float = 0.0
    lost_instances: int = 0
    leaving: float = 0.0  # share of clients that go before their answer's end
    failing_starts: float = 0.0
    # Instances that compute prompts, the others answer (PD); auto: as many as the policy finds right, where it says
    # how many (`follow_split`), else as many as serve the most requests of this kind. None: all do both.
    pd: int | Literal["auto"] | None = None

    @property
    def disaggregated(self) -> bool:
        return self.pd is not None


@dataclass(frozen=True)
class Prepared:
    """A scenario with everything drawn and bounded, ready to run."""

    scenario: Scenario
    spec: SimulationSpec
    window: tuple[float, float]
    facts: Facts


@dataclass(frozen=True)
class Result:
    """What came of a scenario."""

    run: Run
    score: Score
    facts: Facts


def prepare(scenario: Scenario) -> Prepared:
    """Read, draw and bound; raises the readers' errors, `SettingError` and `DemandError`."""
    _check(scenario)
    settings = _settings(scenario)
    wish = engine_wish(settings.router)
    profile = load(scenario.profile)
    true = _true(scenario, profile)
    others = [(load(name), count) for name, count in scenario.others]
    warm_up_s = _warm_up_s(scenario)
    workload = draw(scenario, [true, *(_true(scenario, other) for other, _ in others)], warm_up_s)
    window = (warm_up_s, workload.duration_s)
    if warm_up_s >= workload.duration_s:
        raise DemandError(f"warm-up of {warm_up_s:g} s leaves nothing of {workload.duration_s:g} s to measure")
    instances = max(scenario.instances, settings.max_instances)
    mixes = workload.mixes()
    if settings.router == "static" and not settings.static_sizes:
        settings = settings.replaced({"static_sizes": _static_sizes(scenario, profile, mixes)})
    if scenario.disaggregated:
        prompts = _prefill_instances(scenario, settings, profile, mixes)
        settings = settings.replaced({"prefill_instances": prompts})
    chunk, order = scenario.chunk, scenario.order or wish.order
    spec = SimulationSpec(
        requests=list(workload),
        tiers=tuple(Tier(tier_key(tpot), tpot, max(scenario.ttfts)) for tpot, _ in sorted(scenario.tpots)),
        settings=settings,
        profile=true,
        believed=profile,
        instances=scenario.instances,
        chunk=chunk or _chunk(wish, profile),
        order=order,
        others=tuple(
            Group(_true(scenario, other), count, other, chunk or _chunk(wish, other), order) for other, count in others
        ),
        seed=scenario.seed,
        jitter=scenario.jitter,
        sight=scenario.sight,
        lag_s=scenario.lag_s,
        network_s=scenario.network_s,
        start_up_s=scenario.start_up_s,
        faults=faults(scenario, workload, window),
    )
    own = spec.profile
    alike = bool(mixes) and not others  # a fleet of several kinds has no bound here
    facts = Facts(
        policy=scenario.policy,
        profile=scenario.profile,
        trace=scenario.trace,
        seed=scenario.seed,
        instances=instances + sum(count for _, count in others),
        settings=dict(scenario.values),
        infeasible=workload.infeasible,
        optimal_rate=_optimal_rate(scenario, own, instances, mixes) if alike else None,
        strict_optimal_rate=_optimal_rate(scenario, own, instances, mixes, strict=True) if alike else None,
        ceiling=(bound.split_ceiling if scenario.disaggregated else bound.ceiling)(own, mixes) if alike else None,
        other_bounds={
            name: _optimal_rate(scenario, _true(scenario, load(name)), instances, mixes)
            for name in _siblings(scenario.profile)
            if alike
        },
    )
    return Prepared(scenario, spec, window, facts)


def _optimal_rate(
    scenario: Scenario, profile: Profile, instances: float, mixes: Sequence[bound.TierMix], *, strict: bool = False
) -> float:
    """The fluid optimum; in PD no iteration is mixed, so that the strict one is the same."""
    if scenario.disaggregated:
        return bound.split_rate(profile, instances, mixes)
    return bound.optimal_rate(profile, instances, mixes, strict=strict)


def _prefill_instances(scenario: Scenario, settings: Settings, profile: Profile, mixes: Sequence[bound.TierMix]) -> int:
    """How many instances compute prompts at the start; 0: the policy finds that out."""
    if isinstance(scenario.pd, int):
        return scenario.pd
    if settings.prefill_instances or settings.follow_split or not mixes:
        return settings.prefill_instances
    needs = bound.split_needs(profile, mixes)
    return bound.best_split(scenario.instances, needs.prefill, needs.decode) if needs is not None else 0


def link(settings: Settings, profile: Profile) -> tuple[float, float]:
    """What handing KV over takes, to begin with and per token."""
    return settings.kv_latency_s, profile.kv_bytes_per_token / settings.kv_bandwidth


def evaluate(
    scenario: Scenario | Prepared,
    journal: JournalWriter | None = None,
    on_look: Callable[[float, int], None] | None = None,
) -> Result:
    """Run a scenario and score the requests of its window."""
    prepared = scenario if isinstance(scenario, Prepared) else prepare(scenario)
    run = simulate(prepared.spec, journal, on_look)
    window = prepared.window
    facts = dataclasses.replace(
        prepared.facts,
        preemptions=run.preemptions,
        forced_chunks=run.forced_chunks,
        instance_seconds=run.instance_seconds(*window),
        iterations=run.iterations,
        simulated_requests=len(run.outcomes),
        wall_s=run.wall_s,
        steps=run.steps,
        decision_us=run.decision_us,
    )
    return Result(run, score(run.outcomes, window, [t.tpot_s for t in prepared.spec.tiers]), facts)


def draw(scenario: Scenario, profiles: Sequence[Profile], warm_up_s: float) -> Workload:
    """The scenario's requests, feasible on an idle instance of one of the true `profiles`.

    What is feasible does not depend on the policy, so that all policies get the same requests.
    """
    trace = read_trace(scenario.trace, scenario.columns)
    duration_s = None if scenario.duration_s is None else warm_up_s + scenario.duration_s
    at_rate = partial(
        draw_requests,
        trace,
        duration_s=duration_s,
        ttfts=scenario.ttfts,
        feasible=partial(
            feasible, profiles, link=link(_settings(scenario), profiles[0]) if scenario.disaggregated else None
        ),
        arrivals=scenario.arrivals,
        best_effort=scenario.best_effort,
        seed=scenario.seed,
    )
    rate = scenario.rate
    if scenario.of_optimal is not None:
        # Lengths and paces do not depend on the rate, so their means may be taken at any.
        sample = at_rate(rate=1.0, duration_s=max(10_000.0, len(trace)), tpots=scenario.tpots)
        if scenario.others:
            raise DemandError("a fleet of several profiles wants a rate in requests per second")
        optimal = _optimal_rate(scenario, profiles[0], scenario.instances, sample.mixes())
        if optimal <= 0:
            raise DemandError(f"profile {scenario.profile} cannot hold every pace asked for, so there is no optimum")
        rate = scenario.of_optimal * optimal / (1.0 - scenario.best_effort)
    workload = at_rate(rate=rate, tpots=scenario.tpots)
    if scenario.curve:
        workload = _curved(workload, scenario.curve)
    if scenario.later:
        middle = (warm_up_s + workload.duration_s) / 2
        after = at_rate(rate=rate, tpots=scenario.later)
        workload = _joined(workload, _curved(after, scenario.curve) if scenario.curve else after, middle)
    return workload


def feasible(
    profiles: Sequence[Profile],
    prompts: Ints,
    outputs: Ints,
    slo: Slo,
    link: tuple[float, float] | None = None,
) -> Bools:
    """Which requests an idle instance of one of the profiles, with a dynamic chunk, would serve in time.

    In PD with another one, over a `link` as `bound.feasible` takes it.
    """
    each = [bound.feasible(profile, ChunkRule(), prompts, outputs, slo, link) for profile in profiles]
    anybody: Bools = np.logical_or.reduce(each)
    return anybody


def _true(scenario: Scenario, believed: Profile) -> Profile:
    return believed.slowed(1.0 + scenario.bias) if scenario.bias else believed


def _curved(workload: Workload, curve: Sequence[float]) -> Workload:
    """The same requests, at rates that follow the curve: its pieces are equally long, its mean is the old rate."""
    upto = np.concatenate([[0.0], np.cumsum(curve)]) / sum(curve) * workload.duration_s
    at = np.linspace(0.0, workload.duration_s, len(curve) + 1)
    moved = np.interp([r.arrived_at for r in workload.requests], upto, at).tolist()
    requests = [
        dataclasses.replace(request, arrived_at=to_microsecond(time))
        for request, time in zip(workload.requests, moved, strict=True)
    ]
    return dataclasses.replace(workload, requests=requests)


def _joined(before: Workload, after: Workload, at: float) -> Workload:
    """The first workload's requests until `at`, the second's from then on; both arrive at the same times."""
    cut = bisect_left(before.requests, at, key=lambda request: request.arrived_at)
    return Workload(
        requests=before.requests[:cut] + after.requests[cut:],
        output_tokens=before.output_tokens[:cut] + after.output_tokens[cut:],
        rows=np.concatenate([before.rows[:cut], after.rows[cut:]]),
        infeasible=before.infeasible,
        duration_s=before.duration_s,
    )


def faults(scenario: Scenario, workload: Workload, window: tuple[float, float]) -> Faults:
    """What goes wrong, drawn from the scenario's seed."""
    chance = Random(f"{scenario.seed}/faults")
    lost = chance.sample(range(scenario.instances), scenario.lost_instances)
    losses = tuple(sorted((chance.uniform(*window), InstanceId(f"i{number}")) for number in lost))
    leaving: dict[RequestId, float] = {}
    for request, output_tokens in workload if scenario.leaving else ():
        if chance.random() < scenario.leaving:
            slo = request.slo
            whole_s = slo.ttft_s + output_tokens * slo.tpot_s if slo is not None else 10.0
            leaving[request.id] = chance.uniform(0.0, whole_s)
    return Faults(losses, leaving, scenario.failing_starts)


def _check(scenario: Scenario) -> None:
    if not 1 <= scenario.instances <= MOST_INSTANCES:
        raise SettingError(f"instances: from 1 to {MOST_INSTANCES}, not {scenario.instances}")
    if scenario.duration_s is not None and not 0 < scenario.duration_s < math.inf:
        raise DemandError(f"duration is a positive number of seconds, not {scenario.duration_s:g}")
    if scenario.of_optimal is not None and not 0 < scenario.of_optimal < math.inf:
        raise DemandError(f"rate is a positive share of the optimum, not {scenario.of_optimal:g}")
    for name in ("jitter", "lag_s", "network_s", "start_up_s", "warm_up_s"):
        value = getattr(scenario, name)
        if value is not None and not 0 <= value < math.inf:
            raise SettingError(f"{name.removesuffix('_s').replace('_', '-')} is not negative, not {value:g}")
    if not -1 < scenario.bias < math.inf:
        raise SettingError(
            f"bias is above -1, since iterations take 1 + bias of what is believed, not {scenario.bias:g}"
        )
    if scenario.later and [pace for pace, _ in scenario.later] != [pace for pace, _ in scenario.tpots]:
        raise DemandError("the later shares are of the same paces")
    if scenario.later and scenario.arrivals.kind == "recorded":
        raise DemandError("shares cannot change in a recorded trace: take poisson or gamma:CV arrivals")
    if scenario.curve and not (min(scenario.curve) >= 0 and 0 < sum(scenario.curve) < math.inf):
        raise DemandError("the rates of a curve are not negative, and some are positive")
    for name in ("leaving", "failing_starts"):
        if not 0 <= getattr(scenario, name) <= 1:
            raise SettingError(f"{name.replace('_', '-')} is a share from 0 to 1, not {getattr(scenario, name):g}")
    if not 0 <= scenario.lost_instances <= scenario.instances:
        raise SettingError(f"of {scenario.instances} instances {scenario.lost_instances} cannot be lost")


def _settings(scenario: Scenario) -> Settings:
    values = {"start_up_s": scenario.start_up_s, "disaggregated": scenario.disaggregated, **scenario.values}
    settings = policy(scenario.policy, values)
    if settings.disaggregated != scenario.disaggregated:
        raise SettingError("disaggregated is not set by itself: say pd, and how many instances compute prompts")
    if settings.disaggregated:
        _check_split(scenario, settings)
    most, least = settings.max_instances, settings.min_instances
    if most and most < scenario.instances:
        raise SettingError(f"max-instances {most} is less than the {scenario.instances} instances at the start")
    if most and least > most:
        raise SettingError(f"min-instances {least} is more than max-instances {most}")
    return settings


def _check_split(scenario: Scenario, settings: Settings) -> None:
    if scenario.instances < 2:
        raise SettingError(f"pd: wants at least 2 instances, one of each role, not {scenario.instances}")
    if scenario.pd != "auto" and not (isinstance(scenario.pd, int) and 0 < scenario.pd < scenario.instances):
        raise SettingError(
            f"pd: auto, or 1 to {scenario.instances - 1} of the {scenario.instances} instances, not {scenario.pd}"
        )
    if scenario.others:
        raise SettingError("pd: wants instances of one profile")
    if settings.max_instances and settings.autoscaler != "own":
        raise SettingError(
            f"pd: autoscaler {settings.autoscaler!r} cannot say which role lacks instances; leave max-instances out, "
            "or take policy polyserve"
        )


def _warm_up_s(scenario: Scenario) -> float:
    if scenario.warm_up_s is not None:
        return scenario.warm_up_s
    return WARM_UP_S if scenario.duration_s is None else min(WARM_UP_S, scenario.duration_s / 2)


def _chunk(wish: EngineWish, profile: Profile) -> ChunkRule:
    return ChunkRule() if wish.chunk == "dynamic" else ChunkRule("fixed", profile.limits.max_num_batched_tokens)


def _static_sizes(scenario: Scenario, profile: Profile, mixes: Sequence[bound.TierMix]) -> str:
    """The partition for the requests as drawn: what an operator would set up who knew them."""
    drawn = {mix.tpot_s: mix for mix in mixes}
    paces = sorted(tpot for tpot, _ in scenario.tpots)
    given = [drawn.get(pace, bound.TierMix(pace, 0.0, 1.0, 1.0, 1.0, 1.0)) for pace in paces]
    return ",".join(str(size) for size in bound.partition_sizes(profile, scenario.instances, given))


def _siblings(profile: str) -> list[str]:
    """The same engine with the other assumption about mixed batches, where it is shipped."""
    plain = profile.removesuffix("-mixed")
    return [name for name in (plain, f"{plain}-mixed") if name != profile and name in shipped_names()]
