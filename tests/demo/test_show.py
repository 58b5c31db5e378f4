from pathlib import Path

import pytest

from polyserve.core.types import Slo
from polyserve.demo.show import GATEWAY_LAG_S, LATE_SHARE, OF_OPTIMAL, Live, lags, prepare, twin
from polyserve.report import Outcome, Percentiles
from polyserve.serve.replay import ClientLag
from polyserve.sim.world import simulate

CONFIG = Path(__file__).parents[2] / "examples/demo/fleet.yaml"
IN_TIME = ClientLag(Percentiles.of([0.001]), Percentiles.of([0.001]))


def lived(late_iterations: int = 0, look_s: float = 0.01) -> Live:
    engine = {"iterations": 1000, "late_iterations": late_iterations, "worst_lag_s": 0.01}
    return Live(1, looks_took_s=[look_s], engines=[engine])


def test_its_requests_load_the_fleet_to_the_share_of_the_best_that_it_says() -> None:
    stage = prepare(CONFIG, 90.0, seed=1)
    assert stage.instances == 4
    assert stage.workload.rate == pytest.approx(OF_OPTIMAL * stage.optimal_rate, rel=0.02)
    assert {request.slo.tpot_s for request in stage.workload.requests if request.slo} == set(stage.paces_s)


def test_the_simulated_fleet_is_as_large_as_the_live_one() -> None:
    stage = prepare(CONFIG, 5.0, seed=1)
    run = simulate(twin(stage.workload, stage.configured, stage.profile))
    assert len(run.lives) == 4
    assert all(life.gone_at is None for life in run.lives)
    assert len(run.outcomes) == len(stage.workload)


def test_it_says_when_anybody_was_behind() -> None:
    assert lags(IN_TIME, lived())[1]
    late = ClientLag(Percentiles.of([0.5]), Percentiles.of([0.001]))
    assert not lags(late, lived())[1]
    assert not lags(IN_TIME, lived(late_iterations=int(1000 * LATE_SHARE) + 1))[1]
    assert not lags(IN_TIME, lived(look_s=2 * GATEWAY_LAG_S))[1]


def test_progress_counts_what_was_sent_answered_and_refused() -> None:
    live = Live(3)
    slo = Slo(0.3, 0.02)
    live.outcomes += [Outcome("a", 0.0, 1, slo, "finished"), Outcome("b", 0.0, 1, slo, "refused")]
    live.count(2)
    assert str(live) == "2 of 3 sent, 1 answered, 1 refused"
