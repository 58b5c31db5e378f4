"""The compiled loops of the simulated engine; `tests/sim/plain_engine.py` is the plain twin that they are
held to.

An engine's state is arrays (`sim/layout.py`), so that an iteration visits no resident in Python. `sim/bank.py` keeps
them for one engine or for many, `sim/decoding.py` has what concerns decodes alone, `sim/turns.py` runs many engines.
The rules are told in `sim/engine.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from polyserve.core.kernels import FIXED, FORCED, Matrix, Vector, iteration_s, plan_prefill
from polyserve.sim import layout as lay
from polyserve.sim.decoding import (
    blocks_needed,
    join,
    keep,
    make_tokens,
    place_of,
    take_blocks,
    write_back,
)
from polyserve.sim.layout import IntMatrix, IntVector
from polyserve.sim.queueing import enqueue, next_due, remove

# Share of the newest iteration in the engine's own view of observed over believed time: about 20 iterations
# of memory, half a second at the paces served.
NEWEST = 0.05


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
    for row in range(lay.INT_ROWS):
        ints[row, slot] = 0
    ints[lay.PROMPT, slot], ints[lay.OUTPUT, slot], ints[lay.GENERATED, slot] = prompt, output, generated
    ints[lay.SEQUENCE, slot], ints[lay.BROUGHT, slot] = sequence, brought
    floats[lay.BASE, slot], floats[lay.TPOT, slot] = base, tpot
    floats[lay.WORST, slot], floats[lay.FIRST_AT, slot] = -np.inf, np.nan
    enqueue(ints, floats, lists, state, slot)


@njit(cache=True)
def release(ints: IntMatrix, state: IntVector, slot: int) -> None:  # pragma: no cover - compiled
    """Give back a slot's KV and seat."""
    state[lay.FREE] += ints[lay.BLOCKS, slot]
    state[lay.HELD] -= ints[lay.COMPUTED, slot]
    state[lay.RUNNING] -= ints[lay.RUNS, slot]
    ints[lay.BLOCKS, slot] = ints[lay.COMPUTED, slot] = ints[lay.RUNS, slot] = ints[lay.CHUNK, slot] = 0


@njit(cache=True)
def drop(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector, slot: int
) -> None:  # pragma: no cover - compiled
    """Forget a slot wherever it is, also in the middle of an iteration."""
    place = place_of(lists, state, slot)
    if place >= 0:
        keep(ints, floats, lists, state, clock, place)
    else:
        remove(lists, state, lay.QUEUE, slot)
    remove(lists, state, lay.PREEMPTED, slot)
    release(ints, state, slot)


@njit(cache=True)
def bring_up_to_date(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, slot: int
) -> None:  # pragma: no cover - compiled
    """Let the slot's own column tell what it has, also while it decodes."""
    place = place_of(lists, state, slot)
    if place >= 0:
        write_back(ints, floats, lists, state, place)


@njit(cache=True)
def preempt(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector
) -> None:  # pragma: no cover - compiled
    """Send the running slot that matters least back to the queue without its KV."""
    victim, place, worst = -1, -1, 0.0
    for j in range(state[lay.DECODING] + state[lay.QUEUE]):
        decodes = j < state[lay.DECODING]
        slot = lists[lay.DECODING, j] if decodes else lists[lay.QUEUE, j - state[lay.DECODING]]
        if not ints[lay.RUNS, slot]:
            continue
        due = 0.0
        if state[lay.BY_DEADLINE]:
            due = floats[lay.P_DUE, j] if decodes else next_due(ints, floats, slot)
        if victim < 0 or due > worst or (due == worst and ints[lay.ADMITTED, slot] > ints[lay.ADMITTED, victim]):
            victim, place, worst = slot, j if decodes else -1, due
    if place >= 0:
        keep(ints, floats, lists, state, clock, place)
    else:
        remove(lists, state, lay.QUEUE, victim)
    release(ints, state, victim)
    enqueue(ints, floats, lists, state, victim)
    lists[lay.PREEMPTED, state[lay.PREEMPTED]] = victim
    state[lay.PREEMPTED] += 1
    state[lay.PREEMPTIONS] += 1


