"""The compiled loops of the simulated engine; `tests/sim/plain_engine.py` is the plain twin that they are
held to.

An engine's state is five arrays, so that an iteration visits no resident in Python: `ints` and `floats`
have a column per slot (one request each), `lists` holds ordered slot numbers, `state` the engine's counters
and limits, `clock` its times and ratios. `work` is scratch for one iteration, `profiles` has a row per
profile. `sim/bank.py` keeps them for one engine or for many, `sim/turns.py` runs many. The rules are told in
`sim/engine.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from polyserve.core.kernels import FIXED, FORCED, Matrix, Vector, iteration_s, plan_prefill

IntVector = NDArray[np.int64]
IntMatrix = NDArray[np.int64]

# Rows of `ints`: PROMPT without and TARGET with the tokens generated before it was queued; ADMITTED is the
# number of its admission; RELEGATED, whether it waits behind all that can still be in time; BROUGHT, whether its KV
# came along and waits with it.
(PROMPT, TARGET, COMPUTED, GENERATED, OUTPUT, BLOCKS, SEQUENCE, RUNS, ADMITTED, CHUNK, RELEGATED, BROUGHT,
 INT_ROWS) = range(13)  # fmt: skip
# Rows of `floats`: BASE is when token 0 is due, infinite (like TPOT) without an SLO.
BASE, TPOT, WORST, FIRST_AT, FLOAT_ROWS = range(5)
# Rows of `lists`, with their lengths in `state`: QUEUE is everybody who does not decode, in order.
DECODING, QUEUE, CHUNKED, TOKENS, FIRST, FINISHED, PREEMPTED, LIST_ROWS = range(8)
# Rows of `work`.
SLACKS, REMAINING, PAST, CHUNKS, QUEUED, WORK_ROWS = range(6)
# `state` beyond those lengths: what is free and held; the limits; profiles by row; whether an iteration runs, and its
# shape (JOINED of the decodes brought their KV and decode here for the first time); counters; what `turns` keeps.
(
    FREE, RUNNING, HELD, ADMISSIONS, BLOCK, SEATS, BY_DEADLINE, RELEGATES, KIND, LAW_TOKENS, SPEND, FLOOR, TRUE,
    BELIEVED, LEARNS, BUSY, PREFILL, DECODES, KV, JOINED, ITERATIONS, PREEMPTIONS, FORCED_CHUNKS,
    BEGUN, PLACE, LENGTHS, JITTERS, DRAWN, STATE_LENGTH,
) = range(LIST_ROWS, LIST_ROWS + 29)  # fmt: skip
# `clock`: the pace; observed over believed iteration time, what slacks are divided by besides, and its variance, with
# the spreads that the margin counts; of the iteration that runs: what its true time is stretched by, its end, its
# length, and its true over its believed time; seconds busy so far; and of `turns`: when tokens came last, and a report.
PACE, RATIO, MARGIN, VARIANCE, SIGMAS, STRETCH, ENDS_AT, LENGTH, OFF, BUSY_S, TOKENS_AT, REPORTED_AT, CLOCK_LENGTH = (
    range(13)
)
# Share of the newest iteration in the engine's own view of observed over believed time: about 20 iterations
# of memory, half a second at the paces served.
NEWEST = 0.05


@njit(cache=True)
def next_due(ints: IntMatrix, floats: Matrix, slot: int) -> float:  # pragma: no cover - compiled
    """When the slot's next token is late."""
    if np.isinf(floats[BASE, slot]):
        return np.inf
    due: float = floats[BASE, slot] + ints[GENERATED, slot] * floats[TPOT, slot]
    return due


@njit(cache=True)
def precedes(ints: IntMatrix, floats: Matrix, state: IntVector, a: int, b: int) -> bool:  # pragma: no cover - compiled
    """Whether `a` is computed before `b`: the relegated last, by deadline where the engine goes by it, by arrival."""
    if ints[RELEGATED, a] != ints[RELEGATED, b]:
        return bool(ints[RELEGATED, a] < ints[RELEGATED, b])
    if state[BY_DEADLINE]:
        due_a, due_b = next_due(ints, floats, a), next_due(ints, floats, b)
        if due_a != due_b:
            return due_a < due_b
    earlier: bool = ints[SEQUENCE, a] < ints[SEQUENCE, b]
    return earlier


