"""Every policy at several loads, the baselines with the best of several chunk budgets: overall, worst tier, attained.

    python benchmarks/policies.py --fleet a100-8b --loads 0.7,0.8,0.9,1.0,1.5 --out build/policies

One row a policy and load. Every finished run is kept under --out, so that an interrupted table goes on where it
stopped. Requests are the same for every policy (same seed, same rates).
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from polyserve.core.types import ChunkRule
from polyserve.report import to_dict
from polyserve.sim.scenario import Scenario, evaluate

FLEETS = {
    "a100-8b": Scenario(profile="a100-llama-3-8b"),
    "h200-70b": Scenario(
        profile="h200-llama-3-70b-tp4",
        tpots=((0.03, 0.1), (0.05, 0.2), (0.1, 0.3), (0.2, 0.4)),
        ttfts=(0.6, 1.0, 2.0),
    ),
    "h200-8b": Scenario(profile="h200-llama-3-8b"),
}
OURS = ("polyserve", "polyserve-paper")
BASELINES = ("random", "round-robin", "least-requests", "minimal")
BUDGETS = (256, 512, 2048)


class Cell(NamedTuple):
    """One run of the table."""

    fleet: str
    trace: str
    policy: str
    budget: int | None  # tokens of a fixed chunk; None: dynamic
    load: float
    duration_s: float
    warm_up_s: float
    seed: int

    @property
    def file(self) -> str:
        chunk = self.budget or "dynamic"
        window = f"{self.duration_s:g}s-{self.warm_up_s:g}s"
        return f"{self.fleet}_{self.trace}_{self.policy}_{chunk}_{self.load:g}_{window}_{self.seed}.json"


def run(cell: Cell, out: Path) -> dict[str, Any]:
    """The result of one cell, computed unless it is kept already."""
    path = out / cell.file
    if not path.exists():
        scenario = replace(
            FLEETS[cell.fleet],
            trace=cell.trace,
            of_optimal=cell.load,
            policy=cell.policy,
            chunk=None if cell.budget is None else ChunkRule("fixed", cell.budget),
            duration_s=cell.duration_s,
            warm_up_s=cell.warm_up_s,
            seed=cell.seed,
        )
        result = evaluate(scenario)
        path.write_text(json.dumps(to_dict(result.score, result.facts)))
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every run of the table, cheapest loads first."""
    asked = options.policies.split(",")
    pairs: list[tuple[str, int | None]] = [(policy, None) for policy in OURS if policy in asked]
    pairs += [(policy, budget) for policy in BASELINES if policy in asked for budget in BUDGETS]
    window = (options.duration, options.warm_up, options.seed)
    return [
        Cell(options.fleet, options.trace, policy, budget, float(load), *window)
        for load in options.loads.split(",")
        for policy, budget in pairs
    ]


def show(table: list[tuple[Cell, dict[str, Any]]]) -> None:
    """Print a row a policy and load: of a baseline's budgets the one that attained most."""
    print("| load | policy | chunk | overall | worst tier | attained / optimal |")
    print("|---|---|---|---|---|---|")
    for load in dict.fromkeys(cell.load for cell, _ in table):
        for policy in (*OURS, *BASELINES):
            rows = [(c, r) for c, r in table if c.load == load and c.policy == policy]
            if not rows:
                continue
            cell, result = max(rows, key=lambda row: row[1]["attainment"]["overall"])
            attainment = result["attainment"]
            chunk = cell.budget or "dynamic"
            overall, worst = attainment["overall"], attainment["worst_tier"]
            print(
                f"| {load:.0%} | {policy} | {chunk} | {overall:.1%} | {worst:.1%} | {result['share_of_optimal']:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", choices=sorted(FLEETS), default="a100-8b")
    parser.add_argument("--trace", default="azure-conv")
    parser.add_argument("--policies", default=",".join((*OURS, *BASELINES)))
    parser.add_argument("--loads", default="0.7,0.8,0.9,1.0,1.5")
    parser.add_argument("--duration", type=float, default=120.0)
    parser.add_argument("--warm-up", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/policies"))
    options = parser.parse_args()
    if unknown := sorted({*options.policies.split(",")} - {*OURS, *BASELINES}):
        parser.error(f"--policies: unknown {unknown[0]!r}; there are: {', '.join((*OURS, *BASELINES))}")
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = cells(options)
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run, wanted, [options.out] * len(wanted)))
    print(f"20 x {FLEETS[options.fleet].profile} on {options.trace}, seed {options.seed}, {options.duration:g} s")
    show(list(zip(wanted, results, strict=True)))


if __name__ == "__main__":
    main()