@njit(cache=True)
def room_for_decodes(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector
) -> None:  # pragma: no cover - compiled
    """Allocate the block that each decode may need for its next token, preempting until it is there."""
    needed = blocks_needed(lists, state)
    while needed > state[lay.FREE]:
        preempt(ints, floats, lists, state, clock)
        needed = blocks_needed(lists, state)
    if needed > 0:
        take_blocks(lists, state, needed)


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
    while state[lay.QUEUE] > 0:
        slot = lists[lay.QUEUE, 0]
        left = ints[lay.TARGET, slot]
        at_best = now + ratio * iteration_s(believed, left, state[lay.DECODING], kv, 0.5 * left * left)
        if ints[lay.RUNS, slot] or ints[lay.BROUGHT, slot] or ints[lay.RELEGATED, slot]:
            return
        if at_best <= next_due(ints, floats, slot):
            return
        ints[lay.RELEGATED, slot] = 1
        remove(lists, state, lay.QUEUE, slot)
        enqueue(ints, floats, lists, state, slot)


@njit(cache=True)
def join_brought(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector
) -> None:  # pragma: no cover - compiled
    """Give those whose KV came along their seats and blocks, the next token's included, and have them decode.

    Nobody overtakes one that waits for a seat or for memory, whatever its KV.
    """
    j = 0
    while j < state[lay.QUEUE]:
        slot = lists[lay.QUEUE, j]
        if ints[lay.RUNS, slot]:
            j += 1
            continue
        held = ints[lay.TARGET, slot] - 1
        blocks = held // state[lay.BLOCK] + 1
        if not ints[lay.BROUGHT, slot] or state[lay.RUNNING] >= state[lay.SEATS] or blocks > state[lay.FREE]:
            return
        remove(lists, state, lay.QUEUE, slot)
        ints[lay.BROUGHT, slot], ints[lay.RUNS, slot] = 0, 1
        ints[lay.ADMITTED, slot] = state[lay.ADMISSIONS]
        state[lay.ADMISSIONS] += 1
        state[lay.RUNNING] += 1
        ints[lay.COMPUTED, slot], ints[lay.BLOCKS, slot] = held, blocks
        state[lay.HELD] += held
        state[lay.FREE] -= blocks
        join(ints, floats, lists, state, clock, slot)
        state[lay.JOINED] += 1


