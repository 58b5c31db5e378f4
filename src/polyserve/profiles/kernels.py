"""Times of single kernels from public tables, and of the iteration that they add up to.

The tables are AIConfigurator's (Apache-2.0, github.com/ai-dynamo/aiconfigurator, `systems/`), measured inside vLLM.
One iteration of c prefill tokens behind `past` and b decodes at a mean context is

    layers * (QKV + O + gate-up + down GEMMs of c + b tokens + prefill attention + decode attention
              + 2 all-reduces + elementwise traffic) + output head of the sequences that get a token

Nothing of the CPU or the scheduler is in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from polyserve.core.profile import ProfileError

Floats = NDArray[np.float64]
Columns = dict[str, NDArray[Any]]

BYTES = 2  # of a bfloat16


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of a dense Llama-like transformer."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    parameters: float
    head_dim: int = 128

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, on all GPUs together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES


MODELS = {
    "llama-3-8b": Model("llama-3-8b", 32, 4096, 32, 8, 14336, 128256, 8.03e9),
    "llama-3-70b": Model("llama-3-70b", 80, 8192, 64, 8, 28672, 128256, 70.55e9),
    "mistral-7b": Model("mistral-7b", 32, 4096, 32, 8, 14336, 32768, 7.25e9),
    "qwen2.5-72b": Model("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064, 72.7e9),
    "qwen3-8b": Model("qwen3-8b", 36, 4096, 32, 8, 12288, 151936, 8.19e9),
    "qwen3-32b": Model("qwen3-32b", 64, 5120, 64, 8, 25600, 151936, 32.8e9),
}


def model_named(name: str) -> Model:
    """The model shape of that name; raises `ProfileError` naming those there are.

    Llama 3.1 and 3.3 have the shapes of Llama 3, and an owner before the name is passed over.
    """
    shape = re.sub(r"^llama-3\.\d-", "llama-3-", name.lower().rpartition("/")[2]).removesuffix("-instruct")
    if shape not in MODELS:
        raise ProfileError(f"unknown model {name!r}; there are: {', '.join(MODELS)}")
    return MODELS[shape]


@dataclass(frozen=True, slots=True)
class Engine:
    """How the engine is started: what turns kernel tables into one instance's profile."""

    tensor_parallel: int = 1
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    context_tokens: int = 131072
    memory_share: float = 0.9  # vLLM's gpu_memory_utilization
    dtype: str = "bfloat16"  # of the linear layers; attention and KV stay 16 bit
    kv_tokens: int | None = None  # None: what fits into the GPU's memory


# ---------------------------------------------------------------------------------------------------- the tables


TABLE_COLUMNS = {
    "gemm": ("m", "n", "k", "latency"),
    "context_attention": ("batch_size", "isl", "num_heads", "num_key_value_heads", "latency"),
    "generation_attention": ("batch_size", "step", "num_heads", "num_key_value_heads", "latency"),
    "custom_allreduce": ("num_gpus", "message_size", "backend", "latency"),
}


@dataclass(frozen=True)
class Tables:
    """One GPU's kernel tables, as columns, and its data sheet."""

    gemm: Columns
    context: Columns
    generation: Columns
    allreduce: Columns | None
    gpu: Mapping[str, Any]
    origin: str


def read_tables(directory: str | Path, gpu: str) -> Tables:
    """The vLLM tables of a GPU type, such as `h200_sxm`.

    The directory is AIConfigurator's `systems` (`data/{gpu}/.../{kind}_perf.parquet`, newest version), or holds
    flat copies (`{gpu}_..._{kind}_perf.parquet`); `{gpu}.yaml` lies in it. Raises `ProfileError`.
    """
    folder = Path(directory)
    files = {kind: _table_file(folder, gpu, kind) for kind in TABLE_COLUMNS}
    tables = {kind: columns_of(file, TABLE_COLUMNS[kind]) for kind, file in files.items()}
    return Tables(
        gemm=tables["gemm"],
        context=tables["context_attention"],
        generation=tables["generation_attention"],
        allreduce=tables["custom_allreduce"],
        gpu=data_sheet(folder / f"{gpu}.yaml"),
        origin=", ".join(file.name for file in files.values()),
    )


def data_sheet(file: Path) -> Mapping[str, Any]:
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"{file}: cannot be read as a GPU data sheet: {error}") from None
    gpu = plain.get("gpu") if isinstance(plain, dict) else None
    for field in ("mem_bw", "mem_bw_empirical_scaling_factor", "mem_empirical_constant_latency", "mem_capacity"):
        if not isinstance(gpu, dict) or not isinstance(gpu.get(field), int | float):
            raise ProfileError(f"{file}: a GPU data sheet has a number gpu.{field}")
    return dict(plain)


