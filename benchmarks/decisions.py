"""Microseconds per step of the core, by event, on fleets of several sizes.

A simulation is run and its events kept; then they are fed once more to a new controller, and each step is timed. The
decision is the step of an `Arrived`; reports (`Progressed`) are what an instance costs whether or not anybody asks.

    python benchmarks/decisions.py [--instances 20,100] [--loads 0.9,1.5] [--policy polyserve] [--duration 20]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from statistics import fmean
from time import perf_counter_ns

import numpy as np

from polyserve.core.controller import Controller
from polyserve.core.types import Action, Event
from polyserve.sim.scenario import Scenario, prepare
from polyserve.sim.world import simulate


class Tape:
    """Keeps events instead of writing them."""

    def __init__(self) -> None:
        self.events: list[tuple[float, Event]] = []

    def write(self, now: float, event: Event, actions: Iterable[Action]) -> None:
        self.events.append((now, event))


def measure(instances: int, load: float, policy: str, duration_s: float) -> None:
    """Print one block of rows."""
    scenario = Scenario(
        instances=instances, of_optimal=load, policy=policy, duration_s=duration_s, warm_up_s=duration_s
    )
    tape = Tape()
    simulate(prepare(scenario).spec, tape)  # type: ignore[arg-type]
    controller = Controller()
    spent: dict[str, list[float]] = {}
    residents: list[float] = []
    for now, event in tape.events:
        began = perf_counter_ns()
        controller.step(now, event)
        took_us = (perf_counter_ns() - began) / 1e3
        if now >= duration_s:
            spent.setdefault(type(event).__name__, []).append(took_us)
            if len(residents) < 1000:
                residents.append(fmean(len(books.jobs) for books in controller.fleet))
    print(f"{policy}, {instances} instances at {load:.0%} of optimal, {fmean(residents):.0f} residents each")
    for name in ("Arrived", "Progressed", "FirstToken", "Finished", "Tick"):
        if sample := spent.get(name):
            p50, p99 = np.percentile(sample, (50, 99))
            print(f"  {name:<11} {len(sample):>7} steps  mean {fmean(sample):7.1f} us  p50 {p50:7.1f}  p99 {p99:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", default="20,100")
    parser.add_argument("--loads", default="0.9,1.5")
    parser.add_argument("--policy", default="polyserve")
    parser.add_argument("--duration", type=float, default=20.0)
    options = parser.parse_args()
    for instances in map(int, options.instances.split(",")):
        for load in map(float, options.loads.split(",")):
            measure(instances, load, options.policy, options.duration)


if __name__ == "__main__":
    main()
