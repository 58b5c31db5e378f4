"""A recorded engine run, predicted: its requests replayed through the simulated engine, and how far off that is.

The engine is vLLM's V1: first come, first served, decodes first, then prompts up to a budget of tokens. A log has one
row per request, as LLMServingSim's bench writes it from vLLM's own events: `arrival_time` (wall clock, at the front
end) and `queued_ts`, `scheduled_ts`, `first_token_ts`, `last_token_ts` (monotonic clock, in the engine core), seconds.

    TTFT = first_token_ts - queued_ts      TPOT = (last_token_ts - first_token_ts) / (output_toks - 1)
    latency = last_token_ts - queued_ts

vLLM schedules asynchronously (by default since 0.14: github.com/vllm-project/vllm/pull/27614): when iteration n ends,
n + 1 starts, and only then are arrivals looked at and n + 2 put together. So a request is queued at an iteration's end
and sits out the one that follows. The same delay for the seat of a request that ended is not modelled: it is one
iteration in as many as an answer has tokens.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import math
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import ChunkRule, Instance
from polyserve.sim.engine import Done, Engine, Job

COLUMNS = ("request_id", "input_toks", "output_toks", "arrival_time", "queued_ts", "first_token_ts", "last_token_ts")
METRICS = ("ttft", "tpot", "latency")
PERCENTILES = (50, 90, 99)

Floats = NDArray[np.float64]


class ValidateError(ValueError):
    """A log that cannot be replayed; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request as it was recorded, in seconds since the first was queued."""

    id: str
    prompt_tokens: int
    output_tokens: int
    arrived_at: float
    queued_at: float
    first_token_at: float
    last_token_at: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What the recorded engine was started with; `kv_tokens` None: the profile's."""

    max_batched_tokens: int
    max_seqs: int
    kv_tokens: int | None = None
    async_scheduling: bool = True


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric: seconds recorded and predicted, and how far the second is above the first, as a share."""

    recorded_s: dict[str, float]
    predicted_s: dict[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """By statistic: predicted over recorded, less 1."""
        return {name: self.predicted_s[name] / self.recorded_s[name] - 1.0 for name in self.recorded_s}

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        errors = {f"{name}_error": error for name, error in self.errors.items()}
        return errors | {"recorded_s": self.recorded_s, "predicted_s": self.predicted_s}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A replayed run: the three metrics, and what the engine did."""

    ttft: Comparison
    tpot: Comparison
    latency: Comparison
    iterations: int
    preemptions: int
    extrapolated: int  # iterations outside what the profile was measured on

    def to_dict(self) -> dict[str, Any]:
        """Plain values, a key per metric."""
        metrics = {name: getattr(self, name).to_dict() for name in METRICS}
        return metrics | {
            "iterations": self.iterations,
            "preemptions": self.preemptions,
            "extrapolated_iterations": self.extrapolated,
        }


# --------------------------------------------------------------------------------------------------------- the log


def read_log(path: str | Path) -> list[Row]:
    """The requests of a log, by arrival; raises `ValidateError`."""
    file = Path(path)
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise ValidateError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValidateError(f"{path}: cannot be read as a log: {error}") from None
    table = csv.DictReader(text.splitlines())
    for name in COLUMNS:
        if name not in (table.fieldnames or ()):
            raise ValidateError(f"{path}: column {name!r} is missing; a log has {', '.join(COLUMNS)}")
    numbers = [_numbers(cells, f"{path}: row {n}") for n, cells in enumerate(table, 2)]
    if not numbers:
        raise ValidateError(f"{path}: has no requests")
    # Both clocks run alike; whoever found the engine idle was queued as it arrived.
    offset = min(row["queued_ts"] - row["arrival_time"] for row in numbers)
    start = min(row["queued_ts"] for row in numbers)
    rows = [
        Row(
            id=f"{n}:{row['request_id']}",
            prompt_tokens=row["input_toks"],
            output_tokens=row["output_toks"],
            arrived_at=row["arrival_time"] + offset - start,
            queued_at=row["queued_ts"] - start,
            first_token_at=row["first_token_ts"] - start,
            last_token_at=row["last_token_ts"] - start,
        )
        for n, row in enumerate(numbers)
    ]
    return sorted(rows, key=lambda row: row.arrived_at)