def _table_file(folder: Path, gpu: str, kind: str) -> Path:
    flat = f"{gpu}_*_{kind}_perf.parquet"
    found = [*folder.glob(flat), *folder.glob(f"data/{gpu}/**/vllm/*/{kind}_perf.parquet")]
    if not found:
        raise ProfileError(f"{folder}: no {kind} table of {gpu} (as {flat}, or as in AIConfigurator's systems)")
    return max(found, key=_version)


def _version(file: Path) -> tuple[list[int], str]:
    """Sorts by the numbers in the path, so that 0.24 comes after 0.9."""
    return [int(n) for n in re.findall(r"\d+", f"{file.parent.name}/{file.name}")], str(file)


def columns_of(file: Path, needed: tuple[str, ...]) -> Columns:
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise ProfileError(f"{file}: cannot be read as a kernel table: {error}") from None
    for name in needed:
        if name not in table.column_names:
            raise ProfileError(f"{file}: column {name!r} is missing; there are: {', '.join(table.column_names)}")
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def _picked(table: Columns, what: str, **wanted: object) -> Columns:
    """The rows with these values; a column that is not there was constant and is passed over."""
    mask = np.ones(len(table["latency"]), bool)
    for name, value in wanted.items():
        if name in table:
            mask &= table[name] == value
    if not mask.any():
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise ProfileError(f"the {what} table has no rows for {asked}")
    return {name: column[mask] for name, column in table.items()}


def line(x: Floats, xs: Floats, ys: Floats, least_slope: float = 0.0) -> Floats:
    """Linear between the points, the first value before them, and on with the last slope beyond."""
    order = np.argsort(xs, kind="stable")
    xs, ys = xs[order].astype(float), ys[order].astype(float)
    slope = max((ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) if len(xs) > 1 else 0.0, least_slope)
    values: Floats = np.interp(x, xs, ys) + np.maximum(x - xs[-1], 0.0) * slope
    return values


# --------------------------------------------------------------------------------------------------- the kernels


