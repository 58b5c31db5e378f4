"""Files told apart by their columns, and one clear line for what cannot be used."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyserve.core.profile import ProfileError
from polyserve.profiles.kernels import TABLE_COLUMNS, Tables
from polyserve.profiles.layers import LAYER_COLUMNS, LayerTables
from polyserve.profiles.sources import read_sources

SHEET = "{gpu: {mem_bw: 1.0, mem_bw_empirical_scaling_factor: 1, mem_empirical_constant_latency: 0, mem_capacity: 9}}"


def csv_of(folder: Path, kind: str) -> Path:
    columns = LAYER_COLUMNS[kind]
    file = folder / f"{kind}.csv"
    cells = ["pure" if name == "regime" else "x" if name == "layer" else "1" for name in columns]
    file.write_text(f"{','.join(columns)}\n{','.join(cells)}\n", encoding="utf-8")
    return file


def parquet_of(folder: Path, kind: str, gpu: str = "tiny") -> Path:
    file = folder / f"{gpu}_vllm-1_{kind}_perf.parquet"
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(TABLE_COLUMNS[kind], 1)]), file)
    return file


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    return [csv_of(tmp_path, kind) for kind in ("dense", "per_sequence", "attention")]


@pytest.fixture
def kernels(tmp_path: Path) -> list[Path]:
    return [parquet_of(tmp_path, kind) for kind in ("generation_attention", "gemm", "context_attention")]


def test_layer_tables_are_known_in_any_order_and_by_any_name(layers: list[Path], tmp_path: Path) -> None:
    renamed = layers[0].rename(tmp_path / "anything.csv")
    read = read_sources([layers[2], csv_of(tmp_path, "skew"), renamed, layers[1]])
    assert isinstance(read, LayerTables)
    assert read.skew is not None
    assert read.dense["time_us"].tolist() == [1.0]
    assert "anything.csv" in read.origin


def test_kernel_tables_find_the_data_sheet_beside_them(kernels: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="want the GPU's data sheet too"):
        read_sources(kernels)
    (tmp_path / "tiny.yaml").write_text(SHEET, encoding="utf-8")
    read = read_sources(kernels)
    assert isinstance(read, Tables)
    assert read.allreduce is None
    assert read.gpu["gpu"]["mem_capacity"] == 9
    given = tmp_path / "other.yaml"
    given.write_text(SHEET.replace("9", "7"), encoding="utf-8")
    with_all = read_sources([given, parquet_of(tmp_path, "custom_allreduce"), *kernels])
    assert isinstance(with_all, Tables)
    assert with_all.allreduce is not None
    assert with_all.gpu["gpu"]["mem_capacity"] == 7


def test_memory_is_known_from_the_gpu_or_said_or_not_known(layers: list[Path], tmp_path: Path) -> None:
    unknown = read_sources(layers)
    assert isinstance(unknown, LayerTables)
    assert unknown.gpu == {}
    meta = tmp_path / "meta.yaml"
    meta.write_text("gpu: NVIDIA RTX PRO 6000 Blackwell", encoding="utf-8")
    known = read_sources([*layers, meta])
    assert isinstance(known, LayerTables)
    assert known.gpu["gpu"]["mem_capacity"] == 95.6 * 2**30
    assert "95.6 GiB, known of NVIDIA RTX PRO 6000" in known.memory


def bad(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_what_cannot_be_used_is_named_with_what_would_do(
    layers: list[Path], kernels: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ProfileError, match=r"second dense table beside .*dense.csv; give those of one GPU"):
        read_sources([*layers, bad(tmp_path, "again.csv", "layer,tokens,time_us\na,1,1\n")])
    with pytest.raises(ProfileError, match=r"cannot be mixed"):
        read_sources([*layers, *kernels])
    with pytest.raises(ProfileError, match="no dense table among the files: layer, tokens, time_us"):
        read_sources(layers[1:])
    with pytest.raises(ProfileError, match="no kernel tables among the files"):
        read_sources([csv_of(tmp_path, "skew")])
    with pytest.raises(ProfileError, match=r"columns are a, b\. Known are gemm: m, n, k, latency"):
        read_sources([bad(tmp_path, "other.csv", "a,b\n1,2\n")])
    with pytest.raises(ProfileError, match=r"nowhere.csv: no such file"):
        read_sources([tmp_path / "nowhere.csv"])
    with pytest.raises(ProfileError, match="cannot be read as a table"):
        read_sources([bad(tmp_path, "torn.csv.gz", "no gzip")])
    with pytest.raises(ProfileError, match="cannot be read as Parquet"):
        read_sources([bad(tmp_path, "torn.parquet", "no parquet")])
    with pytest.raises(ProfileError, match="neither a GPU's data sheet nor"):
        read_sources([bad(tmp_path, "list.yaml", "[1]")])
    with pytest.raises(ProfileError, match="no gpu"):
        read_sources([bad(tmp_path, "bare.yaml", "model: x")])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "has no rows"),
        ("x,many,1\n", "'tokens' wants a number"),
        ("x,1\n", "'time_us'"),
        ("x,1,-1\n", "not negative"),
    ],
)
def test_bad_rows_are_refused(layers: list[Path], tmp_path: Path, rows: str, said: str) -> None:
    layers[0] = bad(tmp_path, "bad.csv", f"layer,tokens,time_us\n{rows}")
    with pytest.raises(ProfileError, match=said):
        read_sources(layers)
