"""The rows of an instance's residents: counted, summed over what is to come, and brought to the present."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from polyserve.core.kernels.laws import iteration_s, plan_prefill
from polyserve.core.kernels.layout import (
    G_BATCH,
    G_DECODE_KV,
    G_DECODES,
    G_KV,
    G_MOST,
    G_VARIANCE,
    I_BEGAN,
    I_CLEAR,
    I_COUNT,
    I_ENDS,
    I_FLOOR,
    I_FREE,
    I_GAUGED,
    I_KIND,
    I_PACE,
    I_PEAK,
    I_POINT,
    I_PROFILE,
    I_ROLLED,
    I_SCALE,
    I_SPEND,
    I_TOKENS,
    I_WAITS,
    R_BAND,
    R_BASE,
    R_CAP,
    R_DUE,
    R_FROM,
    R_KEY,
    R_LEFT,
    R_MADE,
    R_PROMPT,
    R_RUN,
    R_SEEN,
    R_TPOT,
    Matrix,
    Vector,
)


@njit(cache=True)
def tally(rows: Matrix, count: int) -> tuple[int, float, int, float]:  # pragma: no cover - compiled
    """Decodes and the KV they read, queued prompts and the tokens they lack; the plain twin is `plain.tally`."""
    decodes, kv, queued, left = 0, 0.0, 0, 0.0
    for i in range(count):
        if rows[i, R_LEFT] > 0.0:
            queued += 1
            left += rows[i, R_LEFT]
        elif rows[i, R_LEFT] == 0.0:
            decodes += 1
            kv += rows[i, R_PROMPT] + rows[i, R_MADE]
    return decodes, kv, queued, left


@njit(cache=True)
def take_in(rows: Matrix, at: NDArray[np.int64], counts: Vector) -> None:  # pragma: no cover - compiled
    """Write reported token counts into rows; the plain twin is `plain.take_in`."""
    for k in range(at.shape[0]):
        i = at[k]
        rows[i, R_LEFT] = 0.0
        rows[i, R_SEEN] = counts[k]
        rows[i, R_MADE] = max(counts[k] - rows[i, R_BASE], 1.0)


@njit(cache=True)
def bin_of(edges: Vector, made: float) -> int:  # pragma: no cover - compiled
    """The bin of output lengths that `made` tokens fall into; the plain twin is `plain.bin_of`."""
    low, high = 0, edges.shape[0]
    while high - low > 1:
        middle = (low + high) >> 1
        if edges[middle] <= made:
            low = middle
        else:
            high = middle
    return low


@njit(cache=True)
def add_to_gauge(
    out: Matrix, alive: Vector, grid: Vector, reach: int, group: Vector
) -> None:  # pragma: no cover - compiled
    """Add residents that share their chances to be there: a short loop for each line, which the compiler makes wide.

    `group`: how many they are, the sum of their contexts and of its squares; how many decode, and their contexts.
    """
    count, context, square, decodes, decode_context = group[0], group[1], group[2], group[3], group[4]
    for p in range(reach):
        out[G_BATCH, p] += alive[p] * count
    for p in range(reach):
        out[G_KV, p] += alive[p] * (context + count * grid[p])
    for p in range(reach):
        held = square + 2.0 * grid[p] * context + count * grid[p] * grid[p]
        out[G_VARIANCE, p] += alive[p] * (1.0 - alive[p]) * held
    for p in range(reach):
        out[G_MOST, p] += (context + count * grid[p]) * (alive[p] > 0.0)
    if decodes > 0.0:
        for p in range(reach):
            out[G_DECODES, p] += alive[p] * decodes
        for p in range(reach):
            out[G_DECODE_KV, p] += alive[p] * (decode_context + decodes * grid[p])


@njit(cache=True)
def gauge(
    rows: Matrix, count: int, table: NDArray[np.float64], edges: Vector, grid: Vector, out: Matrix
) -> None:  # pragma: no cover - compiled
    """Expected batch and KV over the grid of future iterations; the plain twin is `plain.gauge`.

    Residents of one band whose tokens made lie in one bin share their chances, unless a cap cuts them off.
    """
    points, bins = grid.shape[0], table.shape[1]
    out[:, :] = 0.0
    groups, used, seen = np.zeros((table.shape[0] * bins, 5)), np.empty(count, np.int64), 0
    lone = np.empty(5)
    for i in range(count):
        made, band = rows[i, R_MADE], int(rows[i, R_BAND])
        at = bin_of(edges, made)
        context, more = rows[i, R_PROMPT] + made, rows[i, R_CAP] - made
        decodes = 1.0 if rows[i, R_LEFT] <= 0.0 else 0.0
        if more <= grid[points - 1]:
            reach = 0
            while grid[reach] < more:
                reach += 1
            lone[0], lone[1], lone[2], lone[3], lone[4] = 1.0, context, context * context, decodes, decodes * context
            add_to_gauge(out, table[band, at], grid, reach, lone)
            continue
        group = groups[band * bins + at]
        if group[0] == 0.0:
            used[seen] = band * bins + at
            seen += 1
        group[0] += 1.0
        group[1] += context
        group[2] += context * context
        group[3] += decodes
        group[4] += decodes * context
    for k in range(seen):
        add_to_gauge(out, table[used[k] // bins, used[k] % bins], grid, points, groups[used[k]])


@njit(cache=True)
def at_iteration(line: Vector, grid: Vector, h: float) -> float:  # pragma: no cover - compiled
    """A line of a gauge at an iteration between grid points; the plain twin is `plain.at_iteration`."""
    last = grid.shape[0] - 1
    if h >= grid[last]:
        return float(line[last])
    p = 0
    while grid[p + 1] <= h:
        p += 1
    return float(line[p] + (line[p + 1] - line[p]) * (h - grid[p]) / (grid[p + 1] - grid[p]))


@njit(cache=True)
def peak_s(
    profile: Vector, gauged: Matrix, points: int, scale: float
) -> tuple[float, int]:  # pragma: no cover - compiled
    """The longest pure-decode iteration over the grid, and at which point; the plain twin is `plain.peak_s`."""
    peak, at = 0.0, 0
    for p in range(points):
        if gauged[G_BATCH, p] > 0.0:
            seconds = iteration_s(profile, 0.0, gauged[G_BATCH, p], gauged[G_KV, p], 0.0)
            if seconds > peak:
                peak, at = seconds, p
    return peak * scale, at


@njit(cache=True)
def first_waiting(
    rows: Matrix, count: int, ends_at: float, begins: bool, budget: int, order: NDArray[np.int64]
) -> int:  # pragma: no cover - compiled
    """Write the first of the queue, whose prompts fill the budget, into `order`; returns how many.

    No others: where nobody is refused thousands wait, and sorting them all took most of a simulation's time. One who
    joined while the running iteration ran is in the next; one who joined at its end is not in what begins then.
    """
    waiting, wanted = 0, 0.0
    for i in range(count):
        if rows[i, R_LEFT] <= 0.0:
            continue
        since = rows[i, R_FROM]
        if since > ends_at >= 0.0 or (begins and since == ends_at):
            continue
        if waiting > 0 and wanted >= budget and rows[i, R_KEY] >= rows[order[waiting - 1], R_KEY]:
            continue
        j = waiting - 1
        while j >= 0 and rows[order[j], R_KEY] > rows[i, R_KEY]:
            order[j + 1] = order[j]
            j -= 1
        order[j + 1] = i
        waiting += 1
        wanted += rows[i, R_LEFT]
        while waiting > 1 and wanted - rows[order[waiting - 1], R_LEFT] >= budget:
            waiting -= 1
            wanted -= rows[order[waiting], R_LEFT]
    return waiting


@njit(cache=True)
def roll(
    profile: Vector,
    inst: Vector,
    rows: Matrix,
    count: int,
    ends_at: float,
    now: float,
) -> float:  # pragma: no cover - compiled
    """Move the books on to `now`: every iteration that has ended since gives tokens; returns when the next one ends.

    A prompt whose first token nobody has seen keeps one token to compute. The plain twin is `plain.roll`.
    """
    order = np.empty(count, np.int64)
    remaining, past, chunks, slacks = np.empty(count), np.empty(count), np.empty(count), np.empty(count)
    turns = 0
    while True:
        if turns > 0:
            inst[I_BEGAN] = ends_at
        elif ends_at < 0.0:
            inst[I_BEGAN] = now
        decodes, kv, began = 0, 0.0, inst[I_BEGAN]
        for i in range(count):
            if rows[i, R_LEFT] == 0.0:
                slacks[decodes] = rows[i, R_DUE] + rows[i, R_MADE] * rows[i, R_TPOT] - began
                decodes += 1
                kv += rows[i, R_PROMPT] + rows[i, R_MADE]
        budget = int(inst[I_TOKENS]) - decodes
        waiting = first_waiting(rows, count, ends_at, turns == 0, budget, order)
        total, work = 0, 0.0
        for i in range(count):
            rows[i, R_RUN] = 0.0
        if waiting > 0:
            for i in range(waiting):
                remaining[i] = rows[order[i], R_LEFT]
                past[i] = rows[order[i], R_PROMPT] - remaining[i]
            total, _ = plan_prefill(
                profile, int(inst[I_KIND]), int(inst[I_TOKENS]), int(inst[I_SPEND]), int(inst[I_FLOOR]), inst[I_PACE],
                decodes, kv, slacks, rows[order[0], R_DUE] - began, remaining, past, waiting, chunks,
            )  # fmt: skip
            for i in range(waiting):
                work += chunks[i] * (past[i] + 0.5 * chunks[i])
                rows[order[i], R_RUN] = chunks[i]
        step = iteration_s(profile, total, decodes, kv, work) * inst[I_SCALE]
        if turns > 0:
            ends_at += step
        elif ends_at < 0.0:
            ends_at = now + step
        if ends_at > now or turns >= 64:
            return max(ends_at, now)
        for i in range(count):
            if rows[i, R_LEFT] == 0.0 and rows[i, R_MADE] + 1.0 < rows[i, R_CAP]:
                rows[i, R_MADE] += 1.0
        for i in range(waiting):
            rows[order[i], R_LEFT] = max(1.0, remaining[i] - chunks[i])
        turns += 1


@njit(cache=True)
def roll_on(profile: Vector, inst: Vector, rows: Matrix, now: float) -> None:  # pragma: no cover - compiled
    """Bring one instance's rows to `now`, unless they are there; the plain twin is `Books.roll`."""
    if now <= inst[I_ROLLED]:
        return
    count = int(inst[I_COUNT])
    inst[I_ROLLED] = now
    if count > 0 and inst[I_ENDS] <= now:
        inst[I_ENDS] = roll(profile, inst, rows, count, max(inst[I_ENDS], -1.0), now)
        inst[I_GAUGED] = -1.0


