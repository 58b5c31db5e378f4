"""The core's compiled loops. Each has a plain twin (named in its docstring) that a property test holds it to.

A profile travels as one float64 vector (`Profile.packed`): the header below, then the knots, then the values.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

P_KNOTS, P_DECODE, P_KV, P_ATTENTION, P_MIXED_KV, P_MIXED_DECODE, P_HOST, P_HEADER = range(8)


@njit(cache=True)
def iteration_s(
    profile: Vector, prefill: float, decodes: float, kv: float, attention: float
) -> float:  # pragma: no cover - compiled
    """Seconds one iteration takes; the plain twin is `Profile.iteration_s`."""
    count = int(profile[P_KNOTS])
    tokens = prefill + decodes
    low, high = 0, count - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if profile[P_HEADER + middle] <= tokens:
            low = middle
        else:
            high = middle
    x0, x1 = profile[P_HEADER + low], profile[P_HEADER + low + 1]
    y0, y1 = profile[P_HEADER + count + low], profile[P_HEADER + count + low + 1]
    seconds = y0 + (y1 - y0) * (tokens - x0) / (x1 - x0) if tokens > x0 else y0
    kv_slope, per_decode = profile[P_KV], profile[P_DECODE]
    if prefill > 0.0:
        kv_slope *= profile[P_MIXED_KV]
        per_decode += profile[P_MIXED_DECODE]
    return seconds + per_decode * decodes + kv_slope * kv + profile[P_ATTENTION] * attention + profile[P_HOST]


@njit(cache=True)
def largest_chunk(
    profile: Vector, bound: float, decodes: float, kv: float, past: float, longest: int
) -> int:  # pragma: no cover - compiled
    """Most prompt tokens beside `decodes` within `bound` seconds; the plain twin is `Profile.largest_chunk`.

    `past` prompt tokens of the same request are computed already; 0 when not even one fits.
    """
    if longest <= 0 or iteration_s(profile, 1.0, decodes, kv, past + 0.5) > bound:
        return 0
    low, high = 1, longest
    while low < high:
        middle = (low + high + 1) >> 1
        if iteration_s(profile, middle, decodes, kv, middle * (past + 0.5 * middle)) <= bound:
            low = middle
        else:
            high = middle - 1
    return low
