"""Composition, on tables made up so that every time can be said by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from polyserve.core.profile import ProfileError
from polyserve.profiles.compose import Composed, compose, kv_tokens, mixed
from polyserve.profiles.kernels import Engine, Kernels, model_named, read_tables

MODEL = model_named("llama-3-8b")
GPU = {
    "gpu": {
        "mem_bw": 2e12,
        "mem_bw_empirical_scaling_factor": 0.8,
        "mem_empirical_constant_latency": 3e-6,
        "mem_capacity": 80 * 2**30,
    },
    "misc": {"nccl_mem": {1: 0, 2: 400 * 2**20}, "other_mem": 3584 * 2**20},
}
PER_FLOP, PER_WEIGHT = 1e-11, 1.2e-9  # ms: 100 TFLOP/s times m * n * k, 2 bytes at 1.7 TB/s times n * k


def gemm_ms(m: float, n: float, k: float) -> float:
    return PER_FLOP * m * n * k + PER_WEIGHT * n * k


def context_ms(isl: float) -> float:
    return 0.01 + 1e-7 * isl * isl


def generation_ms(batch: float, kv: float) -> float:
    return 0.01 + 3e-6 * batch * kv


def allreduce_ms(elements: float) -> float:
    return 0.005 + 1e-8 * elements


def write(folder: Path, kind: str, rows: list[dict[str, object]], version: str = "0.24.0") -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / f"tiny_vllm-{version}_{kind}_perf.parquet")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables whose times are linear in what they are interpolated over, so that interpolation is exact."""
    folder = tmp_path_factory.mktemp("systems")
    sizes = itertools.product((1, 64, 1024, 8192), (1024, 8192, 131072), (1024, 4096, 16384))
    write(folder, "gemm", [{"m": m, "n": n, "k": k, "latency": gemm_ms(m, n, k)} for m, n, k in sizes])
    heads = [{"num_heads": 32 // tp, "num_key_value_heads": 8 // tp} for tp in (1, 2)]
    isls = [1, *range(64, 2049, 64), *range(3072, 16385, 1024)]
    write(
        folder,
        "context_attention",
        [h | {"batch_size": 1, "isl": isl, "latency": context_ms(isl)} for h in heads for isl in isls],
    )
    write(
        folder,
        "generation_attention",
        [
            h | {"batch_size": b, "step": kv - 1, "latency": generation_ms(b, kv)}
            for h in heads
            for b, kv in itertools.product((1, 16, 256), (64, 1024, 4096))
        ],
    )
    write(
        folder,
        "custom_allreduce",
        [
            {"num_gpus": 2, "message_size": n, "backend": "vllm_graph", "latency": allreduce_ms(n)}
            for n in (128, 2**20, 2**27)
        ],
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(GPU), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def composed(tables: Path) -> Composed:
    engine = Engine(max_num_seqs=256, max_num_batched_tokens=2048)
    return compose(read_tables(tables, "tiny"), MODEL, engine, "tiny", host_overhead_s=1e-3)


def by_hand_s(chunk: int, past: int, decodes: int, context: int, tp: int = 1) -> float:
    tokens = chunk + decodes
    layer = (
        gemm_ms(tokens, 6144 / tp, 4096)
        + gemm_ms(tokens, 4096, 4096 / tp)
        + gemm_ms(tokens, 28672 / tp, 4096)
        + gemm_ms(tokens, 4096, 14336 / tp)
    )
    if chunk:
        layer += context_ms(chunk + past) * (1 - (past / (chunk + past)) ** 2)
    if decodes:
        layer += generation_ms(decodes, context)
    if tp > 1:
        layer += 2 * allreduce_ms(tokens * 4096)
    values = 2 * (2 + 2) * 4096 + 3 * 14336 // tp  # two residual norms, one gated activation: read and written
    layer += 1e3 * (tokens * values * 2 / 1.6e12 + 9e-6)
    head = gemm_ms(decodes + (chunk > 0), 128256 / tp, 4096)
    return (32 * layer + head) / 1e3


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "shape", [(0, 0, 1, 1024), (0, 0, 100, 500), (512, 0, 0, 0), (1024, 1024, 0, 0), (256, 512, 64, 2000)]
)
def test_an_iteration_is_the_sum_of_its_kernels(tables: Path, shape: tuple[int, int, int, int], tp: int) -> None:
    kernels = Kernels(read_tables(tables, "tiny"), MODEL, Engine(tensor_parallel=tp))
    chunk, past, decodes, context = (np.array([float(x)]) for x in shape)
    assert kernels.iteration_s(chunk, past, decodes, context)[0] == pytest.approx(by_hand_s(*shape, tp), rel=1e-6)


def test_the_law_comes_close_to_every_shape_it_was_fitted_to(composed: Composed) -> None:
    profile, shapes = composed.profile, composed.shapes
    rows = zip(shapes.prefill, shapes.decodes, shapes.kv, shapes.attention, strict=True)
    law = np.array([profile.iteration_s(*row) - profile.host_overhead_s for row in rows])
    errors = np.abs(law / shapes.seconds - 1)
    assert errors.mean() < 0.01
    assert errors.max() < 0.06
    assert errors.max() == pytest.approx(composed.law.max_error, abs=1e-4)
    assert f"{composed.law.max_error:.1%}" in profile.notes["fit"]


def test_a_profile_carries_engine_limits_and_what_was_measured(composed: Composed) -> None:
    profile = composed.profile
    free = 80 * 2**30 * 0.9 - 8.03e9 * 2 - 3584 * 2**20
    assert profile.limits.kv_tokens == int(free / (131072 * 16)) * 16
    assert (profile.limits.max_num_seqs, profile.limits.max_num_batched_tokens) == (256, 2048)
    assert profile.knots[-1] == 2048
    assert profile.measured_to == (8192.0, 256.0, 256 * 4096.0)
    assert profile.host_overhead_s == 1e-3
    assert "0.24.0" in profile.notes["origin"]


def test_mixed_names_its_assumption(composed: Composed) -> None:
    dearer = mixed(composed.profile, MODEL, "tiny-mixed")
    assert dearer.iteration_s(64, 10, 10_000) > composed.profile.iteration_s(64, 10, 10_000)
    assert dearer.iteration_s(0, 10, 10_000) == composed.profile.iteration_s(0, 10, 10_000)
    assert "assumption" in dearer.notes["mixed"]


def test_beyond_the_measured_contexts_memory_is_read_no_faster_than_it_can_be(tables: Path) -> None:
    tables_ = read_tables(tables, "tiny")
    flat = dict(tables_.generation) | {"latency": np.full(len(tables_.generation["latency"]), 0.05)}
    kernels = Kernels(
        type(tables_)(tables_.gemm, tables_.context, flat, tables_.allreduce, tables_.gpu, ""), MODEL, Engine()
    )
    seconds = kernels.decode_attention_s(np.array([256.0]), np.array([8192.0]))[0]
    assert seconds >= 0.05e-3 + 256 * 4096 * 4096 / 2e12  # 4,096 tokens more each, of 4,096 bytes in this layer


def test_two_gpus_share_the_weights_and_pay_nccl() -> None:
    one, two = (kv_tokens(GPU, MODEL, Engine(tensor_parallel=tp)) for tp in (1, 2))
    assert 2 * one < two < 3 * one


def test_the_newest_version_is_taken(tables: Path, tmp_path: Path) -> None:
    for file in tables.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    nested = tmp_path / "data" / "tiny" / "gemm" / "vllm"
    for version in ("0.9.1", "0.24.0"):
        (nested / version).mkdir(parents=True)
        file = tmp_path / "tiny_vllm-0.24.0_gemm_perf.parquet"
        (nested / version / "gemm_perf.parquet").write_bytes(file.read_bytes())
    (tmp_path / "tiny_vllm-0.24.0_gemm_perf.parquet").unlink()
    table = next(tmp_path.glob("tiny*_generation*"))
    (tmp_path / "tiny_vllm-0.9.0_generation_attention_perf.parquet").write_bytes(table.read_bytes())
    origin = read_tables(tmp_path, "tiny").origin
    assert "vllm-0.24.0_generation" in origin
    assert "vllm-0.9.0" not in origin


def test_what_is_missing_is_named(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no gemm table of huge"):
        read_tables(tables, "huge")
    with pytest.raises(ProfileError, match="unknown model 'gpt'; there are: llama-3-8b"):
        model_named("gpt")
    with pytest.raises(ProfileError, match="no rows for batch_size 1, num_heads 8"):
        Kernels(read_tables(tables, "tiny"), MODEL, Engine(tensor_parallel=4, dtype="bfloat16"))
    with pytest.raises(ProfileError, match="cannot be split over 3 GPUs"):
        Kernels(read_tables(tables, "tiny"), MODEL, Engine(tensor_parallel=3))
    with pytest.raises(ProfileError, match="leaves no memory"):
        kv_tokens(GPU, model_named("llama-3-70b"), Engine())
    for file in tables.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write(tmp_path, "gemm", [{"m": 1, "n": 1, "latency": 1.0}])
    with pytest.raises(ProfileError, match="column 'k' is missing; there are: m, n, latency"):
        read_tables(tmp_path, "tiny")
    (tmp_path / "tiny_vllm-0.24.0_gemm_perf.parquet").write_text("no", encoding="utf-8")
    with pytest.raises(ProfileError, match="cannot be read as a kernel table"):
        read_tables(tmp_path, "tiny")


def test_a_data_sheet_without_its_numbers_is_refused(tables: Path, tmp_path: Path) -> None:
    for file in tables.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tiny.yaml").write_text("gpu: {mem_bw: fast}", encoding="utf-8")
    with pytest.raises(ProfileError, match=r"gpu\.mem_bw"):
        read_tables(tmp_path, "tiny")
