"""Kernel tables by their columns: which files make up one GPU's tables, whatever they are called.

Two families are known: AIConfigurator's (`kernels.py`: every kernel by itself, Parquet) and LLMServingSim's
(`layers.py`: operators of a layer, mixed attention, CSV). YAML beside them is a GPU's data sheet (AIConfigurator) or
says how the tables were measured (LLMServingSim).
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from polyserve.core.profile import ProfileError
from polyserve.profiles.kernels import TABLE_COLUMNS, Columns, Tables, columns_of, data_sheet
from polyserve.profiles.layers import LAYER_COLUMNS, LayerTables

KINDS = TABLE_COLUMNS | LAYER_COLUMNS
AIC, LAYERS = ("gemm", "context_attention", "generation_attention"), ("attention", "dense", "per_sequence")
TEXT = {"layer", "regime"}
GIB = 2**30
# Memory as the driver reports it, of GPUs that no data sheet of AIConfigurator's comes with.
MEMORY_GIB = {"rtxpro6000": 95.6}
# What AIConfigurator's data sheets set aside for activations and CUDA graphs, taken for other GPUs too.
OTHER_BYTES = 3584 * 2**20


def read_sources(files: Iterable[str | Path], memory_gib: float | None = None) -> Tables | LayerTables:
    """The tables of one GPU from files in any order; raises `ProfileError` naming the file or kind at fault.

    A data sheet that lies beside AIConfigurator's tables under their GPU's name need not be given.
    """
    found: dict[str, Path] = {}
    for file in map(Path, files):
        kind = _kind(file)
        if kind in found:
            raise ProfileError(f"{file}: a second {kind} table beside {found[kind]}; give those of one GPU")
        found[kind] = file
    tables = {kind: file for kind, file in found.items() if kind in KINDS}
    if families := [wanted for wanted in (AIC, LAYERS) if set(wanted) & set(tables)]:
        if len(families) > 1:
            raise ProfileError("AIConfigurator's and LLMServingSim's tables cannot be mixed; give those of one of them")
        if missing := [kind for kind in families[0] if kind not in tables]:
            raise ProfileError(f"no {missing[0]} table among the files: {', '.join(KINDS[missing[0]])}")
        return (_kernels if families[0] == AIC else _layers)(found, memory_gib)
    raise ProfileError("no kernel tables among the files")


def _kernels(found: Mapping[str, Path], memory_gib: float | None) -> Tables:
    if memory_gib is not None:
        raise ProfileError("--memory-gib: AIConfigurator's data sheet says it")
    read = {kind: columns_of(file, KINDS[kind]) for kind, file in found.items() if kind in TABLE_COLUMNS}
    sheet = found.get("data sheet") or _sheet_beside(found["gemm"])
    return Tables(
        gemm=read["gemm"],
        context=read["context_attention"],
        generation=read["generation_attention"],
        allreduce=read.get("custom_allreduce"),
        gpu=data_sheet(sheet),
        origin=", ".join(found[kind].name for kind in TABLE_COLUMNS if kind in found),
    )


def _sheet_beside(table: Path) -> Path:
    """`GPU.yaml` beside `GPU_..._perf.parquet`, or beside AIConfigurator's `data/GPU/...`."""
    for folder in table.absolute().parents:
        for sheet in sorted(folder.glob("*.yaml")):
            if table.name.startswith(f"{sheet.stem}_") or sheet.stem in table.parts:
                return sheet
    raise ProfileError(f"{table}: want the GPU's data sheet too, as h200_sxm.yaml in AIConfigurator's systems")


def _layers(found: Mapping[str, Path], memory_gib: float | None) -> LayerTables:
    read = {kind: _read_csv(file, KINDS[kind]) for kind, file in found.items() if kind in LAYER_COLUMNS}
    meta = _yaml(found["meta"]) if "meta" in found else {}
    gpu, memory_note = _memory(str(meta.get("gpu", "")), found["attention"].name, memory_gib)
    allreduce = found.get("custom_allreduce")
    return LayerTables(
        attention=read["attention"],
        dense=read["dense"],
        per_sequence=read["per_sequence"],
        skew=read.get("skew"),
        gpu=gpu,
        origin=", ".join(found[kind].name for kind in (*LAYER_COLUMNS, "custom_allreduce") if kind in found),
        allreduce=columns_of(allreduce, TABLE_COLUMNS["custom_allreduce"]) if allreduce else None,
        model=str(meta.get("model", "")),
        measured_in=f"vLLM {meta['vllm_version']} on {meta['gpu']}" if "vllm_version" in meta else "an engine",
        memory=memory_note,
    )


def _memory(gpu: str, file: str, gib: float | None) -> tuple[dict[str, Any], str]:
    """A data sheet with the memory alone, and where the number is from; empty where nobody knows."""
    note = "as given"
    if gib is None:
        named = "".join(c for c in f"{gpu} {file}".lower() if c.isalnum())
        gib = next((g for name, g in MEMORY_GIB.items() if name in named), None)
        note = f"known of {gpu or file}"
    if gib is None:
        return {}, "not known"
    return {"gpu": {"mem_capacity": gib * GIB}, "misc": {"other_mem": OTHER_BYTES}}, f"{gib:g} GiB, {note}"


# ------------------------------------------------------------------------------------------------------ the files


def _kind(file: Path) -> str:
    """What a file is: a kind of table, `data sheet` or `meta`."""
    if file.suffix in (".yaml", ".yml"):
        plain = _yaml(file)
        if isinstance(plain.get("gpu"), dict):
            return "data sheet"
        if isinstance(plain.get("gpu"), str):
            return "meta"
        raise ProfileError(f"{file}: neither a GPU's data sheet nor a description of tables: no gpu")
    names = _header(file)
    for kind, columns in KINDS.items():
        if set(columns) <= set(names):
            return kind
    known = "; ".join(f"{kind}: {', '.join(columns)}" for kind, columns in KINDS.items())
    raise ProfileError(f"{file}: no kernel table that is known; its columns are {', '.join(names)}. Known are {known}")


def _yaml(file: Path) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"{file}: cannot be read: {error}") from None
    if not isinstance(plain, dict):
        raise ProfileError(f"{file}: neither a GPU's data sheet nor a description of tables")
    return dict(plain)


def _header(file: Path) -> list[str]:
    if file.suffix != ".parquet":
        return next(iter(_rows(file)), [])
    try:
        return list(pq.read_schema(file).names)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{file}: cannot be read as Parquet: {error}") from None


def _rows(file: Path) -> list[list[str]]:
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    except FileNotFoundError:
        raise ProfileError(f"{file}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ProfileError(f"{file}: cannot be read as a table: {error}") from None
    return [row for row in csv.reader(text.splitlines()) if row]


def _read_csv(file: Path, needed: tuple[str, ...]) -> Columns:
    names, *rows = _rows(file)
    if not rows:
        raise ProfileError(f"{file}: has no rows")
    columns: Columns = {}
    for name in needed:
        at = names.index(name)
        try:
            cells = [row[at] for row in rows]
            columns[name] = np.array(cells) if name in TEXT else np.array([float(cell) for cell in cells])
        except (IndexError, ValueError) as error:
            raise ProfileError(f"{file}: column {name!r} wants a number in every row: {error}") from None
        if name not in TEXT and not (np.isfinite(columns[name]).all() and (columns[name] >= 0).all()):
            raise ProfileError(f"{file}: column {name!r} wants finite numbers that are not negative")
    return columns
