"""Trying a fleet out: the same requests for every fleet, long enough to say something, and remembered."""

from __future__ import annotations

import numpy as np
import pytest
from plan_scenes import PROFILE, TPOTS, small

from polyserve.core import bound
from polyserve.demand import Arrivals
from polyserve.planner.ask import Load, PlanError
from polyserve.planner.bench import Bench, busiest, longer
from polyserve.planner.trial import Fleet, Tally, Trial, pooled
from polyserve.profiles.store import load
from polyserve.sim.scenario import Scenario, evaluate
from polyserve.traces import Trace, read_trace

TWO = Fleet(PROFILE, 2, "polyserve")
LOAD = Load(TPOTS)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(small())


def test_a_trial_is_what_simulate_would_report(bench: Bench) -> None:
    trial, span = bench.trial(TWO, LOAD, 0), bench.window(PROFILE, LOAD)
    scenario = Scenario(
        trace="uniform:6000/10",
        profile=PROFILE,
        instances=2,
        rate=4.0,
        duration_s=span.measured_s,
        warm_up_s=span.warm_up_s,
        tpots=TPOTS,
        ttfts=(1.0, 2.0),
    )
    result = evaluate(scenario)
    shares = {name: tier.share for name, tier in result.score.tiers.items()}
    assert {name: (t.requests, t.attained) for name, t in trial.tiers.items()} == {
        name: (share.requests, share.attained) for name, share in shares.items()
    }
    assert trial.attained_rate == pytest.approx(result.score.attained_rate)
    assert trial.token_rate == pytest.approx(10 * trial.attained_rate)


def test_every_look_counts_every_instance_once(bench: Bench) -> None:
    counts = bench.trial(TWO, LOAD, 0).instances
    assert set(counts) == {"30", "100", None}
    assert len(counts[None]) > 50
    assert [sum(at) for at in zip(*counts.values(), strict=True)] == [2] * len(counts[None])


def test_what_was_tried_is_not_tried_again(bench: Bench) -> None:
    assert bench.trial(TWO, LOAD, 0) is bench.trial(TWO, LOAD, 0)
    assert bench.tried(TWO, LOAD)[2].seeds == bench.over(TWO, LOAD, [0]).seeds
    assert bench.tried(Fleet(PROFILE, 2, "minimal"), LOAD) == {}


def test_the_same_seed_draws_the_same_requests_for_every_fleet(bench: Bench) -> None:
    many = bench.trial(TWO.of(3), LOAD, 0)
    assert many.simulated == bench.trial(TWO, LOAD, 0).simulated
    assert {n: t.requests for n, t in many.tiers.items()} == {
        n: t.requests for n, t in bench.trial(TWO, LOAD, 0).tiers.items()
    }


def test_the_bound_is_that_of_the_fluid_optimum(bench: Bench) -> None:
    kind = load(PROFILE)
    mixes = [bound.tier_mix(tpot_s, share, np.array([6000]), np.array([10])) for tpot_s, share in TPOTS]
    assert bench.least(PROFILE, LOAD) == pytest.approx(4.0 / bound.optimal_rate(kind, 1, mixes), rel=0.02)
    assert bench.least(PROFILE, Load(TPOTS, rate_by=2.0)) == pytest.approx(2 * bench.least(PROFILE, LOAD))
    assert bench.least(PROFILE, Load(TPOTS, prompts_by=1.5)) > bench.least(PROFILE, LOAD)


def test_a_pace_that_no_instance_holds_is_named() -> None:
    with pytest.raises(PlanError, match=r"takes 11\.8 ms, so no instance of this kind can hold TPOT 5 ms"):
        Bench(small(tpots=((0.005, 1.0),))).least(PROFILE, Load(((0.005, 1.0),)))


def test_runs_are_as_long_as_the_scarcest_tier_needs_and_no_longer_than_asked() -> None:
    mix = ((0.03, 0.1), (0.1, 0.9))
    wide = Bench(small(tpots=mix, requests=100_000, target=0.99)).window(PROFILE, Load(mix))
    assert wide.measured_s * 4 * 0.1 == pytest.approx(400, rel=0.01)  # four that may miss
    assert not wide.cut
    narrow = Bench(small(tpots=mix, requests=1000, target=0.99)).window(PROFILE, Load(mix))
    assert narrow.measured_s * 4 == pytest.approx(1000, rel=0.01)
    assert narrow.cut
    assert narrow.warm_up_s == wide.warm_up_s