class Kernels:
    """Seconds of each kernel of one model on one GPU, interpolated from its tables."""

    mixed = False  # prefill and decode attention were timed apart

    def __init__(self, tables: Tables, model: Model, engine: Engine) -> None:
        self._tables, self._model, self._engine = tables, model, engine
        tp = engine.tensor_parallel
        if model.heads % tp or model.kv_heads % tp or model.ffn % tp:
            raise ProfileError(f"{model.name} cannot be split over {tp} GPUs")
        heads = {"num_heads": model.heads // tp, "num_key_value_heads": model.kv_heads // tp}
        kind = {"kv_cache_dtype": "bfloat16", "attn_dtype": "bfloat16", "head_dim": model.head_dim, "window_size": 0}
        self._gemm = _picked(tables.gemm, "gemm", gemm_dtype=engine.dtype)
        self._head = _picked(tables.gemm, "gemm", gemm_dtype="bfloat16")
        self._context = _picked(tables.context, "context attention", batch_size=1, **heads, **kind)
        self._generation = _picked(tables.generation, "generation attention", **heads, **kind)
        self._allreduce = None
        if tp > 1:
            if tables.allreduce is None:
                raise ProfileError(f"TP {tp} wants an all-reduce table too")
            self._allreduce = _picked(tables.allreduce, "all-reduce", num_gpus=tp, backend="vllm_graph")

    def linear_s(self, tokens: Floats, n: int, k: int, *, head: bool = False) -> Floats:
        """A GEMM of `tokens` rows, linear between the neighbouring n and k that were measured."""
        table = self._head if head else self._gemm
        total = np.zeros_like(tokens)
        for n_at, n_share in _corners(n, np.unique(table["n"])):
            for k_at, k_share in _corners(k, np.unique(table["k"])):
                rows = _picked(table, "gemm", n=n_at, k=k_at)
                total += n_share * k_share * line(tokens, rows["m"], rows["latency"])
        return total / 1e3

    def prefill_attention_s(self, chunk: Floats, past: Floats) -> Floats:
        """One chunk: its share of the causal triangle of chunk and past together, and no less than alone."""
        isl, latency = self._context["isl"], self._context["latency"]
        whole = chunk + past
        longest = float(isl.max())
        reach = np.minimum(whole, longest)
        square = (np.maximum(whole, 1.0) / np.maximum(reach, 1.0)) ** 2  # beyond the table it grows as its square
        share = 1 - (past / np.maximum(whole, 1.0)) ** 2
        behind = line(reach, isl, latency) * square * share
        alone = line(np.minimum(chunk, longest), isl, latency)
        return np.where(chunk > 0, np.maximum(behind, alone), 0.0) / 1e3

    def decode_attention_s(self, decodes: Floats, context: Floats) -> Floats:
        """A batch of decodes that all have the same context; between measured batches linear.

        Beyond the measured contexts KV is read no faster than the GPU's memory gives it.
        """
        model, tp = self._model, self._engine.tensor_parallel
        token_ms = 1e3 * model.kv_bytes_per_token / model.layers / tp / self._tables.gpu["gpu"]["mem_bw"]
        batches = np.unique(self._generation["batch_size"]).astype(float)
        rows = [_picked(self._generation, "generation attention", batch_size=b) for b in batches]
        times = np.stack(
            [line(context, r["step"] + 1.0, r["latency"], b * token_ms) for b, r in zip(batches, rows, strict=True)]
        )
        low = np.clip(np.searchsorted(batches, decodes, side="right") - 1, 0, len(batches) - 2)
        share = (decodes - batches[low]) / (batches[low + 1] - batches[low])
        every = np.arange(len(decodes))
        value = times[low, every] * (1 - share) + times[low + 1, every] * share
        return np.where(decodes > 0, value, 0.0) / 1e3

    def allreduce_s(self, tokens: Floats) -> Floats:
        """One all-reduce of the hidden states; none on one GPU."""
        if self._allreduce is None:
            return np.zeros_like(tokens)
        table = self._allreduce
        return line(tokens * self._model.hidden, table["message_size"], table["latency"]) / 1e3

    def elementwise_s(self, tokens: Floats) -> Floats:
        """Norms, residuals, rotation and activation of one layer, as memory traffic."""
        gpu, model = self._tables.gpu["gpu"], self._model
        width = 2 * (2 * model.hidden + 2 * model.hidden) + 3 * model.ffn // self._engine.tensor_parallel
        bandwidth = gpu["mem_bw"] * gpu["mem_bw_empirical_scaling_factor"]
        kernels = 3  # two fused norms, one activation
        seconds: Floats = tokens * width * BYTES / bandwidth + kernels * gpu["mem_empirical_constant_latency"]
        return seconds

    def iteration_s(self, chunk: Floats, past: Floats, decodes: Floats, context: Floats) -> Floats:
        """One engine iteration: a chunk of one prompt behind `past`, and decodes that all have that context."""
        model, tp = self._model, self._engine.tensor_parallel
        tokens = chunk + decodes
        attention_width = model.heads * model.head_dim // tp
        layer = (
            self.linear_s(tokens, (model.heads + 2 * model.kv_heads) * model.head_dim // tp, model.hidden)
            + self.linear_s(tokens, model.hidden, attention_width)
            + self.linear_s(tokens, 2 * model.ffn // tp, model.hidden)
            + self.linear_s(tokens, model.hidden, model.ffn // tp)
            + self.prefill_attention_s(chunk, past)
            + self.decode_attention_s(decodes, context)
            + 2 * self.allreduce_s(tokens)
            + self.elementwise_s(tokens)
        )
        sequences = decodes + (chunk > 0)
        return model.layers * layer + self.linear_s(sequences, model.vocab // tp, model.hidden, head=True)

    def measured_to(self) -> tuple[float, float, float]:
        """Tokens, decodes and KV tokens up to which the tables were measured."""
        table = self._generation
        kv = table["batch_size"] * (table["step"] + 1.0)
        return float(self._gemm["m"].max()), float(table["batch_size"].max()), float(kv.max())

    def notes(self) -> dict[str, str]:
        """Where the tables come from, and how they were put together."""
        model, engine = self._model, self._engine
        return {
            "origin": f"ai-dynamo/aiconfigurator: aic-core/src/aiconfigurator_core/systems/ ({self._tables.origin})",
            "licence": "Apache-2.0, Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES",
            "composition": f"{model.name}, TP {engine.tensor_parallel}, {engine.dtype}: sum over {model.layers} layers "
            "of GEMMs, prefill and decode attention, all-reduce and elementwise traffic, plus the output head; "
            "composed, not measured as a whole",
        }


def _corners(value: int, grid: NDArray[Any]) -> list[tuple[int, float]]:
    """The measured neighbours of a size with their weights; beyond the grid the last two, extended."""
    if value in grid or len(grid) == 1:
        return [(value if value in grid else int(grid[0]), 1.0)]
    high = int(np.clip(np.searchsorted(grid, value), 1, len(grid) - 1))
    low_at, high_at = int(grid[high - 1]), int(grid[high])
    share = (value - low_at) / (high_at - low_at)
    return [(low_at, 1 - share), (high_at, share)]
