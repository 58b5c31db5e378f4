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


DYNAMIC, FIXED = 0, 1
FITS, WAITS, FORCED = 0, 1, 2


@njit(cache=True)
def fit_chunks(
    profile: Vector,
    bound: float,
    budget: int,
    decodes: float,
    kv: float,
    remaining: Vector,
    past: Vector,
    count: int,
    out: Vector,
) -> int:  # pragma: no cover - compiled
    """Give prompts their chunks in order while the iteration keeps within `bound`; returns the tokens given.

    `out[:count]` is overwritten. The plain twin is `chunking.fit_chunks`.
    """
    for i in range(count):
        out[i] = 0.0
    total, work = 0, 0.0
    for i in range(count):
        room = min(int(remaining[i]), budget - total)
        if room <= 0:
            break
        low, high = 0, room
        if not np.isinf(bound):
            while low < high:
                middle = (low + high + 1) >> 1
                attention = work + middle * (past[i] + 0.5 * middle)
                if iteration_s(profile, total + middle, decodes, kv, attention) <= bound:
                    low = middle
                else:
                    high = middle - 1
        chunk = high
        if chunk <= 0:
            break
        out[i] = chunk
        total += chunk
        work += chunk * (past[i] + 0.5 * chunk)
        if chunk < remaining[i]:
            break
    return total


@njit(cache=True)
def plan_prefill(
    profile: Vector,
    kind: int,
    tokens: int,
    spend_slack: bool,
    floor: int,
    pace: float,
    decodes: int,
    kv: float,
    slacks: Vector,
    head_slack: float,
    remaining: Vector,
    past: Vector,
    count: int,
    out: Vector,
) -> tuple[int, int]:  # pragma: no cover - compiled
    """The prefill chunks of one iteration, and how they came about; the plain twin is `chunking.plan_prefill`."""
    budget = tokens - decodes
    if count == 0 or budget <= 0:
        for i in range(count):
            out[i] = 0.0
        return 0, WAITS if count > 0 else FITS
    if kind == FIXED or decodes == 0:
        return fit_chunks(profile, np.inf, budget, decodes, kv, remaining, past, count, out), FITS
    alone = iteration_s(profile, 0.0, decodes, kv, 0.0)
    banked = np.inf
    for i in range(decodes):
        if slacks[i] >= alone and slacks[i] < banked:
            banked = slacks[i]
    enough = min(float(floor), remaining[0])
    bound = banked if spend_slack else min(pace, banked)
    total = fit_chunks(profile, bound, budget, decodes, kv, remaining, past, count, out)
    if total >= enough:
        return total, FITS
    if banked > bound:
        total = fit_chunks(profile, banked, budget, decodes, kv, remaining, past, count, out)
        if total >= enough:
            return total, FITS
    for i in range(count):
        out[i] = 0.0
    whole = min(int(remaining[0]), budget)
    whole_s = iteration_s(profile, whole, decodes, kv, whole * (past[0] + 0.5 * whole))
    if head_slack > whole_s + alone:
        return 0, WAITS
    chunk = min(floor, whole)
    if head_slack >= whole_s and whole == int(remaining[0]):
        late = 0
        for i in range(decodes):
            if slacks[i] >= alone and slacks[i] < whole_s:
                late += 1
        if late <= 1:
            chunk = whole
    out[0] = chunk
    return chunk, FORCED
