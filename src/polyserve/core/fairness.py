"""Whose turn it is when requests of several tenants wait in one tier: start-time fair queueing (Goyal et al., 1996).

Each tenant has a virtual time, which its served requests move on by their tokens over its share. Inside a tenant
requests stay in deadline order, and each has the virtual time at which its tenant would come to it; lowest goes first.
Who comes back after having waited for nothing begins at the present, so that nobody saves turns up.
"""

from __future__ import annotations

from collections.abc import Mapping


class Turns:
    """The virtual times of the tenants of one queue."""

    def __init__(self, shares: Mapping[str, float], answer_tokens: int) -> None:
        """`answer_tokens` stand for an answer, whose length nobody knows before."""
        self._shares = shares
        self._answer_tokens = answer_tokens
        self._times: dict[str, float] = {}
        self._now = 0.0

    def __repr__(self) -> str:
        return f"<turns at {self._now:g}: {self._times}>"

    def share(self, tenant: str) -> float:
        return self._shares.get(tenant, 1.0)

    def cost(self, tenant: str, prompt_tokens: int) -> float:
        """How far one request moves its tenant's time on."""
        return (prompt_tokens + self._answer_tokens) / self.share(tenant)

    def time(self, tenant: str) -> float:
        """When the next request of a tenant has its turn."""
        return max(self._times.get(tenant, 0.0), self._now)

    def came(self, tenant: str) -> None:
        """A tenant of whom nobody waited has somebody waiting."""
        self._times[tenant] = self.time(tenant)

    def served(self, tenant: str, prompt_tokens: int) -> None:
        """A waiting request of a tenant had its turn."""
        begun = self._times.get(tenant, self._now)
        self._now = max(self._now, begun)
        self._times[tenant] = begun + self.cost(tenant, prompt_tokens)

    def rest(self) -> None:
        """Nobody waits any more: all begin anew."""
        self._times.clear()
        self._now = 0.0
