"""One simulated instance as the world keeps it, and the requests under way on it."""

from __future__ import annotations

import math

from polyserve.core.types import InstanceId, Request, RequestId, TierName
from polyserve.report import Outcome
from polyserve.sim.engine import Engine


class Stream:
    """A request under way, from its client's end."""

    __slots__ = ("dispatches", "due_there_at", "instance", "outcome", "output_tokens", "request", "source")

    def __init__(self, request: Request, output_tokens: int) -> None:
        self.request = request
        self.output_tokens = output_tokens
        self.outcome = Outcome(request.id, request.arrived_at, request.prompt_tokens, request.slo)
        self.instance: InstanceId | None = None
        self.source: InstanceId | None = None  # where its KV lies, or comes from, that another is to have
        self.due_there_at = -math.inf  # when the last dispatch reaches its engine
        self.dispatches = 0  # how often it was sent somewhere: what arrives late is known to be stale

    def take(self, output_tokens: int, worst_lateness_s: float, first_at: float, last_at: float | None) -> None:
        """The client has got what one engine made of it; `first_at` is NaN where that is nothing."""
        if math.isnan(first_at):
            return
        outcome = self.outcome
        if worst_lateness_s > outcome.late_s:
            outcome.late_s = worst_lateness_s
        if outcome.first_at is None:
            outcome.first_at = first_at
        outcome.last_at = last_at
        outcome.output_tokens = output_tokens


class Station:
    """One simulated instance."""

    __slots__ = ("engine", "floor_s", "id", "joined_at", "looked", "pace_s", "residents", "role", "sending", "tier")

    def __init__(self, engine: Engine, floor_s: float, now: float) -> None:
        self.id = engine.instance.id
        self.engine = engine
        self.floor_s = floor_s  # what an iteration of one lone decode takes
        self.joined_at = now
        self.role = engine.instance.role
        self.residents: dict[RequestId, Stream] = {}
        self.sending: dict[RequestId, Stream] = {}  # those whose KV lies here, or is on its way from here
        self.tier: TierName | None = None
        self.pace_s: float | None = None
        self.looked = (now, 0.0, 0)  # at the last look: the time, seconds busy and iterations by then

    def __repr__(self) -> str:
        return f"<station of {self.engine}>"

    @property
    def idle(self) -> bool:
        """Whether nobody's KV is here or on its way from here."""
        return not self.residents and not self.sending

    def load(self, now: float, tightest_s: float) -> float:
        """The largest share taken since the last look of what an instance has to give: pace, memory, seats.

        The share of the pace is that of the mean iteration beyond `floor_s`.
        """
        engine, (then, busy_s, iterations) = self.engine, self.looked
        self.looked = (now, engine.busy_s, engine.iterations)
        if not engine.residents:
            return 0.0
        busy_s, iterations, floor_s = self.looked[1] - busy_s, self.looked[2] - iterations, self.floor_s
        pace_s = self.pace_s or tightest_s
        paced = 0.0
        if iterations and pace_s > floor_s:
            paced = min(busy_s / (now - then), 1.0) * (busy_s / iterations - floor_s) / (pace_s - floor_s)
        return max(paced, engine.kv_allocated / engine.kv_capacity, engine.residents / engine.max_num_seqs)

    def so_far(self, stream: Stream) -> None:
        """The resident's client has what it has got so far; its last token's time is not kept."""
        done = self.engine.so_far(stream.request.id)
        stream.take(done.output_tokens, done.worst_lateness_s, done.first_token_at, None)

    def part(self, stream: Stream) -> None:
        """The resident leaves before its end; its client has what it has got so far."""
        self.so_far(stream)
        del self.residents[stream.request.id]
