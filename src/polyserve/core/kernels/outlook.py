"""What would become of a candidate on one instance, and of everybody there."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from polyserve.core.kernels.books import at_iteration, bin_of
from polyserve.core.kernels.laws import fit_chunks, is_pressed, iteration_s
from polyserve.core.kernels.layout import (
    ALWAYS,
    F_DECODES,
    F_FIRST,
    F_MEMORY,
    F_PACE,
    F_PEAK,
    F_PREFILL,
    F_QUEUED,
    F_SEQS,
    F_TOKEN1,
    FIXED,
    G_BATCH,
    G_DECODE_KV,
    G_DECODES,
    G_KV,
    G_MOST,
    G_VARIANCE,
    I_BLOCK,
    I_FLOOR,
    I_FREE,
    I_KIND,
    I_KV,
    I_MARGIN,
    I_PACE,
    I_SCALE,
    I_SEQS,
    I_SIGMA,
    I_SPEND,
    I_TOKENS,
    IF_NEEDED,
    R_BAND,
    R_CAP,
    R_DUE,
    R_FROM,
    R_KEY,
    R_LEFT,
    R_LESS,
    R_MADE,
    R_PROMPT,
    R_RUN,
    R_SOLO,
    R_TPOT,
    TEST_MEMORY,
    TEST_PACE,
    TEST_PREFILL,
    TEST_TOKEN1,
    Matrix,
    Vector,
)

LONGEST_RUN = 512  # iterations a queue is followed: beyond, everybody in it counts as late


# Those who wait on an instance, in order: one row of a matrix each.
Q_LEFT, Q_PAST, Q_DUE, Q_TPOT, Q_CAP, Q_ROWS = range(6)


@njit(cache=True)
def with_newest(
    banked: float, credit: float, due: float, at: float, tpot: float
) -> tuple[float, float]:  # pragma: no cover - compiled
    """The least slack, and what an iteration adds to it, once somebody has token 0 `at` and token 1 `due`.

    Who is late by then bounds nothing.
    """
    return (min(banked, due - at), min(credit, tpot)) if at <= due < np.inf else (banked, credit)


@njit(cache=True)
def in_order(
    rows: Matrix, count: int, candidate: Vector, joins: bool, order: NDArray[np.int64], queue: Matrix
) -> int:  # pragma: no cover - compiled
    """Write those who wait into `order`, first to last, `count` for the candidate; returns how many.

    `queue` gets, of each: prompt tokens remaining and past, when token 0 is due, the pace, and most output tokens.
    """
    waiting = 0
    for i in range(count + 1):
        if (i == count and not joins) or (i < count and rows[i, R_LEFT] <= rows[i, R_RUN]):
            continue
        key = candidate[R_KEY] if i == count else rows[i, R_KEY]
        j = waiting - 1
        while j >= 0 and (candidate[R_KEY] if order[j] == count else rows[order[j], R_KEY]) > key:
            order[j + 1] = order[j]
            j -= 1
        order[j + 1] = i
        waiting += 1
    for j in range(waiting):
        row = candidate if order[j] == count else rows[order[j]]
        left = row[R_LEFT] if order[j] == count else row[R_LEFT] - row[R_RUN]
        queue[Q_LEFT, j], queue[Q_PAST, j] = left, row[R_PROMPT] - left
        queue[Q_DUE, j], queue[Q_TPOT, j], queue[Q_CAP, j] = row[R_DUE], row[R_TPOT], row[R_CAP]
    return waiting


@njit(cache=True)
def next_chunks(
    profile: Vector,
    inst: Vector,
    batch: float,
    kv: float,
    banked: float,
    slack: float,
    remaining: Vector,
    past: Vector,
    out: Vector,
) -> tuple[int, int]:  # pragma: no cover - compiled
    """The chunks of one iteration as `plan_prefill` makes them, for a batch that is an expectation.

    Returns their tokens, and how many prompts were looked at: those beyond fill no budget, and have nothing in `out`.
    `banked`: the slack of whoever has least; `slack`: the first prompt's. The plain twin is `plain._chunks`.
    """
    pace, floor, spend = inst[I_PACE], inst[I_FLOOR], inst[I_SPEND]
    budget = int(inst[I_TOKENS] - batch)
    span, wanted = 1, remaining[0]
    while span < remaining.shape[0] and wanted < budget:
        wanted += remaining[span]
        span += 1
    if inst[I_KIND] == FIXED or batch < 0.5:
        return fit_chunks(profile, np.inf, budget, batch, kv, remaining, past, span, out), span
    alone = iteration_s(profile, 0.0, batch, kv, 0.0)
    # Whoever cannot be on time is no bound; what the others have is not known then, and not counted on.
    spent = banked if banked >= alone else np.inf
    enough = min(floor, remaining[0])
    bound = spent if spend == ALWAYS else min(pace, spent)
    total = fit_chunks(profile, bound, budget, batch, kv, remaining, past, span, out)
    if spend == IF_NEEDED and banked - pace > bound and is_pressed(bound, out[0], remaining[0], slack):
        total = fit_chunks(profile, banked - pace, budget, batch, kv, remaining, past, span, out)
    if total < enough and spent > bound:
        total = fit_chunks(profile, spent, budget, batch, kv, remaining, past, span, out)
    if total >= enough:
        return total, span
    out[:span] = 0.0
    whole = max(min(int(remaining[0]), budget), 0)
    whole_s = iteration_s(profile, whole, batch, kv, whole * (past[0] + 0.5 * whole))
    if slack <= whole_s + alone:
        out[0] = min(int(floor), whole)
    return int(out[0]), span


@njit(cache=True)
def run_queue(
    profile: Vector,
    inst: Vector,
    rows: Matrix,
    count: int,
    gauged: Matrix,
    grid: Vector,
    candidate: Vector,
    joins: bool,
    grow: bool,
    now: float,
    until: float,
    finish: Vector,
) -> tuple[float, float, float]:  # pragma: no cover - compiled
    """Follow an instance's prefill queue, chunk by chunk as its rule makes them.

    Returns when the candidate's token 0 and token 1 are made, and the smallest slack a decode keeps. Stops early once
    the candidate has no token 0 by `until`; what was not reached is inf. `finish[i]` becomes the time of row i's token
    0, `finish[count]` the candidate's. The plain twin is `plain.run_queue`.
    """
    t, made, head = inst[I_FREE], 0, 0
    next_due, tightest = np.inf, np.inf
    joined, joined_kv = 0.0, 0.0
    banked, credit = np.inf, np.inf  # what all that decode by then have left, and what they gain by an iteration
    finish[:] = np.inf
    for i in range(count):
        row = rows[i]
        if row[R_LEFT] <= 0.0:
            due = row[R_DUE] + row[R_MADE] * row[R_TPOT]
            if now <= due < np.inf:
                next_due, tightest = min(next_due, due), min(tightest, row[R_TPOT])
        elif row[R_LEFT] <= row[R_RUN]:
            finish[i] = t
            if grow and row[R_CAP] > 1.0:
                joined, joined_kv = joined + 1.0, joined_kv + row[R_PROMPT]
                banked, credit = with_newest(banked, credit, row[R_DUE] + row[R_TPOT], t, row[R_TPOT])
    banked, credit = min(banked, next_due - t), min(credit, tightest)
    if np.isinf(next_due):
        tightest = 0.0
    order, queue, chunks = np.empty(count + 1, np.int64), np.empty((Q_ROWS, count + 1)), np.empty(count + 1)
    waiting = in_order(rows, count, candidate, joins, order, queue)
    remaining, past = queue[Q_LEFT, :waiting], queue[Q_PAST, :waiting]
    first, second, slack = np.inf, np.inf, np.inf
    while made < LONGEST_RUN:
        if head >= waiting and (not joins or second < np.inf):
            break
        if joins and min(first, t) > until:
            break
        ahead = float(made + 1) if grow else 0.0
        batch = at_iteration(gauged[G_DECODES], grid, ahead) + joined
        kv = at_iteration(gauged[G_DECODE_KV], grid, ahead) + joined_kv
        total, work, span = 0, 0.0, 0
        if head < waiting:
            total, span = next_chunks(
                profile, inst, batch, kv, banked, queue[Q_DUE, head] - t, remaining[head:], past[head:], chunks[head:]
            )
            for i in range(head, head + span):
                work += chunks[i] * (past[i] + 0.5 * chunks[i])
        step = iteration_s(profile, total, batch, kv, work) * inst[I_SCALE]
        t += step
        banked += credit - step
        slack = min(slack, next_due + made * tightest - t)
        made += 1
        if first < np.inf and second == np.inf:
            second = t
        for i in range(head, head + span):
            if chunks[i] <= 0.0:
                break
            remaining[i] -= chunks[i]
            past[i] += chunks[i]
            if remaining[i] > 0.0:
                continue
            finish[order[i]] = t
            if order[i] == count:
                first = t
            if grow and queue[Q_CAP, i] > 1.0:
                joined, joined_kv = joined + 1.0, joined_kv + past[i]
                banked, credit = with_newest(banked, credit, queue[Q_DUE, i] + queue[Q_TPOT, i], t, queue[Q_TPOT, i])
        while head < waiting and remaining[head] <= 0.0:
            head += 1
    return first, second, slack


@njit(cache=True)
def left_s(row: Vector, due: float, at: float, now: float, margin: float) -> float:  # pragma: no cover - compiled
    """Seconds between a due time and a predicted one, less a margin for what is uncertain of the wait.

    What the prompt takes on an idle instance is certain, and what is kept for later is not there. The plain twin is
    `plain.left_s`.
    """
    if at == np.inf:
        return -np.inf
    certain = row[R_SOLO] * row[R_LEFT] / row[R_PROMPT]
    return float(due - row[R_LESS] - at - margin * max(at - now - certain, 0.0))


@njit(cache=True)
def joins_at(
    inst: Vector, candidate: Vector, count: int, peak: float, now: float
) -> float:  # pragma: no cover - compiled
    """When the first iteration begins that a candidate with its KV is in; the plain twin is `plain.joins_at`.

    The running iteration's end is known. KV that comes later finds another one just begun: nobody knows where the ends
    of those will lie.
    """
    there = max(candidate[R_FROM], now + candidate[R_SOLO])
    if there <= inst[I_FREE]:
        return float(inst[I_FREE])
    return float(there + peak if count > 0 else there)


@njit(cache=True)
def forecast(
    profile: Vector,
    inst: Vector,
    rows: Matrix,
    count: int,
    gauged: Matrix,
    table: NDArray[np.float64],
    edges: Vector,
    grid: Vector,
    candidate: Vector,
    grow: bool,
    tests: int,
    waive: bool,
    whole: bool,
    now: float,
    out: Vector,
) -> None:  # pragma: no cover - compiled
    """Every margin of one candidate on one instance; the plain twin is `plain.forecast`.

    Stops at the first margin below 0 unless `whole`; margins not looked at are nan, those of tests that are not made
    inf. `waive`: the candidate's own deadline no longer counts.
    """
    out[:] = np.nan
    points = grid.shape[0]
    memory, peak = np.inf, 0.0
    alive = table[int(candidate[R_BAND]), bin_of(edges, candidate[R_MADE])]
    for p in range(points):
        share = alive[p] if candidate[R_MADE] + grid[p] < candidate[R_CAP] else 0.0
        held = candidate[R_PROMPT] + candidate[R_MADE] + grid[p]
        batch = gauged[G_BATCH, p] + share
        kv = gauged[G_KV, p] + share * held
        variance = gauged[G_VARIANCE, p] + share * (1.0 - share) * held * held
        # A margin has no use beyond what they hold if all of them stay: of one long prompt alone it is no more.
        most = gauged[G_MOST, p] + (held if share > 0.0 else 0.0)
        needed = min(kv + inst[I_SIGMA] * np.sqrt(variance), most)
        memory = min(memory, inst[I_KV] - needed - 0.5 * inst[I_BLOCK] * batch)
        peak = max(peak, iteration_s(profile, 0.0, batch, kv, 0.0))
    peak *= inst[I_SCALE]
    out[F_MEMORY] = memory if tests & TEST_MEMORY else np.inf
    out[F_PACE] = inst[I_PACE] - peak if tests & TEST_PACE else np.inf
    out[F_SEQS], out[F_PEAK] = inst[I_SEQS] - count - 1, peak
    if not whole and (out[F_MEMORY] < 0.0 or out[F_SEQS] < 0.0 or out[F_PACE] < 0.0):
        return
    due, tpot = candidate[R_DUE], candidate[R_TPOT]
    if candidate[R_LEFT] <= 0.0:
        out[F_FIRST], out[F_TOKEN1] = joins_at(inst, candidate, count, peak, now), np.inf
        if tests & TEST_TOKEN1 and not waive and due < np.inf:
            out[F_TOKEN1] = due + tpot - out[F_FIRST] - peak
        out[F_PREFILL] = out[F_QUEUED] = out[F_DECODES] = np.inf
        return
    finish = np.empty(count + 1)
    until = np.inf
    if tests & TEST_PREFILL and not waive and not whole:
        until = due - candidate[R_LESS]
    first, second, slack = run_queue(
        profile, inst, rows, count, gauged, grid, candidate, True, grow, now, until, finish
    )
    out[F_FIRST] = first
    # Finishing times are means: whoever is promised the last moment is late every other time.
    margin = inst[I_MARGIN]
    prefill, token1 = tests & TEST_PREFILL, tests & TEST_TOKEN1
    out[F_PREFILL] = left_s(candidate, due, first, now, margin) if prefill and not waive else np.inf
    out[F_TOKEN1] = np.inf
    if token1 and not waive and not np.isinf(due) and candidate[R_CAP] > 1.0:
        out[F_TOKEN1] = left_s(candidate, due + tpot, second, now, margin)
    out[F_QUEUED], out[F_DECODES] = np.inf, np.inf
    if not prefill:
        return
    if not whole and (out[F_PREFILL] < 0.0 or out[F_TOKEN1] < 0.0):
        return
    for i in range(count):
        if rows[i, R_LEFT] > 0.0 and rows[i, R_DUE] < np.inf:
            out[F_QUEUED] = min(out[F_QUEUED], left_s(rows[i], rows[i, R_DUE], finish[i], now, margin))
    # On an engine whose chunks ignore the pace, the candidate's chunks may also push decodes beyond their slack.
    fixed = inst[I_KIND] == FIXED
    if fixed:
        out[F_DECODES] = slack
    if out[F_QUEUED] >= 0.0 and out[F_DECODES] >= 0.0:
        return
    # Somebody is late: only the candidate's doing counts against it.
    alone = np.empty(count + 1)
    _, _, slack_alone = run_queue(profile, inst, rows, count, gauged, grid, candidate, False, grow, now, np.inf, alone)
    out[F_QUEUED] = np.inf
    for i in range(count):
        due = rows[i, R_DUE]
        if rows[i, R_LEFT] > 0.0 and due < np.inf and left_s(rows[i], due, alone[i], now, margin) >= 0.0:
            out[F_QUEUED] = min(out[F_QUEUED], left_s(rows[i], rows[i, R_DUE], finish[i], now, margin))
    if fixed and slack_alone < 0.0:
        out[F_DECODES] = np.inf
