"""How much each tenant may: requests and tokens a second, and requests at once.

Rates are token buckets that begin full and hold `burst_s` seconds of their rate. A request is let in when each of its
tenant's buckets holds something, and takes its prompt's tokens then and those of its answer when it ends: a bucket may
go below nothing, so that what was promised is kept over time though nobody knows an answer's length beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from polyserve.core.types import Limit, Request, RequestId, Tenant

# How much the latest request says of how long a tenant's requests take.
LATEST_SHARE = 0.1


class Bucket:
    """`rate` a second flow in, at most `size` are kept."""

    __slots__ = ("_at", "_level", "_rate", "_size")

    def __init__(self, rate: float, size: float, now: float) -> None:
        self._rate = rate
        self._size = self._level = size
        self._at = now

    def __repr__(self) -> str:
        return f"<{self._level:g} of {self._size:g} at {self._at:g} s, {self._rate:g}/s>"

    def wait_s(self, now: float, least: float) -> float:
        """Seconds until it holds `least`, or is full; 0 when it does."""
        self._fill(now)
        return max(min(least, self._size) - self._level, 0.0) / self._rate

    def take(self, now: float, amount: float) -> None:
        """Take so much out, though it may not be there."""
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now


class Excess(NamedTuple):
    """What a tenant has too much of, and when to come back."""

    limit: Limit
    retry_after_s: float


class Quota:
    """What one tenant has used."""

    def __init__(self, tenant: Tenant, now: float, before: Quota | None = None) -> None:
        """`before`: what the tenant had under other bounds, whose requests count on."""
        self.tenant = tenant
        self._most = math.inf if tenant.concurrency is None else tenant.concurrency
        self._requests = _bucket(tenant.requests_per_s, tenant.burst_s, now)
        self._tokens = _bucket(tenant.tokens_per_s, tenant.burst_s, now)
        self._open: int = before._open if before is not None else 0
        # What a request takes, as far as those that have ended tell.
        self._takes_s: float = before._takes_s if before is not None else 1.0

    def excess(self, now: float) -> Excess | None:
        """What forbids one more request, if anything; the longest wait of all."""
        found = []
        if self._open >= self._most:
            # Of so many that run at once the next ends, in the mean, after this share of the time that one takes.
            found.append(Excess("concurrency", self._takes_s / self._most))
        if self._requests is not None and (wait_s := self._requests.wait_s(now, 1.0)) > 0.0:
            found.append(Excess("requests", wait_s))
        if self._tokens is not None and (wait_s := self._tokens.wait_s(now, 1.0)) > 0.0:
            found.append(Excess("tokens", wait_s))
        return max(found, key=lambda excess: excess.retry_after_s, default=None)

    def begin(self, now: float, prompt_tokens: int) -> None:
        """A request of so many prompt tokens, over all its choices, is let in."""
        self._open += 1
        if self._requests is not None:
            self._requests.take(now, 1.0)
        if self._tokens is not None:
            self._tokens.take(now, prompt_tokens)

    def end(self, now: float, took_s: float, output_tokens: int) -> None:
        """A request that was let in has ended, however it did."""
        self._open -= 1
        self._takes_s += LATEST_SHARE * (took_s - self._takes_s)
        if self._tokens is not None and output_tokens:
            self._tokens.take(now, output_tokens)


def _bucket(rate: float | None, burst_s: float, now: float) -> Bucket | None:
    # Less than one would never let anybody in.
    return None if rate is None else Bucket(rate, max(rate * burst_s, 1.0), now)


class Quotas:
    """The quotas of all tenants that have any; requests of others are not its business."""

    def __init__(self, tenants: Iterable[Tenant], now: float) -> None:
        self._quotas = {tenant.name: Quota(tenant, now) for tenant in tenants if tenant.limited}
        self._open: dict[RequestId, tuple[Quota, float, int]] = {}  # let in when, and how many choices

    def __bool__(self) -> bool:
        return bool(self._quotas)

    def replace(self, tenants: Iterable[Tenant], now: float) -> None:
        """Other tenants: one that is as it was keeps its buckets, and every one that stays its open requests."""
        before, self._quotas = self._quotas, {}
        for tenant in tenants:
            old = before.get(tenant.name)
            if old is not None and old.tenant == tenant:
                self._quotas[tenant.name] = old
            elif tenant.limited:
                self._quotas[tenant.name] = Quota(tenant, now, old)
        heirs = {id(old): self._quotas.get(name, old) for name, old in before.items()}
        self._open = {
            request: (heirs.get(id(quota), quota), since, choices)
            for request, (quota, since, choices) in self._open.items()
        }

    def admit(self, now: float, request: Request) -> Excess | None:
        """Let a request in, or say what its tenant has too much of."""
        quota = self._quotas.get(request.tenant)
        if quota is None:
            return None
        excess = quota.excess(now)
        if excess is None:
            quota.begin(now, request.prompt_tokens)
            self._open[request.id] = (quota, now, request.n)
        return excess

    def ended(self, now: float, request: RequestId, output_tokens: int = 0) -> None:
        """A request has ended, with so many output tokens in each of its choices; once is enough."""
        known = self._open.pop(request, None)
        if known is not None:
            quota, since, choices = known
            quota.end(now, now - since, output_tokens * choices)
