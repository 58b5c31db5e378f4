"""Microseconds per step of the core, by event, on fleets of several sizes.

Each fleet is simulated from empty until its state is that of its load, and then every step of the controller is timed
where it happens: nothing is replayed, so nothing is kept but the times. Times are the processor's, so that what else
runs on the machine is not counted. The workload is chosen so that about 150
residents stand on each instance (H200, Llama-3-8B, 90 % of the optimum). The decision is the step of an `Arrived`;
reports (`Progressed`) are what an instance costs whether or not anybody asks.

    python benchmarks/decisions.py [--instances 100,1000] [--loads 0.9,1.5] [--policy polyserve] [--trace azure-conv]
"""

from __future__ import annotations

import argparse
import time
from array import array
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from polyserve.core.controller import Controller
from polyserve.core.types import Action, Event
from polyserve.sim.scenario import Scenario, prepare
from polyserve.sim.world import simulate

PROFILE = "h200-llama-3-8b"
TRACE = "uniform:1800/256"
# Twice as long as a request stays (about 6 s), so that what stands there at the end did not arrive together.
WARM_UP_S = 12.0
# About 30 requests a second arrive for each instance.
ARRIVALS = 6000
EVENTS = ("Arrived", "Progressed", "FirstToken", "Finished", "Tick")


class EndOfWindowError(Exception):
    """The window is over, and nobody wants to see the rest of the run."""


@dataclass
class Clocked:
    """The controller's steps in a window of virtual time, by event, in microseconds."""

    start: float
    end: float
    spent: dict[str, array[float]] = field(default_factory=dict)
    residents: list[float] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    _look_at: float = 0.0

    def simulate(self, scenario: Scenario) -> None:
        """Run the scenario with every step of its controller timed."""
        step = Controller.step

        def timed(controller: Controller, now: float, event: Event) -> list[Action]:
            if now < self.start:
                return step(controller, now, event)
            if now >= self.end:
                raise EndOfWindowError
            began = time.thread_time_ns()
            actions = step(controller, now, event)
            took = time.thread_time_ns() - began
            self.spent.setdefault(type(event).__name__, array("d")).append(took / 1e3)
            if now >= self._look_at:
                self._look_at = now + 0.05
                self.residents.append(fmean(len(books.jobs) for books in controller.fleet))
                self.pending.append(len(controller.pending))
            return actions

        Controller.step = timed  # type: ignore[method-assign]
        try:
            simulate(prepare(scenario).spec)
        except EndOfWindowError:
            pass
        finally:
            Controller.step = step  # type: ignore[method-assign]


def measure(
    instances: int, load: float, policy: str = "polyserve", trace: str = TRACE, measured_s: float | None = None
) -> dict[str, Any]:
    """Residents, requests waiting, and by event the steps' count, mean, p50 and p99 in microseconds.

    Without a length the window has some 6,000 arrivals, but is at most 2 s.
    """
    began = time.perf_counter()
    if measured_s is None:
        measured_s = min(2.0, ARRIVALS / 30 / instances)
    scenario = Scenario(
        profile=PROFILE,
        trace=trace,
        instances=instances,
        of_optimal=load,
        policy=policy,
        warm_up_s=WARM_UP_S,
        duration_s=measured_s,
    )
    clocked = Clocked(WARM_UP_S, WARM_UP_S + measured_s)
    clocked.simulate(scenario)
    steps = {}
    for name in EVENTS:
        if sample := clocked.spent.get(name):
            p50, p99 = np.percentile(sample, (50, 99))
            steps[name] = {"steps": len(sample), "mean": fmean(sample), "p50": float(p50), "p99": float(p99)}
    return {
        "policy": policy,
        "instances": instances,
        "load": load,
        "residents": fmean(clocked.residents),
        "waiting": fmean(clocked.pending),
        "step_us": steps,
        "took_s": time.perf_counter() - began,
    }


def show(result: dict[str, Any]) -> None:
    """Print one block of rows."""
    print(
        f"{result['policy']}, {result['instances']:,} instances at {result['load']:.0%} of optimal: "
        f"{result['residents']:.0f} residents each, {result['waiting']:.0f} requests waiting "
        f"(took {result['took_s']:.0f} s)"
    )
    for name, us in result["step_us"].items():
        times = f"mean {us['mean']:7.1f} us  p50 {us['p50']:7.1f}  p99 {us['p99']:7.1f}"
        print(f"  {name:<11} {us['steps']:>8,} steps  {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", default="100,1000")
    parser.add_argument("--loads", default="0.9,1.5")
    parser.add_argument("--policy", default="polyserve")
    parser.add_argument("--trace", default=TRACE)
    parser.add_argument("--duration", type=float, help="Seconds measured.")
    options = parser.parse_args()
    for instances in map(int, options.instances.split(",")):
        for load in map(float, options.loads.split(",")):
            show(measure(instances, load, options.policy, options.trace, options.duration))


if __name__ == "__main__":
    main()
