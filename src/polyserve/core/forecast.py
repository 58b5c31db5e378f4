"""If this request joined that instance: who would be late, by how much, and would it fit.

Four tests, each a margin that admits at 0 and above:

1. memory: the largest KV that all residents and the candidate will hold at once, plus a margin for its spread, and a
   free sequence;
2. pace (from token 2 on): the longest pure-decode iteration that is coming, against the instance's pace. It looks far:
   the largest batch and KV, without a chunk, since a dynamic chunk takes only what the pace leaves;
3. prefill (token 0): chunk by chunk as this instance makes them, behind the queue in its order, after the running
   iteration; and nobody already queued becomes late;
4. token 1: the iteration after that, its chunk included. It looks near, and decides where iterations are not held to
   the pace: fixed chunks, spent slack, decodes that alone exceed it, a guest tighter than its host.

The arithmetic is `kernels.forecast`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from polyserve.core import kernels
from polyserve.core.fleet import Books, Job
from polyserve.core.kernels import (
    F_COLUMNS,
    G_ROWS,
    I_KV,
    I_PACE,
    Matrix,
    Vector,
)
from polyserve.core.lengths import EDGES, GRID, LengthModel
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, Request, RequestId

Cause = str  # name of a test


@dataclass(frozen=True, slots=True)
class Forecast:
    """The margins of one candidate on one instance; nan where an earlier test had already decided."""

    memory_tokens: float
    seqs: float
    pace_s: float
    prefill_s: float  # candidate's token 0
    token1_s: float
    queued_s: float  # the tightest of those already queued whom the candidate could make late
    decodes_s: float  # the tightest resident whom chunks could push beyond its slack (fixed chunks)
    first_token_at: float  # predicted; inf: not in sight
    peak_s: float  # longest pure-decode iteration with the candidate

    @property
    def lacks(self) -> Cause | None:
        """The first test that refuses; None when the candidate is admitted."""
        if self.admits:
            return None
        return next(cause for cause, margin in self.margins().items() if margin < 0.0)

    @property
    def admits(self) -> bool:
        """Whether no margin is below 0."""
        return not (
            self.memory_tokens < 0.0
            or self.seqs < 0.0
            or self.pace_s < 0.0
            or self.prefill_s < 0.0
            or self.token1_s < 0.0
            or self.queued_s < 0.0
            or self.decodes_s < 0.0
        )

    def margins(self) -> dict[Cause, float]:
        """Every margin that was computed, in the order of the tests; seconds, or tokens, or sequences."""
        named = {
            "memory": self.memory_tokens,
            "seqs": self.seqs,
            "pace": self.pace_s,
            "prefill": self.prefill_s,
            "token1": self.token1_s,
            "queued": self.queued_s,
            "decodes": self.decodes_s,
        }
        return {cause: margin for cause, margin in named.items() if not math.isnan(margin)}


DEADLINE_CAUSES = frozenset({"prefill", "token1"})  # the candidate's own deadline, nobody else's trouble


@cache
def compile_kernels() -> None:
    """Have every kernel compiled, or loaded from its cache, before the first decision waits for it."""
    limits = Limits(kv_tokens=1000, max_num_seqs=2, max_num_batched_tokens=64)
    profile = Profile("", (0.0, 1.0), (0.0, 1.0), 0.0, 0.0, 0.0, limits)
    lengths = LengthModel(0, 16)
    books = Books(Instance("", ""), profile, Settings(), lengths)
    for at in range(2):
        books.add(Job(Request(str(at), 0.0, 8, None), None, None, 8), float(at))
    Forecaster(Settings(), lengths).of(Job(Request("", 0.0, 8, None), None, None, 8), books, 9.0, pace_s=1.0)


class Forecaster:
    """Asks `kernels.forecast` under the switches of the settings."""

    def __init__(self, settings: Settings, lengths: LengthModel):
        self._settings = settings
        self._lengths = lengths
        self._out: Vector = np.zeros(F_COLUMNS)
        self.asked = 0

    def of(
        self,
        job: Job,
        books: Books,
        now: float,
        *,
        pace_s: float,
        reserve: float = 0.0,
        waive: bool = False,
        without: frozenset[RequestId] = frozenset(),
        whole: bool = False,
    ) -> Forecast:
        """The forecast of `job` on `books` at `pace_s`, of which a share `reserve` stays free.

        `waive`: the job's own deadline no longer counts. `without`: as if these residents had left.
        `whole`: compute every margin even after one has decided.
        """
        settings = self._settings
        self.asked += 1
        books.roll(now)
        rows, count, gauged = books.rows, len(books.ids), books.gauge()
        if without:
            rows, gauged = self._rest(books, without)
            count = len(rows)
        inst = books.inst(now)
        inst[I_PACE] = pace_s * (1.0 - reserve)
        best_effort = job.slo is None
        if best_effort:
            inst[I_KV] = books.kv_tokens * (1.0 - settings.best_effort_headroom)
        row = books.row(job, now)
        kernels.forecast(
            books.packed, inst, rows, count, gauged, self._lengths.table, EDGES, GRID, row,
            settings.predict_chunks, waive or best_effort, whole, now, self._out,
        )  # fmt: skip
        inst[I_KV] = books.kv_tokens
        return self._switched(self._out)

    def _switched(self, out: Vector) -> Forecast:
        """The forecast with margins of tests that are switched off at inf."""
        settings = self._settings
        memory, seqs, pace, prefill, token1, queued, decodes, first, peak = out.tolist()
        if not settings.test_memory:
            memory = math.inf
        if not settings.test_pace:
            pace = math.inf
        if not settings.test_prefill:
            prefill = queued = decodes = math.inf
        if not settings.test_token1:
            token1 = math.inf
        return Forecast(memory, seqs, pace, prefill, token1, queued, decodes, first, peak)

    def _rest(self, books: Books, without: frozenset[RequestId]) -> tuple[Matrix, Matrix]:
        """Rows of the residents that stay, and their gauge."""
        stay = [at for at, request in enumerate(books.ids) if request not in without]
        rows = np.ascontiguousarray(books.rows[stay])
        gauged = np.zeros((G_ROWS, len(GRID)))
        kernels.gauge(rows, len(rows), self._lengths.table, EDGES, GRID, gauged)
        return rows, gauged
