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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from polyserve.core import kernels
from polyserve.core.fleet import Books, Fleet, Job
from polyserve.core.kernels import (
    F_COLUMNS,
    G_ROWS,
    I_COUNT,
    I_GAUGED,
    TEST_MEMORY,
    TEST_PACE,
    TEST_PREFILL,
    TEST_TOKEN1,
    Matrix,
    Vector,
)
from polyserve.core.lengths import EDGES, GRID, LengthModel
from polyserve.core.pending import Queue
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, Iteration, Request, RequestId, Role, TierName

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
    books, fleet = Books(Instance("", ""), profile, Settings(), lengths), Fleet()
    fleet.add(books)
    for at in range(2):
        books.add(Job(Request(str(at), 0.0, 8, None), None, None, 8), float(at))
    forecaster, job = Forecaster(Settings(), lengths), Job(Request("", 0.0, 8, None), None, None, 8)
    forecaster.of(job, books, 9.0, pace_s=1.0)
    forecaster.walk(job, fleet, 9.0, Hosts(fleet, [(None, 0.0)]), pace_s=1.0)
    queue = Queue()
    queue.push(job)
    forecaster.pick(books, queue, 9.0, pace_s=1.0, first=0, refusals=0)
    for prefill in (0, 5):
        books.progressed({"0": 1, "1": 1}, {}, Iteration(9.0, 1.0, prefill, 2, 16), 9.0)
    books.gauge()


class Hosts:
    """Tiers whose instances a request may join, in order, each with the share of the pace that it leaves free there."""

    def __init__(self, fleet: Fleet, tiers: Sequence[tuple[TierName | None, float]]) -> None:
        self.names = [name for name, _ in tiers]
        self.codes: Vector = np.array([fleet.code(name) for name, _ in tiers])
        self.reserves: Vector = np.array([reserve for _, reserve in tiers])


def _candidate(job: Job, role: Role) -> Vector:
    """The row to ask an instance of that role about."""
    return job.prompt_row() if role is Role.PREFILL and job.link is not None else job.row()


class Forecaster:
    """Asks `kernels.ask` of one instance, or `kernels.walk` of many, under the switches of the settings."""

    def __init__(self, settings: Settings, lengths: LengthModel):
        self._settings = settings
        self._lengths = lengths
        self._out: Matrix = np.zeros((1, F_COLUMNS))
        self._tried: NDArray[np.int64] = np.zeros(1, np.int64)
        self._nobody: NDArray[np.bool_] = np.zeros(1, np.bool_)
        self._tests = sum(
            bit
            for bit, made in (
                (TEST_MEMORY, settings.test_memory),
                (TEST_PACE, settings.test_pace),
                (TEST_PREFILL, settings.test_prefill),
                (TEST_TOKEN1, settings.test_token1),
            )
            if made
        )
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
        settings, lengths = self._settings, self._lengths
        self.asked += 1
        best_effort = job.slo is None
        inst, rows, gauged = books.numbers
        if without:
            books.roll(now)
            inst, rows, gauged = self._rest(books, without)
        # A float either way: for a whole number the kernels would be compiled once more.
        kv = float(books.kv_tokens) * (1.0 - settings.best_effort_headroom if best_effort else 1.0)
        kernels.ask(
            books.packed, inst, rows, gauged, lengths.table, EDGES, GRID, lengths.version, _candidate(job, books.role),
            pace_s * (1.0 - reserve), kv, settings.predict_chunks, self._tests, waive or best_effort, whole, now,
            self._out[0],
        )  # fmt: skip
        return Forecast(*self._out[0].tolist())

    def walk(
        self,
        job: Job,
        fleet: Fleet,
        now: float,
        hosts: Hosts,
        *,
        pace_s: float,
        least_first: bool = False,
        waive: bool = False,
        whole: bool = False,
        role: Role = Role.MIXED,
    ) -> tuple[Books | None, list[tuple[Books, Forecast]]]:
        """The first instance of `hosts` that admits a job, and all that were asked.

        Within a tier the most loaded is asked first, or the least loaded. Each is asked at the tighter of its pace
        and `pace_s`. In PD, `role` is that of the fleet's instances.
        """
        settings, lengths, arena = self._settings, self._lengths, fleet.arena
        if len(self._tried) < arena.slots:
            self._out, self._tried = np.zeros((arena.slots, F_COLUMNS)), np.zeros(arena.slots, np.int64)
            self._nobody = np.zeros(arena.slots, np.bool_)
        skip = self._nobody
        if job.avoid:
            skip = np.zeros(arena.slots, np.bool_)
            skip[[b.slot for b in fleet if b.id in job.avoid]] = True
        admits, asked = kernels.walk(
            arena.profiles, arena.insts, arena.rows, arena.gauges, lengths.table, EDGES, GRID, lengths.version,
            skip, hosts.codes, hosts.reserves, pace_s, _candidate(job, role), least_first, settings.predict_chunks,
            self._tests, waive, whole, now, self._tried, self._out,
        )  # fmt: skip
        self.asked += asked
        first = 0 if whole else asked - 1 if admits else asked
        answers = []
        for at in range(first, asked):
            books = arena.tenants[self._tried[at]]
            assert isinstance(books, Books)
            answers.append((books, Forecast(*self._out[at].tolist())))
        return answers[-1][0] if admits else None, answers

    def pick(
        self, books: Books, queue: Queue, now: float, *, pace_s: float, first: int, refusals: int
    ) -> tuple[int, int, Forecast]:
        """The first job of a queue, from place `first`, that an instance admits; its place, or -1.

        Passes `head_walk` jobs that their own deadline refuses, `refusals` before this call included; returns their
        number too.
        """
        settings, lengths = self._settings, self._lengths
        inst, rows, gauged = books.numbers
        at, refusals = kernels.pick(
            books.packed, inst, rows, gauged, lengths.table, EDGES, GRID, lengths.version, queue.rows, queue.late,
            first, len(queue), refusals, settings.head_walk, pace_s, settings.predict_chunks, self._tests, now,
            self._out[0],
        )  # fmt: skip
        self.asked += 1
        return at, refusals, Forecast(*self._out[0].tolist())

    def _rest(self, books: Books, without: frozenset[RequestId]) -> tuple[Vector, Matrix, Matrix]:
        """The instance's numbers as if some residents had left."""
        stay = [at for at, request in enumerate(books.ids) if request not in without]
        rows = np.ascontiguousarray(books.rows[stay])
        inst = books.numbers[0].copy()
        inst[I_COUNT], inst[I_GAUGED] = len(rows), -1.0
        return inst, rows, np.zeros((G_ROWS, len(GRID)))
