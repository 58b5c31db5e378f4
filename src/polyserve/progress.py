"""What a body sees of an instance that only streams tokens: which iterations it ran, how long they took.

Every decoding resident yields one token per iteration, so the tokens of one iteration arrive together.
Arrivals are grouped into clusters: a new one begins when a resident comes round again, or after a gap that
is long for this instance. A cluster begins when its iteration ended (what follows is only the relay's
delay). Whoever decodes in it was in the cluster before as well, so the distance between the two is the
length of the later iteration; a cluster of first tokens alone says nothing of length, since the engine may
have been idle, or busy with prompts that nobody saw.

Both bodies use it, so that the core has the same view of a simulated and of a live engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from statistics import median

from polyserve.core.types import InstanceId, Iteration, Progressed, RequestId, to_microsecond

# At most one report per instance in this time: the core needs no step per token, its forecast rolls on.
REPORT_EVERY_S = 0.05
# Tokens of one iteration leave an engine within a millisecond or so; the gap that parts two iterations is a
# share of their length, between these bounds.
GAP_SHARE, LEAST_GAP_S, MOST_GAP_S = 0.3, 0.001, 0.005


class ProgressCollector:
    """Gathers one instance's token arrivals into at most one `Progressed` per 50 ms."""

    def __init__(self, instance: InstanceId) -> None:
        self._instance = instance
        self._counts: Counter[RequestId] = Counter()  # output tokens of each resident that has a first one
        self._news = False  # whether a count changed since the last report
        self._reported_at = float("-inf")
        self._gap_s = MOST_GAP_S
        # The cluster that is being gathered: events of each member, and how many of them are first tokens.
        self._members: dict[RequestId, int] = {}
        self._firsts = 0
        self._began_at = self._last_at = float("-inf")
        # Of complete clusters: when the last began; since the last report, lengths and the latest's decodes.
        self._previous_at = float("-inf")
        self._lengths_s: list[float] = []
        self._decodes: int | None = None

    def __repr__(self) -> str:
        return f"<progress of {self._instance}: {len(self._counts)} residents>"

    def first(self, now: float, request: RequestId) -> None:
        """A resident's first token has arrived."""
        self.token(now, request, 1)

    def token(self, now: float, request: RequestId, count: int, events: int = 1) -> None:
        """A resident has reached `count` output tokens, with `events` stream events at once."""
        if request in self._members or now - self._last_at > self._gap_s:
            self._close()
            self._began_at = now
        self._firsts += request not in self._counts
        self._counts[request] = count
        self._members[request] = events
        self._last_at = now
        self._news = True

    def tokens(self, now: float, decodes: Collection[RequestId], firsts: Collection[RequestId] = ()) -> None:
        """A whole iteration at once: one token more for each of `decodes`, the first for each of `firsts`."""
        self._close()
        self._counts.update(decodes)
        self._counts.update(firsts)
        self._closed(now, len(decodes), steps=1)
        self._news = True

    def drop(self, request: RequestId) -> None:
        """A resident has left; what it did still counts for the iteration it was in."""
        self._counts.pop(request, None)

    def report(self, now: float) -> Progressed | None:
        """What happened since the last report, or None when that is nothing or the last one is too recent."""
        if not self._news or now - self._reported_at < REPORT_EVERY_S:
            return None
        if now - self._last_at > self._gap_s:
            self._close()
        self._news = False
        self._reported_at = now
        return Progressed(now, self._instance, dict(self._counts), iteration=self._iteration())

    def _iteration(self) -> Iteration | None:
        if not self._lengths_s:
            return None
        seconds = to_microsecond(median(self._lengths_s))
        self._lengths_s.clear()
        self._gap_s = min(max(GAP_SHARE * seconds, LEAST_GAP_S), MOST_GAP_S)
        return Iteration(to_microsecond(self._previous_at), seconds, decodes=self._decodes, inferred=True)

    def _close(self) -> None:
        """End the cluster that is being gathered."""
        if self._members:
            # A relay held up reads several events of a stream at once: the stream held up least is right.
            steps = min(self._members.values())
            self._closed(self._began_at, len(self._members) - self._firsts, steps)
            self._members.clear()
            self._firsts = 0

    def _closed(self, began_at: float, decodes: int, steps: int) -> None:
        if decodes and self._previous_at > float("-inf"):
            self._lengths_s.append((began_at - self._previous_at) / steps)
            self._decodes = decodes
        self._previous_at = began_at
