"""Scores: folds over outcomes that agree with counting by hand, and reports that say what they rest on."""

from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from polyserve.core.types import Slo
from polyserve.report import Ending, Facts, Outcome, Percentiles, score, table, tier_key, tier_of, to_dict

SLO = Slo(0.5, 0.02)
PACES = (0.02, 0.05, 0.1)


def outcome(
    ending: Ending = "unfinished", arrived_at: float = 0.0, slo: Slo | None = SLO, code: str | None = None
) -> Outcome:
    return Outcome("r", arrived_at, 100, slo, ending, code)


def finished(times: list[float], arrived_at: float = 0.0) -> Outcome:
    made = outcome("finished", arrived_at)
    made.delivered(times)
    return made


def test_every_token_on_time_attains_and_one_late_token_does_not() -> None:
    assert finished([0.5, 0.52, 0.54]).attained
    assert finished([0.1, 0.519, 0.54]).attained  # banked slack is spent
    assert not finished([0.5, 0.5201, 0.53]).attained
    assert not finished([0.51, 0.52]).attained


@given(st.lists(st.integers(0, 2_000_000), min_size=1, max_size=40), st.data())
def test_lateness_is_that_of_the_worst_token_however_the_stream_is_cut(gaps_us: list[int], data: st.DataObject) -> None:
    times, now = [], 1.0
    for gap in gaps_us:
        now += gap / 1e6
        times.append(now)
    made = outcome(arrived_at=1.0)
    cut = data.draw(st.integers(0, len(times)))
    made.delivered(times[:cut])
    made.delivered(times[cut:])
    by_hand = max(at - SLO.due_at(1.0, nth) for nth, at in enumerate(times))
    assert made.late_s == pytest.approx(by_hand, abs=1e-9)
    assert (made.first_at, made.last_at, made.output_tokens) == (times[0], times[-1], len(times))


@pytest.mark.parametrize("ending", ["refused", "failed", "unfinished"])
def test_whoever_got_no_whole_answer_is_a_miss(ending: Ending) -> None:
    result = score([outcome(ending=ending), finished([0.4])], (0.0, 10.0), PACES)
    assert result.overall.share.attainment == 0.5


def test_cancelled_and_best_effort_requests_are_counted_apart() -> None:
    outcomes = [outcome(ending="cancelled"), outcome(slo=None, ending="finished"), outcome(slo=None), finished([0.4])]
    result = score(outcomes, (0.0, 10.0), PACES)
    assert result.overall.share.requests == 1
    assert (result.cancelled, result.best_effort, result.best_effort_finished) == (1, 2, 1)


def test_only_requests_of_the_window_count() -> None:
    outcomes = [finished([at + 0.4], arrived_at=at) for at in (0.0, 1.0, 2.0, 3.0)]
    result = score(outcomes, (1.0, 3.0), PACES)
    assert result.overall.share.requests == 2
    assert result.offered_rate == 1.0
    assert result.attained_rate == 1.0


def test_a_request_belongs_to_the_loosest_tier_that_is_no_looser() -> None:
    assert tier_of(Slo(1.0, 0.05), PACES) == 0.05
    assert tier_of(Slo(1.0, 0.099), PACES) == 0.05
    assert tier_of(Slo(1.0, 3.0), PACES) == 0.1
    assert tier_of(Slo(1.0, 0.001), PACES) == 0.02
    assert [tier_key(pace) for pace in PACES] == ["20", "50", "100"]
    assert tier_key(0.0125) == "12.5"


endings: st.SearchStrategy[Ending] = st.sampled_from(["finished", "refused", "failed", "unfinished"])


@given(st.lists(st.tuples(endings, st.sampled_from(PACES), st.integers(1, 9), st.booleans()), max_size=30))
def test_tiers_and_quartiles_add_up_to_the_whole(rows: list[tuple[Ending, float, int, bool]]) -> None:
    outcomes = []
    for n, (ending, pace, prompt, on_time) in enumerate(rows):
        made = Outcome(f"r{n}", 0.0, prompt, Slo(0.5, pace), ending)
        made.delivered([0.4 if on_time else 0.6])
        outcomes.append(made)
    result = score(outcomes, (0.0, 1.0), PACES)
    whole = (len(outcomes), sum(o.attained for o in outcomes))
    for parts in (list(result.tiers.values()), result.quartiles):
        assert (sum(p.share.requests for p in parts), sum(p.share.attained for p in parts)) == whole
    counted = result.overall
    assert counted.refused + counted.failed + counted.unfinished == sum(e != "finished" for e, *_ in rows)
    bounds = [q.prompt_tokens_to for q in result.quartiles]
    assert bounds == sorted(bounds)


def test_percentiles_of_nothing_are_none() -> None:
    assert Percentiles.of([None]) == Percentiles(None, None, None)
    assert Percentiles.of([1.0, None, 3.0]).p50 == 2.0


FACTS = Facts(
    "polyserve", "small", "uniform:9/9", 1, 2, optimal_rate=4.0, ceiling=1.2, wall_s=2.0, simulated_requests=10
)


def test_the_json_report_has_what_is_promised_and_is_strict_json() -> None:
    outcomes = [finished([0.4, 0.42]), outcome(ending="refused", code="overloaded", slo=Slo(1.0, 0.1))]
    plain = to_dict(score(outcomes, (0.0, 1.0), PACES), FACTS)
    assert plain == json.loads(json.dumps(plain, allow_nan=False))
    assert plain["attainment"]["overall"] == 0.5
    assert plain["attainment"]["tiers"] == {"20": 1.0, "50": None, "100": 0.0}
    assert plain["share_of_optimal"] == 0.25
    assert plain["ttft_s"]["20"] == {"p50": 0.4, "p90": 0.4, "p99": 0.4}
    assert plain["tpot_s"]["20"]["p50"] == pytest.approx(0.02)
    promised = """offered_rate attained_rate optimal_rate ceiling requests infeasible refused unfinished promoted
        preemptions forced_chunks instance_seconds iterations wall_s policy seed settings decision_us"""
    assert set(promised.split()) <= set(plain)


def test_an_empty_window_reports_nothing_rather_than_dividing_by_it() -> None:
    plain = to_dict(score([], (0.0, math.inf), PACES), Facts("random"))
    assert plain["attainment"]["overall"] is None
    assert plain["offered_rate"] is None
    json.dumps(plain, allow_nan=False)


def test_the_table_names_tiers_and_says_what_it_rests_on() -> None:
    text = io.StringIO()
    result = score([finished([0.4, 0.42])], (0.0, 1.0), PACES)
    Console(file=text, width=120).print(table(result, FACTS))
    shown = text.getvalue()
    assert "polyserve, 2 x small, uniform:9/9" in shown
    assert "100.0 %" in shown
    assert "25.0 % of optimal 4/s (ceiling of binning 1.2x)" in shown
    assert "5 requests/s simulated" in shown
