"""One simulated engine, iteration by iteration: continuous batching as vLLM's V1 scheduler does it.

Each iteration takes every decode (one token each) and then prefills in the engine's order: `deadline`, by
when their next token is due, best effort last, or `fcfs`, by arrival here. The chunk rule
(`core/chunking.py`) sizes the chunks by the *believed* profile; the engine also knows its own clock, batch
and KV, and corrects that belief by what its iterations really took. How long an iteration takes is for the
*true* profile to say, times jitter.

KV is allocated in blocks, chunk by chunk, as vLLM does; as there (`scheduler_reserve_full_isl`) a request
joins the batch only when a seat is free and the free blocks would hold its whole prompt, and nobody
overtakes one that waits for memory. A half computed prompt that finds too little room takes what is left, or
stands still, and those behind it with it: so what took its room decodes and will end, and no engine locks up.
A decode that finds no block has the resident that matters least preempted: the last admitted, or by deadline
the latest (best effort first). It loses its KV and queues again, what it had generated being part of its
prompt; nobody joins in such an iteration.

The state is a structure of arrays that `sim/kernels.py` works on; Python sees only what changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np

from polyserve.core.chunking import chunk_law
from polyserve.core.kernels import FORCED
from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, Iteration, RequestId, Slo
from polyserve.sim import kernels as k

FIRST_SLOTS = 64
# Share of the newest iteration in the engine's own view of observed over believed time: about 20 iterations
# of memory, half a second at the paces served.
NEWEST = 0.05
# Spreads of that ratio which a deadline-bound chunk leaves free: jitter's one in a thousand.
SIGMAS = 3.0


@dataclass(frozen=True, slots=True)
class Job:
    """One request as an engine gets it.

    The first `resume_from` output tokens were delivered elsewhere already: they are computed like prompt
    tokens, and the next token is number `resume_from`.
    """

    id: RequestId
    prompt_tokens: int
    output_tokens: int  # altogether, those before `resume_from` included
    slo: Slo | None
    arrived_at: float  # at the system's door: what deadlines count from
    resume_from: int = 0


class Done(NamedTuple):
    """What a request has got; `worst_lateness_s` is that of its latest token here, -inf without an SLO."""

    id: RequestId
    output_tokens: int
    worst_lateness_s: float
    first_token_at: float
    last_token_at: float


class IterationResult:
    """What one iteration brought; `tokens` is read before the engine's next `submit` or `end`."""

    __slots__ = ("_engine", "_shape", "_version", "finished", "first", "preempted")

    def __init__(
        self,
        engine: Engine,
        first: list[RequestId],
        finished: list[Done],
        preempted: list[RequestId],
        shape: tuple[float, float, int, int, int],
    ) -> None:
        self._engine, self._version, self._shape = engine, engine._version, shape
        self.first, self.finished, self.preempted = first, finished, preempted

    @property
    def tokens(self) -> list[RequestId]:
        """Who got a token: the decodes, oldest first, then the prompts that came to their end."""
        assert self._version == self._engine._version, "the engine has moved on"
        return self._engine._named(self._engine._lists[k.TOKENS, : self._engine._state[k.TOKENS]])

    @property
    def decodes(self) -> int:
        """Residents that decoded; those whose prompt ended are not among them."""
        return self._shape[3]

    @property
    def iteration(self) -> Iteration:
        """The batch as it was; `kv_tokens` are those that its decodes read."""
        return Iteration(*self._shape)

    def __repr__(self) -> str:
        return f"IterationResult({self.iteration}, first={self.first}, finished={self.finished})"