@njit(cache=True)
def enqueue(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, slot: int
) -> None:  # pragma: no cover - compiled
    """Put a slot in its place in the queue, all that it has generated being part of what it must compute."""
    ints[TARGET, slot] = ints[PROMPT, slot] + ints[GENERATED, slot]
    low, high = 0, state[QUEUE]
    while low < high:
        middle = (low + high) >> 1
        if precedes(ints, floats, state, lists[QUEUE, middle], slot):
            low = middle + 1
        else:
            high = middle
    for j in range(state[QUEUE], low, -1):
        lists[QUEUE, j] = lists[QUEUE, j - 1]
    lists[QUEUE, low] = slot
    state[QUEUE] += 1


@njit(cache=True)
def admit(
    ints: IntMatrix,
    floats: Matrix,
    lists: IntMatrix,
    state: IntVector,
    slot: int,
    sequence: int,
    prompt: int,
    output: int,
    generated: int,
    brought: bool,
    base: float,
    tpot: float,
) -> None:  # pragma: no cover - compiled
    """Fill a free slot with a request and queue it."""
    for row in range(INT_ROWS):
        ints[row, slot] = 0
    ints[PROMPT, slot], ints[OUTPUT, slot], ints[GENERATED, slot] = prompt, output, generated
    ints[SEQUENCE, slot], ints[BROUGHT, slot] = sequence, brought
    floats[BASE, slot], floats[TPOT, slot] = base, tpot
    floats[WORST, slot], floats[FIRST_AT, slot] = -np.inf, np.nan
    enqueue(ints, floats, lists, state, slot)


@njit(cache=True)
def remove(lists: IntMatrix, state: IntVector, row: int, slot: int) -> bool:  # pragma: no cover - compiled
    """Take a slot out of an ordered list; False when it is not there."""
    for j in range(state[row]):
        if lists[row, j] == slot:
            for k in range(j, state[row] - 1):
                lists[row, k] = lists[row, k + 1]
            state[row] -= 1
            return True
    return False


@njit(cache=True)
def release(ints: IntMatrix, state: IntVector, slot: int) -> None:  # pragma: no cover - compiled
    """Give back a slot's KV and seat."""
    state[FREE] += ints[BLOCKS, slot]
    state[HELD] -= ints[COMPUTED, slot]
    state[RUNNING] -= ints[RUNS, slot]
    ints[BLOCKS, slot] = ints[COMPUTED, slot] = ints[RUNS, slot] = ints[CHUNK, slot] = 0


@njit(cache=True)
def drop(ints: IntMatrix, lists: IntMatrix, state: IntVector, slot: int) -> None:  # pragma: no cover - compiled
    """Forget a slot wherever it is, also in the middle of an iteration."""
    if not remove(lists, state, DECODING, slot):
        remove(lists, state, QUEUE, slot)
    remove(lists, state, PREEMPTED, slot)
    release(ints, state, slot)


@njit(cache=True)
def preempt(ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector) -> None:  # pragma: no cover - compiled
    """Send the running slot that matters least back to the queue without its KV."""
    victim = -1
    for row in (DECODING, QUEUE):
        for j in range(state[row]):
            slot = lists[row, j]
            if not ints[RUNS, slot]:
                continue
            if victim < 0:
                victim = slot
                continue
            due, worst = 0.0, 0.0
            if state[BY_DEADLINE]:
                due, worst = next_due(ints, floats, slot), next_due(ints, floats, victim)
            if due > worst or (due == worst and ints[ADMITTED, slot] > ints[ADMITTED, victim]):
                victim = slot
    if not remove(lists, state, DECODING, victim):
        remove(lists, state, QUEUE, victim)
    release(ints, state, victim)
    enqueue(ints, floats, lists, state, victim)
    lists[PREEMPTED, state[PREEMPTED]] = victim
    state[PREEMPTED] += 1
    state[PREEMPTIONS] += 1


