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
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyserve.core.chunking import chunk_law
from polyserve.core.kernels import Vector
from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, Iteration, RequestId, Slo
from polyserve.sim import kernels as k
from polyserve.sim import layout as lay
from polyserve.sim.bank import NOISE, Bank

# Spreads of observed over believed time which a deadline-bound chunk leaves free: jitter's one in a thousand.
SIGMAS = 3.0


class Job(NamedTuple):
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
        return self._engine._listed(lay.TOKENS)

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
        self._ids: NDArray[np.object_] = np.empty(0, object)  # by slot, and an array, since reports name many at once
        self._unused: list[int] = []
        self._sequence = self._version = 0
        self._state: lay.IntVector
        self._clock: Vector
        self._bank = bank if bank is not None else Bank()
        self.row = self._bank.take(self)
        self.take_hold()
        state, clock = self._state, self._clock
        state[lay.FREE] = self.kv_capacity // self.block_size
        state[lay.BLOCK], state[lay.SEATS] = self.block_size, self.max_num_seqs
        state[lay.BY_DEADLINE], state[lay.RELEGATES] = instance.order == "deadline", settings.relegate
        state[lay.KIND], state[lay.LAW_TOKENS] = law.kind, law.tokens
        state[lay.SPEND], state[lay.FLOOR] = law.spend, law.floor
        state[lay.TRUE], state[lay.BELIEVED] = self._bank.learn_profile(true), self._bank.learn_profile(believed)
        state[lay.LEARNS] = settings.correction and (jitter > 0 or state[lay.TRUE] != state[lay.BELIEVED])
        state[lay.JITTERS], state[lay.DRAWN] = jitter > 0, NOISE
        clock[lay.PACE] = math.inf
        clock[lay.RATIO] = clock[lay.MARGIN] = clock[lay.STRETCH] = clock[lay.OFF] = 1.0
        clock[lay.SIGMAS] = SIGMAS * settings.safety_sigma
        clock[lay.TOKENS_AT] = clock[lay.REPORTED_AT] = -math.inf

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
        self._ids = np.append(self._ids, np.full(bank.slots - old, "", object))
        self._unused[:0] = range(bank.slots - 1, old - 1, -1)

    def draw(self) -> float:
        """What the next iteration's true time is stretched by."""
        assert self._noise is not None
        return max(0.5, 1.0 + self._jitter * self._noise.gauss())

    def submit(self, now: float, job: Job) -> None:
        """Take in a request; raises `ValueError` for one that this engine can never finish."""
        id, prompt_tokens, output_tokens, slo, arrived_at, resume_from, brings_kv = job
        if prompt_tokens < 1 or not 0 <= resume_from < output_tokens:
            raise ValueError(f"request {id}: wants a prompt and at least one token to make: {job}")
        if brings_kv and not resume_from:
            raise ValueError(f"request {id}: brings its KV, so its first token was made: resume_from is at least 1")
        # The last token's KV is never computed.
        if prompt_tokens + output_tokens - 1 > self.kv_capacity:
            raise ValueError(
                f"request {id}: {prompt_tokens} prompt and {output_tokens} output tokens never "
                f"fit into the {self.kv_capacity} KV tokens of instance {self.instance.id}"
            )
        assert id not in self._slots, f"request {id} is here already"
        if not self._unused:
            self._bank.widen()
        slot = self._unused.pop()
        self._slots[id] = slot
        self._ids[slot] = id
        self._sequence += 1
        self._version += 1
        due_at, tpot_s = (math.inf, math.inf) if slo is None else (slo.due_at(arrived_at, 0), slo.tpot_s)
        k.admit(
            self._ints,
            self._floats,
            self._lists,
            self._state,
            slot,
            self._sequence,
            prompt_tokens,
            output_tokens,
            resume_from,
            brings_kv,
            due_at,
            tpot_s,
        )

    def cancel(self, now: float, id: RequestId) -> bool:
        """Forget a request; False when it is not here. A running iteration keeps its length."""
        if id not in self._slots:
            return False
        k.drop(self._ints, self._floats, self._lists, self._state, self._clock, self._slots[id])
        self._unused.append(self._slots.pop(id))
        return True

    def set_pace(self, pace_s: float) -> None:
        """Bound iterations with a dynamic chunk; a tighter running resident bounds them still."""
        self._clock[lay.PACE] = pace_s

    def begin(self, now: float) -> float | None:
        """Start the next iteration and say when it ends; None when one runs or there is no work."""
        if self._state[lay.BUSY] or not self._slots:
            return None
        bank, clock = self._bank, self._clock
        if self._jitter:
            clock[lay.STRETCH] = self.draw()
        goes = k.compose(bank.profiles, self._ints, self._floats, self._lists, self._state, clock, bank.work, now)
        assert goes, f"{self} stands still"
        return float(clock[lay.ENDS_AT])

    def end(self, now: float) -> IterationResult:
        """Finish the running iteration: `now` is when `begin` said it ends, or later if the body was late."""
        state, clock, lists = self._state, self._clock, self._lists
        assert state[lay.BUSY], "no iteration runs"
        self._version += 1
        news = k.settle(self._ints, self._floats, lists, state, clock, now)
        prefill, decodes, kv = state[lay.PREFILL : lay.KV + 1].tolist()
        shape = (clock.item(lay.ENDS_AT), clock.item(lay.LENGTH), prefill, decodes, kv)
        if not news:
            return IterationResult(self, [], [], [], shape)
        ints, floats = self._ints, self._floats
        finished = [
            Done(
                self.forget(s),
                ints.item(lay.GENERATED, s),
                floats.item(lay.WORST, s),
                floats.item(lay.FIRST_AT, s),
                now,
            )
            for s in lists[lay.FINISHED, : state[lay.FINISHED]].tolist()
        ]
        return IterationResult(self, self._listed(lay.FIRST), finished, self._listed(lay.PREEMPTED), shape)

    def named(self, slots: NDArray[np.int64]) -> list[RequestId]:
        """The requests in some slots."""
        names: list[RequestId] = self._ids[slots].tolist()
        return names

    def name(self, slot: int) -> RequestId:
        """The request in a slot."""
        id: RequestId = self._ids[slot]
        return id

    def forget(self, slot: int) -> RequestId:
        """Free the slot of a request that has finished; returns which it was."""
        id: RequestId = self._ids[slot]
        self._unused.append(self._slots.pop(id))
        return id

    def _listed(self, row: int) -> list[RequestId]:
        return self.named(self._lists[row, : self._state[row]])

    @property
    def busy(self) -> bool:
        """Whether an iteration runs."""
        return bool(self._state[lay.BUSY])

    @property
    def pace_s(self) -> float:
        """The bound on iterations."""
        return float(self._clock[lay.PACE])

    @property
    def busy_s(self) -> float:
        """Seconds of all iterations begun."""
        return float(self._clock[lay.BUSY_S])

    @property
    def iterations(self) -> int:
        """Iterations ended."""
        return int(self._state[lay.ITERATIONS])

    @property
    def preemptions(self) -> int:
        """How often somebody was thrown out."""
        return int(self._state[lay.PREEMPTIONS])

    @property
    def forced_chunks(self) -> int:
        """Chunks that cost somebody's deadline."""
        return int(self._state[lay.FORCED_CHUNKS])

    @property
    def residents(self) -> int:
        """Requests on this engine, those that wait for a seat or memory included."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Residents that hold no KV yet, or lost it."""
        return len(self._slots) - int(self._state[lay.RUNNING])

    @property
    def kv_tokens(self) -> int:
        """KV tokens computed and held."""
        return int(self._state[lay.HELD])

    @property
    def kv_allocated(self) -> int:
        """KV tokens in allocated blocks: what cannot be given to anybody else."""
        return self.kv_capacity - int(self._state[lay.FREE]) * self.block_size

    def so_far(self, id: RequestId) -> Done:
        """What a resident has got here, for a body that takes it away; its last token's time is not kept."""
        slot, floats = self._slots[id], self._floats
        k.bring_up_to_date(self._ints, floats, self._lists, self._state, slot)
        worst, first_at = float(floats[lay.WORST, slot]), float(floats[lay.FIRST_AT, slot])
        return Done(id, int(self._ints[lay.GENERATED, slot]), worst, first_at, math.nan)

    def token_counts(self) -> dict[RequestId, int]:
        """Output tokens of every resident that decodes."""
        made = self._floats[lay.P_MADE, : self._state[lay.DECODING]]
        return dict(zip(self._listed(lay.DECODING), made.astype(int).tolist(), strict=True))

    def prefilling(self) -> dict[RequestId, int]:
        """Prompt tokens still to compute of every resident that does not decode, waiting or not."""
        slots = self._lists[lay.QUEUE, : self._state[lay.QUEUE]]
        slots = slots[self._ints[lay.BROUGHT, slots] == 0]
        left = self._ints[lay.TARGET, slots] - self._ints[lay.COMPUTED, slots]
        return dict(zip(self.named(slots), left.tolist(), strict=True))
