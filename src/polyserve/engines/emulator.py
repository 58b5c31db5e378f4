"""The simulated engine in real time: iterations end when the clock says so, and their tokens go to whoever listens.

An iteration that ends late does not move the next one: that begins when this one should have ended, so that a stall
is caught up with and nothing drifts. How late iterations end is measured, since a machine that cannot keep up does not
emulate anything; timers are good for about half a millisecond either way.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, Iteration, Slo
from polyserve.engines.gauges import Gauges
from polyserve.sim.engine import Engine, IterationResult, Job

# At most one line of telemetry in this time: what the controller is told at most, too.
TELEMETRY_S = 0.05
# An iteration that ends later than this was held up by the machine, not by its timers.
LATE_S = 0.005


class Listener(Protocol):
    """Who gets the tokens of an answer."""

    def token(self, answer: Answer) -> None:
        """Its token number `answer.made - 1` was made."""


@dataclass(slots=True, eq=False)
class Answer:
    """One answer being made: a choice of a request."""

    job: Job
    request_id: str
    listener: Listener
    index: int  # among the request's choices
    voice: int
    reason: str  # why it will end
    made: int  # tokens there are, those that came with the prompt included

    @property
    def ended(self) -> bool:
        return self.made == self.job.output_tokens


class Emulator:
    """One instance: an engine, its answers, and the task that runs it."""

    def __init__(
        self,
        instance: Instance,
        true: Profile,
        believed: Profile,
        *,
        settings: Settings,
        model: str = "",
        seed: int = 0,
        jitter: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = Engine(
            instance, true, believed, settings=settings, noise=Random(f"jitter {seed} {instance.id}"), jitter=jitter
        )
        self.instance, self.profile, self.seed, self.clock = instance, believed, seed, clock
        # vLLM does not start with a context that its memory cannot hold; the last token's KV is never computed.
        self.context_tokens = min(true.limits.context_tokens, self.engine.kv_capacity)
        self.model = model or believed.name
        self.gauges = Gauges(self, self.model)
        self.worst_lag_s = self.lag_s = 0.0
        self.late_iterations = 0
        self.iteration: Iteration | None = None
        self._answers: dict[str, Answer] = {}
        self._serial = 0
        self._work = asyncio.Event()
        self._watchers: set[asyncio.Event] = set()

    def __repr__(self) -> str:
        return f"Emulator({self.profile.name}, {self.engine!r}, lag {self.lag_s * 1e3:.1f} ms)"

    @property
    def keeps_real_time(self) -> bool:
        """Whether at most one iteration in a hundred ended late."""
        return self.late_iterations <= 0.01 * self.engine.iterations

    def submit(
        self,
        request_id: str,
        listener: Listener,
        index: int,
        voice: int,
        *,
        prompt_tokens: int,
        delivered: int,
        output_tokens: int,
        reason: str,
        slo: Slo | None,
        arrived_at: float,
    ) -> Answer:
        """Have an answer made; raises `ValueError` for one that can never fit."""
        self._serial += 1
        job = Job(str(self._serial), prompt_tokens, output_tokens, slo, arrived_at, delivered)
        self.engine.submit(self.clock(), job)
        answer = Answer(job, request_id, listener, index, voice, reason, delivered)
        self._answers[job.id] = answer
        self._work.set()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Stop making an answer, if it is still being made."""
        if self._answers.pop(answer.job.id, None) is not None:
            self.engine.cancel(self.clock(), answer.job.id)
            self.gauges.aborted()

    def set_pace(self, pace_s: float) -> None:
        self.engine.set_pace(pace_s)

    async def run(self) -> None:
        """Run iterations as long as there is work; ends only when cancelled."""
        while True:
            ends_at = self.engine.begin(self.clock())
            if ends_at is None:
                self._work.clear()
                await self._work.wait()
            while ends_at is not None:
                await asyncio.sleep(max(0.0, ends_at - self.clock()))
                self._end(ends_at)
                ends_at = self.engine.begin(ends_at)

    def _end(self, ends_at: float) -> None:
        result = self.engine.end(ends_at)
        self.lag_s = max(0.0, self.clock() - ends_at)
        self.worst_lag_s = max(self.worst_lag_s, self.lag_s)
        self.late_iterations += self.lag_s > LATE_S
        self.iteration = result.iteration
        self._deliver(result)
        for watcher in self._watchers:
            watcher.set()

    def _deliver(self, result: IterationResult) -> None:
        answers = self._answers
        got = [answers[id] for id in result.tokens]
        for answer in got:
            answer.made += 1
            answer.listener.token(answer)
        assert self.iteration is not None
        self.gauges.iterated(self.iteration, len(got))
        for id in result.first:
            self.gauges.first_token(answers[id], self.iteration.ended_at)
        for done in result.finished:
            self.gauges.finished(answers.pop(done.id), done)

    async def telemetry(self) -> AsyncIterator[dict[str, Any]]:
        """What the engine does, after each iteration but not more often than every `TELEMETRY_S`."""
        ended = asyncio.Event()
        self._watchers.add(ended)
        try:
            while True:
                await ended.wait()
                ended.clear()
                yield self.state()
                await asyncio.sleep(TELEMETRY_S)
        finally:
            self._watchers.discard(ended)

    def state(self) -> dict[str, Any]:
        """The latest iteration, and how far each request is; of several choices, the one furthest behind.

        `kv_tokens` are those that the iteration's decodes read, `kv_held` those in memory. `tokens` counts what was
        made here: what was delivered before counts as prompt, as it does in vLLM.
        """
        iteration = self.iteration or Iteration(self.clock(), 0.0, 0, 0, 0)
        tokens: dict[str, int] = {}
        for answer in self._answers.values():
            made = answer.made - answer.job.resume_from
            if made > 0:
                tokens[answer.request_id] = min(made, tokens.get(answer.request_id, made))
        prefilling: dict[str, int] = {}
        for id, left in self.engine.prefilling().items():
            request_id = self._answers[id].request_id
            if self._answers[id].made == self._answers[id].job.resume_from:
                prefilling[request_id] = max(left, prefilling.get(request_id, 0))
        return {
            "ended_at_ago_s": round(max(0.0, self.clock() - iteration.ended_at), 6),
            "seconds": iteration.seconds,
            "prefill_tokens": iteration.prefill_tokens,
            "decodes": iteration.decodes,
            "kv_tokens": iteration.kv_tokens,
            "kv_held": self.engine.kv_tokens,
            "tokens": {id: count for id, count in tokens.items() if id not in prefilling},
            "prefilling": prefilling,
        }

    def facts(self) -> dict[str, Any]:
        """What the engine is, for a gateway; and whether this machine could keep up with it."""
        chunk, engine = self.instance.chunk, self.engine
        return {
            "profile": self.profile.name,
            "chunk": f"fixed:{chunk.tokens}" if chunk.kind == "fixed" else chunk.kind,
            "order": self.instance.order,
            "kv_tokens": engine.kv_capacity,
            "max_num_seqs": engine.max_num_seqs,
            "max_num_batched_tokens": self.instance.max_num_batched_tokens
            or self.profile.limits.max_num_batched_tokens,
            "context_tokens": self.context_tokens,
            "iterations": engine.iterations,
            "late_iterations": self.late_iterations,
            "worst_lag_s": round(self.worst_lag_s, 6),
            "keeps_real_time": self.keeps_real_time,
            "pace_s": None if math.isinf(engine.pace_s) else engine.pace_s,
        }
