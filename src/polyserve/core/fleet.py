"""The books: instances and what each holds, as far as reports and our own dispatches tell.

An instance's residents are rows of one matrix (columns `kernels.R_*`), because a forecast walks all of them. Between
reports the books roll on by the believed profile. Everything derived from the rows (gauge, load) is kept until a row,
the clock or the length table moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from polyserve.core import kernels
from polyserve.core.chunking import ChunkLaw, chunk_law
from polyserve.core.kernels import (
    I_BLOCK,
    I_COLUMNS,
    I_FLOOR,
    I_FREE,
    I_KIND,
    I_KV,
    I_MARGIN,
    I_PACE,
    I_SCALE,
    I_SEQS,
    I_SIGMA,
    I_SPEND,
    I_TOKENS,
    R_BAND,
    R_BASE,
    R_CAP,
    R_COLUMNS,
    R_DUE,
    R_FROM,
    R_KEY,
    R_LEFT,
    R_MADE,
    R_PROMPT,
    R_RUN,
    R_SEEN,
    R_SOLO,
    R_TPOT,
    Matrix,
    Vector,
)
from polyserve.core.lengths import EDGES, GRID, LengthModel
from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, InstanceId, Iteration, Request, RequestId, Slo, TierName


class State(StrEnum):
    """Where an instance is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Correction:
    """Live ratio of observed to believed iteration times, and its spread.

    An exponentially weighted mean of the ratio: its weight halves every `HALF_LIFE` iterations, and it starts from
    `PRIOR` iterations that were exactly as believed, so that one slow iteration changes little.
    """

    HALF_LIFE = 100.0
    PRIOR = 10.0

    def __init__(self) -> None:
        self._weight = self.PRIOR
        self._mean = 1.0
        self._square = 0.0

    def observe(self, observed_s: float, believed_s: float) -> None:
        """Learn from one iteration; wild ratios (a stall, a clock that jumped) count as the nearest sane one."""
        ratio = min(max(observed_s / believed_s, 0.25), 4.0)
        self._weight = self._weight * 0.5 ** (1.0 / self.HALF_LIFE) + 1.0
        off = ratio - self._mean
        self._mean += off / self._weight
        self._square += (off * (ratio - self._mean) - self._square) / self._weight

    @property
    def ratio(self) -> float:
        """Observed over believed."""
        return self._mean

    @property
    def spread(self) -> float:
        """Standard deviation of single iterations around `ratio`, as a share of it."""
        return math.sqrt(max(self._square, 0.0)) / self._mean


@dataclass(slots=True)
class Job:
    """A request as the core carries it from arrival to answer."""

    request: Request
    tier: TierName | None  # None: best effort
    slo: Slo | None
    prompt_tokens: int  # best count so far
    length_row: int = 0  # of `LengthModel.table`
    made: int = 0  # output tokens delivered before the present dispatch
    seen: int = 0  # output tokens delivered
    instance: InstanceId | None = None
    pending_since: float = 0.0
    late: bool = False  # its deadline is lost or its stream has begun: served all the same, never refused
    behind: bool = False  # waits behind everybody who can still be on time
    solo_s: float = 0.0  # what its prompt takes on an idle instance
    latest_at: float = math.inf  # beyond this no idle instance would be in time
    avoid: set[InstanceId] = field(default_factory=set)  # instances that broke it

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def due_at(self) -> float:
        """When the next token that has to be made is late; inf for best effort."""
        return self.slo.due_at(self.request.arrived_at, self.made) if self.slo else math.inf

    @property
    def prefill_tokens(self) -> int:
        """Tokens to compute before the next output token."""
        return self.prompt_tokens + self.made


