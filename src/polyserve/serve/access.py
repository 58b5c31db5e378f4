"""Who may come in: API keys, and what each tenant may ask for.

Keys are known by their SHA-256 alone. That is enough for keys that nobody can guess, which is what `fresh_key` makes;
a password would want more. How often a tenant may come is decided by the brain (`polyserve.core.quota`).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from polyserve.core.types import Slo, Tier, TierName
from polyserve.serve.errors import ApiError
from polyserve.serve.plan import BEST_EFFORT, TenantPlan

KEY_PREFIX = "sk-polyserve-"
KEY_BYTES = 32

T = TypeVar("T")
Headers = Mapping[bytes, bytes]

_BEARER = re.compile(rb"bearer +([\x21-\x7e]+) *", re.IGNORECASE)


def fresh_key() -> str:
    """A key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hashed(key: str) -> str:
    """A key as a config keeps it."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keyring(Generic[T]):
    """Which key is whose, without the keys.

    A key is looked up by a hash under a secret of this process, so that the time a look-up takes says nothing about
    how much of a guess was right; what is found is compared in constant time all the same.
    """

    def __init__(self, owners: Iterable[tuple[str, T]]) -> None:
        """`owners`: pairs of a key's SHA-256, in hex, and whose it is."""
        self._secret = secrets.token_bytes(32)
        self._owners = {self._blinded(digest): (digest, owner) for digest, owner in owners}

    def __repr__(self) -> str:
        return f"<keyring of {len(self._owners)}>"

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, headers: Headers) -> T:
        """Whose key a request carries; raises `ApiError`."""
        key = _carried(headers)
        if key is None:
            raise _unknown("no API key was given: send it as `Authorization: Bearer KEY`, or as `x-api-key`")
        digest = hashlib.sha256(key).hexdigest()
        known, owner = self._owners.get(self._blinded(digest), ("", None))
        if owner is None or not hmac.compare_digest(known, digest):
            raise _unknown("the API key is not known here")
        return owner

    def _blinded(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")


def _carried(headers: Headers) -> bytes | None:
    """The key in a request's headers; raises `ApiError` when there are two."""
    bearer = _BEARER.fullmatch(headers.get(b"authorization", b""))
    plain = headers.get(b"x-api-key") or None
    if bearer is None:
        return plain
    if plain is not None and not hmac.compare_digest(plain, bearer[1]):
        raise _unknown("`authorization` and `x-api-key` carry different keys; send one")
    return bearer[1]


def _unknown(message: str) -> ApiError:
    return ApiError(401, "invalid_api_key", message)


def tenants_keyring(tenants: Sequence[TenantPlan]) -> Keyring[TenantPlan]:
    """The keys of all tenants."""
    return Keyring((digest, tenant) for tenant in tenants for digest in tenant.keys)


# ------------------------------------------------------------------------------------------------ what one may ask for


def usual_tier(tenant: TenantPlan, tiers: Iterable[Tier], default: TierName) -> TierName:
    """What a tenant gets of a model that does not say: its own default, the model's, or the first that it may have."""
    there = {tier.name for tier in tiers}
    if tenant.default_tier in there or tenant.default_tier == BEST_EFFORT:
        return tenant.default_tier
    if tenant.may(default):
        return default
    return next((name for name in tenant.tiers or () if name in there or name == BEST_EFFORT), default)


def check_tier(tenant: TenantPlan, name: TierName) -> None:
    """Refuse a tier, or `best-effort`, that a tenant may not have."""
    if not tenant.may(name):
        there = ", ".join(sorted(tenant.tiers or ()))
        raise ApiError(403, "tier_not_allowed", f"this key may not have {name!r}; it may have: {there}")


def clamped(tenant: TenantPlan, tiers: Iterable[Tier], slo: Slo) -> Slo:
    """The SLO, no tighter than the tenant may ask, and of a tier that it may have; raises `ApiError`.

    What would be served in a tier that it may not have goes to the next tighter one that it may.
    """
    ttft_s, tpot_s = max(slo.ttft_s, tenant.tightest_ttft_s), max(slo.tpot_s, tenant.tightest_tpot_s)
    allowed = sorted((tier for tier in tiers if tenant.may(tier.name)), key=lambda tier: tier.tpot_s)
    if not allowed:
        raise ApiError(403, "tier_not_allowed", "this key may have best effort only; ask for no pace")
    tpot_s = max(tpot_s, allowed[0].tpot_s)
    served = [tier for tier in tiers if tier.tpot_s <= tpot_s * (1 + 1e-9)]
    if not tenant.may(max(served, key=lambda tier: tier.tpot_s).name):
        tpot_s = max(tier.tpot_s for tier in allowed if tier in served)
    return Slo(ttft_s, tpot_s)


# ------------------------------------------------------------------------------------------------------- the operators

# What load balancers ask; it tells nothing.
OPEN_PATHS = frozenset(("/health", "/ready", "/version", "/openapi.json"))
# A request that somebody passed on does not come from this machine, whatever its socket says.
_PASSED_ON = (b"forwarded", b"x-forwarded-for", b"via", b"x-real-ip")


class Operators:
    """Who may see and steer the fleet: whoever has a key, or, without keys, whoever is on this machine."""

    def __init__(self, keys: Iterable[str]) -> None:
        """`keys`: their SHA-256, in hex."""
        self._keys = Keyring((digest, True) for digest in keys)

    def check(self, scope: Mapping[str, Any], headers: Headers) -> None:
        """Raise `ApiError` for a request that may not."""
        if self._keys:
            self._keys.owner(headers)
        elif not _from_here(scope, headers):
            message = "without a key the admin API is for this machine only, and not through a proxy; set admin.keys"
            raise ApiError(403, "admin_not_allowed", message)


def _from_here(scope: Mapping[str, Any], headers: Headers) -> bool:
    """Whether a request comes from a program of this machine, and not from a page in its browser."""
    client = scope.get("client")
    if client is not None and not _is_loopback(client[0]):
        return False
    host = headers.get(b"host", b"localhost").decode("latin-1")
    if any(name in headers for name in _PASSED_ON) or not _is_loopback(_without_port(host)):
        return False
    origin = headers.get(b"origin")
    return origin is None or origin.decode("latin-1").partition("://")[2] == host


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
