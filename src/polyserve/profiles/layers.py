"""Times of one transformer layer measured inside an engine, mixed batches included, and the iteration they make.

The tables are LLMServingSim's (MIT, github.com/casys-kaist/LLMServingSim, `profiler/perf`): attention by (prefill
chunk, its computed context, decodes, their context), every other operator by tokens, the output head and the sampler
by sequences. An optional fourth gives attention when contexts in the batch are unequal. One iteration is

    layers * (QKV + rotation + attention + O + 2 norms + gate-up + activation + down, 2 all-reduces on several GPUs)
    + embedding + last norm + output head + sampler

Nothing of the CPU or the scheduler is in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyserve.core.profile import ProfileError
from polyserve.profiles.kernels import Columns, Engine, Floats, Model, line, model_named

LAYER_COLUMNS = {
    "attention": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
    "dense": ("layer", "tokens", "time_us"),
    "per_sequence": ("layer", "sequences", "time_us"),
    "skew": ("regime", "n", "t_mean_us", "t_skew_us"),
}
# How often each operator of the dense table runs: in every layer, or once an iteration.
IN_EVERY_LAYER = {
    "qkv_proj": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "layernorm": 2,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
ONCE = ("embedding", "final_layernorm")
PER_SEQUENCE = ("lm_head", "sampler")


@dataclass(frozen=True)
class LayerTables:
    """One GPU's layer tables, as columns; `gpu` has its memory, as a data sheet of AIConfigurator's would."""

    attention: Columns
    dense: Columns
    per_sequence: Columns
    skew: Columns | None
    gpu: Mapping[str, Any]
    origin: str
    allreduce: Columns | None = None
    model: str = ""  # as its makers call it; empty: not said
    measured_in: str = "an engine"
    memory: str = ""  # where the memory is from

    @property
    def largest_chunk(self) -> int:
        """Most prompt tokens of a measured chunk."""
        return int(self.attention["prefill_chunk"].max())

    @property
    def largest_batch(self) -> int:
        """Most decodes of a measured batch."""
        return int(self.attention["n_decode"].max())


class Grid:
    """Times over four coordinates, measured on nested grids: each first coordinate may have a grid of its own.

    Linear between the neighbours in each coordinate, the nearest below the first, on with the last slope beyond.
    0 is a kind of its own (no chunk, no decode) and no neighbour of anything, but for a chunk's computed context.
    """

    def __init__(self, rows: Iterable[tuple[float, float, float, float, float]]) -> None:
        self._tree: dict[float, Any] = {}
        for *at, seconds in rows:
            branch = self._tree
            for x in at[:-1]:
                branch = branch.setdefault(x, {})
            branch[at[-1]] = seconds
        self._points: dict[int, list[float]] = {}

    def at(self, chunk: float, past: float, decodes: float, context: float) -> float:
        """The time at these coordinates."""
        return self._value(self._tree, (chunk, past, decodes, context))

    def _value(self, branch: Mapping[float, Any], at: Sequence[float]) -> float:
        x, *rest = at
        apart = len(at) != 3  # all but the context of the chunk
        total = 0.0
        for point, share in self._shares(branch, x, apart):
            below = branch[point]
            total += share * (self._value(below, rest) if rest else below)
        return total

    def _shares(self, branch: Mapping[float, Any], x: float, apart: bool) -> list[tuple[float, float]]:
        """The neighbouring points with their weights."""
        if x in branch:
            return [(x, 1.0)]
        if (points := self._points.get(id(branch))) is None:
            points = self._points[id(branch)] = sorted(p for p in branch if p > 0 or not apart)
        if not points or (apart and x == 0):
            raise ProfileError(f"the attention table has no rows for {x:g} of what it has {sorted(branch)} of")
        if len(points) == 1 or x <= points[0]:
            return [(points[0], 1.0)]
        low = min(bisect_right(points, x) - 1, len(points) - 2)
        share = (x - points[low]) / (points[low + 1] - points[low])
        return [(points[low], 1 - share), (points[low + 1], share)]


class LayerKernels:
    """Seconds of each part of an iteration of one model, interpolated from layer tables."""

    mixed = True  # batches of a chunk and decodes were timed as such

    def __init__(self, tables: LayerTables, model: Model, engine: Engine) -> None:
        self._tables, self._model, self._engine = tables, model, engine
        tp = engine.tensor_parallel
        if engine.dtype != "bfloat16":
            raise ProfileError(f"layer tables are of the dtype they were measured with, not of {engine.dtype!r}")
        if tables.model and model_named(tables.model) != model:
            raise ProfileError(f"the tables are of {tables.model}, not of {model.name}")
        if tp > 1 and tables.allreduce is None:
            raise ProfileError(f"TP {tp} wants an all-reduce table too")
        self._dense = _by_name(tables.dense, "tokens", (*IN_EVERY_LAYER, *ONCE), "dense")
        self._heads = _by_name(tables.per_sequence, "sequences", PER_SEQUENCE, "per_sequence")
        columns = (tables.attention[name] for name in LAYER_COLUMNS["attention"])
        self._attention = Grid(zip(*(column.tolist() for column in columns), strict=True))
        self._skew = {mixed: _skew(tables.skew, mixed) for mixed in (False, True)}

    def attention_s(self, chunk: float, past: float, decodes: float, context: float) -> float:
        """One layer's attention for a chunk behind `past` and decodes whose mean context is `context`."""
        if decodes == 0:
            context = 0.0
        seconds = self._attention.at(chunk, past, decodes, context) / 1e6
        return max(seconds, 0.0) * self.skew(decodes, chunk > 0)

    def skew(self, decodes: float, mixed: bool) -> float:
        """How much longer attention takes where contexts are unequal than where all have their mean."""
        batches, excess = self._skew[mixed]
        return 1.0 + float(np.interp(decodes, batches, excess)) if decodes > 1 and len(batches) else 1.0

    def iteration_s(self, chunk: Floats, past: Floats, decodes: Floats, context: Floats) -> Floats:
        """One engine iteration: a chunk of one prompt behind `past`, and decodes of that mean context."""
        tokens, sequences = chunk + decodes, decodes + (chunk > 0)
        attention = np.array(
            [self.attention_s(*shape) for shape in np.column_stack([chunk, past, decodes, context]).tolist()]
        )
        layer = attention + sum(n * line(tokens, *self._dense[name]) for name, n in IN_EVERY_LAYER.items()) / 1e6
        if self._engine.tensor_parallel > 1 and (table := self._tables.allreduce) is not None:
            wanted = (table["num_gpus"] == self._engine.tensor_parallel) & (table["backend"] == "vllm_graph")
            if not wanted.any():
                raise ProfileError(f"the all-reduce table has no rows for num_gpus {self._engine.tensor_parallel}")
            size, latency = table["message_size"][wanted], table["latency"][wanted]
            layer = layer + 2 * line(tokens * self._model.hidden, size, latency) / 1e3
        once = sum(line(tokens, *self._dense[name]) for name in ONCE)
        heads = sum(line(sequences, *self._heads[name]) for name in PER_SEQUENCE)
        seconds: Floats = self._model.layers * layer + (once + heads) / 1e6
        return seconds

    def measured_to(self) -> tuple[float, float, float]:
        """Tokens, decodes and KV tokens up to which the tables were measured."""
        table = self._tables.attention
        kv = table["n_decode"] * table["kv_decode"]
        return float(self._tables.dense["tokens"].max()), float(table["n_decode"].max()), float(kv.max())

    def notes(self) -> dict[str, str]:
        """Where the tables come from, and how they were put together."""
        tables, model = self._tables, self._model
        skewed = (
            "unequal contexts: x the median of the skew table's rows of that batch size"
            if tables.skew is not None
            else "contexts taken as equal: no skew table"
        )
        return {
            "origin": f"casys-kaist/LLMServingSim: profiler/perf ({tables.origin})",
            "licence": "MIT, Copyright (c) the LLMServingSim authors (CASYS, KAIST)",
            "composition": f"{model.name}, TP {self._engine.tensor_parallel}: sum over {model.layers} layers of "
            f"operators measured inside {tables.measured_in}, plus the output head and the sampler; "
            f"{skewed}; composed, not measured as a whole",
        }


