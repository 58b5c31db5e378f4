"""What the core is shown of a simulated instance, and how often.

`GatewaySight` says what `polyserve.progress` would say of the same streams, which a test holds it to,
without visiting tokens: in a simulated engine every decoding resident is in every iteration, so an
iteration with a decode in it began when the one before it ended.
"""

from __future__ import annotations

from statistics import median
from typing import Protocol

from polyserve.core.types import Iteration, Progressed, to_microsecond
from polyserve.progress import REPORT_EVERY_S
from polyserve.sim.engine import Engine, IterationResult


class Sight(Protocol):
    """Sees each iteration of one instance as it ends."""

    def ended(self, now: float, result: IterationResult) -> Progressed | None:
        """Take in an iteration; the report on it, if one is due."""
        ...


class GatewaySight:
    """Streams alone: token counts, and iterations inferred from when tokens came; at most every 50 ms."""

    __slots__ = ("_engine", "_lengths_s", "_reported_at", "_tokens_at")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokens_at = float("-inf")
        self._lengths_s: list[float] = []
        self._reported_at = float("-inf")

    def ended(self, now: float, result: IterationResult) -> Progressed | None:
        decodes = result.decodes
        if decodes:
            self._lengths_s.append(now - self._tokens_at)
        if decodes or result.first:
            self._tokens_at = now
        if self._tokens_at != now or now - self._reported_at < REPORT_EVERY_S:
            return None
        self._reported_at = now
        counts = self._engine.token_counts()
        iteration = None
        if self._lengths_s:
            seconds = to_microsecond(median(self._lengths_s))
            iteration = Iteration(now, seconds, decodes=decodes, inferred=True)
            self._lengths_s.clear()
        return Progressed(now, self._engine.instance.id, counts, iteration=iteration)


class PerfectSight:
    """The engine's own books at every iteration."""

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def ended(self, now: float, result: IterationResult) -> Progressed:
        engine = self._engine
        return Progressed(
            now,
            engine.instance.id,
            engine.token_counts(),
            engine.prefilling(),
            result.iteration,
            engine.kv_tokens,
        )
