"""The books: instances and what each holds, as far as reports and our own dispatches tell.

An instance's residents are rows of one matrix (columns `kernels.R_*`), because a forecast walks all of them. Between
reports the books roll on by the believed profile. Everything derived from the rows (gauge, load) is kept until a row,
the clock or the length table moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from polyserve.core import kernels
from polyserve.core.arena import Arena
from polyserve.core.chunking import ChunkLaw, chunk_law
from polyserve.core.correction import Correction
from polyserve.core.kernels import (
    AWAY,
    I_BEGAN,
    I_BLOCK,
    I_COUNT,
    I_ENDS,
    I_FCFS,
    I_FLOOR,
    I_FREE,
    I_GAUGED,
    I_KIND,
    I_KV,
    I_MARGIN,
    I_PACE,
    I_PEAK,
    I_PROFILE,
    I_RANK,
    I_ROLLED,
    I_SCALE,
    I_SEQS,
    I_SIGMA,
    I_SPEND,
    I_TIER,
    I_TOKENS,
    I_WAITS,
    POOL,
    PROMISED,
    R_BAND,
    R_BASE,
    R_CAP,
    R_DUE,
    R_FROM,
    R_KEY,
    R_LEFT,
    R_LESS,
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
from polyserve.core.types import Instance, InstanceId, Iteration, Request, RequestId, Role, Slo, TierName

# Of an instance's memory that strangers are believed to hold at most: a gauge that is wrong shall not shut it.
MOST_FOREIGN = 0.9


class State(StrEnum):
    """Where an instance is in its life."""

    STARTING = "starting"
    READY = "ready"
    RESTING = "resting"  # it failed, and gets no new requests for a while
    TURNING = "turning"  # to change its role as soon as it is empty
    DRAINING = "draining"


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
    # In PD: what a hand-over of its KV takes, to begin with and per token; None where nothing is handed over.
    link: tuple[float, float] | None = None
    less_s: float = 0.0  # of its first token's deadline, kept for what follows the prompt
    # Its other instance: while its prompt is computed the one it is promised to, then the one its KV comes from.
    partner: InstanceId | None = None
    _row: Vector | None = field(default=None, repr=False, compare=False)
    _row_of: tuple[float, ...] = ()

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

    @property
    def transfer_s(self) -> float:
        """What handing its KV over takes."""
        return self.link[0] + self.link[1] * self.prefill_tokens if self.link is not None else 0.0

    def row(self) -> Vector:
        """The job as a row of the books (columns `kernels.R_*`), for an engine that goes by deadlines and is idle.

        A request for n choices is charged its prompt once. In PD: as it will be on the instance that answers, its
        first token made.
        """
        of = (self.made, self.prompt_tokens, self.length_row, self.solo_s)
        if self._row is None or of != self._row_of:
            request, slo = self.request, self.slo
            prompt, due = self.prompt_tokens + self.made, self.due_at
            cap = math.inf if request.max_tokens is None else max(request.max_tokens - self.made, 1)
            tpot = slo.tpot_s if slo else 0.0  # without a deadline due is inf, and stays it
            made, row, solo_s = self.made, self.length_row, self.solo_s
            left, has, there_s = prompt, 0.0, solo_s
            if self.link is not None:
                left, has, there_s = 0, 1.0, solo_s + self.transfer_s
            self._row = np.array((prompt, left, has, cap, row, due, tpot, due, made, made, 0.0, 0.0, there_s, 0.0))
            self._row_of = of
        return self._row

    def prompt_row(self) -> Vector:
        """In PD: the job as it is on the instance that computes its prompt and makes one token."""
        row = self.row().copy()
        row[R_LEFT], row[R_MADE], row[R_CAP] = row[R_PROMPT], 0.0, 1.0
        row[R_SOLO], row[R_LESS] = self.solo_s, self.less_s
        return row


class Books:
    """What one instance holds and how fast it is believed to be.

    Unwatched books (`watched` false) keep who is there and nothing of how far they are: enough for a policy that
    counts.
    """

    def __init__(
        self, instance: Instance, profile: Profile, settings: Settings, lengths: LengthModel, watched: bool = True
    ):
        limits = profile.limits
        self.instance = instance
        self.id = instance.id
        self.profile = profile
        self.packed = profile.packed
        self.law: ChunkLaw = chunk_law(instance, profile, settings.chunk_bound, settings.chunk_floor_tokens)
        self.kv_tokens = instance.kv_tokens or limits.kv_tokens
        self.max_num_seqs = instance.max_num_seqs or limits.max_num_seqs
        self.watched = watched
        self.jobs: dict[RequestId, Job] = {}  # in PD with those that are promised to it
        self.parting: dict[RequestId, Job] = {}  # in PD: computed here, and their KV is on its way
        self.role = instance.role
        self.turns_to: Role | None = None  # while it is `TURNING`
        self.correction = Correction()
        self.since = 0.0  # when it last changed state or tier
        self.empty_looks = 0
        self.foreign = 0  # residents that others sent
        self._strangers = 0  # of the latest report
        self.reported_at = -math.inf
        self.by_tier: dict[TierName | None, int] = {}  # residents by their tier
        self._fleet: Fleet | None = None
        self._state = State.STARTING
        self._tier: TierName | None = None
        self._settings = settings
        self._lengths = lengths
        self._ids: list[RequestId] = []
        self._index: dict[RequestId, int] = {}
        self._mixed = False  # whether a prompt was computed since the last reported iteration
        self._settle_in(Arena(len(GRID)))
        inst = self._inst
        inst[I_KIND], inst[I_TOKENS] = self.law.kind, self.law.tokens
        inst[I_SPEND], inst[I_FLOOR] = float(self.law.spend), self.law.floor
        inst[I_KV], inst[I_SEQS] = self.kv_tokens, self.max_num_seqs
        inst[I_MARGIN], inst[I_BLOCK] = settings.ttft_margin, limits.block_size
        inst[I_SIGMA], inst[I_WAITS] = settings.memory_margin_sigma, float(settings.wait_time)
        inst[I_FCFS] = float(instance.order == "fcfs")
        inst[I_PACE], inst[I_SCALE], inst[I_ENDS], inst[I_GAUGED] = math.inf, 1.0, -1.0, -1.0

    def _settle_in(self, arena: Arena) -> None:
        self._arena = arena
        self.slot = arena.take(self)
        self.rebind()
        self._inst[I_PROFILE] = arena.profile(self.packed)

    def rebind(self) -> None:
        """Take the views of the slot: the arena's arrays were replaced."""
        arena, slot = self._arena, self.slot
        self._inst: Vector = arena.insts[slot]
        self._rows: Matrix = arena.rows[slot]
        self._gauge: Matrix = arena.gauges[slot]

    def move_in(self, fleet: Fleet) -> None:
        """Become one of a fleet's: the books move into its arena."""
        inst, rows = self._inst, self._rows
        while fleet.arena.rows.shape[1] < len(rows):
            fleet.arena.widen()
        self._fleet = fleet
        self._settle_in(fleet.arena)
        kind = self._inst[I_PROFILE]
        self._inst[:], self._rows[: len(rows)] = inst, rows
        self._inst[I_PROFILE], self._inst[I_GAUGED] = kind, -1.0
        self._sort()

    def move_out(self) -> None:
        """Leave the fleet: the slot is free for another."""
        assert self._fleet is not None
        inst, rows = self._inst.copy(), self._rows.copy()
        self._arena.give_back(self.slot)
        self._fleet = None
        arena = Arena(len(GRID))
        while arena.rows.shape[1] < len(rows):
            arena.widen()
        self._settle_in(arena)
        self._inst[:], self._rows[:] = inst, rows
        self._inst[I_PROFILE], self._inst[I_GAUGED] = 0.0, -1.0

    def _sort(self) -> None:
        """Tell the fleet under which tier it finds this instance."""
        if self._fleet is None:
            return
        ready = self._state is State.READY
        self._inst[I_TIER] = self._fleet.code(self._tier) if ready else AWAY
        self._fleet.changed()

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self._sort()

    @property
    def tier(self) -> TierName | None:
        """Whose requests it serves first; None: it is in the pool."""
        return self._tier

    @tier.setter
    def tier(self, tier: TierName | None) -> None:
        self._tier = tier
        self._sort()

    @property
    def pace_s(self) -> float:
        """The bound on its iterations."""
        return self._inst.item(I_PACE)

    @pace_s.setter
    def pace_s(self, pace_s: float) -> None:
        self._inst[I_PACE] = pace_s

    def __repr__(self) -> str:
        return f"<{self.id} {self.state} tier={self.tier} residents={len(self.jobs)} pace={self.pace_s:.4f}>"

    # ------------------------------------------------------------------------------------------------- residents

    def add(self, job: Job, now: float) -> None:
        """Take a job in as a resident whose prompt is still to be computed; in PD, to answer: whose KV is to come."""
        self.jobs[job.id] = job
        self.by_tier[job.tier] = self.by_tier.get(job.tier, 0) + 1
        if not self.watched:
            return
        self.roll(now)
        at = len(self._ids)
        if at == 0:
            self._inst[I_ENDS] = -1.0
        if at == len(self._rows):
            self._arena.widen()
        row = self._rows[at]
        promised = job.link is not None and self.role is not Role.PREFILL
        row[:] = job.prompt_row() if job.link is not None and not promised else job.row()
        if promised:
            row[R_LEFT] = PROMISED
        if self._inst[I_FCFS]:
            row[R_KEY] = now
        row[R_FROM] = max(self._inst.item(I_ENDS), now) if at else now
        self._ids.append(job.id)
        self._index[job.id] = at
        self._mixed = self._mixed or not promised
        self._touch()
        if at == 0:
            self._advance(now)

    def remove(self, request: RequestId) -> Job | None:
        """Forget a resident; None when it is not one."""
        job = self.jobs.pop(request, None)
        if job is None:
            return None
        self.by_tier[job.tier] -= 1
        if not self.watched:
            return job
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
        if not self.watched and (job := self.jobs.get(request)):
            job.seen = max(job.seen, job.made + 1)
        at = self._index.get(request)
        if at is not None and self._rows[at, R_LEFT] > 0.0:
            self._rows[at, R_LEFT] = 0.0
            self._rows[at, R_MADE] = 1.0
            self._rows[at, R_SEEN] = self._rows[at, R_BASE] + 1.0
            self._touch()

    def computed(self, request: RequestId, at: float, now: float) -> None:
        """Forget a prompt that was computed `at`: then an iteration ended, which nothing else tells of without decodes.

        Those computed in the same iteration are told of one after the other.
        """
        place = self._index.get(request)
        if place is not None:
            left, run = self.rows[:, R_LEFT], self.rows[:, R_RUN]
            if 1.0 < left[place] <= run[place]:  # as believed, and not noted yet
                left[:] = np.where(run > 0.0, np.maximum(left - run, 1.0), left)
            run[:] = 0.0
            self._inst[I_ENDS] = -1.0
        self.remove(request)
        if place is not None and self._ids:
            self._advance(at)
            self._advance(now)

    def received(self, request: RequestId) -> None:
        """The KV of a promised resident is here: it decodes."""
        at = self._index.get(request)
        if at is not None and self._rows[at, R_LEFT] < 0.0:
            self._rows[at, R_LEFT] = 0.0
            self._touch()

    def handed(self, request: RequestId) -> None:
        """A promised resident's first token was made, and its KV is on its way."""
        at = self._index.get(request)
        if at is not None:
            self._rows[at, R_SEEN] = self._rows[at, R_BASE] + 1.0

    @property
    def empty(self) -> bool:
        """Whether it holds nothing of anybody."""
        return not self.jobs and not self.parting

    def recompute(self, request: RequestId) -> None:
        """A resident was preempted: its tokens so far become prompt to compute again."""
        at = self._index.get(request)
        if at is not None and self._rows[at, R_LEFT] >= 0.0:  # no engine preempts whose KV it does not have
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
        if not self.watched:
            for request in tokens.keys() & self.jobs.keys():
                self.jobs[request].seen = tokens[request]
            return
        self.roll(now)
        rows, index = self._rows, self._index
        try:
            at = np.fromiter(map(index.__getitem__, tokens), np.int64, len(tokens))
        except KeyError:  # one that has left since: it costs less to be sorry than to be sure
            tokens = {request: count for request, count in tokens.items() if request in index}
            at = np.fromiter(map(index.__getitem__, tokens), np.int64, len(tokens))
        if tokens:
            kernels.take_in(rows, at, np.fromiter(tokens.values(), np.float64, len(tokens)))
        for request, left in prefilling.items():
            row = index.get(request)
            if row is not None and rows[row, R_LEFT] > 0.0:
                rows[row, R_LEFT] = min(max(left, 1), rows[row, R_PROMPT])
        if iteration is not None:
            tally = self.tally()
            self._observe(iteration, tally)
            self._mixed = tally[2] > 0
            self._inst[I_BEGAN] = iteration.ended_at
            ends_at = self._inst[I_ENDS] = iteration.ended_at + self._step_s(iteration, tally)
            # Whoever has joined by now is in the iteration that a report of now begins, or else in the next.
            begins_at = iteration.ended_at if iteration.ended_at >= now else ends_at
            since = self.rows[:, R_FROM]
            np.minimum(since, begins_at - 1e-6, out=since)
        self._touch()
        self._advance(now)

    def made(self) -> Matrix:
        """Row of the length table and output tokens seen, of every resident."""
        return self.rows[:, (R_BAND, R_SEEN)]

    def tally(self) -> tuple[int, float, int, float]:
        """Decodes and the KV tokens they read, queued prompts and the prompt tokens still to compute."""
        decodes, kv, queued, left = kernels.tally(self._rows, len(self._ids))
        return decodes, kv, queued, left

    def _step_s(self, iteration: Iteration, tally: tuple[int, float, int, float]) -> float:
        """How long the iteration after a reported one is believed to take: as long as the same kind took."""
        decodes, kv, queued, _ = tally
        mixed = iteration.prefill_tokens is not None and iteration.prefill_tokens > 0
        if iteration.prefill_tokens is not None and mixed == (queued > 0):
            return iteration.seconds
        if queued and decodes and self.law.kind == kernels.DYNAMIC:
            return min(self.pace_s, 2.0 * iteration.seconds)
        if decodes and not queued:
            return kernels.iteration_s(self.packed, 0.0, decodes, kv, 0.0) * self.correction.ratio
        return iteration.seconds

    def _observe(self, iteration: Iteration, tally: tuple[int, float, int, float]) -> None:
        if not self._settings.correction:
            return
        prefill, decodes, kv = iteration.prefill_tokens, iteration.decodes, iteration.kv_tokens
        if prefill is None and not self._mixed:
            decodes, held, _, _ = tally
            prefill, kv = 0, int(held)
        # Prefill attention depends on where in its prompt a chunk lies, which no report tells: decodes alone teach.
        if prefill == 0 and decodes and kv is not None:
            self.observe(iteration.seconds, kernels.iteration_s(self.packed, 0.0, decodes, kv, 0.0))

    def observe(self, observed_s: float, believed_s: float) -> None:
        """Learn from one iteration how far the profile is off."""
        self.correction.observe(observed_s, believed_s)
        # Deadlines sum many iterations, whose errors partly cancel: a tenth of the single spread remains at 100.
        spread = self._settings.safety_sigma * 0.1 * self.correction.spread
        self._inst[I_SCALE] = self.correction.ratio * (1.0 + spread)

    def next_token_s(self) -> tuple[float, float]:
        """Believed seconds of an iteration, and of the prompts that come before any token where nobody decodes."""
        if not self._ids:
            return self.profile.iteration_s(0, 1, 0, 0), 0.0
        decodes, kv, _, left = self.tally()
        chunk = min(left, max(self.law.tokens - decodes, 0))
        iteration_s = self.profile.iteration_s(chunk, decodes, kv, 0.5 * chunk * chunk) * self.correction.ratio
        queued = self.rows[:, R_LEFT] > 0.0
        if not queued.all():
            return iteration_s, 0.0
        prompts = float(self.rows[queued, R_PROMPT].sum())
        chunk = min(prompts, max(self.law.tokens, 1))
        return iteration_s, math.ceil(prompts / chunk) * self.profile.iteration_s(chunk, 0, 0, 0.5 * chunk * chunk)

    def restarted(self) -> None:
        """Its process was replaced: nothing that was learned of it holds."""
        self.unlearn()
        self.host(0, None)
        self.reported_at = -math.inf
        self._inst[I_ENDS] = -1.0

    def host(self, strangers: int, kv_tokens: int | None) -> None:
        """Believe that so many residents of others have seats here, and that KV which is not ours is theirs.

        One report may count who is just coming or going: of two in a row the fewer are believed. What strangers cost
        in time the correction learns from iterations.
        """
        self.foreign, self._strangers = min(strangers, self._strangers), strangers
        theirs = 0.0
        if self.foreign and kv_tokens is not None and self.watched:
            rows = self.rows
            ours = rows[:, R_PROMPT] - np.maximum(rows[:, R_LEFT], 0.0) + rows[:, R_MADE]
            theirs = min(max(kv_tokens - float(ours.sum()), 0.0), MOST_FOREIGN * self.kv_tokens)
        seats = max(self.max_num_seqs - self.foreign, 1)
        if (theirs, seats) != (self.kv_tokens - self._inst[I_KV], self._inst[I_SEQS]):
            self._inst[I_KV], self._inst[I_SEQS] = self.kv_tokens - theirs, seats
            self._touch()

    def unlearn(self) -> None:
        """Believe the profile again: what the instance was says nothing of what it will be."""
        self.correction = Correction()
        self._inst[I_SCALE] = 1.0
        self._touch()

    def _touch(self) -> None:
        self._inst[I_COUNT] = len(self._ids)
        self._inst[I_GAUGED] = -1.0

    # ------------------------------------------------------------------------------------------------ what follows

    def roll(self, now: float) -> None:
        """Bring the rows to `now` by forecast."""
        inst = self._inst
        if now <= inst[I_ROLLED] or not self.watched:
            return
        inst[I_ROLLED] = now
        if self._ids and inst[I_ENDS] <= now:
            self._advance(now)

    def _advance(self, now: float) -> None:
        """End every iteration that is over, and plan the one that runs."""
        inst, count = self._inst, len(self._ids)
        inst[I_ROLLED] = now
        if count:
            inst[I_ENDS] = kernels.roll(self.packed, inst, self._rows, count, max(inst.item(I_ENDS), -1.0), now)
            inst[I_GAUGED] = -1.0

    def inst(self, now: float) -> Vector:
        """The instance as the kernels see it."""
        inst = self._inst
        inst[I_FREE] = max(inst.item(I_ENDS), now) if self._settings.wait_time and self._ids else now
        return inst

    @property
    def scale(self) -> float:
        """What believed iteration times are multiplied by: the correction and its safety margin."""
        return self._inst.item(I_SCALE)

    @property
    def rows(self) -> Matrix:
        """The residents' rows, in no particular order."""
        return self._rows[: len(self._ids)]

    @property
    def ids(self) -> list[RequestId]:
        """The residents, in the order of `rows`."""
        return self._ids

    @property
    def numbers(self) -> tuple[Vector, Matrix, Matrix]:
        """The slot as `kernels.ask` takes it: the instance, all rows, the gauge."""
        return self._inst, self._rows, self._gauge

    def gauge(self) -> Matrix:
        """Expected batch and KV over `lengths.GRID` (rows `kernels.G_*`)."""
        lengths, inst = self._lengths, self._inst
        if inst[I_GAUGED] != lengths.version:
            rolled = inst.item(I_ROLLED)
            kernels.renew(
                self.packed, inst, self._rows, self._gauge, lengths.table, EDGES, GRID, lengths.version, rolled
            )
        return self._gauge

    @property
    def peak_s(self) -> float:
        """The longest pure-decode iteration that is coming."""
        self.gauge()
        return self._inst.item(I_PEAK)

    @property
    def load(self) -> float:
        """Peak forecast iteration over pace; over the idle iteration where there is no pace."""
        if not self._ids:
            return 0.0
        return self.peak_s / self.pace_s if math.isfinite(self.pace_s) else self.peak_s


