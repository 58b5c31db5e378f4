"""Which pace a request asks for: every way that clients of other gateways know, first found wins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyserve.core.types import Slo, Tier, TierName, to_microsecond
from polyserve.serve.access import check_tier, clamped, usual_tier
from polyserve.serve.errors import ApiError
from polyserve.serve.plan import BEST_EFFORT as BEST_EFFORT
from polyserve.serve.plan import TenantPlan

_NUMBER = re.compile(r"\d{1,12}(\.\d{1,9})?")
# A deadline further off than a day is none; the loosest tier takes it in.
_LONGEST_MS = 86_400_000.0
_PAIRS = (
    (b"x-slo-ttft-ms", b"x-slo-tpot-ms"),
    (b"x-llm-d-slo-ttft-ms", b"x-llm-d-slo-tpot-ms"),
)
_SGL_TTFT, _SGL_TPS = b"x-sgl-ttft-slo-ms", b"x-sgl-tps-slo"
_TIER = b"x-polyserve-tier"
# OpenAI's own values of `service_tier`; each may be mapped, and what is not mapped means the default.
SERVICE_TIERS = ("auto", "default", "flex", "priority", "scale")

# A pair of milliseconds, each None where the client did not say.
_Asked = tuple[float | None, float | None]
_NOTHING: _Asked = (None, None)


@dataclass(frozen=True)
class Paces:
    """What the names of paces mean here."""

    tiers: tuple[Tier, ...]
    service_tiers: Mapping[str, TierName]  # OpenAI's `service_tier` to a tier or `BEST_EFFORT`
    default: TierName

    def asked(
        self, headers: Mapping[bytes, bytes], body: Mapping[str, Any], tenant: TenantPlan | None = None
    ) -> Slo | None:
        """The SLO asked for, or None for best effort; raises `ApiError` naming what is malformed or not allowed.

        `body` holds the fields `nvext`, `vllm_xargs` and `service_tier`, as far as they were sent.
        """
        if tenant is None:
            return self._slo(headers, body, self._named(headers, body, self.default))
        name = self._named(headers, body, usual_tier(tenant, self.tiers, self.default))
        check_tier(tenant, name)
        slo = self._slo(headers, body, name)
        return None if slo is None else clamped(tenant, self.tiers, slo)

    def _slo(self, headers: Mapping[bytes, bytes], body: Mapping[str, Any], name: TierName) -> Slo | None:
        # All are read before the first wins: what is malformed is told, never skipped in silence.
        asked = [*_in_headers(headers), *_in_body(body)]
        ttft_ms, tpot_ms = next((pair for pair in asked if pair != _NOTHING), _NOTHING)
        if ttft_ms is None and tpot_ms is None:
            tier = self._tier(name)
            return None if tier is None else Slo(tier.ttft_s, tier.tpot_s)
        named = self._tier(name) or self._loosest
        tpot_s = named.tpot_s if tpot_ms is None else to_microsecond(tpot_ms / 1e3)
        ttft_s = self._usual_ttft_s(tpot_s) if ttft_ms is None else to_microsecond(ttft_ms / 1e3)
        return Slo(ttft_s, tpot_s)

    def served(self, asked: str, tier: TierName | None) -> str:
        """The service tier that a request got which asked for `asked` and was served in `tier`."""
        named = {name: to for name, to in self.service_tiers.items() if name != "auto"}
        got = tier or BEST_EFFORT
        if named.get(asked) == got:
            return asked
        return next((name for name, to in named.items() if to == got), "default")

    def _named(self, headers: Mapping[bytes, bytes], body: Mapping[str, Any], default: TierName) -> TierName:
        wanted = body.get("service_tier")
        if wanted is not None and wanted not in SERVICE_TIERS:
            there = ", ".join(SERVICE_TIERS)
            raise ApiError(400, "invalid_type", f"service_tier is one of {there}, not {wanted!r}", "service_tier")
        value = headers.get(_TIER)
        if value is not None:
            name = value.decode("latin-1")
            if name != BEST_EFFORT and all(tier.name != name for tier in self.tiers):
                there = ", ".join([*(tier.name for tier in self.tiers), BEST_EFFORT])
                raise _invalid(_TIER.decode(), f"unknown tier {name!r}; there are: {there}")
            return name
        if wanted is None:
            return default
        return self.service_tiers.get(wanted, default)

    def _tier(self, name: TierName) -> Tier | None:
        return next((tier for tier in self.tiers if tier.name == name), None)

    @property
    def _loosest(self) -> Tier:
        return max(self.tiers, key=lambda tier: tier.tpot_s)

    def _usual_ttft_s(self, tpot_s: float) -> float:
        """The TTFT that goes with a pace: that of the loosest tier which holds it."""
        holding = [tier for tier in self.tiers if tier.tpot_s <= tpot_s]
        if holding:
            return max(holding, key=lambda tier: tier.tpot_s).ttft_s
        return min(self.tiers, key=lambda tier: tier.tpot_s).ttft_s


def _in_headers(headers: Mapping[bytes, bytes]) -> list[_Asked]:
    pairs = [(_header_ms(headers, ttft), _header_ms(headers, tpot)) for ttft, tpot in _PAIRS]
    tokens_per_s = _header_ms(headers, _SGL_TPS)
    return [*pairs, (_header_ms(headers, _SGL_TTFT), None if tokens_per_s is None else 1e3 / tokens_per_s)]


def _in_body(body: Mapping[str, Any]) -> list[_Asked]:
    nvext, xargs = body.get("nvext") or {}, body.get("vllm_xargs") or {}
    router = {} if nvext.get("router") is None else nvext["router"]
    if not isinstance(router, dict):
        raise _invalid("nvext.router", f"an object, not {router!r}")
    return [
        (_field_ms(router, "ttft_target", "nvext.router"), _field_ms(router, "itl_target", "nvext.router")),
        (_field_ms(xargs, "slo_ttft_ms", "vllm_xargs"), _field_ms(xargs, "slo_tpot_ms", "vllm_xargs")),
    ]


def _header_ms(headers: Mapping[bytes, bytes], name: bytes) -> float | None:
    value = headers.get(name)
    return None if value is None else _number(value.decode("latin-1"), name.decode())


def _field_ms(fields: Mapping[str, Any], key: str, path: str) -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _invalid(f"{path}.{key}", f"a number above 0, not {value!r}")
    return _number(format(value, "f") if isinstance(value, float) else str(value), f"{path}.{key}")


def _number(text: str, where: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text.strip()) else 0.0
    if number < 1e-3:
        raise _invalid(where, f"a number above 0, not {text!r}")
    return min(number, _LONGEST_MS)


def _invalid(where: str, what: str) -> ApiError:
    return ApiError(400, "invalid_slo", f"{where}: {what}", where)
