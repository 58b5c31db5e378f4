"""Layer tables: interpolation on their nested grid, and the iteration they add up to."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.profile import ProfileError
from polyserve.profiles.compose import compose
from polyserve.profiles.kernels import Engine, model_named
from polyserve.profiles.layers import IN_EVERY_LAYER, ONCE, PER_SEQUENCE, Grid, LayerKernels, LayerTables
from polyserve.profiles.sources import read_sources

MODEL = model_named("llama-3-8b")


def attention_us(chunk: float, past: float, decodes: float, context: float) -> float:
    """Linear in each coordinate, so that interpolation is exact."""
    return 5.0 + 0.01 * chunk + 0.001 * past + 0.02 * decodes + 1e-3 * decodes * context


def dense_us(tokens: float) -> float:
    return 30.0 + 0.2 * tokens


def write(path: Path, columns: str, rows: list[tuple[object, ...]]) -> Path:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split(","))
        writer.writerows(rows)
    return path


def grid_rows(time: Callable[[float, float, float, float], float]) -> list[tuple[float, ...]]:
    """As LLMServingSim measures: decodes alone, chunks alone, both; each chunk's contexts on a grid of its own."""
    contexts = {0: (16, 256, 4096), 16: (16, 256, 4096), 24: (512, 2048), 2048: (16, 256, 4096)}
    shapes = [(0, 0, n, k) for n in (1, 8, 64, 256) for k in contexts[0]]
    for chunk in (16, 24, 2048):
        for past in (0, *contexts[chunk]):
            shapes.append((chunk, past, 0, 0))
            shapes += [(chunk, past, n, k) for n in (1, 8, 64) for k in contexts[chunk]]
    return [(*shape, time(*shape)) for shape in shapes]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tables as LLMServingSim writes them, with times that can be said by hand."""
    folder = tmp_path_factory.mktemp("layers")
    dense = [(name, t, dense_us(t)) for name in (*IN_EVERY_LAYER, *ONCE) for t in (1, 64, 2048)]
    heads = [(name, n, 10.0 + n) for name in PER_SEQUENCE for n in (1, 256)]
    skew = [(kind, n, 100.0, 100.0 + n / 8) for kind in ("pure", "mixed") for n in (8, 64) for _ in range(3)]
    return {
        "attention": write(
            folder / "a.csv.gz", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", [*grid_rows(attention_us)]
        ),
        "dense": write(folder / "d.csv", "layer,tokens,time_us", [*dense]),
        "heads": write(folder / "h.csv", "layer,sequences,time_us", [*heads]),
        "skew": write(folder / "s.csv", "regime,n,t_mean_us,t_skew_us", [*skew]),
    }


def tables(files: dict[str, Path], *left_out: str) -> LayerTables:
    read = read_sources([file for name, file in files.items() if name not in left_out], memory_gib=80.0)
    assert isinstance(read, LayerTables)
    return read


@given(st.integers(0, 2048), st.integers(0, 5000), st.integers(0, 64), st.integers(16, 5000))
def test_what_is_linear_is_interpolated_exactly(chunk: int, past: int, decodes: int, context: int) -> None:
    if 0 < chunk < 16 or chunk + decodes == 0:
        return
    grid = Grid((c, p, n, k, t) for c, p, n, k, t in grid_rows(attention_us))
    past, context = past if chunk else 0, max(context, 512) if decodes else 0
    assert grid.at(chunk, past, decodes, context) == pytest.approx(attention_us(chunk, past, decodes, context))


def test_below_the_smallest_chunk_its_time_is_taken() -> None:
    grid = Grid((c, p, n, k, t) for c, p, n, k, t in grid_rows(attention_us))
    assert grid.at(1, 0, 8, 256) == grid.at(16, 0, 8, 256)


def test_a_chunk_is_never_mistaken_for_none() -> None:
    grid = Grid([(0, 0, 1, 16, 1.0), (16, 0, 1, 16, 100.0), (32, 0, 1, 16, 200.0)])
    assert grid.at(1, 0, 1, 16) == 100.0
    with pytest.raises(ProfileError, match="no rows for 0"):
        grid.at(16, 0, 0, 0)


@pytest.mark.parametrize(
    "shape", [(0, 0, 1, 256), (0, 0, 64, 1000), (512, 0, 0, 0), (1024, 512, 0, 0), (256, 16, 8, 900)]
)
def test_an_iteration_is_the_sum_of_its_operators(files: dict[str, Path], shape: tuple[int, int, int, int]) -> None:
    chunk, _, decodes, _ = shape
    kernels = LayerKernels(tables(files, "skew"), MODEL, Engine())
    tokens, sequences = chunk + decodes, decodes + (chunk > 0)
    layer = attention_us(*shape) + sum(IN_EVERY_LAYER.values()) * dense_us(tokens)
    by_hand = (32 * layer + len(ONCE) * dense_us(tokens) + len(PER_SEQUENCE) * (10 + sequences)) / 1e6
    columns = (np.array([float(x)]) for x in shape)
    assert kernels.iteration_s(*columns)[0] == pytest.approx(by_hand)


def test_unequal_contexts_cost_what_the_skew_table_says(files: dict[str, Path]) -> None:
    equal = LayerKernels(tables(files, "skew"), MODEL, Engine())
    unequal = LayerKernels(tables(files), MODEL, Engine())
    assert unequal.attention_s(0, 0, 64, 256) == pytest.approx(1.08 * equal.attention_s(0, 0, 64, 256))
    assert unequal.attention_s(0, 0, 1, 256) == equal.attention_s(0, 0, 1, 256)
    assert equal.skew(64, True) == 1.0


def test_what_decodes_cost_more_beside_a_chunk_is_fitted(tmp_path: Path, files: dict[str, Path]) -> None:
    def dearer(chunk: float, past: float, decodes: float, context: float) -> float:
        return 5.0 + 1e-6 * chunk * (past + chunk / 2) + (2.0 if chunk else 1.0) * 1e-3 * decodes * context

    rows = grid_rows(dearer)
    file = write(tmp_path / "a.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", [*rows])
    profile = compose(tables(files | {"attention": file}, "skew"), MODEL, Engine(1, 64, 2048), "dear").profile
    assert profile.mixed_kv_factor == pytest.approx(2.0, rel=0.05)  # the grid of chunk 24 lacks short contexts
    assert profile.per_kv_token_s == pytest.approx(32e-9, rel=0.02)
    assert "measured" in profile.notes["mixed"]
    assert "MIT" in profile.notes["licence"]


def test_several_gpus_want_an_all_reduce_table(files: dict[str, Path]) -> None:
    with pytest.raises(ProfileError, match="TP 2 wants an all-reduce table"):
        LayerKernels(tables(files), MODEL, Engine(tensor_parallel=2))


def test_another_dtype_or_model_than_was_measured_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="not of 'fp8'"):
        LayerKernels(tables(files), MODEL, Engine(dtype="fp8"))
    meta = tmp_path / "meta.yaml"
    meta.write_text("{gpu: RTX PRO 6000, vllm_version: 0.19.0, model: meta-llama/Llama-3.1-8B}", encoding="utf-8")
    read = tables(files | {"meta": meta})
    assert LayerKernels(read, MODEL, Engine()).notes()["composition"].find("vLLM 0.19.0 on RTX PRO 6000") > 0
    with pytest.raises(ProfileError, match=r"of meta-llama/Llama-3\.1-8B, not of llama-3-70b"):
        LayerKernels(read, model_named("llama-3-70b"), Engine())


def test_operators_that_are_missing_or_not_known_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    few = write(tmp_path / "few.csv", "layer,tokens,time_us", [("qkv_proj", 1, 1.0)])
    with pytest.raises(ProfileError, match=r"dense table has no rows of 'rotary_emb'; it has: qkv_proj"):
        LayerKernels(tables(files | {"dense": few}), MODEL, Engine())
    more = [*((name, 1, 1.0) for name in (*PER_SEQUENCE, "router"))]
    with pytest.raises(ProfileError, match="per_sequence table has 'router'"):
        LayerKernels(
            tables(files | {"heads": write(tmp_path / "more.csv", "layer,sequences,time_us", [*more])}), MODEL, Engine()
        )


def test_measured_limits_are_those_of_the_tables(files: dict[str, Path]) -> None:
    read = tables(files)
    assert (read.largest_chunk, read.largest_batch) == (2048, 256)
    assert LayerKernels(read, MODEL, Engine()).measured_to() == (2048.0, 256.0, 256 * 4096.0)
    assert math.isclose(read.gpu["gpu"]["mem_capacity"], 80 * 2**30)