class Fleet:
    """All instances by id, in the order they joined."""

    def __init__(self, tiers: Sequence[TierName] = ()) -> None:
        self.books: dict[InstanceId, Books] = {}
        self.arena = Arena(len(GRID))
        self._codes: dict[TierName | None, float] = {None: POOL}
        for name in tiers:
            self.code(name)
        self._ready: list[Books] | None = None
        self._of_tier: dict[TierName | None, list[Books]] = {}

    def __iter__(self) -> Iterator[Books]:
        return iter(self.books.values())

    def __len__(self) -> int:
        return len(self.books)

    def get(self, instance: InstanceId) -> Books | None:
        return self.books.get(instance)

    def add(self, books: Books) -> None:
        """Take an instance in, instead of one of the same name."""
        self.remove(books.id)
        self.books[books.id] = books
        books.move_in(self)
        self._rank()

    def remove(self, instance: InstanceId) -> Books | None:
        """Forget an instance; None when it is not one of the fleet's."""
        books = self.books.pop(instance, None)
        if books is not None:
            books.move_out()
            self.changed()
            self._rank()
        return books

    def _rank(self) -> None:
        """Number the instances by name: what decides between equals."""
        for rank, name in enumerate(sorted(self.books)):
            self.arena.insts[self.books[name].slot, I_RANK] = rank

    def code(self, tier: TierName | None) -> float:
        """What stands for a tier in the arena's numbers."""
        return self._codes.setdefault(tier, float(len(self._codes) - 1))

    def changed(self) -> None:
        """An instance has changed tier or state: lists are made anew when next asked for."""
        self._ready = None

    def ready(self) -> list[Books]:
        """Instances that take requests; the list is not to be changed."""
        if self._ready is None:
            self._ready = [b for b in self.books.values() if b.state is State.READY]
            self._of_tier = {}
            for books in self._ready:
                self._of_tier.setdefault(books.tier, []).append(books)
        return self._ready

    def of_tier(self, tier: TierName | None) -> list[Books]:
        """Ready instances that serve a tier; None: the pool. The list is not to be changed."""
        self.ready()
        return self._of_tier.get(tier, [])

    def look(self, now: float, instances: Sequence[Books]) -> tuple[list[float], list[float]]:
        """Of each instance at `now`: believed seconds of its next iteration, and prompt tokens still to compute."""
        arena, count = self.arena, len(instances)
        slots = np.fromiter((books.slot for books in instances), np.int64, count)
        seconds, left = np.empty(count), np.empty(count)
        kernels.look(arena.profiles, arena.insts, arena.rows, slots, now, seconds, left)
        return seconds.tolist(), left.tolist()

    def starting(self) -> list[Books]:
        return [b for b in self.books.values() if b.state is State.STARTING]

    @property
    def parts(self) -> Sequence[Fleet]:
        """The fleets of all of which a request needs an instance."""
        return (self,)