@njit(cache=True)
def able_prefills(
    ints: IntMatrix, lists: IntMatrix, state: IntVector, work: Matrix
) -> int:  # pragma: no cover - compiled
    """List the prefills that may get a chunk now into `work`; returns how many.

    Whoever is behind one that gets only a part gets nothing, so each may be taken to use all it asks for.
    """
    budget = state[lay.LAW_TOKENS] - state[lay.DECODING]
    free, seats = state[lay.FREE], state[lay.SEATS] - state[lay.RUNNING]
    running = state[lay.RUNNING] - state[lay.DECODING]
    closed = state[lay.PREEMPTED] > 0  # nobody joins in an iteration that had to throw somebody out
    count, total = 0, 0
    for j in range(state[lay.QUEUE]):
        if total >= budget or (closed and running == 0):
            break
        slot = lists[lay.QUEUE, j]
        left = ints[lay.TARGET, slot] - ints[lay.COMPUTED, slot]
        room = (ints[lay.BLOCKS, slot] + free) * state[lay.BLOCK] - ints[lay.COMPUTED, slot]
        if ints[lay.RUNS, slot]:
            running -= 1
            if room < left:
                if room < state[lay.FLOOR]:
                    break  # nobody behind may take the room that it waits for
                left = room
        else:
            closed = closed or seats <= 0 or room < left or ints[lay.BROUGHT, slot] > 0
            if closed:
                continue
            seats -= 1
        end = ints[lay.COMPUTED, slot] + left
        free -= max(0, (end + state[lay.BLOCK] - 1) // state[lay.BLOCK] - ints[lay.BLOCKS, slot])
        work[lay.QUEUED, count], work[lay.REMAINING, count] = slot, left
        work[lay.PAST, count] = ints[lay.COMPUTED, slot]
        count += 1
        total += left
    return count


@njit(cache=True)
def give_chunks(
    ints: IntMatrix, lists: IntMatrix, state: IntVector, work: Matrix, count: int
) -> float:  # pragma: no cover - compiled
    """Admit the prefills that have a chunk and allocate its blocks; returns their attention work."""
    attention = 0.0
    state[lay.CHUNKED] = 0
    for j in range(count):
        chunk = int(work[lay.CHUNKS, j])
        if chunk <= 0:
            break
        slot = int(work[lay.QUEUED, j])
        if not ints[lay.RUNS, slot]:
            ints[lay.RUNS, slot] = 1
            ints[lay.ADMITTED, slot] = state[lay.ADMISSIONS]
            state[lay.ADMISSIONS] += 1
            state[lay.RUNNING] += 1
        end = ints[lay.COMPUTED, slot] + chunk
        more = max(0, (end + state[lay.BLOCK] - 1) // state[lay.BLOCK] - ints[lay.BLOCKS, slot])
        ints[lay.BLOCKS, slot] += more
        state[lay.FREE] -= more
        ints[lay.CHUNK, slot] = chunk
        attention += chunk * (work[lay.PAST, j] + 0.5 * chunk)
        lists[lay.CHUNKED, state[lay.CHUNKED]] = slot
        state[lay.CHUNKED] += 1
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
    state[lay.CHUNKED] = 0
    count = able_prefills(ints, lists, state, work) if state[lay.QUEUE] > 0 else 0
    if count == 0:
        return 0, 0.0, 0
    decodes, pace, head_slack = state[lay.DECODING], np.inf, np.inf
    if state[lay.KIND] != FIXED:
        pace, caution = clock[lay.PACE], clock[lay.RATIO] * clock[lay.MARGIN]
        due, slacks = floats[lay.P_DUE], work[lay.SLACKS]
        for j in range(decodes):
            slacks[j] = (due[j] - now) / caution
        if decodes > 0:
            pace = min(pace, clock[lay.TIGHTEST])
        running = state[lay.RUNNING] - decodes
        for j in range(state[lay.QUEUE]):
            if running == 0:
                break
            if ints[lay.RUNS, lists[lay.QUEUE, j]]:
                running -= 1
                pace = min(pace, floats[lay.TPOT, lists[lay.QUEUE, j]])
        head = int(work[lay.QUEUED, 0])
        if not ints[lay.RELEGATED, head]:  # nothing is forced for one whose deadline is lost
            head_slack = (next_due(ints, floats, head) - now) / caution
    total, verdict = plan_prefill(
        believed,
        state[lay.KIND],
        state[lay.LAW_TOKENS],
        int(state[lay.SPEND]),
        state[lay.FLOOR],
        pace / clock[lay.RATIO],
        decodes,
        kv,
        work[lay.SLACKS],
        head_slack,
        work[lay.REMAINING],
        work[lay.PAST],
        count,
        work[lay.CHUNKS],
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
    state[lay.PREEMPTED] = state[lay.JOINED] = 0
    room_for_decodes(ints, floats, lists, state, clock)
    believed = profiles[state[lay.BELIEVED]]
    if state[lay.QUEUE] > 0:
        if state[lay.RELEGATES]:
            kv = state[lay.READ] + state[lay.DECODING]
            relegate(believed, ints, floats, lists, state, now, kv, clock[lay.RATIO])
        if state[lay.PREEMPTED] == 0:
            join_brought(ints, floats, lists, state, clock)
    decodes, kv = state[lay.DECODING], state[lay.READ] + state[lay.DECODING]
    total, attention, verdict = plan(believed, ints, floats, lists, state, clock, work, now, kv)
    if verdict == FORCED:
        state[lay.FORCED_CHUNKS] += 1
    seconds = expected = iteration_s(believed, total, decodes, kv, attention)
    if state[lay.TRUE] != state[lay.BELIEVED]:
        seconds = iteration_s(profiles[state[lay.TRUE]], total, decodes, kv, attention)
    seconds *= clock[lay.STRETCH]
    clock[lay.ENDS_AT] = np.rint((now + seconds) * 1e6) / 1e6  # `to_microsecond`
    clock[lay.LENGTH] = np.rint((clock[lay.ENDS_AT] - now) * 1e6) / 1e6
    clock[lay.OFF] = seconds / expected
    clock[lay.BUSY_S] += clock[lay.ENDS_AT] - now
    state[lay.PREFILL], state[lay.DECODES], state[lay.KV] = total, decodes, kv
    state[lay.BUSY] = 1
    return bool(total + decodes > 0)


@njit(cache=True)
def learn(state: IntVector, clock: Vector) -> None:  # pragma: no cover - compiled
    """Take the iteration that just ended into the ratio of observed to believed time, and its spread."""
    off = clock[lay.OFF] - clock[lay.RATIO]
    clock[lay.RATIO] += NEWEST * off
    clock[lay.VARIANCE] += NEWEST * (off * off - clock[lay.VARIANCE])
    clock[lay.MARGIN] = 1.0 + clock[lay.SIGMAS] * np.sqrt(clock[lay.VARIANCE])


@njit(cache=True)
def first_here(ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, now: float) -> None:
    # pragma: no cover - compiled
    """Note when those who brought their KV had their first token of this engine: to the client it is no first."""
    for j in range(state[lay.DECODING]):
        slot = lists[lay.DECODING, j]
        if np.isnan(floats[lay.FIRST_AT, slot]):
            floats[lay.FIRST_AT, slot] = now


@njit(cache=True)
def compute_chunk(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector, slot: int, now: float
) -> None:  # pragma: no cover - compiled
    """End a prompt's chunk, and make its token where it was the last."""
    chunk = ints[lay.CHUNK, slot]
    ints[lay.CHUNK, slot] = 0  # and 0 already where it was cancelled in the meantime
    ints[lay.COMPUTED, slot] += chunk
    state[lay.HELD] += chunk
    if chunk == 0 or ints[lay.COMPUTED, slot] < ints[lay.TARGET, slot]:
        return
    remove(lists, state, lay.QUEUE, slot)
    lists[lay.TOKENS, state[lay.TOKENS]] = slot
    state[lay.TOKENS] += 1
    floats[lay.WORST, slot] = max(floats[lay.WORST, slot], now - next_due(ints, floats, slot))
    if np.isnan(floats[lay.FIRST_AT, slot]):
        floats[lay.FIRST_AT, slot] = now
        lists[lay.FIRST, state[lay.FIRST]] = slot
        state[lay.FIRST] += 1
    ints[lay.GENERATED, slot] += 1
    if ints[lay.GENERATED, slot] == ints[lay.OUTPUT, slot]:
        release(ints, state, slot)
        lists[lay.FINISHED, state[lay.FINISHED]] = slot
        state[lay.FINISHED] += 1
    else:
        join(ints, floats, lists, state, clock, slot)


@njit(cache=True)
def settle(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector, now: float
) -> int:  # pragma: no cover - compiled
    """End the running iteration; returns how many had their first token, their last, or were preempted."""
    decodes = state[lay.DECODING]
    state[lay.BUSY] = 0
    state[lay.ITERATIONS] += 1
    state[lay.FIRST] = state[lay.FINISHED] = 0
    state[lay.HELD] += decodes
    if state[lay.JOINED] > 0:
        first_here(ints, floats, lists, state, now)
    lists[lay.TOKENS, :decodes] = lists[lay.DECODING, :decodes]
    state[lay.TOKENS] = decodes
    make_tokens(floats, lists, state, now)
    if decodes > 0 and state[lay.NEXT_LAST] == state[lay.ITERATIONS]:
        for j in range(decodes):
            if lists[lay.P_LAST, j] == state[lay.ITERATIONS]:
                lists[lay.FINISHED, state[lay.FINISHED]] = lists[lay.DECODING, j]
                state[lay.FINISHED] += 1
        keep(ints, floats, lists, state, clock, -1)
        for j in range(state[lay.FINISHED]):
            release(ints, state, lists[lay.FINISHED, j])
    for j in range(state[lay.CHUNKED]):
        compute_chunk(ints, floats, lists, state, clock, lists[lay.CHUNKED, j], now)
    if state[lay.LEARNS]:
        learn(state, clock)
    return int(state[lay.FIRST] + state[lay.FINISHED] + state[lay.PREEMPTED])