def _by_name(table: Columns, key: str, wanted: Sequence[str], what: str) -> dict[str, tuple[Floats, Floats]]:
    """Each operator's points; raises `ProfileError` for one that is missing or not known."""
    there = set(table["layer"].tolist())
    if missing := [name for name in wanted if name not in there]:
        raise ProfileError(f"the {what} table has no rows of {missing[0]!r}; it has: {', '.join(sorted(there))}")
    if unknown := sorted(there - set(wanted)):
        raise ProfileError(f"the {what} table has {unknown[0]!r}, which is not known; known: {', '.join(wanted)}")
    rows = {name: table["layer"] == name for name in wanted}
    return {name: (table[key][mask].astype(float), table["time_us"][mask]) for name, mask in rows.items()}


def _skew(table: Columns | None, mixed: bool) -> tuple[Floats, Floats]:
    """By batch size: the median excess of attention over unequal contexts above that over equal ones.

    The median, since each row is a few repetitions and single ratios reach 8; never below 0.
    """
    if table is None:
        return np.zeros(0), np.zeros(0)
    rows = (table["regime"] == "mixed") == mixed
    batches = np.unique(table["n"][rows])
    excess = table["t_skew_us"] / table["t_mean_us"] - 1.0
    medians = [max(float(np.median(excess[rows & (table["n"] == n)])), 0.0) for n in batches]
    return batches.astype(float), np.array(medians)
