"""The forecast against the engine it forecasts, run; each of its tests where it alone decides; and its law."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scenes import STEADY, Stage, job, request

from polyserve.core import kernels
from polyserve.core.fleet import Books
from polyserve.core.forecast import Forecast, Forecaster
from polyserve.core.lengths import GRID, LengthModel
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import ChunkBound, ChunkRule, Instance, Request
from polyserve.sim import engine as sim

# --------------------------------------------------------------------------------- against the engine itself

KV_TOKENS = 60_000
REAL = Profile(
    "real",
    (0, 64, 512, 2048),
    (0.006, 0.007, 0.02, 0.07),
    per_decode_s=2e-5,
    per_kv_token_s=2e-7,
    per_attention_s=1e-9,
    limits=Limits(KV_TOKENS, 64, 512, 16),
    mixed_kv_factor=1.5,
    mixed_per_decode_s=2e-5,
)


@dataclass
class Truth:
    """What was forecast for a candidate, and what then happened."""

    forecast: Forecast
    candidate: Request
    residents: int
    first_at: float = math.inf
    second_at: float = math.inf
    longest_s: float = 0.0  # of the iterations up to token 1
    peak_kv: int = 0


class Play:
    """An engine with known lengths, and books that hear of each of its iterations as it ends."""

    def __init__(self, seed: int, chunk: ChunkRule, bound: ChunkBound) -> None:
        self.random = Random(seed)
        self.pace_s = self.random.choice([0.015, 0.02, 0.03])
        instance = Instance("i", REAL.name, chunk)
        self.stage = Stage(REAL, instance=instance, pace_s=self.pace_s, switches={"chunk_bound": bound})
        self.engine = sim.Engine(instance, REAL, REAL, settings=self.stage.settings)
        self.engine.set_pace(self.pace_s)
        self.now = 0.0
        self.ends_at: float | None = None

    def truth(self) -> Truth:
        """Up to 20 requests within 0.4 s, a candidate after 0.5 s, and then the engine until all is done."""
        for at in sorted(self.random.random() * 0.4 for _ in range(self.random.randint(0, 20))):
            self.run_until(round(at, 6))
            resident = self.request(f"r{at}", longest=800)
            self.stage.books.add(job(resident), self.now)
            self.submit(resident)
        self.run_until(0.5)
        candidate = self.request("candidate", longest=1500)
        forecast = self.stage.forecaster.of(job(candidate), self.stage.books, self.now, pace_s=self.pace_s, whole=True)
        truth = Truth(forecast, candidate, self.engine.residents)
        self.submit(candidate)
        self.play_out(truth)
        return truth

    def request(self, id: str, longest: int) -> Request:
        draw = self.random
        prompt, ttft_s = draw.randint(1, longest), draw.choice([0.2, 0.5, 1.0])
        return request(id, prompt, ttft_s, self.pace_s, self.now, most=draw.randint(60, 200))

    def submit(self, request: Request) -> None:
        assert request.max_tokens is not None
        made = sim.Job(request.id, request.prompt_tokens, request.max_tokens, request.slo, request.arrived_at)
        self.engine.submit(self.now, made)
        if self.ends_at is None:
            self.ends_at = self.engine.begin(self.now)

    def end(self) -> sim.IterationResult:
        assert self.ends_at is not None
        self.now = self.ends_at
        return self.engine.end(self.now)

    def run_until(self, at: float) -> None:
        while self.ends_at is not None and self.ends_at <= at:
            result, books = self.end(), self.stage.books
            for done in result.finished:
                books.remove(done.id)
            books.progressed(self.engine.token_counts(), self.engine.prefilling(), result.iteration, self.now)
            self.ends_at = self.engine.begin(self.now)
        self.now = at

    def play_out(self, truth: Truth) -> None:
        while self.ends_at is not None:
            if truth.second_at == math.inf:
                truth.longest_s = max(truth.longest_s, self.ends_at - self.now)
            truth.peak_kv = max(truth.peak_kv, self.engine.kv_allocated)
            result = self.end()
            if truth.first_at < math.inf:
                truth.second_at = min(truth.second_at, self.now)
            if truth.candidate.id in result.first:
                truth.first_at = self.now
            self.ends_at = self.engine.begin(self.now)


KINDS: dict[str, tuple[ChunkRule, ChunkBound]] = {
    "dynamic": (ChunkRule(), "pace"),
    "spending slack": (ChunkRule(), "slack"),
    "spending slack if needed": (ChunkRule(), "need"),
    "fixed": (ChunkRule("fixed", 128), "pace"),
}
_PLAYED: dict[str, list[Truth]] = {}


@pytest.fixture(params=KINDS)
def truths(request: pytest.FixtureRequest) -> list[Truth]:
    """Sixty seeds of one kind of engine, played once."""
    kind: str = request.param
    if kind not in _PLAYED:
        rule, bound = KINDS[kind]
        _PLAYED[kind] = [Play(seed, rule, bound).truth() for seed in range(60)]
    return _PLAYED[kind]


def test_the_first_tokens_come_when_forecast(truths: list[Truth]) -> None:
    """Each within an iteration or so; three of four within a tenth of one."""
    near = 0
    for truth in truths:
        off_s = abs(truth.forecast.first_token_at - truth.first_at)
        assert off_s <= 1.2 * truth.longest_s, truth
        assert truth.candidate.slo is not None
        second_at = truth.candidate.slo.due_at(truth.candidate.arrived_at, 1) - truth.forecast.token1_s
        assert abs(second_at - truth.second_at) <= 1.2 * truth.longest_s, truth
        near += off_s <= 0.1 * truth.longest_s
    assert near >= 0.75 * len(truths)


def test_the_largest_kv_is_the_forecasts_where_lengths_are_certain(truths: list[Truth]) -> None:
    """As near as the grid lets it: who ends between two points has grown since the first of them."""
    step = max(b - a for a, b in pairwise(GRID) if b <= 256)
    for truth in truths:
        forecast_kv = KV_TOKENS - truth.forecast.memory_tokens
        assert abs(forecast_kv - truth.peak_kv) <= step * (truth.residents + 1), truth
        assert forecast_kv == pytest.approx(truth.peak_kv, rel=0.1), truth


# --------------------------------------------------------------------------------- each test, deciding alone


Switches = Mapping[str, object]
NONE: Switches = {}


def forecast(stage: Stage, candidate: Request, pace_s: float) -> Forecast:
    stage.books.pace_s = pace_s
    return stage.forecaster.of(job(candidate), stage.books, 0.0, pace_s=pace_s, whole=True)


def alone(forecast: Forecast) -> tuple[str, float]:
    """The only test that refuses, and its margin."""
    [(cause, margin)] = [(cause, margin) for cause, margin in forecast.margins().items() if margin < 0.0]
    assert forecast.lacks == cause
    assert not forecast.admits
    return cause, margin


def memory(switches: Switches = NONE) -> Forecast:
    """Two long prompts would fill an instance that has room for one."""
    stage = Stage(STEADY, instance=Instance("i", "steady", kv_tokens=1000), switches=switches)
    stage.decode(request("resident", prompt=600, most=10))
    return forecast(stage, request("candidate", prompt=500, most=10), 0.1)


def pace(switches: Switches = NONE) -> Forecast:
    """Two decodes take 10.2 ms, and the host promises 10.15 ms: a loose guest would spoil it for the host."""
    stage = Stage(switches=switches)
    stage.decode(request("host", ttft_s=5.0, tpot_s=0.01015))
    return forecast(stage, request("candidate"), 0.01015)


def prefill(switches: Switches = NONE) -> Forecast:
    """500 tokens take 60 ms on an idle instance, and are due after 50; there is time enough for token 1."""
    return forecast(Stage(switches=switches), request("candidate", prompt=500, ttft_s=0.05, tpot_s=0.5), 0.5)


def token1(switches: Switches = NONE) -> Forecast:
    """The candidate's own token 0 is in time after 60 ms, but a patient prompt behind it fills the next chunk too."""
    stage = Stage(chunk=ChunkRule("fixed", 500), switches=switches)
    stage.queue(request("patient", prompt=2000, ttft_s=10.0, tpot_s=0.02))
    return forecast(stage, request("candidate", ttft_s=0.1, tpot_s=0.015), 0.02)


