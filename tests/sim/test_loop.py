"""Virtual time runs one way, and equal times have an order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.sim.loop import Loop, Rank


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(Rank))))
def test_things_run_by_time_then_rank_then_as_they_came(planned: list[tuple[int, Rank]]) -> None:
    loop, ran = Loop(), list[int]()
    for n, (time, rank) in enumerate(planned):
        loop.at(float(time), rank, ran.append, n)
    loop.run()
    assert ran == sorted(range(len(planned)), key=lambda n: (*planned[n], n))


def test_what_is_planned_while_running_takes_its_place() -> None:
    loop, ran = Loop(), list[str]()

    def first(_: object) -> None:
        ran.append("first")
        loop.at(loop.now, Rank.ITERATION, ran.append, "now, and before a tick")
        loop.at(2.0, Rank.TICK, ran.append, "later")

    loop.at(1.0, Rank.ARRIVAL, first)
    loop.at(1.0, Rank.TICK, ran.append, "tick")
    loop.run()
    assert ran == ["first", "now, and before a tick", "tick", "later"]


def test_a_run_ends_at_its_bound_or_when_it_is_stopped() -> None:
    loop, ran = Loop(), list[float]()
    for time in (1.0, 2.0, 3.0):
        loop.at(time, Rank.TICK, ran.append, time)
    loop.run(until=2.0)
    assert (ran, loop.now) == ([1.0, 2.0], 2.0)
    loop.at(2.5, Rank.TICK, lambda _: loop.stop())
    loop.run()
    assert (ran, loop.now) == ([1.0, 2.0], 2.5)


def test_times_are_whole_microseconds_and_never_in_the_past() -> None:
    loop, seen = Loop(), list[float]()
    loop.at(0.1234567, Rank.TICK, lambda _: seen.append(loop.now))
    loop.run()
    assert seen == [0.123457]
    with pytest.raises(AssertionError, match="is before"):
        loop.at(0.1, Rank.TICK, seen.append)
