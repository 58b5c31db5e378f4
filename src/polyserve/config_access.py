"""The sections of the config that say who may come in."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from polyserve.core.types import Tenant, TierName, to_microsecond
from polyserve.serve.pace import BEST_EFFORT
from polyserve.serve.plan import Address, TenantPlan

_HASH = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_WANTED = "the SHA-256 of each key in hex, as `polyserve key` prints it, never a key itself"

Rate = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)]


def read_hashes(value: Any) -> tuple[str, ...]:
    """Hashes of keys; raises `ValueError`, which never shows what was given."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"a list with {_WANTED}")
    found = [_HASH.fullmatch(one) if isinstance(one, str) else None for one in value]
    if not all(found):
        raise ValueError(f"wants {_WANTED}")
    return tuple(one[1].lower() for one in found if one)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class AdminConfig(_Section):
    """Where the admin API listens, without a port with everything else, and who may use it."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, strict=True)] | None = None
    keys: tuple[str, ...] = ()
    off: bool = False

    _read_keys = field_validator("keys", mode="before")(read_hashes)

    @model_validator(mode="before")
    @classmethod
    def _may_be_off(cls, value: Any) -> Any:
        if value in ("off", False):  # YAML reads a bare off as false
            return {"off": True}
        if not isinstance(value, dict):
            raise ValueError("wants host, port and keys, or off")
        return value


class Tightest(_Section):
    """The tightest SLO that a tenant may ask for."""

    tpot_ms: Milliseconds | None = None
    ttft_ms: Milliseconds | None = None


class TenantConfig(_Section):
    """One tenant."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    keys: tuple[str, ...]
    tiers: list[str] | None = None
    default_tier: str | None = None
    tightest: Tightest = Tightest()
    requests_per_s: Rate | None = None
    tokens_per_s: Rate | None = None
    burst_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 10.0
    concurrency: Annotated[int, Field(ge=1, strict=True)] | None = None
    body_mib: Annotated[float, Field(gt=0, le=1024)] | None = None
    share: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0

    _read_keys = field_validator("keys", mode="before")(read_hashes)

    @model_validator(mode="after")
    def _default_is_allowed(self) -> TenantConfig:
        if self.tiers is not None and self.default_tier is not None and self.default_tier not in self.tiers:
            raise ValueError(f"default_tier: {self.default_tier!r} is not among its tiers: {', '.join(self.tiers)}")
        if self.tiers is not None and not self.tiers:
            raise ValueError("tiers: there are none; name at least one, or leave it out for all")
        return self


def engine_key(api_key: SecretStr | None, api_key_env: str | None) -> str | None:
    """The key that an engine wants of us, given or in the environment; raises `ValueError` naming what is wrong."""
    if api_key is not None and api_key_env is not None:
        raise ValueError("api_key_env: there is an api_key too; give one of them")
    if api_key_env is None:
        key, where = None if api_key is None else api_key.get_secret_value(), "api_key"
    else:
        key, where = os.environ.get(api_key_env), f"api_key_env: the environment variable {api_key_env}"
        if key is None:
            raise ValueError(f"{where} is not set")
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"{where}: a key is printable ASCII without spaces, at least one character")
    return key


def without_secrets(url: str) -> str:
    """A URL that may be shown; raises `ValueError`."""
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError("a URL is shown and logged, so it has no user and password; give api_key or api_key_env")
    return url


def may_be_secret(where: Sequence[str]) -> bool:
    """Whether what stands there in a file must not be shown, since it is a key or may hold one by mistake."""
    names = [part for part in where if not part.isdigit()]
    return bool(names) and names[-1] in ("keys", "api_key", "tenants", "environment")


def admin_address(admin: AdminConfig | None, listen: Address) -> Address | None:
    """Where the admin API is: with the rest when only this machine can reach that, unless the file says otherwise.

    Raises `ValueError` for one that others could reach without a key.
    """
    if admin is None:
        return listen if listen.loopback else None
    if admin.off:
        return None
    address = listen if admin.port is None else Address(admin.host, admin.port)
    if not address.loopback and not admin.keys:
        raise ValueError(
            f"{address.host} can be reached from elsewhere; give admin.keys (`polyserve key` makes one), or a host of "
            "this machine"
        )
    return address


def check_tenants(tenants: Sequence[TenantConfig], tiers: Collection[TierName]) -> None:
    """Raise `ValueError` for tenants that do not fit together or to the tiers."""
    names: set[str] = set()
    keys: set[str] = set()
    for number, tenant in enumerate(tenants):
        if tenant.name in names:
            raise ValueError(f"tenants: two have the name {tenant.name!r}; each needs its own")
        if not keys.isdisjoint(tenant.keys) or len(set(tenant.keys)) < len(tenant.keys):
            raise ValueError(f"tenants.{number}.keys: a key is given twice; each belongs to one tenant")
        names.add(tenant.name)
        keys.update(tenant.keys)
        there = [BEST_EFFORT, *tiers]
        for name in [*(tenant.tiers or ()), *([tenant.default_tier] if tenant.default_tier else ())]:
            if name not in there:
                raise ValueError(f"tenants.{number}: no tier {name!r}; there are: {', '.join(there)}")


def tenant_plan(tenant: TenantConfig) -> TenantPlan:
    """What a tenant may."""
    return TenantPlan(
        tenant=Tenant(
            tenant.name,
            tenant.requests_per_s,
            tenant.tokens_per_s,
            tenant.burst_s,
            tenant.concurrency,
            tenant.share,
        ),
        keys=tenant.keys,
        tiers=None if tenant.tiers is None else tuple(tenant.tiers),
        default_tier=tenant.default_tier,
        tightest_tpot_s=to_microsecond((tenant.tightest.tpot_ms or 0.0) / 1e3),
        tightest_ttft_s=to_microsecond((tenant.tightest.ttft_ms or 0.0) / 1e3),
        body_bytes=None if tenant.body_mib is None else round(tenant.body_mib * 1024 * 1024),
    )
