"""How long an iteration takes, and the prefill chunks that fit into one."""

from __future__ import annotations

import numpy as np
from numba import njit

from polyserve.core.kernels.layout import (
    ALWAYS,
    FITS,
    FIXED,
    FORCED,
    IF_NEEDED,
    P_ATTENTION,
    P_DECODE,
    P_HEADER,
    P_HOST,
    P_KNOTS,
    P_KV,
    P_MIXED_DECODE,
    P_MIXED_KV,
    WAITS,
    Vector,
)


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
    seconds = seconds + per_decode * decodes + kv_slope * kv + profile[P_ATTENTION] * attention + profile[P_HOST]
    return float(seconds)


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


@njit(cache=True)
def one_solo_ttft_s(profile: Vector, size: int, prompt: int) -> float:  # pragma: no cover - compiled
    """Seconds until the first token on an empty instance of such chunks; the plain twin is `bound.solo_ttft_s`."""
    whole, rest = prompt // size, prompt % size
    seconds = profile[P_ATTENTION] * 0.5 * prompt * prompt
    if whole > 0:
        seconds += whole * iteration_s(profile, size, 0.0, 0.0, 0.0)
    if rest > 0:
        seconds += iteration_s(profile, rest, 0.0, 0.0, 0.0)
    return float(seconds)


@njit(cache=True)
def widest(
    profile: Vector, bound: float, decodes: float, kv: float, total: int, work: float, past: float, room: int
) -> int:  # pragma: no cover - compiled
    """Most tokens up to `room` that one more prompt may have within `bound`, beside `total` that others have.

    The law is nearly straight, so the search starts where a straight line meets the bound and gallops from there.
    """
    most = iteration_s(profile, total + room, decodes, kv, work + room * (past + 0.5 * room))
    if most <= bound:
        return room
    least = iteration_s(profile, total, decodes, kv, work)
    low, high, step = 0, room, 1
    middle = int(room * (bound - least) / (most - least)) if most > least else 0
    middle = min(max(middle, 1), room - 1)
    rising, falling = True, True
    while high - low > 1:
        if iteration_s(profile, total + middle, decodes, kv, work + middle * (past + 0.5 * middle)) <= bound:
            low, falling = middle, False
        else:
            high, rising = middle, False
        if rising:
            middle = min(low + step, high - 1)
        elif falling:
            middle = max(high - step, low + 1)
        else:
            middle = (low + high) >> 1
        step *= 4
    return low


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
        chunk = min(int(remaining[i]), budget - total)
        if chunk <= 0:
            break
        if not np.isinf(bound):
            chunk = widest(profile, bound, decodes, kv, total, work, past[i], chunk)
        if chunk <= 0:
            break
        out[i] = chunk
        total += chunk
        work += chunk * (past[i] + 0.5 * chunk)
        if chunk < remaining[i]:
            break
    return total


@njit(cache=True)
def is_pressed(bound: float, chunk: float, remaining: float, slack: float) -> bool:  # pragma: no cover - compiled
    """Whether a head that gets such a chunk every `bound` seconds is late; the plain twin is `chunking.is_pressed`."""
    return bool(0.0 < slack < bound * remaining / chunk) if 0.0 < chunk < remaining else False


@njit(cache=True)
def plan_prefill(
    profile: Vector,
    kind: int,
    tokens: int,
    spend: int,
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
    bound = banked if spend == ALWAYS else min(pace, banked)
    total = fit_chunks(profile, bound, budget, decodes, kv, remaining, past, count, out)
    if spend == IF_NEEDED and is_pressed(bound, out[0], remaining[0], head_slack) and banked - pace > bound:
        total = fit_chunks(profile, banked - pace, budget, decodes, kv, remaining, past, count, out)
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
