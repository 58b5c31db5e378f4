"""What is known of a case before anything runs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from polyserve.core import bound
from polyserve.core.types import ChunkRule
from polyserve.demand import draw_requests
from polyserve.study.ground import Case
from polyserve.study.settings import PACES, SWAPPED, TTFTS, Fleet, StudyError, World, fleet
from polyserve.traces import read_trace

OLD = fleet("a100-llama-3-8b-mixed", 20)


@pytest.mark.parametrize("workload", ["azure-code", "mooncake"])
def test_the_bound_is_what_a_long_draw_comes_to(workload: str) -> None:
    case = Case(OLD, workload)
    drawn = draw_requests(
        read_trace(workload),
        rate=1.0,
        duration_s=50_000.0,
        tpots=PACES,
        ttfts=TTFTS,
        feasible=partial(bound.feasible, case.true(case.fleet.profile), ChunkRule()),
        seed=3,
    )
    assert case.optimal_rate == pytest.approx(
        bound.optimal_rate(case.true(case.fleet.profile), 20, drawn.mixes()), rel=0.03
    )
    assert case.infeasible_share == pytest.approx(drawn.infeasible / len(drawn), abs=0.005)
    stays = [max(TTFTS) + output * r.slo.tpot_s for r, output in drawn if r.slo is not None]
    assert case.residency_p99_s == pytest.approx(np.percentile(stays, 99), rel=0.1)


def test_the_window_is_five_residencies_or_as_many_requests_as_are_wanted() -> None:
    short = Case(OLD, "azure-conv", least_requests=1)
    assert 5 * short.residency_p99_s <= short.window_s < 5 * short.residency_p99_s + 5
    assert short.residency_p99_s <= short.warm_up_s < short.residency_p99_s + 5
    long = Case(OLD, "azure-conv", least_requests=10**6)
    assert long.window_s * long.optimal_rate >= 10**6


def test_where_shares_change_the_worse_mix_is_the_bound_and_both_get_a_window() -> None:
    steady, swapped = Case(OLD, "azure-code", least_requests=1), Case(OLD, "azure-code", paces=SWAPPED)
    burst = Case(OLD, "azure-code", World(later=SWAPPED), least_requests=1)
    assert burst.optimal_rate == min(steady.optimal_rate, swapped.optimal_rate) < steady.optimal_rate
    assert burst.window_s >= 2 * 5 * burst.residency_p99_s


def test_a_biased_machine_has_a_bound_of_its_own() -> None:
    plain, biased = Case(OLD, "azure-code"), Case(OLD, "azure-code", World(bias=0.1))
    assert 0.85 * plain.optimal_rate < biased.optimal_rate < 0.95 * plain.optimal_rate
    assert biased.bounds["believed_rate"] == pytest.approx(plain.optimal_rate, rel=0.03)


def test_both_laws_have_their_bound() -> None:
    bounds = Case(OLD, "azure-code").bounds
    assert bounds["mixed_rate"] == bounds["optimal_rate"]
    assert bounds["additive_rate"] is not None
    assert bounds["mixed_rate"] is not None
    assert bounds["additive_rate"] > bounds["mixed_rate"]
    assert bounds["ceiling"] is not None
    assert bounds["ceiling"] > 1.2


def test_a_workload_that_nobody_can_serve_is_said() -> None:
    with pytest.raises(StudyError, match="no request is feasible on a100-llama-3-8b-mixed at 20 ms"):
        _ = Case(OLD, "uniform:60000/5").optimal_rate


def test_a_fleet_of_two_kinds_serves_at_least_what_both_serve_apart_and_no_more_than_the_better() -> None:
    young, old = (
        Case(fleet("h200-llama-3-8b-mixed", 6), "azure-code"),
        Case(fleet("a100-llama-3-8b-mixed", 12), "azure-code"),
    )
    both = Case(Fleet("both", old.fleet.groups + young.fleet.groups), "azure-code")
    best = Case(fleet("h200-llama-3-8b-mixed", 18), "azure-code")
    assert young.optimal_rate + old.optimal_rate - 1e-6 <= both.optimal_rate < best.optimal_rate


def test_two_groups_of_one_kind_are_one() -> None:
    whole = Case(OLD, "azure-code")
    halves = Case(Fleet("halves", fleet("a100-llama-3-8b-mixed", 10).groups * 2), "azure-code")
    assert halves.optimal_rate == pytest.approx(whole.optimal_rate, rel=1e-9)
