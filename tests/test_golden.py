"""Golden journals: small runs whose every decision is kept. Laws say what is wrong; these say what changed.

A journal in `tests/golden/` that no longer fits is a decision that changed. Where that was meant, write them anew with

    python tests/test_golden.py

and say in CHANGELOG.md which decision changed.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Literal

import pytest

from polyserve.core.settings import policy
from polyserve.core.types import ChunkRule, Configured, Request, Slo, Tier, to_microsecond
from polyserve.journal import JournalWriter, Step, read_journal, replay, to_plain
from polyserve.profiles.store import load
from polyserve.sim.spec import Faults, SimulationSpec
from polyserve.sim.world import World

FOLDER = Path(__file__).parent / "golden"
COUNTS = FOLDER / "counts.json"
TIERS = (Tier("20", 0.02, 0.5), Tier("30", 0.03, 0.5), Tier("50", 0.05, 1.0), Tier("100", 0.1, 1.0))


def requests(seed: int, count: int, per_second: float, free: float = 0.0) -> list[tuple[Request, int]]:
    """Requests at random times with lengths like a conversation's; a share `free` has no SLO."""
    draw, drawn, at = Random(seed), [], 0.0
    for n in range(count):
        at = to_microsecond(at + draw.expovariate(per_second))
        prompt, output = int(draw.lognormvariate(6.0, 1.0)) + 1, int(draw.lognormvariate(4.0, 0.7)) + 1
        slo = Slo(draw.choice([0.3, 0.5, 1.0]), draw.choice([0.02, 0.03, 0.05, 0.05, 0.1, 0.1, 0.1]))
        drawn.append((Request(f"r{n}", at, min(prompt, 8000), None if draw.random() < free else slo), output))
    return drawn


def scene(
    drawn: list[tuple[Request, int]],
    instances: int,
    name: str = "polyserve",
    chunk: ChunkRule | None = None,
    faults: Faults = Faults(),  # noqa: B008 - a frozen value
    start_up_s: float = 0.0,
    **values: object,
) -> SimulationSpec:
    settings, profile = policy(name, values), load("a100-llama-3-8b")
    order: Literal["deadline", "fcfs"] = "fcfs" if chunk else "deadline"
    return SimulationSpec(
        drawn, TIERS, settings, profile, instances, None, chunk or ChunkRule(), order, 7,
        faults=faults, start_up_s=start_up_s, samples=1,
    )  # fmt: skip


def scenes() -> dict[str, SimulationSpec]:
    """Every golden run by name."""
    faults = Faults(losses=((1.5, "i1"),), leaving={"r5": 0.4, "r20": 1.0}, failing_starts=0.3)
    return {
        "fixed-fleet": scene(requests(1, 150, 60.0), 4),
        "overload": scene(requests(2, 200, 130.0), 2),
        "elastic-with-faults": scene(requests(3, 150, 40.0), 2, faults=faults, start_up_s=0.5, max_instances=5),
        "best-effort": scene(requests(4, 160, 60.0, free=0.6), 1, tight_on_loose=True, best_effort_max_age_s=3.0),
        "paper": scene(requests(5, 150, 50.0), 3, "polyserve-paper", max_instances=5),
        "minimal": scene(requests(6, 60, 15.0), 3, "minimal", ChunkRule("fixed", 512)),
    }


def play(spec: SimulationSpec, path: Path) -> dict[str, int]:
    """Write the journal of a run; returns what it took."""
    with JournalWriter(path) as journal:
        world = World(spec, journal)
        run = world.run()
    return {"steps": run.steps, "iterations": run.iterations, "forecasts": world.controller.forecasts}


def shown(step: Step | None) -> str:
    if step is None:
        return "nothing more"
    actions = [to_plain(action) for action in step.actions]
    return f"{step.now:.6f} {to_plain(step.event)}\n      -> {actions or 'nothing'}"


def difference(golden: Path, played: Path) -> str | None:
    """The first line in which two journals differ."""
    pairs = zip_longest(read_journal(golden), read_journal(played))
    for line, (was, now) in enumerate(pairs, 1):
        if was == now:
            continue
        if was and now and isinstance(was.event, Configured) and isinstance(now.event, Configured):
            if changed := reconfigured(was.event, now.event):
                return f"configuration: {changed}"
            continue
        return f"line {line}\n  was {shown(was)}\n  now {shown(now)}"
    return None


def reconfigured(was: Configured, now: Configured) -> list[str]:
    """What differs between two configurations; a setting that is new is no difference while nothing follows from it."""
    before, after = was.settings, now.settings
    changed = [f"{name} was {before[name]}, is {after.get(name)}" for name in before if after.get(name) != before[name]]
    changed += [f"profile {name}" for name in was.profiles if now.profiles.get(name) != was.profiles[name]]
    return changed + (["tiers"] if was.tiers != now.tiers else [])


@pytest.mark.parametrize("name", scenes())
def test_the_core_decides_as_in_the_golden_journal(name: str) -> None:
    """The same events, so that only the core can be what changed."""
    assert (mismatch := replay(FOLDER / f"{name}.jsonl.gz").mismatch) is None, f"a decision changed: {mismatch}"


@pytest.mark.parametrize("name", scenes())
def test_a_run_is_the_golden_one(name: str, tmp_path: Path) -> None:
    """Core, engines and what is seen of them, and how many steps, iterations and forecasts it took."""
    played = tmp_path / "played.jsonl"
    counts = play(scenes()[name], played)
    assert (changed := difference(FOLDER / f"{name}.jsonl.gz", played)) is None, f"the run changed: {changed}"
    assert counts == json.loads(COUNTS.read_text())[name]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    counts = {name: play(spec, FOLDER / f"{name}.jsonl.gz") for name, spec in scenes().items()}
    COUNTS.write_text(json.dumps(counts, indent=2) + "\n")
    for name, taken in counts.items():
        print(f"{name}: {taken}, {(FOLDER / f'{name}.jsonl.gz').stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
