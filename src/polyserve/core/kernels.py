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


DYNAMIC, FIXED = 0, 1
FITS, WAITS, FORCED = 0, 1, 2


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


# One resident, as a row of the books. MADE is what the forecast believes of this dispatch, SEEN what was reported since
# the request arrived, BASE what earlier dispatches had delivered; FROM: iterations that begin before leave it out;
# RUN: prompt tokens of the running iteration's chunk; SOLO: seconds that the prompt takes on an idle instance; LESS:
# seconds of its deadline that are kept for what follows its prompt on another instance. A candidate that has nothing
# LEFT had its prompt computed elsewhere, or will have: its KV is here SOLO seconds from now, or at FROM.
(
    R_PROMPT, R_LEFT, R_MADE, R_CAP, R_BAND, R_DUE, R_TPOT, R_KEY, R_BASE, R_SEEN, R_FROM, R_RUN, R_SOLO, R_LESS,
    R_COLUMNS,
) = range(15)  # fmt: skip
# When a dynamic chunk goes beyond the pace into the slack that decodes have banked.
NEVER, ALWAYS, IF_NEEDED = range(3)
PROMISED = -1.0  # in LEFT: a place is kept for it, and its KV is still to come
# One instance, as the forecast sees it; then how far its books are: ENDS when the running iteration does (below 0: none
# runs), ROLLED the time they stand at, GAUGED the version of the length table that the gauge was made with (below 0: it
# is to be made again), PEAK of it in seconds, and its point; COUNT residents; TIER by index, or POOL or AWAY; RANK
# among all names; PROFILE its row in the arena; WAITS whether the running iteration is charged; FCFS its order;
# CLEAR when the prompts queued there are computed (below 0: not known), and LAST the last key among them; BEGAN when
# the running iteration did.
(
    I_KIND, I_TOKENS, I_SPEND, I_FLOOR, I_PACE, I_KV, I_SEQS, I_BLOCK, I_SCALE, I_FREE, I_SIGMA, I_MARGIN,
    I_ENDS, I_ROLLED, I_GAUGED, I_PEAK, I_POINT, I_COUNT, I_TIER, I_RANK, I_PROFILE, I_WAITS, I_FCFS,
    I_CLEAR, I_LAST, I_BEGAN, I_COLUMNS,
) = range(27)  # fmt: skip
POOL, AWAY = -1.0, -2.0  # ready without a tier; starting or draining
# The rows of a gauge, each over the grid of future iterations. MOST is the KV if nobody ends before its cap.
G_BATCH, G_KV, G_VARIANCE, G_MOST, G_DECODES, G_DECODE_KV, G_ROWS = range(7)
# Which tests a forecast makes, as bits.
TEST_MEMORY, TEST_PACE, TEST_PREFILL, TEST_TOKEN1, ALL_TESTS = 1, 2, 4, 8, 15
# The answer of a forecast.
F_MEMORY, F_SEQS, F_PACE, F_PREFILL, F_TOKEN1, F_QUEUED, F_DECODES, F_FIRST, F_PEAK, F_COLUMNS = range(10)


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


LONGEST_RUN = 512  # iterations a queue is followed: beyond, everybody in it counts as late