def queued(switches: Switches = NONE) -> Forecast:
    """The candidate is due first and would put a prompt behind itself that just makes it without."""
    stage = Stage(switches=switches)
    stage.queue(request("queued", prompt=512, ttft_s=0.07))
    return forecast(stage, request("candidate", prompt=300, ttft_s=0.065), 0.1)


def decodes(switches: Switches = NONE) -> Forecast:
    """A fixed chunk makes an iteration of 50 ms where the next token of a decode is due in 30."""
    stage = Stage(chunk=ChunkRule("fixed", 512), switches=switches)
    stage.decode(request("resident", ttft_s=0.01, tpot_s=0.02))
    return forecast(stage, request("candidate", prompt=400), 0.02)


@pytest.mark.parametrize(
    ("scene", "switch", "margin"),
    [
        (memory, "test_memory", 1000 - 609 - 508 - 1),  # at 8 iterations on, the last grid point before both end
        (pace, "test_pace", 0.01015 - 0.0102),
        (prefill, "test_prefill", 0.05 - 0.06),
        (token1, "test_token1", 0.115 - 0.06 - 0.06),
        (queued, "test_prefill", 0.07 - 0.0612 - 0.04),
        (decodes, "test_prefill", 0.03 - 0.0501),
    ],
)
def test_each_test_decides_alone_somewhere(scene: Callable[[Switches], Forecast], switch: str, margin: float) -> None:
    cause, short = alone(scene({}))
    assert cause == getattr(scene, "__name__", "")
    assert short == pytest.approx(margin, abs=3e-4)
    assert scene({switch: False}).admits, "with the test switched off it is admitted"