class Books:
    """What one instance holds and how fast it is believed to be."""

    def __init__(self, instance: Instance, profile: Profile, settings: Settings, lengths: LengthModel):
        limits = profile.limits
        self.instance = instance
        self.id = instance.id
        self.profile = profile
        self.packed = profile.packed
        self.law: ChunkLaw = chunk_law(instance, profile, settings.chunk_bound, settings.chunk_floor_tokens)
        self.kv_tokens = instance.kv_tokens or limits.kv_tokens
        self.max_num_seqs = instance.max_num_seqs or limits.max_num_seqs
        self.state = State.STARTING
        self.tier: TierName | None = None
        self.pace_s = math.inf
        self.jobs: dict[RequestId, Job] = {}
        self.correction = Correction()
        self.since = 0.0  # when it last changed state or tier
        self.empty_looks = 0
        self.foreign = 0  # residents that others sent
        self.reported_at = -math.inf
        self._settings = settings
        self._lengths = lengths
        self._rows: Matrix = np.zeros((32, R_COLUMNS))
        self._ids: list[RequestId] = []
        self._index: dict[RequestId, int] = {}
        self._ends_at = -1.0
        self._rolled_at = 0.0
        self._mixed = False  # whether a prompt was computed since the last reported iteration
        self._gauge: Matrix = np.zeros((kernels.G_ROWS, len(GRID)))
        self._gauged_with: object = None
        self._peak_s = 0.0
        self._inst: Vector = np.zeros(I_COLUMNS)
        self._inst[I_KIND], self._inst[I_TOKENS] = self.law.kind, self.law.tokens
        self._inst[I_SPEND], self._inst[I_FLOOR] = float(self.law.spend_slack), self.law.floor
        self._inst[I_KV], self._inst[I_SEQS] = self.kv_tokens, self.max_num_seqs
        self._inst[I_MARGIN] = settings.ttft_margin
        self._inst[I_BLOCK], self._inst[I_SIGMA] = limits.block_size, settings.memory_margin_sigma

    def __repr__(self) -> str:
        return f"<{self.id} {self.state} tier={self.tier} residents={len(self.jobs)} pace={self.pace_s:.4f}>"

    # ------------------------------------------------------------------------------------------------- residents

    def add(self, job: Job, now: float) -> None:
        """Take a job in as a resident whose prompt is still to be computed."""
        self.roll(now)
        if not self._ids:
            self._ends_at = -1.0
        at = len(self._ids)
        if at == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[at] = self.row(job, now)
        self._ids.append(job.id)
        self._index[job.id] = at
        self.jobs[job.id] = job
        self._mixed = True
        self._touch()
        if at == 0:
            self._advance(now)

    def row(self, job: Job, now: float) -> Vector:
        """The row a job would have if it joined now; a request for n choices is charged its prompt once."""
        row = np.empty(R_COLUMNS)
        request, slo = job.request, job.slo
        row[R_PROMPT] = row[R_LEFT] = job.prefill_tokens
        row[R_MADE] = 0.0
        row[R_CAP] = math.inf if request.max_tokens is None else max(request.max_tokens - job.made, 1)
        row[R_BAND] = job.length_row
        row[R_DUE] = job.due_at
        row[R_TPOT] = slo.tpot_s if slo else 0.0  # without a deadline due is inf, and stays it
        row[R_KEY] = now if self.instance.order == "fcfs" else row[R_DUE]
        row[R_BASE] = row[R_SEEN] = job.made
        row[R_FROM] = max(self._ends_at, now) if self._ids else now
        row[R_RUN] = 0.0
        row[R_SOLO] = job.solo_s
        return row

    def remove(self, request: RequestId) -> Job | None:
        """Forget a resident; None when it is not one."""
        job = self.jobs.pop(request, None)
        if job is None:
            return None
        at = self._index.pop(request)
        job.seen = int(self._rows[at, R_SEEN])
        last = len(self._ids) - 1
        if at != last:
            self._rows[at] = self._rows[last]
            self._ids[at] = self._ids[last]
            self._index[self._ids[at]] = at
        self._ids.pop()
        self._touch()
        return job

    def first_token(self, request: RequestId) -> None:
        """A resident's prompt is computed and its first token seen."""
        at = self._index.get(request)
        if at is not None and self._rows[at, R_LEFT] > 0.0:
            self._rows[at, R_LEFT] = 0.0
            self._rows[at, R_MADE] = 1.0
            self._rows[at, R_SEEN] = self._rows[at, R_BASE] + 1.0
            self._touch()

    def recompute(self, request: RequestId) -> None:
        """A resident was preempted: its tokens so far become prompt to compute again."""
        at = self._index.get(request)
        if at is not None:
            row = self._rows[at]
            row[R_PROMPT] += row[R_MADE]
            row[R_CAP] = max(row[R_CAP] - row[R_MADE], 1.0)
            row[R_DUE] += row[R_MADE] * row[R_TPOT]
            row[R_LEFT], row[R_MADE], row[R_RUN] = row[R_PROMPT], 0.0, 0.0
            self._mixed = True
            self._touch()

    def correct_prompt(self, request: RequestId, prompt_tokens: int) -> None:
        """Replace an estimate of a prompt's tokens by a better one."""
        at = self._index.get(request)
        if at is not None:
            job = self.jobs[request]
            change = prompt_tokens - job.prompt_tokens
            row = self._rows[at]
            row[R_PROMPT] = max(row[R_PROMPT] + change, 1.0)
            if row[R_LEFT] > 0.0:
                row[R_LEFT] = min(max(row[R_LEFT] + change, 1.0), row[R_PROMPT])
            self._touch()

    def progressed(
        self,
        tokens: dict[RequestId, int],
        prefilling: dict[RequestId, int],
        iteration: Iteration | None,
        now: float,
    ) -> None:
        """Take in a report: counts are output tokens since the request arrived."""
        self.roll(now)
        rows, index = self._rows, self._index
        if not tokens.keys() <= index.keys():
            tokens = {request: count for request, count in tokens.items() if request in index}
        if tokens:
            at = np.fromiter(map(index.__getitem__, tokens), np.int64, len(tokens))
            kernels.take_in(rows, at, np.fromiter(tokens.values(), np.float64, len(tokens)))
        for request, left in prefilling.items():
            row = index.get(request)
            if row is not None and rows[row, R_LEFT] > 0.0:
                rows[row, R_LEFT] = min(max(left, 1), rows[row, R_PROMPT])
        if iteration is not None:
            self._observe(iteration)
            self._mixed = self.tally()[2] > 0
            self._ends_at = iteration.ended_at + self._step_s(iteration)
            # Whoever has joined by now is in the iteration that a report of now begins, or else in the next.
            begins_at = iteration.ended_at if iteration.ended_at >= now else self._ends_at
            self.rows[:, R_FROM] = np.minimum(self.rows[:, R_FROM], begins_at - 1e-6)
        self._touch()
        self._advance(now)

    def made(self) -> list[tuple[int, int]]:
        """(row of the length table, output tokens seen) of every resident."""
        return [(int(row[R_BAND]), int(row[R_SEEN])) for row in self.rows]

    def tally(self) -> tuple[int, float, int, float]:
        """Decodes and the KV tokens they read, queued prompts and the prompt tokens still to compute."""
        decodes, kv, queued, left = kernels.tally(self._rows, len(self._ids))
        return decodes, kv, queued, left

    def _step_s(self, iteration: Iteration) -> float:
        """How long the iteration after a reported one is believed to take: as long as the same kind took."""
        decodes, kv, queued, _ = self.tally()
        mixed = iteration.prefill_tokens is not None and iteration.prefill_tokens > 0
        if iteration.prefill_tokens is not None and mixed == (queued > 0):
            return iteration.seconds
        if queued and decodes and self.law.kind == kernels.DYNAMIC:
            return min(self.pace_s, 2.0 * iteration.seconds)
        if decodes and not queued:
            return self.profile.iteration_s(0, decodes, kv) * self.correction.ratio
        return iteration.seconds

    def _observe(self, iteration: Iteration) -> None:
        if not self._settings.correction:
            return
        prefill, decodes, kv = iteration.prefill_tokens, iteration.decodes, iteration.kv_tokens
        if prefill is None and not self._mixed:
            decodes, held, _, _ = self.tally()
            prefill, kv = 0, int(held)
        # Prefill attention depends on where in its prompt a chunk lies, which no report tells: decodes alone teach.
        if prefill == 0 and decodes and kv is not None:
            self.correction.observe(iteration.seconds, self.profile.iteration_s(0, decodes, kv))

    def _touch(self) -> None:
        self._gauged_with = None

    # ------------------------------------------------------------------------------------------------ what follows

    def roll(self, now: float) -> None:
        """Bring the rows to `now` by forecast."""
        if now <= self._rolled_at:
            return
        self._rolled_at = now
        count = len(self._ids)
        if count and self._ends_at <= now:
            self._advance(now)

    def _advance(self, now: float) -> None:
        """End every iteration that is over, and plan the one that runs."""
        self._rolled_at = now
        if self._ids:
            ends_at = max(self._ends_at, -1.0)
            self._ends_at = kernels.roll(self.packed, self.inst(now), self._rows, len(self._ids), ends_at, now)
            self._touch()

    def inst(self, now: float) -> Vector:
        """The instance as the kernels see it."""
        inst = self._inst
        inst[I_PACE] = self.pace_s
        inst[I_SCALE] = self.scale
        inst[I_FREE] = max(self._ends_at, now) if self._settings.wait_time and self._ids else now
        return inst

    @property
    def scale(self) -> float:
        """What believed iteration times are multiplied by: the correction and its safety margin."""
        if not self._settings.correction:
            return 1.0
        # Deadlines sum many iterations, whose errors partly cancel: a tenth of the single spread remains at 100.
        return self.correction.ratio * (1.0 + self._settings.safety_sigma * 0.1 * self.correction.spread)

    @property
    def rows(self) -> Matrix:
        """The residents' rows, in no particular order."""
        return self._rows[: len(self._ids)]

    @property
    def ids(self) -> list[RequestId]:
        """The residents, in the order of `rows`."""
        return self._ids

    def gauge(self) -> Matrix:
        """Expected batch and KV over `lengths.GRID` (rows `kernels.G_*`)."""
        table = self._lengths.table
        if self._gauged_with is not table:
            kernels.gauge(self._rows, len(self._ids), table, EDGES, GRID, self._gauge)
            self._peak_s = kernels.peak_s(self.packed, self._gauge, len(GRID), self.scale)
            self._gauged_with = table
        return self._gauge

    @property
    def peak_s(self) -> float:
        """The longest pure-decode iteration that is coming."""
        self.gauge()
        return self._peak_s

    @property
    def load(self) -> float:
        """Peak forecast iteration over pace; over the idle iteration where there is no pace."""
        if not self._ids:
            return 0.0
        return self.peak_s / self.pace_s if math.isfinite(self.pace_s) else self.peak_s

    def iteration_now_s(self) -> float:
        """Believed seconds of the iteration that comes next, its prefill chunk included."""
        decodes, kv, _, left = self.tally()
        chunk = min(left, max(self.law.tokens - decodes, 0))
        return self.profile.iteration_s(chunk, decodes, kv, 0.5 * chunk * chunk)


class Fleet:
    """All instances by id, in the order they joined."""

    def __init__(self) -> None:
        self.books: dict[InstanceId, Books] = {}

    def __iter__(self) -> Iterator[Books]:
        return iter(self.books.values())

    def __len__(self) -> int:
        return len(self.books)

    def get(self, instance: InstanceId) -> Books | None:
        return self.books.get(instance)

    def ready(self) -> list[Books]:
        """Instances that take requests."""
        return [b for b in self.books.values() if b.state is State.READY]

    def of_tier(self, tier: TierName | None) -> list[Books]:
        """Ready instances that serve a tier; None: the pool."""
        return [b for b in self.books.values() if b.state is State.READY and b.tier == tier]

    def starting(self) -> list[Books]:
        return [b for b in self.books.values() if b.state is State.STARTING]