@njit(cache=True)
def room_for_decodes(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector
) -> None:  # pragma: no cover - compiled
    """Allocate the block that each decode may need for its next token, preempting until it is there."""
    while True:
        needed = 0
        for j in range(state[DECODING]):
            slot = lists[DECODING, j]
            if ints[COMPUTED, slot] == ints[BLOCKS, slot] * state[BLOCK]:
                needed += 1
        if needed <= state[FREE]:
            break
        preempt(ints, floats, lists, state)
    if needed == 0:
        return
    for j in range(state[DECODING]):
        slot = lists[DECODING, j]
        if ints[COMPUTED, slot] == ints[BLOCKS, slot] * state[BLOCK]:
            ints[BLOCKS, slot] += 1
            state[FREE] -= 1


@njit(cache=True)
def decodes_read(ints: IntMatrix, lists: IntMatrix, state: IntVector) -> int:  # pragma: no cover - compiled
    """KV tokens that the decodes read, those that they make included."""
    kv = state[DECODING]
    for j in range(state[DECODING]):
        kv += ints[COMPUTED, lists[DECODING, j]]
    return int(kv)


@njit(cache=True)
def relegate(
    believed: Vector,
    ints: IntMatrix,
    floats: Matrix,
    lists: IntMatrix,
    state: IntVector,
    now: float,
    kv: int,
    ratio: float,
) -> None:  # pragma: no cover - compiled
    """Send every head that would be late, were it computed at once, behind all that can still be in time.

    Whoever holds KV stays: two half computed prompts that took turns could fill the memory and both stand still.
    """
    while state[QUEUE] > 0:
        slot = lists[QUEUE, 0]
        left = ints[TARGET, slot]
        at_best = now + ratio * iteration_s(believed, left, state[DECODING], kv, 0.5 * left * left)
        if ints[RUNS, slot] or ints[BROUGHT, slot] or ints[RELEGATED, slot] or at_best <= next_due(ints, floats, slot):
            return
        ints[RELEGATED, slot] = 1
        remove(lists, state, QUEUE, slot)
        enqueue(ints, floats, lists, state, slot)


@njit(cache=True)
def join_brought(ints: IntMatrix, lists: IntMatrix, state: IntVector) -> None:  # pragma: no cover - compiled
    """Give those whose KV came along their seats and blocks, the next token's included, and have them decode.

    Nobody overtakes one that waits for a seat or for memory, whatever its KV.
    """
    j = 0
    while j < state[QUEUE]:
        slot = lists[QUEUE, j]
        if ints[RUNS, slot]:
            j += 1
            continue
        held = ints[TARGET, slot] - 1
        blocks = held // state[BLOCK] + 1
        if not ints[BROUGHT, slot] or state[RUNNING] >= state[SEATS] or blocks > state[FREE]:
            return
        remove(lists, state, QUEUE, slot)
        ints[BROUGHT, slot], ints[RUNS, slot] = 0, 1
        ints[ADMITTED, slot] = state[ADMISSIONS]
        state[ADMISSIONS] += 1
        state[RUNNING] += 1
        ints[COMPUTED, slot], ints[BLOCKS, slot] = held, blocks
        state[HELD] += held
        state[FREE] -= blocks
        lists[DECODING, state[DECODING]] = slot
        state[DECODING] += 1
        state[JOINED] += 1


