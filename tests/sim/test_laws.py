"""The laws of DESIGN section 4 over a swarm of whole simulations that break things on purpose.

Each seed is one fleet, workload, policy and set of faults. To see one again, with what it is made of:

    python tests/sim/test_laws.py SEED [SEED ...]

and `POLYSERVE_SWARM=200 pytest tests/sim/test_laws.py` runs more of them.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Literal

import pytest
from referee import Referee

from polyserve.core.settings import POLICIES, policy
from polyserve.core.types import ChunkRule, Progressed, Request, Role, Slo, Tier, to_microsecond
from polyserve.journal import JournalWriter, Step, read_journal, replay
from polyserve.profiles.store import load
from polyserve.sim.spec import Faults, Run, SimulationSpec
from polyserve.sim.world import simulate

COUNT = int(os.environ.get("POLYSERVE_SWARM", "12"))
SPLIT = 1000  # seeds from here on are fleets in PD
SEEDS = (*range(COUNT), *range(SPLIT, SPLIT + COUNT))
PROFILES = ("a100-llama-3-8b", "a100-llama-3-8b-mixed", "h200-llama-3-8b-mixed", "h200-llama-3-70b-tp4")
TIERS = (
    Tier("20", 0.02, 0.5),
    Tier("30", 0.03, 0.5, weight=2.0),
    Tier("50", 0.05, 1.0),
    Tier("100", 0.1, 2.0, on_late="serve_late"),
)
SWITCHES: dict[str, tuple[object, ...]] = {
    "placement": ("auto", "fill", "spread"),
    "promotion": ("lazy", "eager", "off"),
    "promotion_order": ("nearest", "tightest"),
    "tight_on_loose": (False, True),
    "relabel": (True, False),
    "sizing": ("demand", "pending"),
    "on_late": ("refuse", "serve_late", "never"),
    "infeasible": ("refuse", "best_possible"),
    "shortage": ("demand", "weight", "cost"),
    "chunk_bound": ("pace", "slack", "need"),
    "queue_timeout_s": (0.0, 1.0),
    "best_effort_max_age_s": (60.0, 1.0),
    "test_memory": (True, False),
    "test_pace": (True, False),
}


def requests(draw: Random) -> list[tuple[Request, int]]:
    """Bursts and lulls of requests, a few of them without an SLO and a few impossible."""
    drawn, at = [], 0.0
    gap_s = draw.choice([0.002, 0.01, 0.05])
    for n in range(draw.randint(20, 140)):
        at += draw.expovariate(1.0) * gap_s * draw.choice([0.1, 1.0, 1.0, 4.0])
        prompt, output = int(draw.lognormvariate(5.5, 1.3)) + 1, int(draw.lognormvariate(4.0, 1.0)) + 1
        slo = Slo(draw.choice([0.05, 0.3, 0.5, 1.0]), draw.choice([0.01, 0.02, 0.03, 0.05, 0.1, 0.2]))
        asked = draw.choice([None, output, output + 100])
        bound = draw.random() > 0.1
        request = Request(f"r{n}", to_microsecond(at), min(prompt, 20_000), slo if bound else None, asked)
        drawn.append((request, min(output, 1500)))
    return drawn


def faults(draw: Random, ids: list[str], last_at: float) -> Faults:
    """Clients that go, instances that die, starts that fail."""
    names = ["i0", "i1", "i2", "i3", "i4", "i5"]
    losses = [(draw.uniform(0, last_at + 2.0), draw.choice(names)) for _ in range(draw.randint(0, 3))]
    leaving = {id: to_microsecond(draw.expovariate(1.0)) for id in ids if draw.random() < 0.1}
    return Faults(tuple(sorted(losses)), leaving, draw.choice([0.0, 0.0, 0.4]))


def scene(seed: int) -> SimulationSpec:
    """What a seed stands for."""
    draw = Random(seed)
    drawn = requests(draw)
    values = {name: draw.choice(choices) for name, choices in SWITCHES.items() if draw.random() < 0.3}
    instances = draw.randint(1, 4)
    if draw.random() < 0.5:
        instances = draw.randint(0, 2)
        values |= {"max_instances": draw.randint(2, 6), "keep_warm_s": 0.5, "look_s": 0.2}
    split = seed >= SPLIT
    if split:
        values, instances = in_two_roles(draw, values, max(instances, 2))
    true = load(draw.choice(PROFILES)).slowed(draw.choice([1.0, 1.0, 1.15]))
    chunk = draw.choice([ChunkRule(), ChunkRule(), ChunkRule("fixed", 256), ChunkRule("unknown")])
    sight: Literal["gateway", "perfect"] = draw.choice(["gateway", "gateway", "perfect"])
    spec = SimulationSpec(
        requests=drawn,
        tiers=TIERS,
        settings=policy(draw.choice([*POLICIES, "polyserve", "polyserve"]), values),
        profile=true,
        believed=load(true.name),
        instances=instances,
        chunk=chunk,
        order=draw.choice(["deadline", "fcfs"]),
        seed=seed,
        jitter=draw.choice([0.0, 0.1]),
        sight=sight,
        lag_s=draw.choice([0.0, 0.005]),
        network_s=draw.choice([0.0, 0.003]),
        start_up_s=draw.choice([0.0, 0.6]),
        faults=faults(draw, [r.id for r, _ in drawn], drawn[-1][0].arrived_at),
        samples=50,
    )
    if split and draw.random() < 0.5:  # else the core says who does what
        answers = dataclasses.replace(spec.groups[0], count=draw.randint(1, 3), role=Role.DECODE)
        spec = dataclasses.replace(spec, instances=max(instances - 1, 1), role=Role.PREFILL, others=(answers,))
    return spec


def in_two_roles(draw: Random, values: dict[str, object], instances: int) -> tuple[dict[str, object], int]:
    """Settings and instances of a fleet in PD, over links that are sometimes slow."""
    values |= {"disaggregated": True, "autoscaler": "own"}
    values["kv_bandwidth"] = draw.choice([40e9, 40e9, 1e9])
    values |= {name: draw.choice([True, False]) for name in ("promise", "follow_split") if draw.random() < 0.5}
    if "max_instances" in values:
        values["max_instances"] = draw.randint(3, 6)
    return values, instances


def spent(of: Played) -> bool:
    """Whether losses have left fewer than two instances of a fleet that cannot do with one."""
    settings = of.spec.settings
    alive = sum(life.gone_at is None for life in of.run.lives)
    return settings.disaggregated and alive < 2


@dataclass(frozen=True)
class Played:
    """A seed's simulation, and its journal twice over."""

    spec: SimulationSpec
    run: Run
    steps: list[Step]
    again: bool  # whether the same seed gave the same journal
    mismatch: object  # of a replay of the journal


