"""A recorded run predicted from its GPU's kernel tables: the figures of docs/fidelity.md, and the replay's rules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.profile import Limits as EngineLimits
from polyserve.core.profile import Profile
from polyserve.profiles.compose import HOST_OVERHEAD_S, HOST_OVERHEAD_SOURCE, compose
from polyserve.profiles.kernels import Engine, model_named
from polyserve.profiles.layers import LayerTables
from polyserve.profiles.sources import read_sources
from polyserve.sim.validate import (
    METRICS,
    Limits,
    Prediction,
    Row,
    ValidateError,
    predict,
    read_log,
    without_host_overhead,
)

DATA = Path(__file__).parent.parent / "data" / "rtxpro6000"
RUN = DATA / "rtxpro6000_llama-3.1-8b_tp1_vllm_requests.csv.gz"
AS_RECORDED = Limits(max_batched_tokens=2048, max_seqs=128)
# 10 ms an iteration, whatever is in it: times that can be said by hand.
EVEN = Profile("even", (0.0, 4096.0), (0.01, 0.01), 0.0, 0.0, 0.0, EngineLimits(10**6, 64, 4096))


@pytest.fixture(scope="module")
def profile() -> Profile:
    tables = read_sources(file for file in DATA.iterdir() if "_vllm_" not in file.name and file.suffix != ".md")
    assert isinstance(tables, LayerTables)
    engine = Engine(1, tables.largest_batch, tables.largest_chunk)
    overhead = {"host_overhead_s": HOST_OVERHEAD_S, "host_overhead_source": HOST_OVERHEAD_SOURCE}
    return compose(tables, model_named("meta-llama/Llama-3.1-8B"), engine, "rtxpro6000", **overhead).profile  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def predicted(profile: Profile) -> Prediction:
    return predict(read_log(RUN), profile, AS_RECORDED)


def test_a_real_run_is_predicted_from_kernel_tables(predicted: Prediction) -> None:
    assert abs(predicted.ttft.errors["mean"]) < 0.05
    assert abs(predicted.tpot.errors["mean"]) < 0.02
    assert abs(predicted.latency.errors["mean"]) < 0.02
    assert all(abs(getattr(predicted, name).errors[p]) < 0.09 for name in METRICS for p in ("p50", "p90", "p99"))
    assert predicted.extrapolated == 0


def test_without_host_overhead_it_is_still_near_and_always_faster(profile: Profile, predicted: Prediction) -> None:
    bare = predict(read_log(RUN), without_host_overhead(profile), AS_RECORDED)
    for name, within in (("ttft", 0.08), ("tpot", 0.05), ("latency", 0.05)):
        assert abs(getattr(bare, name).errors["mean"]) < within
        assert getattr(bare, name).predicted_s["mean"] < getattr(predicted, name).predicted_s["mean"]


def test_decodes_beside_a_chunk_must_be_dearer_for_that(profile: Profile, predicted: Prediction) -> None:
    apart = dataclasses.replace(profile, mixed_kv_factor=1.0, mixed_per_decode_s=0.0)
    error = predict(read_log(RUN), apart, AS_RECORDED).ttft.errors["mean"]
    assert error < 2 * predicted.ttft.errors["mean"]


def test_the_same_log_gives_the_same_figures(profile: Profile, predicted: Prediction) -> None:
    assert predict(read_log(RUN), profile, AS_RECORDED) == predicted


def row(id: str, arrived_at: float, prompt: int = 100, output: int = 3) -> Row:
    return Row(id, prompt, output, arrived_at, arrived_at, arrived_at + 1, arrived_at + 2)


def test_alone_a_request_has_its_prompt_and_its_tokens_in_turn() -> None:
    alone = predict([row("a", 5.0)], EVEN, Limits(512, 8))
    assert alone.ttft.predicted_s["mean"] == pytest.approx(0.01)
    assert alone.tpot.predicted_s["mean"] == pytest.approx(0.01)
    assert alone.latency.predicted_s["mean"] == pytest.approx(0.03)
    assert alone.iterations == 3
    assert alone.latency.errors["mean"] == pytest.approx(0.03 / 2 - 1)


@pytest.mark.parametrize(("asynchronous", "first_s"), [(True, 0.02), (False, 0.01)])
def test_who_arrives_in_an_iteration_sits_out_the_next_where_that_is_put_together_already(
    asynchronous: bool, first_s: float
) -> None:
    limits = Limits(512, 8, async_scheduling=asynchronous)
    both = predict([row("a", 0.0, output=20), row("b", 0.015, output=20)], EVEN, limits)
    assert both.ttft.predicted_s["mean"] == pytest.approx((0.01 + first_s) / 2)


def test_a_prompt_is_cut_at_the_token_budget_and_seats_are_kept() -> None:
    long = predict([row("a", 0.0, prompt=1000)], EVEN, Limits(400, 8))
    assert long.ttft.predicted_s["mean"] == pytest.approx(0.03)
    queue = predict([row(str(n), 0.0, output=5) for n in range(3)], EVEN, Limits(400, 1))
    assert queue.ttft.predicted_s["mean"] == pytest.approx(0.06)  # 0.01, 0.06, 0.11


@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.integers(1, 600), st.integers(1, 20)),
        min_size=1,
        max_size=20,
    ),
    st.booleans(),
)
def test_every_request_ends_after_it_began(drawn: list[tuple[float, int, int]], asynchronous: bool) -> None:
    rows = [row(str(n), at, prompt, output) for n, (at, prompt, output) in enumerate(sorted(drawn))]
    run = predict(rows, EVEN, Limits(256, 4, async_scheduling=asynchronous))
    assert run.latency.predicted_s["p50"] >= run.ttft.predicted_s["p50"] > 0
    assert run.iterations >= max(output for _, _, output in drawn)


def test_one_token_answers_have_no_tpot() -> None:
    assert predict([row("a", 0.0, output=1)], EVEN, Limits(512, 8)).tpot.to_dict() == {
        "recorded_s": {},
        "predicted_s": {},
    }


def test_what_the_engine_cannot_hold_is_said() -> None:
    with pytest.raises(ValidateError, match=r"never fit into the 64 KV tokens .* --kv-tokens"):
        predict([row("a", 0.0)], EVEN, Limits(512, 8, kv_tokens=64))


HEADER = "request_id,input_toks,output_toks,arrival_time,queued_ts,first_token_ts,last_token_ts\n"


def test_a_log_is_read_in_order_of_arrival_on_one_clock(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(HEADER + "a,10,2,1002.0,12.5,13,14\nb,10,2,1000.0,10.0,11,12\n", encoding="utf-8")
    first, second = read_log(log)
    assert (first.arrived_at, first.queued_at, first.first_token_at) == (0.0, 0.0, 1.0)
    assert (second.arrived_at, second.queued_at, second.last_token_at) == (2.0, 2.5, 4.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "column 'request_id' is missing"),
        (HEADER, "has no requests"),
        (HEADER + "a,10,2,1,1,2\n", "row 2: last_token_ts is a number, not None"),
        (HEADER + "a,10,0,1,1,2,3\n", "row 2: output_toks is at least 1, not 0"),
        (HEADER + "a,10,2,1,nan,2,3\n", "row 2: queued_ts is finite"),
        (HEADER + "a,10,2,1,1,1,3\n", "row 2: queued_ts, first_token_ts and last_token_ts come in this order"),
    ],
)
def test_a_bad_log_is_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    log = tmp_path / "log.csv"
    log.write_text(text, encoding="utf-8")
    with pytest.raises(ValidateError, match=said):
        read_log(log)
    with pytest.raises(ValidateError, match="no such file"):
        read_log(tmp_path / "nowhere.csv")
    (tmp_path / "log.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ValidateError, match="cannot be read as a log"):
        read_log(tmp_path / "log.csv.gz")