def test_a_run_is_never_shorter_than_requests_stay_and_begins_warm() -> None:
    bench = Bench(small(trace="azure-conv", rate=1000.0, requests=100))
    span = bench.window(PROFILE, LOAD)
    assert span.measured_s == pytest.approx(3 * span.residency_s, rel=0.01)
    assert bench.window(PROFILE, Load(TPOTS, outputs_by=2.0)).warm_up_s == pytest.approx(2 * span.warm_up_s, rel=0.1)


def test_runs_last_as_long_at_any_rate(bench: Bench) -> None:
    assert bench.window(PROFILE, Load(TPOTS, rate_by=3.0)) == bench.window(PROFILE, LOAD)


def test_recorded_arrivals_are_simulated_once_through() -> None:
    bench = Bench(small(trace="aibrix-ramp", rate=None, arrivals=Arrivals("recorded"), requests=5000))
    assert bench.window(PROFILE, LOAD).whole_s == pytest.approx(2024 / 4.44, rel=0.02)
    assert bench.rate(PROFILE, LOAD) == pytest.approx(4.44, rel=0.02)
    twice = Load(TPOTS, rate_by=2.0)
    assert bench.rate(PROFILE, twice) == pytest.approx(8.88, rel=0.02)
    assert bench.window(PROFILE, twice).whole_s == pytest.approx(bench.window(PROFILE, LOAD).whole_s / 2)


def test_a_trace_without_times_wants_a_rate() -> None:
    with pytest.raises(PlanError, match="no arrival times; give requests per second"):
        Bench(small(rate=None))


def test_of_a_long_recording_the_busiest_stretch_is_taken() -> None:
    gaps = np.concatenate([np.full(50, 2.0), np.full(50, 0.1), np.full(50, 1.0)])
    lengths = np.arange(150)
    trace = Trace("mine", lengths, lengths + 1, np.cumsum(gaps) - gaps[0])
    part = busiest(trace, 40)
    assert len(part) == 40
    assert part.recorded_rate == pytest.approx(10)
    assert part.arrived_s is not None
    assert part.arrived_s[0] == 0
    assert 49 <= part.prompt_tokens[0] <= 60
    assert (part.output_tokens == part.prompt_tokens + 1).all()
    assert busiest(trace, 150) is trace


def test_longer_requests_have_at_least_a_token() -> None:
    trace = read_trace("azure-conv")
    half = longer(trace, 1.5, 0.001)
    assert half.prompt_tokens.mean() == pytest.approx(1.5 * trace.prompt_tokens.mean(), rel=0.01)
    assert half.output_tokens.min() == 1
    assert longer(trace, 1.0, 1.0) is trace


# ---------------------------------------------------------------------------------------------------- verdicts


def trial(requests: int, attained: int, seed: int = 0) -> Trial:
    return Trial((seed,), {"20": Tally(requests, attained)}, {"20": [1, 2], None: [0, 1]}, 0.5, 10.0, 100, requests, 0)


def test_trials_are_pooled_by_their_counts() -> None:
    both = pooled([trial(100, 99, 1), trial(300, 273, 2)])
    assert (both.seeds, both.tiers["20"]) == ((1, 2), Tally(400, 372))
    assert both.worst == ("20", 0.93)
    assert both.instances == {"20": [1, 2, 1, 2], None: [0, 1, 0, 1]}
    assert (both.seconds, both.tokens, both.token_rate) == (20.0, 200, 10.0)


@pytest.mark.parametrize(
    ("requests", "attained", "verdict"),
    [(1000, 1000, True), (1000, 995, True), (1000, 990, None), (1000, 985, None), (1000, 900, False), (10, 9, None)],
)
def test_a_verdict_waits_until_luck_is_out_of_the_question(requests: int, attained: int, verdict: bool | None) -> None:
    assert trial(requests, attained).verdict(0.99) is verdict


def test_an_interval_holds_the_share_and_narrows_with_more_requests() -> None:
    for requests, attained in ((100, 99), (10, 5), (10_000, 9_900)):
        low, high = trial(requests, attained).interval
        assert 0 <= low < attained / requests < high <= 1
    assert trial(100, 100).interval == pytest.approx((0.963, 1.0), abs=1e-3)
    assert trial(100, 0).interval == pytest.approx((0.0, 0.037), abs=1e-3)
    few, many = trial(100, 99).interval, trial(10_000, 9_900).interval
    assert many[1] - many[0] < 0.2 * (few[1] - few[0])
