"""One run of a study: what identifies it, what it leaves, and the command that makes it again."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from statistics import fmean
from typing import Any

from polyserve import report
from polyserve.core.settings import policy
from polyserve.core.types import ChunkRule
from polyserve.profiles.store import digest as profile_digest
from polyserve.sim.scenario import Result, Scenario, evaluate
from polyserve.study.ground import Case, profile_of, trace_of
from polyserve.study.settings import Pairs
from polyserve.study.store import Record, code, digest

# Beyond this many instances a showcase keeps only how many each tier has.
SHOWN_INSTANCES = 64


@dataclass(frozen=True)
class Job:
    """One policy in one case at one load. `show` keeps the load of every instance over time as well."""

    case: Case
    policy: str
    load: float  # share of the optimum
    seed: int
    chunk: int | None = None  # fixed; None: the policy's own rule
    values: Pairs = ()
    show: bool = False
    instances: int | None = None  # at the start; None: the fleet's

    @property
    def rate(self) -> float:
        """Requests per second, the mean of warm-up and window where it follows a day's curve."""
        curve = self.case.curve
        return round(self.load * self.case.optimal_rate * (fmean(curve) if curve else 1.0), 6)

    @property
    def requests(self) -> float:
        """How many requests it simulates, about."""
        return self.rate * (self.case.warm_up_s + self.case.window_s)

    @cached_property
    def scenario(self) -> Scenario:
        case, world = self.case, self.case.world
        return Scenario(
            trace=case.workload,
            profile=case.fleet.profile,
            instances=self.instances or case.fleet.groups[0].instances,
            pd="auto" if case.fleet.disaggregated else None,
            others=tuple((group.profile, group.instances) for group in case.fleet.groups[1:]),
            rate=self.rate,
            duration_s=case.window_s,
            warm_up_s=case.warm_up_s,
            tpots=case.paces,
            ttfts=case.ttfts,
            later=world.later,
            curve=case.curve,
            start_up_s=world.start_up_s,
            policy=self.policy,
            values=dict(self.values),
            seed=self.seed,
            chunk=None if self.chunk is None else ChunkRule("fixed", self.chunk),
            jitter=world.jitter,
            bias=world.bias,
        )

    @cached_property
    def key(self) -> str:
        """The digest of everything the run rests on but the code."""
        scenario = self.scenario
        return digest(
            {
                "fleet": [
                    [profile_digest(profile_of(g.profile)), g.instances, g.role.value] for g in self.case.fleet.groups
                ],
                "trace": trace_digest(scenario.trace),
                "demand": [scenario.tpots, scenario.ttfts, scenario.later, scenario.curve],
                "rate": scenario.rate,
                "times": [scenario.warm_up_s, scenario.duration_s],
                "policy": self.policy,
                "instances": scenario.instances,
                "settings": policy(self.policy, scenario_values(scenario)).to_dict(),
                "chunk": self.chunk,
                "world": [scenario.jitter, scenario.bias, scenario.start_up_s, scenario.sight, scenario.lag_s],
                "seed": self.seed,
                "show": self.show,
            }
        )

    @property
    def command(self) -> str | None:
        """The command that makes this very run; None where `polyserve simulate` cannot say what changes in it."""
        scenario, world = self.scenario, self.case.world
        if world.later or world.day or scenario.others:
            return None
        words = ["polyserve", "simulate", "--trace", scenario.trace, "--profile", scenario.profile]
        words += ["--instances", str(scenario.instances), "--rate", f"{self.rate:.10g}"]
        words += ["--duration", f"{scenario.duration_s:g}", "--warm-up", f"{scenario.warm_up_s:g}"]
        words += ["--tpot", ",".join(f"{pace * 1e3:g}:{share:g}" for pace, share in scenario.tpots)]
        words += ["--ttft", ",".join(f"{ttft * 1e3:g}" for ttft in scenario.ttfts), "--policy", self.policy]
        words += [word for key, value in self.values for word in ("--set", f"{key}={value}")]
        words += ["--pd", "auto"] if scenario.disaggregated else []
        words += [] if self.chunk is None else ["--chunk", f"fixed:{self.chunk}"]
        words += ["--jitter", f"{world.jitter:g}"] if world.jitter else []
        words += ["--bias", f"{world.bias:g}"] if world.bias else []
        return shlex.join([*words, "--seed", str(self.seed)])


@cache
def job(
    case: Case,
    policy: str,
    load: float,
    seed: int,
    chunk: int | None = None,
    values: Pairs = (),
    show: bool = False,
    instances: int | None = None,
) -> Job:
    """The run; the same arguments give the same object, so that its key is found once."""
    return Job(case, policy, load, seed, chunk, values, show, instances)


def scenario_values(scenario: Scenario) -> dict[str, object]:
    return {"start_up_s": scenario.start_up_s, "disaggregated": scenario.disaggregated, **scenario.values}


@cache
def trace_digest(name: str) -> str:
    """Twelve hex digits that stand for the lengths of a trace."""
    trace = trace_of(name)
    lengths = trace.prompt_tokens.tobytes() + trace.output_tokens.tobytes()
    return hashlib.sha256(lengths).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------ what it leaves


def made(asked: Job) -> Record:
    """Run it; the line for the store."""
    result = evaluate(asked.scenario)
    left = report.to_dict(result.score, result.facts)
    left["cost_per_attained_s"] = _cost(left)
    if asked.show:
        left["showcase"] = showcase(result)
    return {"key": asked.key, "code": code(), "load": asked.load, "seed": asked.seed, "result": left}


def _cost(left: dict[str, Any]) -> float | None:
    """Instance-seconds per request that attained its SLO."""
    attained = sum(tier["attained"] for tier in left["by_tier"].values())
    return left["instance_seconds"] / attained if attained and left["instance_seconds"] is not None else None


def showcase(result: Result) -> dict[str, Any]:
    """How the fleet looked over time: instances per tier (null: the pool), and each instance's tier and load."""
    by_time = [(at, list(looks)) for at, looks in groupby(result.run.looks, key=lambda look: look.at)]
    tiers = [*result.score.tiers, None]
    names = sorted({look.instance for _, looks in by_time for look in looks}, key=lambda name: (len(name), name))
    rows = {name: {"instance": name, "tier": [], "load": []} for name in names[:SHOWN_INSTANCES]}
    for _, looks in by_time:
        seen = {look.instance: look for look in looks}
        for name, row in rows.items():
            look = seen.get(name)
            row["tier"].append(look.tier if look else None)  # type: ignore[attr-defined]
            row["load"].append(round(look.load, 4) if look else None)  # type: ignore[attr-defined]
    return {
        "at_s": [round(at, 3) for at, _ in by_time],
        "instances_per_tier": [
            {"tier": tier, "instances": [sum(look.tier == tier for look in looks) for _, looks in by_time]}
            for tier in tiers
        ],
        "instances": list(rows.values()),
    }