@njit(cache=True)
def look(
    profiles: Matrix,
    insts: Matrix,
    rows: NDArray[np.float64],
    slots: NDArray[np.int64],
    now: float,
    seconds: Vector,
    left: Vector,
) -> None:  # pragma: no cover - compiled
    """Of each slot at `now`: seconds of the next iteration and prompt tokens to compute."""
    for j in range(slots.shape[0]):
        i = slots[j]
        inst, profile = insts[i], profiles[int(insts[i, I_PROFILE])]
        roll_on(profile, inst, rows[i], now)
        decodes, kv, _, left[j] = tally(rows[i], int(inst[I_COUNT]))
        chunk = min(left[j], max(inst[I_TOKENS] - decodes, 0.0))
        seconds[j] = iteration_s(profile, chunk, decodes, kv, 0.5 * chunk * chunk)


@njit(cache=True)
def regauge(
    profile: Vector,
    inst: Vector,
    rows: Matrix,
    gauged: Matrix,
    table: NDArray[np.float64],
    edges: Vector,
    grid: Vector,
    version: float,
) -> None:  # pragma: no cover - compiled
    """Make an instance's gauge again, and its peak, if its rows or the length table have changed."""
    if inst[I_GAUGED] != version:
        gauge(rows, int(inst[I_COUNT]), table, edges, grid, gauged)
        inst[I_PEAK], inst[I_POINT] = peak_s(profile, gauged, grid.shape[0], inst[I_SCALE])
        inst[I_GAUGED], inst[I_CLEAR] = version, -1.0


@njit(cache=True)
def renew(
    profile: Vector,
    inst: Vector,
    rows: Matrix,
    gauged: Matrix,
    table: NDArray[np.float64],
    edges: Vector,
    grid: Vector,
    version: float,
    now: float,
) -> None:  # pragma: no cover - compiled
    """Bring one instance's books to `now`: rows, gauge, peak, and when it is free; the plain twin is `plain.renew`."""
    roll_on(profile, inst, rows, now)
    regauge(profile, inst, rows, gauged, table, edges, grid, version)
    inst[I_FREE] = max(inst[I_ENDS], now) if inst[I_WAITS] > 0.0 and inst[I_COUNT] > 0.0 else now
