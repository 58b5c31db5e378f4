"""What each baseline looks at, and that it always finds a place."""

from __future__ import annotations

from random import Random

import pytest
from scenes import Crew
from test_routing import costly, full, steady, wait, where

from polyserve.core.baselines import BASELINES


def chosen(name: str, crew: Crew, times: int, seed: int = 1) -> list[str | None]:
    router = BASELINES[name](crew.fleet, Random(seed))
    return [where(router.place(0.0, crew.job(f"r{n}", "tight"))) for n in range(times)]


def test_round_robin_takes_them_in_turn() -> None:
    crew = steady()
    for n in range(3):
        crew.instance(f"i{n}")
    assert chosen("round-robin", crew, 5) == ["i0", "i1", "i2", "i0", "i1"]


def test_random_takes_them_evenly_and_the_same_by_the_same_seed() -> None:
    crew = steady()
    for n in range(3):
        crew.instance(f"i{n}")
    drawn = chosen("random", crew, 300)
    assert drawn == chosen("random", crew, 300)
    assert drawn != chosen("random", crew, 300, seed=2)
    assert min(drawn.count(f"i{n}") for n in range(3)) > 70


def test_least_requests_counts_those_that_others_sent() -> None:
    crew = steady()
    for n, residents in enumerate((3, 1, 2)):
        crew.instance(f"i{n}", residents=residents)
    assert chosen("least-requests", crew, 1) == ["i1"]
    crew.fleet.books["i1"].foreign = 2
    assert chosen("least-requests", crew, 1) == ["i2"]


def test_minimal_takes_the_shortest_next_iteration() -> None:
    crew = costly()
    crew.instance("many", residents=4)
    queue = crew.instance("queue")
    queue.add(crew.job("prompt", "tight", prompt=400), 0.0)  # one resident, but 50 ms of prompt
    crew.instance("few", residents=2)
    assert chosen("minimal", crew, 1) == ["few"]


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_always_finds_a_place_while_there_is_one(name: str) -> None:
    crew = steady()
    assert chosen(name, crew, 1) == [None]
    full(crew, "i0", "tight")
    crew.instance("i1")
    assert None not in chosen(name, crew, 8)
    job = crew.job("r", "tight")
    job.avoid.add("i0")
    router = BASELINES[name](crew.fleet, Random(1))
    assert {where(router.place(0.0, job)) for _ in range(5)} == {"i1"}
    for n in range(3):
        wait(crew, f"w{n}", "tight" if n else None)
    assert {placement.job.id for placement in router.refill(0.0, crew.fleet.books["i1"], crew.pending)} == {
        "w0",
        "w1",
        "w2",
    }