def test_an_instance_without_a_free_seat_admits_nobody() -> None:
    stage = Stage(instance=Instance("i", "steady", max_num_seqs=1))
    stage.decode(request("resident"))
    assert alone(forecast(stage, request("candidate"), 0.1)) == ("seqs", -1.0)


def test_margins_not_looked_at_are_left_out() -> None:
    stage = Stage(instance=Instance("i", "steady", kv_tokens=50))
    hasty = stage.forecaster.of(job(request("candidate")), stage.books, 0.0, pace_s=0.1)
    assert hasty.lacks == "memory"
    assert "prefill" not in hasty.margins()
    assert "prefill" in forecast(stage, request("candidate"), 0.1).margins()


def test_a_guest_leaves_a_share_of_the_pace_free() -> None:
    stage = Stage()
    stage.decode(request("host"))
    candidate = job(request("candidate"))
    admitted = stage.forecaster.of(candidate, stage.books, 0.0, pace_s=0.0105)
    reserved = stage.forecaster.of(candidate, stage.books, 0.0, pace_s=0.0105, reserve=0.1)
    assert (admitted.lacks, reserved.lacks) == (None, "pace")


def test_a_margin_is_added_to_a_predicted_wait_before_it_is_judged() -> None:
    asks = request("candidate", prompt=500, ttft_s=1.0, tpot_s=0.5)
    plain, careful = (forecast(Stage(switches={"ttft_margin": m}), asks, 0.5) for m in (0.0, 0.2))
    assert careful.prefill_s == pytest.approx(plain.prefill_s - 0.2 * plain.first_token_at)


