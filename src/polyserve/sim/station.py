"""One simulated instance as the world keeps it, and the requests under way on it."""

from __future__ import annotations

import math

from polyserve.core.types import InstanceId, Request, RequestId, TierName
from polyserve.report import Outcome
from polyserve.sim.engine import Done, Engine
from polyserve.sim.sight import Sight


class Stream:
    """A request under way, from its client's end."""

    __slots__ = ("dispatches", "due_there_at", "instance", "outcome", "output_tokens", "request")

    def __init__(self, request: Request, output_tokens: int) -> None:
        self.request = request
        self.output_tokens = output_tokens
        self.outcome = Outcome(request.id, request.arrived_at, request.prompt_tokens, request.slo)
        self.instance: InstanceId | None = None
        self.due_there_at = -math.inf  # when the last dispatch reaches its engine
        self.dispatches = 0  # how often it was sent somewhere: what arrives late is known to be stale

    def take(self, done: Done) -> None:
        """The client has got what one engine made of it."""
        outcome = self.outcome
        if not math.isnan(done.first_token_at):
            outcome.late_s = max(outcome.late_s, done.worst_lateness_s)
            outcome.first_at = done.first_token_at if outcome.first_at is None else outcome.first_at
            outcome.last_at = None if math.isnan(done.last_token_at) else done.last_token_at
            outcome.output_tokens = done.output_tokens


class Station:
    """One simulated instance."""

    __slots__ = (
        "alive",
        "busy_s",
        "engine",
        "id",
        "idle",
        "joined_at",
        "looked",
        "pace_s",
        "residents",
        "sight",
        "tier",
        "waking",
    )

    def __init__(self, engine: Engine, sight: Sight, now: float) -> None:
        self.id = engine.instance.id
        self.engine = engine
        self.sight = sight
        self.joined_at = now
        self.residents: dict[RequestId, Stream] = {}
        self.idle = True
        self.waking = False  # idle, and about to begin
        self.alive = True
        self.tier: TierName | None = None
        self.pace_s: float | None = None
        self.busy_s = 0.0
        self.looked = (now, 0.0, 0)  # at the last look: the time, seconds busy and iterations by then

    def __repr__(self) -> str:
        return f"<station of {self.engine}>"

    def load(self, now: float, floor_s: float, tightest_s: float) -> float:
        """The largest share taken since the last look of what an instance has to give: pace, memory, seats.

        The share of the pace is that of the mean iteration beyond `floor_s`, which one lone decode takes.
        """
        engine, (then, busy_s, iterations) = self.engine, self.looked
        self.looked = (now, self.busy_s, engine.iterations)
        if not engine.residents:
            return 0.0
        busy_s, iterations = self.busy_s - busy_s, engine.iterations - iterations
        pace_s = self.pace_s or tightest_s
        paced = 0.0
        if iterations and pace_s > floor_s:
            paced = min(busy_s / (now - then), 1.0) * (busy_s / iterations - floor_s) / (pace_s - floor_s)
        return max(paced, engine.kv_allocated / engine.kv_capacity, engine.residents / engine.max_num_seqs)

    def part(self, stream: Stream) -> None:
        """The resident leaves before its end; its client has what it has got so far."""
        stream.take(self.engine.so_far(stream.request.id))
        del self.residents[stream.request.id]
