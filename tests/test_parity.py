"""The promise that makes plans worth something: simulated and live, the same requests fare the same."""

import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import uvloop
import yaml

from polyserve import config as configs
from polyserve.core import bound
from polyserve.core.types import ChunkRule
from polyserve.demand import draw_requests, parse_tpot, parse_ttft
from polyserve.demo.fleet import Fleet
from polyserve.demo.show import Live, Stage, lags, replay_live, twin
from polyserve.profiles.store import load
from polyserve.report import Outcome, score
from polyserve.serve.replay import Replayed, lag_note, window
from polyserve.sim.world import simulate
from polyserve.traces import read_trace

pytestmark = pytest.mark.live

PROFILE = "a100-llama-3-8b"
INSTANCES = 2
SECONDS = 80.0
RATE = 9.0
TRIES = 3
CONFIG = {
    "model": "llama-3-8b",
    "profile": PROFILE,
    "tiers": [
        {"name": "agent", "tpot_ms": 30, "ttft_ms": 500, "min_instances": 1},
        {"name": "report", "tpot_ms": 100, "ttft_ms": 1000, "min_instances": 1},
    ],
    "launcher": {"kind": "local", "min": INSTANCES, "max": INSTANCES},
}
TRACE = read_trace("azure-conv")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = {"host": "127.0.0.1", "port": probe.getsockname()[1]}
    path = tmp_path_factory.mktemp("parity") / "fleet.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"listen": listen}))
    return path


@pytest.fixture(scope="module")
def stage(config: Path) -> Stage:
    profile, plan = load(PROFILE), configs.load(config, launch=True).sole
    workload = draw_requests(
        TRACE,
        rate=RATE,
        duration_s=SECONDS,
        tpots=parse_tpot("30:.5,100:.5"),
        ttfts=parse_ttft("300,500,1000"),
        feasible=partial(bound.feasible, profile, ChunkRule()),
        seed=1,
    )
    optimal_rate = bound.optimal_rate(profile, INSTANCES, workload.mixes())
    return Stage(TRACE, workload, profile, plan.configured, INSTANCES, plan.name, optimal_rate, seed=1)


@pytest.fixture(scope="module")
def live(config: Path, stage: Stage) -> Replayed:
    """What the client saw. A machine that does not keep real time emulates nothing: it gets another try."""
    for _ in range(TRIES):
        seen = Live(len(stage.workload))
        fleet = Fleet.start(config, config.parent)
        try:
            fleet.wait_ready(INSTANCES, patience_s=120.0)
            replayed = uvloop.run(replay_live(stage, fleet.url, seen, lambda: None))
        finally:
            fleet.stop()
        notes, kept_up = lags(replayed.lag, seen)
        if kept_up:
            return replayed
    pytest.fail(f"this machine did not keep real time in {TRIES} tries\n{notes}")


@pytest.fixture(scope="module")
def simulated(stage: Stage) -> list[Outcome]:
    return simulate(twin(stage.workload, stage.configured, stage.profile)).outcomes


def test_attainment_per_tier_is_within_three_points(live: Replayed, simulated: list[Outcome], stage: Stage) -> None:
    seen = score(live.outcomes, window(stage.workload, live), [0.03, 0.1]).tiers
    told = score(simulated, (0.0, SECONDS), [0.03, 0.1]).tiers
    for key in ("30", "100"):
        live_share, simulated_share = seen[key].share.attainment, told[key].share.attainment
        assert live_share is not None
        assert simulated_share is not None
        assert abs(live_share - simulated_share) <= 0.03, (key, seen[key], told[key], lag_note(live.lag))


def test_time_to_first_token_is_within_a_tenth(live: Replayed, simulated: list[Outcome]) -> None:
    seen, told = (
        np.percentile([o.ttft_s for o in outcomes if o.ttft_s is not None], (50, 99))
        for outcomes in (live.outcomes, simulated)
    )
    assert seen == pytest.approx(told, rel=0.1), lag_note(live.lag)
