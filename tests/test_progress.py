"""The view of an engine that token arrivals give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.progress import REPORT_EVERY_S, ProgressCollector

RESIDENTS = ["a", "b", "c"]


def test_an_iteration_is_the_distance_between_two_bursts_of_tokens() -> None:
    seen = ProgressCollector("i")
    for step in range(4):
        for late, request in enumerate(RESIDENTS):
            seen.token(step * 0.02 + late * 0.0002, request, step + 1)
    report = seen.report(0.07)
    assert report is not None
    assert report.tokens == dict.fromkeys(RESIDENTS, 4)
    assert report.iteration is not None
    assert report.iteration.seconds == pytest.approx(0.02)
    assert report.iteration.ended_at == pytest.approx(0.06)
    assert report.iteration.decodes == 3
    assert report.iteration.inferred


def test_a_burst_still_under_way_is_left_for_the_next_report() -> None:
    seen = ProgressCollector("i")
    for step in range(4):
        seen.token(step * 0.02, "a", step + 1)
    report = seen.report(0.0601)
    assert report is not None
    assert report.iteration is not None
    assert report.iteration.ended_at == pytest.approx(0.04)


def test_first_tokens_after_a_pause_say_nothing_of_length() -> None:
    seen = ProgressCollector("i")
    seen.first(0.0, "a")
    seen.drop("a")
    seen.first(7.0, "b")
    report = seen.report(7.1)
    assert report is not None
    assert report.iteration is None
    assert report.tokens == {"b": 1}


def test_a_relay_that_was_held_up_does_not_stretch_iterations() -> None:
    seen = ProgressCollector("i")
    at = 0.0
    for events in (1, 1, 1, 3, 1):  # three iterations read at once
        at += 0.02 * events
        seen.token(at, "a", 0, events)
        seen.token(at, "b", 0, events)
    report = seen.report(at + 0.01)
    assert report is not None
    assert report.iteration is not None
    assert report.iteration.seconds == pytest.approx(0.02)


def test_reports_keep_their_distance_and_say_only_news() -> None:
    seen = ProgressCollector("i")
    seen.first(0.0, "a")
    assert seen.report(0.0) is not None
    seen.token(0.01, "a", 2)
    assert seen.report(0.01) is None
    assert seen.report(REPORT_EVERY_S) is not None
    assert seen.report(1.0) is None


@given(st.integers(1, 60), st.floats(0.008, 0.2), st.integers(2, 12))
def test_whole_iterations_and_single_tokens_give_the_same_view(residents: int, length: float, steps: int) -> None:
    one, other = ProgressCollector("i"), ProgressCollector("i")
    names = [f"r{n}" for n in range(residents)]
    for step in range(steps):
        now = step * length
        one.tokens(now, names if step else (), () if step else names)
        for name in names:
            other.token(now, name, step + 1)
    now = (steps - 1) * length + 0.006
    assert one.report(now) == other.report(now)