class Engine:
    """A simulated engine: `begin` an iteration when idle, `end` it at the time that `begin` said."""

    def __init__(
        self,
        instance: Instance,
        true: Profile,
        believed: Profile,
        *,
        settings: Settings,
        noise: Random | None = None,
        jitter: float = 0.0,
    ) -> None:
        assert jitter == 0.0 or noise is not None, "jitter wants a source of noise"
        law = chunk_law(instance, believed, settings.chunk_bound, settings.chunk_floor_tokens)
        self.instance = instance
        self.block_size = true.limits.block_size
        self.kv_capacity = (instance.kv_tokens or true.limits.kv_tokens) // self.block_size * self.block_size
        # vLLM does not start with more seats than the tokens of an iteration.
        self.max_num_seqs = min(instance.max_num_seqs or true.limits.max_num_seqs, law.tokens)
        self.iterations = self.preemptions = self.forced_chunks = 0
        self.running = False
        self._true, self._believed = true.packed, believed.packed
        self._exact = jitter == 0.0 and np.array_equal(self._true, self._believed)
        self._noise, self._jitter = noise, jitter
        self._correct, self._sigmas = settings.correction, SIGMAS * settings.safety_sigma
        self._off = self._ratio = self._margin = 1.0
        self._variance = 0.0
        self.pace_s = math.inf
        self._shape = (0.0, 0.0, 0, 0, 0)
        self._slots: dict[RequestId, int] = {}
        self._ids: list[RequestId] = [""] * FIRST_SLOTS
        self._unused = list(range(FIRST_SLOTS - 1, -1, -1))
        self._sequence = self._version = 0
        self._allocate(FIRST_SLOTS)
        state = self._state
        state[k.FREE] = self.kv_capacity // self.block_size
        state[k.BLOCK], state[k.SEATS] = self.block_size, self.max_num_seqs
        state[k.BY_DEADLINE], state[k.RELEGATES] = instance.order == "deadline", settings.relegate
        state[k.KIND], state[k.LAW_TOKENS] = law.kind, law.tokens
        state[k.SPEND], state[k.FLOOR] = law.spend_slack, law.floor

    def __repr__(self) -> str:
        return (
            f"Engine({self.instance.id}: {self.residents} residents, {self.waiting} waiting, "
            f"{self.kv_tokens}/{self.kv_capacity} KV tokens, {self.iterations} iterations)"
        )

    def _allocate(self, slots: int) -> None:
        self._ints = np.zeros((k.INT_ROWS, slots), np.int64)
        self._floats = np.zeros((k.FLOAT_ROWS, slots))
        self._lists = np.zeros((k.LIST_ROWS, slots), np.int64)
        self._work = np.zeros((k.WORK_ROWS, slots))
        self._state = np.zeros(k.STATE_LENGTH, np.int64)

    def _grow(self) -> None:
        old = len(self._ids)
        ints, floats, lists, state = self._ints, self._floats, self._lists, self._state
        self._allocate(2 * old)
        self._ints[:, :old], self._floats[:, :old], self._lists[:, :old] = ints, floats, lists
        self._state[:] = state
        self._ids += [""] * old
        self._unused = list(range(2 * old - 1, old - 1, -1))

    def submit(self, now: float, job: Job) -> None:
        """Take in a request; raises `ValueError` for one that this engine can never finish."""
        if job.prompt_tokens < 1 or not 0 <= job.resume_from < job.output_tokens:
            raise ValueError(f"request {job.id}: wants a prompt and at least one token to make: {job}")
        # The last token's KV is never computed.
        if job.prompt_tokens + job.output_tokens - 1 > self.kv_capacity:
            raise ValueError(
                f"request {job.id}: {job.prompt_tokens} prompt and {job.output_tokens} output tokens never "
                f"fit into the {self.kv_capacity} KV tokens of instance {self.instance.id}"
            )
        assert job.id not in self._slots, f"request {job.id} is here already"
        if not self._unused:
            self._grow()
        slot = self._unused.pop()
        self._slots[job.id] = slot
        self._ids[slot] = job.id
        self._sequence += 1
        self._version += 1
        k.admit(
            self._ints,
            self._floats,
            self._lists,
            self._state,
            slot,
            self._sequence,
            job.prompt_tokens,
            job.output_tokens,
            job.resume_from,
            math.inf if job.slo is None else job.slo.due_at(job.arrived_at, 0),
            math.inf if job.slo is None else job.slo.tpot_s,
        )

    def cancel(self, now: float, id: RequestId) -> bool:
        """Forget a request; False when it is not here. A running iteration keeps its length."""
        if id not in self._slots:
            return False
        k.drop(self._ints, self._lists, self._state, self._slots[id])
        self._forget(id)
        return True

    def set_pace(self, pace_s: float) -> None:
        """Bound iterations with a dynamic chunk; a tighter running resident bounds them still."""
        self.pace_s = pace_s

    def begin(self, now: float) -> float | None:
        """Start the next iteration and say when it ends; None when one runs or there is no work."""
        if self.running or not self._slots:
            return None
        stretch = 1.0
        if self._jitter:
            assert self._noise is not None
            stretch = max(0.5, 1.0 + self._jitter * self._noise.gauss())
        ends_at, length, self._off, prefill, decodes, kv, verdict = k.compose(
            self._true,
            self._believed,
            self._ints,
            self._floats,
            self._lists,
            self._state,
            self._work,
            now,
            self.pace_s,
            self._ratio,
            self._margin,
            stretch,
        )
        assert prefill + decodes > 0, f"{self} stands still"
        if verdict == FORCED:
            self.forced_chunks += 1
        self._shape = (ends_at, length, prefill, decodes, kv)
        self.running = True
        return ends_at

    def end(self, now: float) -> IterationResult:
        """Finish the running iteration: `now` is when `begin` said it ends, or later if the body was late."""
        assert self.running, "no iteration runs"
        self.running = False
        self.iterations += 1
        self._version += 1
        lists = self._lists
        firsts, finishes, thrown = k.settle(self._ints, self._floats, lists, self._state, now)
        preempted = self._named(lists[k.PREEMPTED, :thrown]) if thrown else []
        self.preemptions += thrown
        first = self._named(lists[k.FIRST, :firsts]) if firsts else []
        finished = [self._done(slot, now) for slot in lists[k.FINISHED, :finishes].tolist()] if finishes else []
        if self._correct and not self._exact:
            self._learn()
        return IterationResult(self, first, finished, preempted, self._shape)

    def _named(self, slots: k.IntVector) -> list[RequestId]:
        ids = self._ids
        return [ids[slot] for slot in slots.tolist()]

    def _done(self, slot: int, now: float) -> Done:
        id, floats = self._ids[slot], self._floats
        self._forget(id)
        return Done(
            id,
            self._ints.item(k.GENERATED, slot),
            floats.item(k.WORST, slot),
            floats.item(k.FIRST_AT, slot),
            now,
        )

    def _forget(self, id: RequestId) -> None:
        self._unused.append(self._slots.pop(id))

    def _learn(self) -> None:
        """Take the iteration that just ended into the ratio of observed to believed time, and its spread."""
        off = self._off - self._ratio
        self._ratio += NEWEST * off
        self._variance += NEWEST * (off * off - self._variance)
        self._margin = 1.0 + self._sigmas * math.sqrt(self._variance)

    @property
    def residents(self) -> int:
        """Requests on this engine, those that wait for a seat or memory included."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Residents that hold no KV yet, or lost it."""
        return len(self._slots) - int(self._state[k.RUNNING])

    @property
    def kv_tokens(self) -> int:
        """KV tokens computed and held."""
        return int(self._state[k.HELD])

    @property
    def kv_allocated(self) -> int:
        """KV tokens in allocated blocks: what cannot be given to anybody else."""
        return self.kv_capacity - int(self._state[k.FREE]) * self.block_size

    def generated(self, id: RequestId) -> int:
        """Output tokens a resident has, those before `resume_from` included."""
        return int(self._ints[k.GENERATED, self._slots[id]])

    def so_far(self, id: RequestId) -> Done:
        """What a resident has got here, for a body that takes it away; its last token's time is not kept."""
        slot, floats = self._slots[id], self._floats
        worst, first_at = floats.item(k.WORST, slot), floats.item(k.FIRST_AT, slot)
        return Done(id, self.generated(id), worst, first_at, math.nan)

    def token_counts(self) -> dict[RequestId, int]:
        """Output tokens of every resident that decodes."""
        slots = self._lists[k.DECODING, : self._state[k.DECODING]]
        ids = self._ids
        return dict(zip([ids[s] for s in slots.tolist()], self._ints[k.GENERATED, slots].tolist(), strict=True))

    def prefilling(self) -> dict[RequestId, int]:
        """Prompt tokens still to compute of every resident that does not decode, waiting or not."""
        slots = self._lists[k.QUEUE, : self._state[k.QUEUE]]
        left = self._ints[k.TARGET, slots] - self._ints[k.COMPUTED, slots]
        return dict(zip(self._named(slots), left.tolist(), strict=True))
