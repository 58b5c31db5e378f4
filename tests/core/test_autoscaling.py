"""Instances by requests per instance: up at once, down after a window, never beyond the bounds, and no stream ends."""

from __future__ import annotations

import math

import pytest
from body import Body, Fate, Life
from hypothesis import given, settings
from hypothesis import strategies as st

from polyserve.core.settings import BASELINES, SettingError, policy
from polyserve.core.types import Drain, Start, Stop

SCALED = [name for name in BASELINES if name != "static"]


def fleet(name: str = "least-requests", ready: int = 1, **values: object) -> Body:
    """A fleet of up to 8 that wants two requests on each instance."""
    usual = {"max_instances": 8, "min_instances": 1, "target_requests": 2, "scale_down_s": 10.0, "start_step": 8}
    return Body(policy(name, {**usual, **values}), ready=ready)


def alive(body: Body, *lives: Life) -> int:
    return sum(life in lives for life in body.lives.values())


def start_up(body: Body) -> None:
    """Everything that was asked to start gets ready."""
    for id in [id for id, life in body.lives.items() if life is Life.ASKED]:
        body.join(id)
        body.ready(id)


def arrive(body: Body, count: int) -> None:
    for _ in range(count):
        body.arrive(f"r{len(body.streams)}")


@pytest.mark.parametrize(("requests", "wanted"), [(0, 1), (2, 1), (3, 2), (7, 4), (16, 8), (30, 8)])
def test_as_many_instances_as_requests_over_the_target(requests: int, wanted: int) -> None:
    body = fleet()
    arrive(body, requests)
    actions = body.wait(1.5)
    assert sum(isinstance(action, Start) for action in actions) == wanted - 1
    assert not [action for action in body.wait(5.0) if isinstance(action, Start)], "those on their way count"


def test_requests_without_an_instance_start_the_first() -> None:
    body = fleet(ready=0, min_instances=0)
    arrive(body, 3)
    assert len(body.of(Fate.WAITS)) == 3
    body.wait(1.5)
    assert alive(body, Life.ASKED) == 2
    start_up(body)
    assert len(body.of(Fate.RUNS)) == 3


def test_a_fleet_within_a_tenth_of_its_target_stays_as_it_is() -> None:
    body = fleet(ready=1, target_requests=20)
    arrive(body, 22)
    assert not [action for action in body.wait(5.0) if isinstance(action, Start)]
    arrive(body, 1)
    assert [action for action in body.wait(1.5) if isinstance(action, Start)]


def test_no_more_start_at_once_than_the_step() -> None:
    body = fleet(start_step=3)
    arrive(body, 16)
    body.wait(1.5)
    assert alive(body, Life.ASKED) == 3
    start_up(body)
    body.wait(1.5)
    assert alive(body, Life.ASKED) == 3


def test_fewer_only_after_a_window_in_which_no_more_were_wanted() -> None:
    body = fleet(ready=4)
    arrive(body, 8)
    body.wait(2.0)
    for stream in body.of(Fate.RUNS)[:6]:
        body.finish(stream.id)
    body.wait(9.0)
    assert alive(body, Life.READY) == 4
    body.wait(3.0)
    assert alive(body, Life.READY) == 1


def test_a_peak_in_the_window_keeps_what_it_wanted() -> None:
    body = fleet(ready=4)
    body.wait(6.0)
    arrive(body, 6)
    body.wait(1.0)
    for stream in body.of(Fate.RUNS):
        body.finish(stream.id)
    body.wait(8.0)  # past a window since the start, not since the peak
    assert alive(body, Life.READY) == 3
    body.wait(5.0)
    assert alive(body, Life.READY) == 1


def test_whoever_leaves_has_the_fewest_residents_and_stops_after_its_last() -> None:
    body = fleet("round-robin", ready=2, scale_down_s=0.0, target_requests=4)
    arrive(body, 3)  # two on m0, one on m1
    last = body.on("m1")[0]
    actions = body.wait(2.5)
    assert [a.instance for a in actions if isinstance(a, Drain)] == ["m1"]
    assert not [a for a in actions if isinstance(a, Stop)]
    assert last.fate is Fate.RUNS
    assert [a.instance for a in body.finish(last.id) if isinstance(a, Stop)] == ["m1"]


@pytest.mark.parametrize(("switch", "value"), [("max_instances", 0), ("autoscaler", "off"), ("autoscaler", "own")])
def test_a_fleet_that_nobody_scales_stays_as_it_is(switch: str, value: object) -> None:
    body = fleet("least-requests", 1, **{switch: value})
    arrive(body, 30)
    assert body.wait(30.0) == []


@given(st.sampled_from(["own", "queue"]), st.integers(3, 12))
@settings(max_examples=10)
def test_the_ladder_can_be_scaled_by_either(autoscaler: str, requests: int) -> None:
    body = fleet("polyserve", autoscaler=autoscaler)
    arrive(body, requests)
    body.wait(1.5)
    wanted = math.ceil(requests / 2)
    if autoscaler == "queue":
        assert alive(body, Life.ASKED) == min(wanted, 8) - 1
    start_up(body)
    assert not body.of(Fate.REFUSED)


@given(st.sampled_from(SCALED), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
@settings(max_examples=60)
def test_however_load_comes_and_goes_streams_run_to_their_end_within_the_budget(
    name: str, waves: list[tuple[int, int]]
) -> None:
    """`Body` itself asserts the budget, that nothing that still streams is stopped, and that nobody is forgotten."""
    body = fleet(name, scale_down_s=2.0, min_instances=2, on_late="never")
    for come, go in waves:
        arrive(body, come)
        body.wait(1.5)
        start_up(body)
        for stream in body.of(Fate.RUNS)[:go]:
            body.finish(stream.id)
        assert alive(body, Life.READY, Life.JOINED, Life.ASKED) <= 8
    while running := body.of(Fate.RUNS):
        for stream in running:
            body.finish(stream.id)
        body.wait(1.5)
        start_up(body)
    body.wait(10.0)
    start_up(body)
    assert {stream.fate for stream in body.streams.values()} <= {Fate.FINISHED}
    assert alive(body, Life.READY) == 2


def test_a_target_of_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="'target_requests' is above 0"):
        policy("random", {"target_requests": 0})