@njit(cache=True)
def able_prefills(
    ints: IntMatrix, lists: IntMatrix, state: IntVector, work: Matrix
) -> int:  # pragma: no cover - compiled
    """List the prefills that may get a chunk now into `work`; returns how many.

    Whoever is behind one that gets only a part gets nothing, so each may be taken to use all it asks for.
    """
    budget = state[LAW_TOKENS] - state[DECODING]
    free, seats = state[FREE], state[SEATS] - state[RUNNING]
    running = state[RUNNING] - state[DECODING]
    closed = state[PREEMPTED] > 0  # nobody joins in an iteration that had to throw somebody out
    count, total = 0, 0
    for j in range(state[QUEUE]):
        if total >= budget or (closed and running == 0):
            break
        slot = lists[QUEUE, j]
        left = ints[TARGET, slot] - ints[COMPUTED, slot]
        room = (ints[BLOCKS, slot] + free) * state[BLOCK] - ints[COMPUTED, slot]
        if ints[RUNS, slot]:
            running -= 1
            if room < left:
                if room < state[FLOOR]:
                    break  # nobody behind may take the room that it waits for
                left = room
        else:
            closed = closed or seats <= 0 or room < left or ints[BROUGHT, slot] > 0
            if closed:
                continue
            seats -= 1
        end = ints[COMPUTED, slot] + left
        free -= max(0, (end + state[BLOCK] - 1) // state[BLOCK] - ints[BLOCKS, slot])
        work[QUEUED, count], work[REMAINING, count], work[PAST, count] = slot, left, ints[COMPUTED, slot]
        count += 1
        total += left
    return count


@njit(cache=True)
def give_chunks(
    ints: IntMatrix, lists: IntMatrix, state: IntVector, work: Matrix, count: int
) -> float:  # pragma: no cover - compiled
    """Admit the prefills that have a chunk and allocate its blocks; returns their attention work."""
    attention = 0.0
    state[CHUNKED] = 0
    for j in range(count):
        chunk = int(work[CHUNKS, j])
        if chunk <= 0:
            break
        slot = int(work[QUEUED, j])
        if not ints[RUNS, slot]:
            ints[RUNS, slot] = 1
            ints[ADMITTED, slot] = state[ADMISSIONS]
            state[ADMISSIONS] += 1
            state[RUNNING] += 1
        end = ints[COMPUTED, slot] + chunk
        more = max(0, (end + state[BLOCK] - 1) // state[BLOCK] - ints[BLOCKS, slot])
        ints[BLOCKS, slot] += more
        state[FREE] -= more
        ints[CHUNK, slot] = chunk
        attention += chunk * (work[PAST, j] + 0.5 * chunk)
        lists[CHUNKED, state[CHUNKED]] = slot
        state[CHUNKED] += 1
    return attention


@njit(cache=True)
def plan(
    believed: Vector,
    ints: IntMatrix,
    floats: Matrix,
    lists: IntMatrix,
    state: IntVector,
    clock: Vector,
    work: Matrix,
    now: float,
    kv: int,
) -> tuple[int, float, int]:  # pragma: no cover - compiled
    """Choose the prefills' chunks and take their KV; returns their tokens, attention work and the rule's verdict."""
    state[CHUNKED] = 0
    count = able_prefills(ints, lists, state, work) if state[QUEUE] > 0 else 0
    if count == 0:
        return 0, 0.0, 0
    decodes, pace, head_slack = state[DECODING], np.inf, np.inf
    if state[KIND] != FIXED:
        pace, caution = clock[PACE], clock[RATIO] * clock[MARGIN]
        for j in range(decodes):
            slot = lists[DECODING, j]
            pace = min(pace, floats[TPOT, slot])
            work[SLACKS, j] = (next_due(ints, floats, slot) - now) / caution
        running = state[RUNNING] - decodes
        for j in range(state[QUEUE]):
            if running == 0:
                break
            if ints[RUNS, lists[QUEUE, j]]:
                running -= 1
                pace = min(pace, floats[TPOT, lists[QUEUE, j]])
        head = int(work[QUEUED, 0])
        if not ints[RELEGATED, head]:  # nothing is forced for one whose deadline is lost
            head_slack = (next_due(ints, floats, head) - now) / caution
    total, verdict = plan_prefill(
        believed,
        state[KIND],
        state[LAW_TOKENS],
        state[SPEND] > 0,
        state[FLOOR],
        pace / clock[RATIO],
        decodes,
        kv,
        work[SLACKS],
        head_slack,
        work[REMAINING],
        work[PAST],
        count,
        work[CHUNKS],
    )
    return total, give_chunks(ints, lists, state, work, count), verdict


@njit(cache=True)
def compose(
    profiles: Matrix,
    ints: IntMatrix,
    floats: Matrix,
    lists: IntMatrix,
    state: IntVector,
    clock: Vector,
    work: Matrix,
    now: float,
) -> bool:  # pragma: no cover - compiled
    """Choose the next iteration's batch, take its KV and say when it ends; False when the engine stands still."""
    state[PREEMPTED] = state[JOINED] = 0
    room_for_decodes(ints, floats, lists, state)
    believed = profiles[state[BELIEVED]]
    if state[QUEUE] > 0:
        if state[RELEGATES]:
            relegate(believed, ints, floats, lists, state, now, decodes_read(ints, lists, state), clock[RATIO])
        if state[PREEMPTED] == 0:
            join_brought(ints, lists, state)
    decodes, kv = state[DECODING], decodes_read(ints, lists, state)
    total, attention, verdict = plan(believed, ints, floats, lists, state, clock, work, now, kv)
    if verdict == FORCED:
        state[FORCED_CHUNKS] += 1
    seconds = expected = iteration_s(believed, total, decodes, kv, attention)
    if state[TRUE] != state[BELIEVED]:
        seconds = iteration_s(profiles[state[TRUE]], total, decodes, kv, attention)
    seconds *= clock[STRETCH]
    clock[ENDS_AT] = np.rint((now + seconds) * 1e6) / 1e6  # `to_microsecond`
    clock[LENGTH] = np.rint((clock[ENDS_AT] - now) * 1e6) / 1e6
    clock[OFF] = seconds / expected
    clock[BUSY_S] += clock[ENDS_AT] - now
    state[PREFILL], state[DECODES], state[KV] = total, decodes, kv
    state[BUSY] = 1
    return bool(total + decodes > 0)


@njit(cache=True)
def finish(ints: IntMatrix, lists: IntMatrix, state: IntVector, slot: int) -> None:  # pragma: no cover - compiled
    """Note that a slot has its last token, its KV being free again."""
    release(ints, state, slot)
    lists[FINISHED, state[FINISHED]] = slot
    state[FINISHED] += 1


@njit(cache=True)
def learn(state: IntVector, clock: Vector) -> None:  # pragma: no cover - compiled
    """Take the iteration that just ended into the ratio of observed to believed time, and its spread."""
    off = clock[OFF] - clock[RATIO]
    clock[RATIO] += NEWEST * off
    clock[VARIANCE] += NEWEST * (off * off - clock[VARIANCE])
    clock[MARGIN] = 1.0 + clock[SIGMAS] * np.sqrt(clock[VARIANCE])


@njit(cache=True)
def first_here(ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, now: float) -> None:
    # pragma: no cover - compiled
    """Note when those who brought their KV had their first token of this engine: to the client it is no first."""
    for j in range(state[DECODING]):
        slot = lists[DECODING, j]
        if np.isnan(floats[FIRST_AT, slot]):
            floats[FIRST_AT, slot] = now


@njit(cache=True)
def settle(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector, now: float
) -> int:  # pragma: no cover - compiled
    """End the running iteration; returns how many had their first token, their last, or were preempted."""
    decodes = state[DECODING]
    state[BUSY] = 0
    state[ITERATIONS] += 1
    state[FIRST] = state[FINISHED] = 0
    state[HELD] += decodes
    if state[JOINED] > 0:
        first_here(ints, floats, lists, state, now)
    stay = 0
    for j in range(decodes):
        slot = lists[DECODING, j]
        lists[TOKENS, j] = slot
        late = now - next_due(ints, floats, slot)
        if late > floats[WORST, slot]:
            floats[WORST, slot] = late
        ints[COMPUTED, slot] += 1
        ints[GENERATED, slot] += 1
        if ints[GENERATED, slot] == ints[OUTPUT, slot]:
            finish(ints, lists, state, slot)
        else:
            lists[DECODING, stay] = slot
            stay += 1
    tokens = decodes
    for j in range(state[CHUNKED]):
        slot = lists[CHUNKED, j]
        chunk = ints[CHUNK, slot]
        ints[CHUNK, slot] = 0  # and 0 already where it was cancelled in the meantime
        ints[COMPUTED, slot] += chunk
        state[HELD] += chunk
        if chunk == 0 or ints[COMPUTED, slot] < ints[TARGET, slot]:
            continue
        remove(lists, state, QUEUE, slot)
        lists[TOKENS, tokens] = slot
        tokens += 1
        floats[WORST, slot] = max(floats[WORST, slot], now - next_due(ints, floats, slot))
        if np.isnan(floats[FIRST_AT, slot]):
            floats[FIRST_AT, slot] = now
            lists[FIRST, state[FIRST]] = slot
            state[FIRST] += 1
        ints[GENERATED, slot] += 1
        if ints[GENERATED, slot] == ints[OUTPUT, slot]:
            finish(ints, lists, state, slot)
        else:
            lists[DECODING, stay] = slot
            stay += 1
    state[DECODING], state[TOKENS] = stay, tokens
    if state[LEARNS]:
        learn(state, clock)
    return int(state[FIRST] + state[FINISHED] + state[PREEMPTED])