@njit(cache=True)
def next_after(row: Vector, at: float) -> float:  # pragma: no cover - compiled
    """When the token after the first one, made `at`, is due; inf for one that is late anyway."""
    due = row[R_DUE] + row[R_TPOT]
    return float(due) if due >= at else np.inf


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
    order = np.empty(count + 1, np.int64)
    waiting, decodes = 0, 0
    next_due, tightest = np.inf, np.inf
    joined, joined_kv = 0.0, 0.0
    banked, credit = np.inf, np.inf  # what all that decode by then have left, and what they gain by an iteration
    for i in range(count):
        finish[i] = np.inf
        if rows[i, R_LEFT] > rows[i, R_RUN]:
            order[waiting] = i
            waiting += 1
        elif rows[i, R_LEFT] > 0.0:
            finish[i] = inst[I_FREE]
            if grow and rows[i, R_CAP] > 1.0:
                joined += 1.0
                joined_kv += rows[i, R_PROMPT]
                after = next_after(rows[i], inst[I_FREE])
                if after < np.inf:
                    banked, credit = min(banked, after), min(credit, rows[i, R_TPOT])
        else:
            decodes += 1
            due = rows[i, R_DUE] + rows[i, R_MADE] * rows[i, R_TPOT]
            if due >= now and due < np.inf:
                next_due = min(next_due, due)
                tightest = min(tightest, rows[i, R_TPOT])
    banked, credit = min(banked, next_due) - inst[I_FREE], min(credit, tightest)
    if np.isinf(next_due):
        tightest = 0.0
    finish[count] = np.inf
    if joins:
        order[waiting] = count
        waiting += 1
    for i in range(1, waiting):
        entry = order[i]
        key = candidate[R_KEY] if entry == count else rows[entry, R_KEY]
        j = i - 1
        while j >= 0:
            other = candidate[R_KEY] if order[j] == count else rows[order[j], R_KEY]
            if other <= key:
                break
            order[j + 1] = order[j]
            j -= 1
        order[j + 1] = entry
    remaining, past, chunks = np.empty(waiting), np.empty(waiting), np.empty(waiting)
    for i in range(waiting):
        entry = order[i]
        left = candidate[R_LEFT] if entry == count else rows[entry, R_LEFT] - rows[entry, R_RUN]
        prompt = candidate[R_PROMPT] if entry == count else rows[entry, R_PROMPT]
        remaining[i], past[i] = left, prompt - left
    scale, pace, floor = inst[I_SCALE], inst[I_PACE], inst[I_FLOOR]
    fixed = inst[I_KIND] == FIXED
    t, head, made = inst[I_FREE], 0, 0
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
            rest, behind, out = remaining[head:], past[head:], chunks[head:]
            budget = int(inst[I_TOKENS] - batch)
            span, wanted = 1, rest[0]
            while head + span < waiting and wanted < budget:
                wanted += rest[span]
                span += 1
            if fixed or batch < 0.5:
                total = fit_chunks(profile, np.inf, budget, batch, kv, rest, behind, span, out)
            else:
                alone = iteration_s(profile, 0.0, batch, kv, 0.0)
                spent = banked if banked >= alone else np.inf
                enough = min(floor, rest[0])
                bound = spent if inst[I_SPEND] == ALWAYS else min(pace, spent)
                total = fit_chunks(profile, bound, budget, batch, kv, rest, behind, span, out)
                entry = order[head]
                due = candidate[R_DUE] if entry == count else rows[entry, R_DUE]
                if inst[I_SPEND] == IF_NEEDED and banked - pace > bound and is_pressed(bound, out[0], rest[0], due - t):
                    total = fit_chunks(profile, banked - pace, budget, batch, kv, rest, behind, span, out)
                if total < enough and spent > bound:
                    total = fit_chunks(profile, spent, budget, batch, kv, rest, behind, span, out)
                if total < enough:
                    for i in range(span):
                        out[i] = 0.0
                    total = 0
                    whole = max(min(int(rest[0]), budget), 0)
                    whole_s = iteration_s(profile, whole, batch, kv, whole * (behind[0] + 0.5 * whole))
                    if due - t <= whole_s + alone:
                        total = min(int(floor), whole)
                        out[0] = total
            for i in range(head, head + span):
                work += chunks[i] * (past[i] + 0.5 * chunks[i])
        step = iteration_s(profile, total, batch, kv, work) * scale
        t += step
        banked += credit - step
        slack = min(slack, next_due + made * tightest - t)
        made += 1
        if first < np.inf and second == np.inf:
            second = t
        for i in range(head, head + span):
            if chunks[i] <= 0.0 or total == 0:
                break
            remaining[i] -= chunks[i]
            past[i] += chunks[i]
            if remaining[i] <= 0.0:
                entry = order[i]
                finish[entry] = t
                if entry == count:
                    first = t
                if grow and (candidate[R_CAP] if entry == count else rows[entry, R_CAP]) > 1.0:
                    joined += 1.0
                    joined_kv += past[i]
                    row = candidate if entry == count else rows[entry]
                    after = next_after(row, t)
                    if after < np.inf:
                        banked, credit = min(banked, after - t), min(credit, row[R_TPOT])
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
