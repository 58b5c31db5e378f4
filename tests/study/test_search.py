"""The search: on curves that fall and on curves that only nearly do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.study.search import LEAST_LOAD, MEASURES, MOST_LOAD, Crossing, Measure, Point, crossing, next_load

G90, G90T, G99T = MEASURES.values()
Curve = Callable[[float], tuple[float, float]]  # overall and worst-tier attainment by load


def search(
    curve: Curve, measures: list[Measure], resolution: float = 0.02, hints: dict[str, float] | None = None
) -> list[Point]:
    """Every run a search asks for."""
    points: list[Point] = []
    while (load := next_load(points, measures, resolution, hints)) is not None:
        assert len(points) < 200, "a search ends"
        points.append(Point(load, *curve(load)))
    return points


def cliff(at: float, width: float) -> Callable[[float], float]:
    """Attainment that falls evenly from 1 to 0 around 0.9, which it meets at `at`."""
    return lambda load: min(max(0.9 - (load - at) / width, 0.0), 1.0)


falling = st.builds(cliff, st.floats(0.15, 1.9), st.floats(0.01, 2.0))


@given(falling, st.sampled_from([0.01, 0.02]))
def test_on_a_falling_curve_goodput_is_found_to_the_resolution(curve: Callable[[float], float], step: float) -> None:
    points = search(lambda load: (curve(load), curve(load)), [G90, G90T, G99T], step)
    for measure in (G90, G90T, G99T):
        true = truth(curve, measure.target)
        found = crossing(points, measure)
        if true < LEAST_LOAD:
            assert found.load <= LEAST_LOAD + step
        elif true > MOST_LOAD:
            assert found.at_least
        else:
            assert abs(found.load - true) <= step + 1e-9


def truth(curve: Callable[[float], float], target: float) -> float:
    """The highest load that reaches the target, by bisection."""
    low, high = 0.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if curve(middle) >= target else (low, middle)
    return low


@given(falling)
def test_a_search_for_three_measures_takes_few_runs(curve: Callable[[float], float]) -> None:
    assert len(search(lambda load: (curve(load), curve(load)), [G90, G90T, G99T])) <= 24


@given(st.randoms(use_true_random=False), falling, st.floats(0.0, 0.3))
def test_under_noise_all_that_ran_below_holds_and_the_next_step_fails(
    chance: object, curve: Callable[[float], float], spread: float
) -> None:
    noise = getattr(chance, "uniform")  # noqa: B009 - hypothesis types its Random as object
    seen: dict[float, tuple[float, float]] = {}

    def noisy(load: float) -> tuple[float, float]:
        overall = min(max(curve(load) + noise(-spread, spread), 0.0), 1.0)
        return seen.setdefault(load, (overall, overall * noise(0.8, 1.0)))

    points = search(noisy, [G90, G90T, G99T])
    for measure in (G90, G90T, G99T):
        found = crossing(points, measure)
        for point in points:
            if found.holds is not None and point.load <= found.holds:
                assert getattr(point, measure.of) >= measure.target
        if found.fails is not None and found.holds is not None:
            assert math.isclose(found.fails - found.holds, 0.02, abs_tol=1e-6)
            assert found.holds <= found.load <= found.fails
        elif found.fails is not None:
            assert math.isclose(found.fails, LEAST_LOAD)
            assert found.load == 0.0
        else:
            assert found.holds is not None
            assert math.isclose(found.holds, MOST_LOAD)


@given(falling, st.floats(-0.05, 0.05))
def test_a_hint_leads_to_the_same_goodput_in_fewer_runs(curve: Callable[[float], float], off: float) -> None:
    plain = search(lambda load: (curve(load), curve(load)), [G90])
    found = crossing(plain, G90)
    hinted = search(lambda load: (curve(load), curve(load)), [G90], hints={"G90": found.load})
    assert crossing(hinted, G90) == pytest.approx(found)
    assert len(hinted) <= 2
    nearby = search(lambda load: (curve(load), curve(load)), [G90], hints={"G90": found.load + off})
    assert crossing(nearby, G90) == pytest.approx(found)


@given(falling)
def test_measures_share_their_runs(curve: Callable[[float], float]) -> None:
    def both(load: float) -> tuple[float, float]:
        return curve(load), curve(load)

    alone = search(both, [G90])
    together = search(both, [G90, G90T])
    assert together == alone


def test_a_lucky_run_beyond_a_failure_counts_for_nothing() -> None:
    points = [Point(0.5, 1.0, 1.0), Point(0.6, 0.8, 0.8), Point(0.7, 0.95, 0.95)]
    assert crossing(points, G90) == Crossing(0.55, 0.5, 0.6)


def test_between_the_last_that_holds_and_the_first_that_fails_it_is_interpolated() -> None:
    assert crossing([Point(0.8, 0.92, 0.0), Point(0.9, 0.82, 0.0)], G90).load == pytest.approx(0.82)


def test_what_never_holds_has_no_goodput() -> None:
    assert crossing(search(lambda load: (0.5, 0.5), [G90]), G90) == Crossing(0.0, None, LEAST_LOAD)


def test_what_always_holds_has_at_least_the_most_that_was_run() -> None:
    found = crossing(search(lambda load: (1.0, 1.0), [G90]), G90)
    assert found.at_least
    assert found.load == MOST_LOAD
