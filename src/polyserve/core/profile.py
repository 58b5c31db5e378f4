"""How many seconds one engine iteration takes for a batch shape, and the inverse.

A batch shape is (prefill tokens, decodes, KV tokens read by the decodes, prefill attention work). Attention work of a
chunk of c prompt tokens behind `past` computed ones is `c * (past + c / 2)` token pairs, summed over chunks.

    T = tokens(prefill + decodes) + per_decode * decodes + per_kv_token * kv + per_attention * work + host_overhead

`tokens` is piecewise linear. Two regimes: in a real engine decode attention costs more as soon as the batch carries
any prefill chunk, so a mixed batch pays `mixed_kv_factor` on the KV slope and `mixed_per_decode_s` more per decode.
Where that was not measured the factor is 1 and the addition 0, and the profile's `notes` say so. T never decreases in
any argument, and extrapolates linearly beyond the last knot.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from polyserve.core.kernels import P_HEADER, Vector


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the field and what would do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine was started with."""

    kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int = 16
    context_tokens: int = 131072


def attention_work(chunk: float, past: float) -> float:
    """Token pairs that prefill attention visits for `chunk` prompt tokens behind `past` computed ones."""
    return chunk * (past + 0.5 * chunk)


@dataclass(frozen=True)
class Profile:
    """A measured or composed law of iteration times, with the limits of the engine it was made for."""

    name: str
    knots: tuple[float, ...]  # tokens in the batch, ascending, first 0
    knot_s: tuple[float, ...]  # seconds at each knot, not decreasing
    per_decode_s: float
    per_kv_token_s: float
    per_attention_s: float
    limits: Limits
    mixed_kv_factor: float = 1.0
    mixed_per_decode_s: float = 0.0
    host_overhead_s: float = 0.0
    kv_bytes_per_token: int = 131072
    measured_to: tuple[float, float, float] = (math.inf, math.inf, math.inf)  # tokens, decodes, KV tokens
    notes: Mapping[str, str] = field(default_factory=dict)  # origin, licence, assumptions

    def __post_init__(self) -> None:
        knots, values = self.knots, self.knot_s
        if len(knots) < 2 or len(knots) != len(values):
            raise ProfileError(f"profile {self.name!r}: knots and knot_s want the same length, at least 2")
        if not all(map(math.isfinite, (*knots, *values))):
            raise ProfileError(f"profile {self.name!r}: knots and knot_s are finite")
        if knots[0] != 0 or any(b <= a for a, b in pairwise(knots)):
            raise ProfileError(f"profile {self.name!r}: knots start at 0 and rise")
        if values[0] < 0 or any(b < a for a, b in pairwise(values)):
            raise ProfileError(f"profile {self.name!r}: knot_s never falls and is never negative")
        for name in (
            "per_decode_s",
            "per_kv_token_s",
            "per_attention_s",
            "mixed_per_decode_s",
            "host_overhead_s",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ProfileError(f"profile {self.name!r}: {name} is finite and not negative")
        if not 1 <= self.mixed_kv_factor < math.inf:
            raise ProfileError(f"profile {self.name!r}: mixed_kv_factor is at least 1")
        if min(dataclasses.astuple(self.limits)) < 1:
            raise ProfileError(f"profile {self.name!r}: limits are positive")
        if values[-1] <= 0:
            raise ProfileError(f"profile {self.name!r}: an iteration takes time")

    def iteration_s(self, prefill: float, decodes: float, kv: float, attention: float = 0.0) -> float:
        """Seconds one iteration takes."""
        tokens = prefill + decodes
        low = min(max(bisect_right(self.knots, tokens) - 1, 0), len(self.knots) - 2)
        x0, x1, y0, y1 = *self.knots[low : low + 2], *self.knot_s[low : low + 2]
        seconds = y0 + (y1 - y0) * (tokens - x0) / (x1 - x0) if tokens > x0 else y0
        mixed = prefill > 0
        kv_slope = self.per_kv_token_s * (self.mixed_kv_factor if mixed else 1.0)
        per_decode = self.per_decode_s + (self.mixed_per_decode_s if mixed else 0.0)
        return seconds + per_decode * decodes + kv_slope * kv + self.per_attention_s * attention + self.host_overhead_s

    @property
    def tightest_pace_s(self) -> float:
        """The tightest pace that an instance keeps at all: that of one short decode alone."""
        return self.iteration_s(0, 1, 1)

    def holds(self, pace_s: float, scale: float = 1.0) -> bool:
        """Whether an instance whose iterations take `scale` times what is said here can keep a pace."""
        return self.tightest_pace_s * scale <= pace_s

    def largest_chunk(self, bound_s: float, decodes: float, kv: float, past: float, longest: int) -> int:
        """Most prompt tokens, up to `longest`, that fit beside the decodes within `bound_s`; 0 when none does."""
        fits = range(1, longest + 1)
        return bisect_right(fits, bound_s, key=lambda c: self.iteration_s(c, decodes, kv, attention_work(c, past)))

    def extrapolates(self, prefill: float, decodes: float, kv: float) -> bool:
        """Whether a batch shape lies outside what was measured."""
        tokens_to, decodes_to, kv_to = self.measured_to
        return prefill + decodes > tokens_to or decodes > decodes_to or kv > kv_to

    @property
    def packed(self) -> Vector:
        """The vector that the kernels read."""
        header = np.zeros(P_HEADER)
        header[:] = (
            len(self.knots),
            self.per_decode_s,
            self.per_kv_token_s,
            self.per_attention_s,
            self.mixed_kv_factor,
            self.mixed_per_decode_s,
            self.host_overhead_s,
        )
        return np.concatenate([header, np.asarray(self.knots, float), np.asarray(self.knot_s, float)])

    def slowed(self, factor: float) -> Profile:
        """The same profile with every time multiplied by `factor`."""
        return dataclasses.replace(
            self,
            knot_s=tuple(s * factor for s in self.knot_s),
            per_decode_s=self.per_decode_s * factor,
            per_kv_token_s=self.per_kv_token_s * factor,
            per_attention_s=self.per_attention_s * factor,
            mixed_per_decode_s=self.mixed_per_decode_s * factor,
            host_overhead_s=self.host_overhead_s * factor,
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values, as profile files and journals keep them; no bound is left out rather than infinite."""
        plain = dataclasses.asdict(self)
        plain["measured_to"] = [None if math.isinf(v) else v for v in self.measured_to]
        plain["knots"], plain["knot_s"] = list(self.knots), list(self.knot_s)
        plain["notes"] = dict(self.notes)
        return plain

    @staticmethod
    def from_dict(plain: Mapping[str, Any], source: str = "profile") -> Profile:
        """The profile that `to_dict` wrote; raises `ProfileError` naming `source` and the field at fault."""
        known = {f.name for f in dataclasses.fields(Profile)}
        required = {
            f.name
            for f in dataclasses.fields(Profile)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if unknown := sorted(set(plain) - known):
            raise ProfileError(f"{source}: unknown field {unknown[0]!r}; there are: {', '.join(sorted(known))}")
        if missing := sorted(required - set(plain)):
            raise ProfileError(f"{source}: field {missing[0]!r} is missing")
        values = dict(plain)
        at = ""
        try:
            at = "name"
            if not isinstance(plain[at], str):
                raise TypeError("a name is text")
            at = "notes"
            values[at] = dict(plain.get(at, {}))
            at = "limits"
            values["limits"] = Limits(**{k: int(v) for k, v in plain["limits"].items()})
            for at in ("knots", "knot_s"):
                values[at] = tuple(float(v) for v in plain[at])
            at = "measured_to"
            if at in plain:
                tokens, decodes, kv = (math.inf if v is None else float(v) for v in plain[at])
                values[at] = (tokens, decodes, kv)
            for at in sorted(known - {"name", "limits", "knots", "knot_s", "measured_to", "notes"}):
                if at in plain:
                    values[at] = int(plain[at]) if at == "kv_bytes_per_token" else float(plain[at])
            return Profile(**values)
        except ProfileError as error:
            raise ProfileError(f"{source}: {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"{source}: field {at!r} has a value that does not fit: {error}") from None