def _numbers(cells: dict[str, str], where: str) -> dict[str, Any]:
    row: dict[str, Any] = {"request_id": cells["request_id"]}
    for name in COLUMNS[1:]:
        whole = name.endswith("_toks")
        try:
            row[name] = int(cells[name]) if whole else float(cells[name])
        except (TypeError, ValueError):
            raise ValidateError(f"{where}: {name} is a number, not {cells[name]!r}") from None
        if (whole and row[name] < 1) or not math.isfinite(row[name]):
            raise ValidateError(f"{where}: {name} is {'at least 1' if whole else 'finite'}, not {cells[name]}")
    if not row["queued_ts"] < row["first_token_ts"] <= row["last_token_ts"]:
        raise ValidateError(f"{where}: queued_ts, first_token_ts and last_token_ts come in this order")
    return row


# ------------------------------------------------------------------------------------------------------ the replay


def predict(rows: Sequence[Row], profile: Profile, limits: Limits) -> Prediction:
    """The run as the simulated engine has it; raises `ValidateError` for what that engine could never hold."""
    instance = Instance(
        "engine",
        profile.name,
        ChunkRule("fixed", limits.max_batched_tokens),
        "fcfs",
        kv_tokens=limits.kv_tokens,
        max_num_seqs=limits.max_seqs,
        max_num_batched_tokens=limits.max_batched_tokens,
    )
    engine = Engine(instance, profile, profile, settings=Settings(correction=False))
    run = _Replay(rows, engine, profile, limits.async_scheduling)
    run.go()
    queued = np.array([run.queued_at[row.id] for row in rows])
    first = np.array([run.done[row.id].first_token_at for row in rows])
    last = np.array([run.done[row.id].last_token_at for row in rows])
    recorded = _metrics(rows, *(np.array([getattr(row, at) for row in rows]) for at in TIMES))
    predicted = _metrics(rows, queued, first, last)
    compared = {name: Comparison(_summary(recorded[name]), _summary(predicted[name])) for name in METRICS}
    return Prediction(
        **compared, iterations=engine.iterations, preemptions=engine.preemptions, extrapolated=run.extrapolated
    )


TIMES = ("queued_at", "first_token_at", "last_token_at")


def without_host_overhead(profile: Profile) -> Profile:
    """The kernels alone."""
    return dataclasses.replace(profile, host_overhead_s=0.0)


class _Replay:
    """One engine fed with a log's requests as they arrive."""

    def __init__(self, rows: Sequence[Row], engine: Engine, profile: Profile, asynchronous: bool) -> None:
        self._coming = deque(rows)
        self._queued: list[Row] = []  # seen, and not in the iteration that was put together already
        self._engine, self._profile, self._asynchronous = engine, profile, asynchronous
        self.queued_at: dict[str, float] = {}
        self.done: dict[str, Done] = {}
        self.extrapolated = 0

    def go(self) -> None:
        """Run until every request has ended."""
        engine, now = self._engine, 0.0
        while self._coming or self._queued or engine.residents:
            if not engine.residents and not self._queued:
                now = max(now, self._coming[0].arrived_at)
            self._look(now)
            ends_at = engine.begin(now)
            assert ends_at is not None, "an engine with residents has something to do"
            now = ends_at
            result = engine.end(now)
            shape = result.iteration
            prefill, decodes, kv = shape.prefill_tokens or 0, shape.decodes or 0, shape.kv_tokens or 0
            self.extrapolated += self._profile.extrapolates(prefill, decodes, kv)
            self.done |= {done.id: done for done in result.finished}

    def _look(self, now: float) -> None:
        """Between two iterations: queue who has arrived, and submit who can be in the next."""
        ready, self._queued = self._queued, []
        while self._coming and self._coming[0].arrived_at <= now:
            row = self._coming.popleft()
            self.queued_at[row.id] = now
            self._queued.append(row)
        if not self._asynchronous or not (ready or self._engine.residents):
            ready, self._queued = ready + self._queued, []
        for row in ready:
            try:
                self._engine.submit(now, Job(row.id, row.prompt_tokens, row.output_tokens, None, row.arrived_at))
            except ValueError as error:
                raise ValidateError(f"{error}; --kv-tokens says how many the recorded engine had") from None


def _metrics(rows: Sequence[Row], queued: Floats, first: Floats, last: Floats) -> dict[str, Floats]:
    """By metric, a value per request; no TPOT for answers of one token."""
    tokens = np.array([row.output_tokens for row in rows])
    many = tokens > 1
    return {"ttft": first - queued, "tpot": ((last - first)[many] / (tokens[many] - 1)), "latency": last - queued}


def _summary(values: Floats) -> dict[str, float]:
    if not len(values):
        return {}
    return {"mean": float(values.mean())} | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
