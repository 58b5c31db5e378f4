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

A request handed over by another engine may bring its KV along (`Job.brings_kv`): it queues like the others,
needs a seat and the blocks of its context, and then decodes; once preempted it is computed like any other.

The state is a row of a bank of arrays (`sim/bank.py`) that compiled loops work on; Python sees only what
changed. An engine alone is run by `begin` and `end`, those of a world by `Bank.advance`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from polyserve.core.chunking import chunk_law
from polyserve.core.kernels import Vector
from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, Iteration, RequestId, Slo
from polyserve.sim import kernels as k
from polyserve.sim.bank import NOISE, Bank

# Spreads of observed over believed time which a deadline-bound chunk leaves free: jitter's one in a thousand.
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
    brings_kv: bool = False  # of its prompt and of all delivered tokens but the last: there is nothing to prefill


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
        return self._engine._listed(k.TOKENS)

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
        bank: Bank | None = None,
    ) -> None:
        assert jitter == 0.0 or noise is not None, "jitter wants a source of noise"
        law = chunk_law(instance, believed, settings.chunk_bound, settings.chunk_floor_tokens)
        self.instance = instance
        self.block_size = true.limits.block_size
        self.kv_capacity = (instance.kv_tokens or true.limits.kv_tokens) // self.block_size * self.block_size
        # vLLM does not start with more seats than the tokens of an iteration.
        self.max_num_seqs = min(instance.max_num_seqs or true.limits.max_num_seqs, law.tokens)
        self._noise, self._jitter = noise, jitter
        self._slots: dict[RequestId, int] = {}
        self._ids: list[RequestId] = []
        self._unused: list[int] = []
        self._sequence = self._version = 0
        self._state: k.IntVector
        self._clock: Vector
        self._bank = bank if bank is not None else Bank()
        self.row = self._bank.take(self)
        self.take_hold()
        state, clock = self._state, self._clock
        state[k.FREE] = self.kv_capacity // self.block_size
        state[k.BLOCK], state[k.SEATS] = self.block_size, self.max_num_seqs
        state[k.BY_DEADLINE], state[k.RELEGATES] = instance.order == "deadline", settings.relegate
        state[k.KIND], state[k.LAW_TOKENS] = law.kind, law.tokens
        state[k.SPEND], state[k.FLOOR] = law.spend_slack, law.floor
        state[k.TRUE], state[k.BELIEVED] = self._bank.learn_profile(true), self._bank.learn_profile(believed)
        state[k.LEARNS] = settings.correction and (jitter > 0 or state[k.TRUE] != state[k.BELIEVED])
        state[k.JITTERS], state[k.DRAWN] = jitter > 0, NOISE
        clock[k.PACE] = math.inf
        clock[k.RATIO] = clock[k.MARGIN] = clock[k.STRETCH] = clock[k.OFF] = 1.0
        clock[k.SIGMAS] = SIGMAS * settings.safety_sigma
        clock[k.TOKENS_AT] = clock[k.REPORTED_AT] = -math.inf

    def __repr__(self) -> str:
        return (
            f"Engine({self.instance.id}: {self.residents} residents, {self.waiting} waiting, "
            f"{self.kv_tokens}/{self.kv_capacity} KV tokens, {self.iterations} iterations)"
        )

    def take_hold(self) -> None:
        """Look up the arrays of the engine's row; they are replaced when the bank grows."""
        bank, row = self._bank, self.row
        self._ints, self._floats, self._lists = bank.ints[row], bank.floats[row], bank.lists[row]
        self._state, self._clock = bank.state[row], bank.clock[row]
        old = len(self._ids)
        self._ids += [""] * (bank.slots - old)
        self._unused[:0] = range(bank.slots - 1, old - 1, -1)

    def draw(self) -> float:
        """What the next iteration's true time is stretched by."""
        assert self._noise is not None
        return max(0.5, 1.0 + self._jitter * self._noise.gauss())

    def submit(self, now: float, job: Job) -> None:
        """Take in a request; raises `ValueError` for one that this engine can never finish."""
        if job.prompt_tokens < 1 or not 0 <= job.resume_from < job.output_tokens:
            raise ValueError(f"request {job.id}: wants a prompt and at least one token to make: {job}")
        if job.brings_kv and not job.resume_from:
            raise ValueError(f"request {job.id}: brings its KV, so its first token was made: resume_from is at least 1")
        # The last token's KV is never computed.
        if job.prompt_tokens + job.output_tokens - 1 > self.kv_capacity:
            raise ValueError(
                f"request {job.id}: {job.prompt_tokens} prompt and {job.output_tokens} output tokens never "
                f"fit into the {self.kv_capacity} KV tokens of instance {self.instance.id}"
            )
        assert job.id not in self._slots, f"request {job.id} is here already"
        if not self._unused:
            self._bank.widen()
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
            job.brings_kv,
            math.inf if job.slo is None else job.slo.due_at(job.arrived_at, 0),
            math.inf if job.slo is None else job.slo.tpot_s,
        )

    def cancel(self, now: float, id: RequestId) -> bool:
        """Forget a request; False when it is not here. A running iteration keeps its length."""
        if id not in self._slots:
            return False
        k.drop(self._ints, self._lists, self._state, self._slots[id])
        self._unused.append(self._slots.pop(id))
        return True

    def set_pace(self, pace_s: float) -> None:
        """Bound iterations with a dynamic chunk; a tighter running resident bounds them still."""
        self._clock[k.PACE] = pace_s

    def begin(self, now: float) -> float | None:
        """Start the next iteration and say when it ends; None when one runs or there is no work."""
        if self._state[k.BUSY] or not self._slots:
            return None
        bank, clock = self._bank, self._clock
        if self._jitter:
            clock[k.STRETCH] = self.draw()
        goes = k.compose(bank.profiles, self._ints, self._floats, self._lists, self._state, clock, bank.work, now)
        assert goes, f"{self} stands still"
        return float(clock[k.ENDS_AT])

    def end(self, now: float) -> IterationResult:
        """Finish the running iteration: `now` is when `begin` said it ends, or later if the body was late."""
        state, clock, lists = self._state, self._clock, self._lists
        assert state[k.BUSY], "no iteration runs"
        self._version += 1
        news = k.settle(self._ints, self._floats, lists, state, clock, now)
        prefill, decodes, kv = state[k.PREFILL : k.KV + 1].tolist()
        shape = (clock.item(k.ENDS_AT), clock.item(k.LENGTH), prefill, decodes, kv)
        if not news:
            return IterationResult(self, [], [], [], shape)
        ints, floats = self._ints, self._floats
        finished = [
            Done(self.forget(s), ints.item(k.GENERATED, s), floats.item(k.WORST, s), floats.item(k.FIRST_AT, s), now)
            for s in lists[k.FINISHED, : state[k.FINISHED]].tolist()
        ]
        return IterationResult(self, self._listed(k.FIRST), finished, self._listed(k.PREEMPTED), shape)

    def named(self, slots: list[int]) -> list[RequestId]:
        """The requests in some slots."""
        ids = self._ids
        return [ids[slot] for slot in slots]

    def name(self, slot: int) -> RequestId:
        """The request in a slot."""
        return self._ids[slot]

    def forget(self, slot: int) -> RequestId:
        """Free the slot of a request that has finished; returns which it was."""
        id = self._ids[slot]
        self._unused.append(self._slots.pop(id))
        return id

    def _listed(self, row: int) -> list[RequestId]:
        return self.named(self._lists[row, : self._state[row]].tolist())

    @property
    def busy(self) -> bool:
        """Whether an iteration runs."""
        return bool(self._state[k.BUSY])

    @property
    def pace_s(self) -> float:
        """The bound on iterations."""
        return float(self._clock[k.PACE])

    @property
    def busy_s(self) -> float:
        """Seconds of all iterations begun."""
        return float(self._clock[k.BUSY_S])

    @property
    def iterations(self) -> int:
        """Iterations ended."""
        return int(self._state[k.ITERATIONS])

    @property
    def preemptions(self) -> int:
        """How often somebody was thrown out."""
        return int(self._state[k.PREEMPTIONS])

    @property
    def forced_chunks(self) -> int:
        """Chunks that cost somebody's deadline."""
        return int(self._state[k.FORCED_CHUNKS])

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
        return dict(zip(self.named(slots.tolist()), self._ints[k.GENERATED, slots].tolist(), strict=True))

    def prefilling(self) -> dict[RequestId, int]:
        """Prompt tokens still to compute of every resident that does not decode, waiting or not."""
        slots = self._lists[k.QUEUE, : self._state[k.QUEUE]]
        slots = slots[self._ints[k.BROUGHT, slots] == 0]
        left = self._ints[k.TARGET, slots] - self._ints[k.COMPUTED, slots]
        return dict(zip(self.named(slots.tolist()), left.tolist(), strict=True))