def test_best_effort_keeps_its_share_of_memory_free() -> None:
    stage = Stage(instance=Instance("i", "steady", kv_tokens=1000), switches={"best_effort_headroom": 0.2})
    candidate = request("candidate", prompt=850, most=10)
    bound = stage.forecaster.of(job(candidate), stage.books, 0.0, pace_s=0.2)
    free = stage.forecaster.of(job(candidate, tier=None), stage.books, 0.0, pace_s=0.2, waive=True)
    assert (bound.lacks, free.lacks) == (None, "memory")


def test_a_bound_request_may_be_judged_as_if_best_effort_had_left() -> None:
    stage = Stage(instance=Instance("i", "steady", kv_tokens=1000))
    stage.books.add(job(request("free", prompt=600), tier=None), 0.0)
    candidate = job(request("candidate", prompt=600))
    crowded = stage.forecaster.of(candidate, stage.books, 0.0, pace_s=0.2)
    cleared = stage.forecaster.of(candidate, stage.books, 0.0, pace_s=0.2, without=frozenset({"free"}))
    assert (crowded.lacks, cleared.lacks) == ("memory", None)


def test_the_margin_of_memory_ends_at_what_everybody_holds_who_stays() -> None:
    """A prompt of 90 % of the memory fits alone, however little is known of its answer."""
    lengths, most = LengthModel(1, 256), Limits(1000, 8, 512, block_size=1)
    profile = dataclasses.replace(STEADY, limits=most)
    books = Books(Instance("i", "steady"), profile, Settings(), lengths)
    forecaster = Forecaster(Settings(), lengths)
    for prompt, lacks in ((900, None), (980, "memory")):
        candidate = request("candidate", prompt=prompt, ttft_s=9.0, most=50)
        assert forecaster.of(job(candidate), books, 0.0, pace_s=0.1).lacks == lacks


# ------------------------------------------------------------------------------------------------------ the law


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    chunk = draw(st.sampled_from([ChunkRule(), ChunkRule("fixed", 128)]))
    stage = Stage(REAL, chunk, switches={"chunk_bound": draw(st.sampled_from(["pace", "slack", "need"]))})
    for n in range(draw(st.integers(0, 6))):
        prompt, ttft_s = draw(st.integers(1, 900)), draw(st.integers(3, 60)) / 100
        resident = request(f"r{n}", prompt, ttft_s, draw(st.sampled_from([0.01, 0.015, 0.03])))
        if draw(st.booleans()):
            stage.decode(resident, made=draw(st.integers(1, 30)))
        else:
            stage.queue(resident)
    return stage


def late(stage: Stage) -> list[str]:
    """Who of those queued would be late, as the forecast reckons, though nobody joined."""
    books, count = stage.books, len(stage.books.ids)
    finish, inst = np.zeros(count + 1), books.inst(0.0)
    kernels.run_queue(
        books.packed, inst, books.rows, count, books.gauge(), GRID, np.zeros(kernels.R_COLUMNS), False, True, 0.0,
        math.inf, finish,
    )  # fmt: skip
    queued = books.rows[:, kernels.R_LEFT] > 0
    after = (1.0 + inst[kernels.I_MARGIN]) * finish[:count] > books.rows[:, kernels.R_DUE]
    return [id for id, is_late in zip(books.ids, queued & after, strict=True) if is_late]


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    stages(), st.integers(1, 900), st.integers(1, 40), st.integers(0, 60), st.sampled_from([0.01, 0.015, 0.03]),
    st.sampled_from([1.0, 1.5]),
)  # fmt: skip
def test_who_is_admitted_is_admitted_with_a_looser_slo(
    stage: Stage, prompt: int, ttft: int, more: int, tpot_s: float, slower: float
) -> None:
    """Where nobody queued is late already: behind one that is beyond help, a later turn may be too late."""
    stage.books.pace_s = tpot_s
    assume(late(stage) == [])
    strict = request("candidate", prompt, ttft / 100, tpot_s)
    looser = request("candidate", prompt, (ttft + more) / 100, tpot_s * slower)
    if forecast(stage, strict, tpot_s).admits:
        assert forecast(stage, looser, tpot_s).admits
