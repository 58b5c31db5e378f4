"""What to compare PolyServe with: policies that take the whole fleet as one pool, and the router that settings name."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from polyserve.core.fleet import Books, Fleet, Job
from polyserve.core.forecast import Forecaster
from polyserve.core.pending import Pending
from polyserve.core.routing import Ladder, Placement, Refusal, Router
from polyserve.core.scaling import Demand
from polyserve.core.settings import Settings
from polyserve.core.types import Tier


class OnePool:
    """The whole fleet as one pool: every request goes somewhere at once."""

    wants_progress = False  # counting residents needs no report

    def __init__(self, fleet: Fleet, random: Random) -> None:
        self._fleet = fleet
        self._random = random
        self.considered: list[Refusal] = []

    def place(self, now: float, job: Job) -> Placement | None:
        ready = [b for b in self._fleet.ready() if b.id not in job.avoid]
        return Placement(job, self.choose(now, ready)) if ready else None

    def choose(self, now: float, ready: list[Books]) -> Books:
        raise NotImplementedError

    def refill(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        waiting = [
            *(job for queue in pending.queues.values() for job in queue),
            *pending.best_effort.values(),
        ]
        for job in waiting:
            if placement := self.place(now, job):
                yield placement


class RandomChoice(OnePool):
    """Any instance, evenly: the paper's Random."""

    def choose(self, now: float, ready: list[Books]) -> Books:
        return ready[self._random.randrange(len(ready))]


class RoundRobin(OnePool):
    """One after the other: what a plain load balancer does."""

    _next = 0

    def choose(self, now: float, ready: list[Books]) -> Books:
        self._next += 1
        return ready[(self._next - 1) % len(ready)]


class LeastRequests(OnePool):
    """The instance with the fewest residents: the usual default of LLM gateways."""

    def choose(self, now: float, ready: list[Books]) -> Books:
        return min(ready, key=lambda b: (len(b.jobs) + b.foreign, b.id))


class PowerOfTwo(OnePool):
    """The one with fewer residents of two drawn at random: what balancers without a shared view do.

    Source: Mitzenmacher, "The power of two choices in randomized load balancing" (2001).
    """

    def choose(self, now: float, ready: list[Books]) -> Books:
        drawn = self._random.sample(ready, min(2, len(ready)))
        return min(drawn, key=lambda b: (len(b.jobs) + b.foreign, b.id))


class Minimal(OnePool):
    """The instance whose next iteration is the shortest: the paper's Minimal."""

    wants_progress = True

    def choose(self, now: float, ready: list[Books]) -> Books:
        for books in ready:
            books.roll(now)
        return min(ready, key=lambda b: (b.iteration_now_s(), len(b.jobs), b.id))


BASELINES: dict[str, type[OnePool]] = {
    "random": RandomChoice,
    "round-robin": RoundRobin,
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "minimal": Minimal,
}


def router(
    settings: Settings,
    tiers: list[Tier],
    fleet: Fleet,
    forecaster: Forecaster,
    demand: Demand,
    random: Random,
) -> Router:
    """The router that the settings name."""
    if settings.router == "tiers":
        return Ladder(settings, tiers, fleet, forecaster, demand)
    return BASELINES[settings.router](fleet, random)
