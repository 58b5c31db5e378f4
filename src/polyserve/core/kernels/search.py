"""Many instances asked about one candidate, and one instance about many who wait."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from polyserve.core.kernels.books import bin_of, regauge, renew
from polyserve.core.kernels.laws import iteration_s
from polyserve.core.kernels.layout import (
    F_FIRST,
    F_MEMORY,
    F_PACE,
    F_PREFILL,
    F_SEQS,
    F_TOKEN1,
    G_BATCH,
    G_KV,
    I_CLEAR,
    I_COUNT,
    I_FCFS,
    I_KV,
    I_LAST,
    I_MARGIN,
    I_PACE,
    I_PEAK,
    I_POINT,
    I_PROFILE,
    I_RANK,
    I_SCALE,
    I_TIER,
    R_BAND,
    R_CAP,
    R_DUE,
    R_KEY,
    R_LEFT,
    R_MADE,
    R_PROMPT,
    TEST_PACE,
    TEST_PREFILL,
    Matrix,
    Vector,
)
from polyserve.core.kernels.outlook import forecast, left_s, run_queue


@njit(cache=True)
def ask(
    profile: Vector,
    inst: Vector,
    rows: Matrix,
    gauged: Matrix,
    table: NDArray[np.float64],
    edges: Vector,
    grid: Vector,
    version: float,
    candidate: Vector,
    pace: float,
    kv: float,
    grow: bool,
    tests: int,
    waive: bool,
    whole: bool,
    now: float,
    out: Vector,
) -> None:  # pragma: no cover - compiled
    """`forecast` on an instance whose books are brought to `now` first, as if it had that pace and KV."""
    renew(profile, inst, rows, gauged, table, edges, grid, version, now)
    own_pace, own_kv = inst[I_PACE], inst[I_KV]
    inst[I_PACE], inst[I_KV] = pace, kv
    candidate[R_KEY] = now if inst[I_FCFS] > 0.0 else candidate[R_DUE]
    count = int(inst[I_COUNT])
    forecast(profile, inst, rows, count, gauged, table, edges, grid, candidate, grow, tests, waive, whole, now, out)
    inst[I_PACE], inst[I_KV] = own_pace, own_kv


@njit(cache=True)
def refused(out: Vector) -> bool:  # pragma: no cover - compiled
    """Whether any margin of a forecast is below 0."""
    worst = 0.0
    for column in range(F_FIRST):
        if out[column] < worst:  # never of a nan
            worst = out[column]
    return worst < 0.0


@njit(cache=True)
def load_of(inst: Vector) -> float:  # pragma: no cover - compiled
    """Peak forecast iteration over pace, or alone where there is no pace; 0 of an empty instance."""
    if inst[I_COUNT] == 0.0:
        return 0.0
    return float(inst[I_PEAK] / inst[I_PACE]) if inst[I_PACE] < np.inf else float(inst[I_PEAK])


@njit(cache=True)
def clear(
    profile: Vector, inst: Vector, rows: Matrix, gauged: Matrix, grid: Vector, grow: bool, now: float
) -> None:  # pragma: no cover - compiled
    """Note when the last of the prompts queued on an instance is computed; nobody queued: at once."""
    count = int(inst[I_COUNT])
    finish = np.empty(count + 1)
    run_queue(profile, inst, rows, count, gauged, grid, rows[0], False, grow, now, np.inf, finish)
    inst[I_CLEAR], inst[I_LAST] = now, -np.inf
    for i in range(count):
        if rows[i, R_LEFT] > 0.0:
            inst[I_CLEAR] = max(inst[I_CLEAR], finish[i])
            inst[I_LAST] = max(inst[I_LAST], rows[i, R_KEY])


@njit(cache=True)
def hopeless(inst: Vector, candidate: Vector, now: float) -> bool:  # pragma: no cover - compiled
    """Whether a candidate would come last behind the prompts queued, and be late even if it took no time itself."""
    key = now if inst[I_FCFS] > 0.0 else candidate[R_DUE]
    if inst[I_CLEAR] < 0.0 or key < inst[I_LAST] or candidate[R_LEFT] <= 0.0:
        return False
    return left_s(candidate, candidate[R_DUE], max(inst[I_CLEAR], now), now, inst[I_MARGIN]) < 0.0


@njit(cache=True)
def walk(
    profiles: Matrix,
    insts: Matrix,
    rows: NDArray[np.float64],
    gauges: NDArray[np.float64],
    table: NDArray[np.float64],
    edges: Vector,
    grid: Vector,
    version: float,
    skip: NDArray[np.bool_],
    tiers: Vector,
    reserves: Vector,
    pace: float,
    candidate: Vector,
    least_first: bool,
    grow: bool,
    tests: int,
    waive: bool,
    whole: bool,
    now: float,
    tried: NDArray[np.int64],
    out: Matrix,
) -> tuple[bool, int]:  # pragma: no cover - compiled
    """Ask the instances of one tier after another, by load as last known, until one admits the candidate.

    An instance is asked at the tighter of its pace and `pace`, less its tier's share `reserves`. Returns whether one
    admits, and how many were asked: `tried` has their slots, `out` their margins; the last asked is the one. Those that
    the pace refuses at the very peak, or known to be hopeless, are passed over unless `whole`. The plain twin is
    `plain.walk`.
    """
    order = np.empty(insts.shape[0], np.int64)
    keys = np.empty(insts.shape[0])
    alive = table[int(candidate[R_BAND]), bin_of(edges, candidate[R_MADE])]
    asked = 0
    for t in range(tiers.shape[0]):
        count = 0
        for i in range(insts.shape[0]):
            inst = insts[i]
            if inst[I_TIER] != tiers[t] or skip[i]:
                continue
            profile = profiles[int(inst[I_PROFILE])]
            regauge(profile, inst, rows[i], gauges[i], table, edges, grid, version)
            if not whole and tests & TEST_PREFILL and not waive and hopeless(inst, candidate, now):
                continue
            if not whole and tests & TEST_PACE:
                p = int(inst[I_POINT])
                share = alive[p] if candidate[R_MADE] + grid[p] < candidate[R_CAP] else 0.0
                held = candidate[R_PROMPT] + candidate[R_MADE] + grid[p]
                batch, kv = gauges[i, G_BATCH, p] + share, gauges[i, G_KV, p] + share * held
                bound = min(inst[I_PACE], pace) * (1.0 - reserves[t])
                if iteration_s(profile, 0.0, batch, kv, 0.0) * inst[I_SCALE] > bound:
                    continue
            key = load_of(inst) if least_first else -load_of(inst)
            j = count - 1
            while j >= 0 and (keys[j] > key or (keys[j] == key and insts[order[j], I_RANK] > inst[I_RANK])):
                keys[j + 1], order[j + 1] = keys[j], order[j]
                j -= 1
            keys[j + 1], order[j + 1] = key, i
            count += 1
        for j in range(count):
            i = order[j]
            inst = insts[i]
            bound = min(inst[I_PACE], pace) * (1.0 - reserves[t])
            ask(
                profiles[int(inst[I_PROFILE])], inst, rows[i], gauges[i], table, edges, grid, version, candidate,
                bound, inst[I_KV], grow, tests, waive, whole, now, out[asked],
            )  # fmt: skip
            tried[asked] = i
            asked += 1
            if not refused(out[asked - 1]):
                return True, asked
    return False, asked


@njit(cache=True)
def pick(
    profile: Vector,
    inst: Vector,
    rows: Matrix,
    gauged: Matrix,
    table: NDArray[np.float64],
    edges: Vector,
    grid: Vector,
    version: float,
    queue: Matrix,
    late: NDArray[np.bool_],
    first: int,
    count: int,
    refusals: int,
    most: int,
    pace: float,
    grow: bool,
    tests: int,
    now: float,
    out: Vector,
) -> tuple[int, int]:  # pragma: no cover - compiled
    """The first of those who wait, from number `first`, whom an instance admits, and `refusals` counted on.

    Passes `most` whom their own deadline refuses, and nobody whom the instance refuses; -1: none. Whoever would come
    last and is late even if it took no time is refused without a forecast. The plain twin is `plain.pick`.
    """
    renew(profile, inst, rows, gauged, table, edges, grid, version, now)
    for c in range(first, count):
        candidate = queue[c]
        waive = late[c] or now > candidate[R_DUE]
        if tests & TEST_PREFILL and not waive:
            if inst[I_CLEAR] < 0.0:
                clear(profile, inst, rows, gauged, grid, grow, now)
            if hopeless(inst, candidate, now):
                refusals += 1
                if refusals > most:
                    return -1, refusals
                continue
        ask(
            profile, inst, rows, gauged, table, edges, grid, version, candidate, pace, inst[I_KV], grow, tests, waive,
            False, now, out,
        )  # fmt: skip
        if not refused(out):
            return c, refusals
        refusals += 1
        theirs = out[F_MEMORY] < 0.0 or out[F_SEQS] < 0.0 or out[F_PACE] < 0.0
        if theirs or not (out[F_PREFILL] < 0.0 or out[F_TOKEN1] < 0.0) or refusals > most:
            return -1, refusals
    return -1, refusals
