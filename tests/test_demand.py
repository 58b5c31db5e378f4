"""Demand: what is drawn, and that a seed means the same luck everywhere."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polyserve.core.bound import feasible
from polyserve.core.types import ChunkRule, Slo
from polyserve.demand import (
    Arrivals,
    DemandError,
    Workload,
    draw_requests,
    gamma_gaps,
    parse_arrivals,
    parse_tpot,
    parse_ttft,
)
from polyserve.profiles import store
from polyserve.traces import Trace, read_trace

Ints = NDArray[np.int64]
TPOTS = [(0.02, 0.1), (0.03, 0.2), (0.05, 0.3), (0.1, 0.4)]
TTFTS = [0.3, 0.5, 1.0]
AZURE = read_trace("azure-conv")
ON_A100 = partial(feasible, store.load("a100-llama-3-8b"), ChunkRule())


def always(prompts: Ints, outputs: Ints, slo: Slo) -> NDArray[np.bool_]:
    return np.ones(len(prompts), bool)


def draw(trace: Trace = AZURE, rate: float | None = 50.0, duration_s: float | None = 100.0, **more: object) -> Workload:
    options: dict[str, object] = {"tpots": TPOTS, "ttfts": TTFTS, "feasible": ON_A100, "seed": 1} | more
    return draw_requests(trace, rate=rate, duration_s=duration_s, **options)  # type: ignore[arg-type]


@settings(max_examples=30)
@given(
    st.sampled_from(["poisson", "gamma:0.5", "gamma:3", "recorded"]),
    st.floats(0.5, 200),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3]),
)
def test_every_request_is_in_order_in_time_and_feasible(
    arrivals: str, rate: float, seed: int, best_effort: float
) -> None:
    drawn = draw(rate=rate, arrivals=parse_arrivals(arrivals), seed=seed, duration_s=10.0, best_effort=best_effort)
    times = [r.arrived_at for r in drawn.requests]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= 10.0
    assert [r.id for r in drawn.requests] == [f"r{i}" for i in range(len(drawn))]
    assert all(round(t * 1e6) / 1e6 == t for t in times)
    by_slo: dict[Slo, list[tuple[int, int]]] = defaultdict(list)
    for request, output in drawn:
        if request.slo is not None:
            by_slo[request.slo].append((request.prompt_tokens, output))
    for slo, lengths in by_slo.items():
        prompts, outputs = np.array(lengths).T
        assert ON_A100(prompts, outputs, slo).all()
    for request, row in zip(drawn.requests, drawn.rows, strict=True):
        assert request.prompt_tokens == AZURE.prompt_tokens[row]


@pytest.mark.parametrize("arrivals", ["poisson", "gamma:2", "recorded"])
def test_the_same_seed_draws_the_same_workload_and_another_does_not(arrivals: str) -> None:
    first, again, other = (draw(arrivals=parse_arrivals(arrivals), seed=s) for s in (7, 7, 8))
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_a_higher_rate_is_the_same_requests_closer_together() -> None:
    slow, fast = draw(rate=40.0), draw(rate=80.0)
    assert len(fast) > len(slow)
    for (a, output_a), (b, output_b) in zip(slow, fast, strict=False):
        assert (a.prompt_tokens, a.slo, output_a) == (b.prompt_tokens, b.slo, output_b)
        assert a.arrived_at == pytest.approx(2 * b.arrived_at, abs=2e-6)


@pytest.mark.parametrize("arrivals", ["poisson", "gamma:2", "recorded"])
def test_rate_and_shares_are_as_asked(arrivals: str) -> None:
    drawn = draw(rate=100.0, duration_s=400.0, arrivals=parse_arrivals(arrivals))
    assert drawn.rate == pytest.approx(100.0, rel=0.05)
    assert [m.tpot_s for m in drawn.mixes()] == [tpot for tpot, _ in TPOTS]
    for mix, (_, share) in zip(drawn.mixes(), TPOTS, strict=True):
        assert mix.share == pytest.approx(share, abs=0.01)
    ttfts = np.array([r.slo.ttft_s for r in drawn.requests if r.slo])
    assert [np.mean(ttfts == t) for t in TTFTS] == pytest.approx([1 / 3] * 3, abs=0.05)


def test_the_infeasible_are_replaced_so_that_rate_and_shares_stay() -> None:
    mooncake = read_trace("mooncake")
    drawn = draw(mooncake, rate=50.0, duration_s=200.0)
    assert drawn.infeasible > 2000  # half of its prompts take an idle A100 more than a second
    assert drawn.rate == pytest.approx(50.0, rel=0.05)
    able = ON_A100(mooncake.prompt_tokens, mooncake.output_tokens, Slo(1.0, 0.1))
    loose = [r.prompt_tokens for r in drawn.requests if r.slo and r.slo.tpot_s == 0.1]
    assert np.mean(loose) == pytest.approx(mooncake.prompt_tokens[able].mean(), rel=0.05)


def test_ttft_is_drawn_even_among_the_feasible_alone() -> None:
    trace = Trace("t", np.array([10]), np.array([5]))

    def from_half_a_second(prompts: Ints, outputs: Ints, slo: Slo) -> NDArray[np.bool_]:
        return np.full(len(prompts), slo.ttft_s >= 0.5)

    drawn = draw(trace, feasible=from_half_a_second)
    ttfts = [r.slo.ttft_s for r in drawn.requests if r.slo]
    assert set(ttfts) == {0.5, 1.0}
    assert np.mean(np.array(ttfts) == 0.5) == pytest.approx(0.5, abs=0.03)


def test_recorded_arrivals_keep_times_and_order() -> None:
    drawn = draw(rate=None, duration_s=None, arrivals=Arrivals("recorded"), feasible=always)
    assert AZURE.arrived_s is not None
    assert [r.prompt_tokens for r in drawn.requests] == AZURE.prompt_tokens.tolist()
    assert [r.arrived_at for r in drawn.requests] == pytest.approx(AZURE.arrived_s.tolist(), abs=1e-6)
    assert drawn.rate == pytest.approx(AZURE.recorded_rate)


def test_recorded_arrivals_begin_again_when_the_trace_ends() -> None:
    trace = Trace("t", np.array([1, 2, 3]), np.array([1, 1, 1]), np.array([0.0, 1.0, 4.0]))
    drawn = draw(trace, rate=1.0, duration_s=7.0, arrivals=Arrivals("recorded"), feasible=always)
    assert [(r.prompt_tokens, r.arrived_at) for r in drawn.requests] == [
        (1, 0.0), (2, 0.5), (3, 2.0), (1, 3.0), (2, 3.5), (3, 5.0), (1, 6.0), (2, 6.5)
    ]  # fmt: skip


def test_recorded_arrivals_lose_the_infeasible_and_keep_the_rate() -> None:
    drawn = draw(read_trace("mooncake"), rate=10.0, duration_s=300.0, arrivals=Arrivals("recorded"))
    assert drawn.infeasible > 1000
    assert drawn.rate == pytest.approx(10.0, rel=0.1)


def test_best_effort_requests_have_no_slo() -> None:
    drawn = draw(best_effort=0.25)
    assert np.mean([r.slo is None for r in drawn.requests]) == pytest.approx(0.25, abs=0.02)
    assert sum(m.share for m in drawn.mixes()) == pytest.approx(1.0)


@pytest.mark.parametrize("cv", [0.05, 0.3, 1.0, 2.0, 5.0])
def test_gamma_gaps_have_mean_one_and_their_variation(cv: float) -> None:
    gaps = gamma_gaps((np.arange(200_000) + 0.5) / 200_000, cv)
    assert gaps.mean() == pytest.approx(1.0, abs=2e-3)
    assert gaps.std() == pytest.approx(cv, rel=5e-3)
    assert (np.diff(gaps) >= 0).all()


def test_gamma_of_variation_one_is_exponential() -> None:
    uniform = (np.arange(10_000) + 0.5) / 10_000
    assert gamma_gaps(uniform, 1.0) == pytest.approx(-np.log1p(-uniform), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rate": 0.0}, "rate is a positive number, not 0"),
        ({"rate": float("nan")}, "rate is a positive number"),
        ({"rate": None}, "poisson arrivals want a rate"),
        ({"duration_s": None}, "poisson arrivals want a duration"),
        ({"duration_s": -1.0}, "duration is a positive number"),
        ({"rate": 0.001, "duration_s": 0.1}, "nothing arrives"),
        ({"best_effort": 1.0}, "best-effort share"),
        ({"ttfts": [0.001]}, "no request of trace azure-conv is feasible at TPOT 20 ms"),
        ({"trace": read_trace("sharegpt"), "arrivals": Arrivals("recorded")}, "no arrival times"),
    ],
)
def test_a_demand_that_cannot_be_is_one_line(changes: dict[str, object], says: str) -> None:
    with pytest.raises(DemandError, match=says):
        draw(**changes)  # type: ignore[arg-type]


def test_tpot_shares_are_normalised_and_sorted() -> None:
    assert parse_tpot("100:3, 20:1") == [(0.02, 0.25), (0.1, 0.75)]
    assert parse_tpot("50") == [(0.05, 1.0)]
    assert parse_ttft("500,300") == [0.3, 0.5]


@pytest.mark.parametrize(
    "text", ["", "20:", "20:0", "20:-1", "0:1", "nan:1", "inf:1", "20:.5,20:.5", "20:.5,20.0:.5", "a:b"]
)
def test_a_bad_tpot_is_refused(text: str) -> None:
    with pytest.raises(DemandError, match="tpot"):
        parse_tpot(text)


@pytest.mark.parametrize("text", ["", "0", "-5", "nan", "300,300", "300,,500"])
def test_a_bad_ttft_is_refused(text: str) -> None:
    with pytest.raises(DemandError, match="ttft"):
        parse_ttft(text)


@pytest.mark.parametrize("text", ["", "uniform", "gamma", "gamma:", "gamma:0", "gamma:x", "gamma:99", "poisson:2"])
def test_bad_arrivals_are_refused(text: str) -> None:
    with pytest.raises(DemandError, match="arrivals"):
        parse_arrivals(text)