class SplitFleet(Fleet):
    """A fleet in PD: instances that compute prompts, instances that answer, and all of them together.

    Tiers are of those that answer.
    """

    def __init__(self, tiers: Sequence[TierName] = ()) -> None:
        super().__init__(tiers)
        self.prefill, self.decode = Fleet(tiers), Fleet(tiers)

    @property
    def parts(self) -> Sequence[Fleet]:
        return (self.prefill, self.decode)

    def part(self, role: Role) -> Fleet:
        return self.prefill if role is Role.PREFILL else self.decode

    def add(self, books: Books) -> None:
        self.remove(books.id)
        self.books[books.id] = books
        self.part(books.role).add(books)

    def remove(self, instance: InstanceId) -> Books | None:
        books = self.books.pop(instance, None)
        return None if books is None else self.part(books.role).remove(instance)

    def turn(self, books: Books, role: Role) -> None:
        """Give an empty instance another role; it is in the pool then."""
        assert books.empty, f"{books} holds requests"
        self.part(books.role).remove(books.id)
        books.role, books.tier = role, None
        self.part(role).add(books)

    def ready(self) -> list[Books]:
        return [*self.prefill.ready(), *self.decode.ready()]

    def of_tier(self, tier: TierName | None) -> list[Books]:
        return self.decode.of_tier(tier)