@cache
def played(seed: int) -> Played:
    spec = scene(seed)
    with TemporaryDirectory() as folder:
        once, again = Path(folder) / "once.jsonl", Path(folder) / "again.jsonl"
        with JournalWriter(once) as journal:
            run = simulate(spec, journal)
        with JournalWriter(again) as journal:
            simulate(spec, journal)
        same = once.read_bytes() == again.read_bytes()
        return Played(spec, run, list(read_journal(once)), same, replay(once).mismatch)


# ---------------------------------------------------------------------------------------------------- the laws


def every_request_is_answered_exactly_once(of: Played) -> None:
    referee = Referee().read(of.steps)
    assert [outcome.request for outcome in of.run.outcomes] == [request.id for request, _ in of.spec.requests]
    for outcome in of.run.outcomes:
        fate = referee.fates[outcome.request]
        told = {"waits": "unfinished", "runs": "unfinished"}.get(fate, fate)
        # What ends in the last moments may be on its way to the core still.
        assert outcome.ending == told or (of.spec.lag_s and told == "unfinished"), f"{outcome} {fate}"


def causes_come_before_effects(of: Played) -> None:
    referee = Referee().read(of.steps)
    for outcome in of.run.outcomes:
        if outcome.first_at is None:
            assert outcome.ending != "finished", outcome
            continue
        sent_at = referee.first_dispatch[outcome.request]
        assert outcome.arrived_at <= sent_at <= outcome.first_at, outcome
        assert outcome.last_at is None or outcome.first_at <= outcome.last_at, outcome


def every_answer_is_whole(of: Played) -> None:
    """Losses, preemptions and evictions cost no token and make none twice."""
    wanted = {request.id: output for request, output in of.spec.requests}
    for outcome in of.run.outcomes:
        if outcome.ending == "finished":
            assert outcome.output_tokens == wanted[outcome.request], outcome
        else:
            assert outcome.output_tokens <= wanted[outcome.request], outcome
        assert (outcome.code is not None) == (outcome.ending == "refused"), outcome


def nobody_is_left_over(of: Played) -> None:
    """With instances left and two minutes to spare, everybody has an answer."""
    if spent(of) or of.spec.settings.router == "static":
        return  # a tier whose part of the fleet is gone, or was never there, waits for it
    alive = [life for life in of.run.lives if life.gone_at is None]
    if alive and of.spec.faults.failing_starts == 0.0:
        assert [o.request for o in of.run.outcomes if o.ending == "unfinished"] == []


def no_instance_holds_more_than_it_has(of: Played) -> None:
    for step in of.steps:
        if isinstance(step.event, Progressed) and step.event.kv_tokens is not None:
            assert 0 <= step.event.kv_tokens <= of.spec.profile.limits.kv_tokens
    assert all(look.load >= 0.0 for look in of.run.looks)
    assert all(look.residents >= 0 for look in of.run.looks)


def the_same_seed_gives_the_same_journal(of: Played) -> None:
    assert of.again


def a_replay_decides_the_same(of: Played) -> None:
    assert of.mismatch is None, of.mismatch


LAWS: tuple[Callable[[Played], None], ...] = (
    every_request_is_answered_exactly_once,
    causes_come_before_effects,
    every_answer_is_whole,
    nobody_is_left_over,
    no_instance_holds_more_than_it_has,
    the_same_seed_gives_the_same_journal,
    a_replay_decides_the_same,
)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_law_holds_whatever_breaks(seed: int) -> None:
    for law in LAWS:
        try:
            law(played(seed))
        except AssertionError as error:
            again = f"python tests/sim/test_laws.py {seed}"
            raise AssertionError(f"{law.__name__}: {error}\nto see it again: {again}") from error


def test_the_swarm_breaks_something() -> None:
    """Laws that nothing tempts are idle: over the seeds there are losses, drains, evictions, refusals, cancels."""
    seen = {type(action).__name__ for seed in SEEDS for step in played(seed).steps for action in step.actions}
    usual = {"Dispatch", "Refuse", "Cancel", "Start", "Stop", "Drain", "Assign", "SetPace"}
    assert usual | {"HandOver", "SetRole"} <= seen


def main(seeds: list[int]) -> None:
    for seed in seeds:
        print(f"seed {seed}: {scene(seed)}")
        of = played(seed)
        endings = [outcome.ending for outcome in of.run.outcomes]
        print({ending: endings.count(ending) for ending in sorted(set(endings))}, len(of.steps), "steps")
        for law in LAWS:
            law(of)
            print("  holds:", law.__name__.replace("_", " "))


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
