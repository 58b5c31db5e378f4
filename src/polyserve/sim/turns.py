"""The compiled loop over all engines of a world: each takes its turn when its iteration ends.

The world's heap knows arrivals, deliveries and ticks; when iterations end is kept here, in a heap of engine rows by
(end, order of beginning), which is the order that a heap of all together would give. `advance` runs iterations up to
a horizon and comes back when something has to be told. Which arrays there are is told in `sim/bank.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from polyserve.core.kernels import Matrix, Vector
from polyserve.progress import REPORT_EVERY_S
from polyserve.sim import kernels as k
from polyserve.sim import layout as lay
from polyserve.sim.layout import IntMatrix, IntVector

Stack = NDArray[np.float64]  # a matrix per engine
IntStack = NDArray[np.int64]

# Why `advance` came back: nothing is left before the horizon, something is told, an engine's noise or its list of
# lengths is used up (nothing of its turn has happened yet), or an engine does nothing though it has residents.
HORIZON, TOLD, DRAW, LENGTHEN, STUCK = range(5)
# What a line of `told` tells, and its columns.
FIRST_TOKEN, PREEMPTED, FINISHED = range(3)
T_AT, T_KIND, T_ROW, T_SLOT, T_GENERATED, T_WORST_S, T_FIRST_AT, T_COLUMNS = range(8)
# What may be seen of engines (`sim/sight.py`), and the rows of a report and its heading.
BLIND, GATEWAY, PERFECT = range(3)
R_SLOTS, R_COUNTS, R_QUEUED, R_LEFT, R_ROWS = range(5)
H_DUE, H_SLOTS, H_QUEUED, H_PREFILL, H_DECODES, H_KV, H_HELD, H_COLUMNS = range(8)
# The loop's own counters: engines in the heap, iterations begun.
HEAPED, BEGINNINGS, OWN_LENGTH = range(3)


@njit(cache=True)
def sooner(state: IntMatrix, clock: Matrix, a: int, b: int) -> bool:  # pragma: no cover - compiled
    """Whether engine `a`'s turn is before engine `b`'s."""
    if clock[a, lay.ENDS_AT] != clock[b, lay.ENDS_AT]:
        earlier: bool = clock[a, lay.ENDS_AT] < clock[b, lay.ENDS_AT]
        return earlier
    first: bool = state[a, lay.BEGUN] < state[b, lay.BEGUN]
    return first


@njit(cache=True)
def sift(heap: IntVector, own: IntVector, state: IntMatrix, clock: Matrix, at: int) -> None:
    """Bring the entry at a place of the heap to where it belongs."""  # pragma: no cover - compiled
    row = heap[at]
    while at > 0:
        above = (at - 1) >> 1
        if not sooner(state, clock, row, heap[above]):
            break
        heap[at] = heap[above]
        state[heap[at], lay.PLACE] = at
        at = above
    while True:
        below = 2 * at + 1
        if below >= own[HEAPED]:
            break
        if below + 1 < own[HEAPED] and sooner(state, clock, heap[below + 1], heap[below]):
            below += 1
        if not sooner(state, clock, heap[below], row):
            break
        heap[at] = heap[below]
        state[heap[at], lay.PLACE] = at
        at = below
    heap[at] = row
    state[row, lay.PLACE] = at


@njit(cache=True)
def take_out(heap: IntVector, own: IntVector, state: IntMatrix, clock: Matrix, row: int) -> None:
    """Take an engine whose iteration runs out of the heap."""  # pragma: no cover - compiled
    at = state[row, lay.PLACE]
    own[HEAPED] -= 1
    if at < own[HEAPED]:
        heap[at] = heap[own[HEAPED]]
        sift(heap, own, state, clock, at)


@njit(cache=True)
def start(
    profiles: Matrix,
    ints: IntMatrix,
    floats: Matrix,
    lists: IntMatrix,
    state: IntVector,
    clock: Vector,
    work: Matrix,
    noise: Vector,
    own: IntVector,
    now: float,
) -> bool:  # pragma: no cover - compiled
    """Begin an engine's next iteration; False when it stands still."""
    if state[lay.JITTERS]:
        clock[lay.STRETCH] = noise[state[lay.DRAWN]]
        state[lay.DRAWN] += 1
    state[lay.BEGUN] = own[BEGINNINGS]
    own[BEGINNINGS] += 1
    return bool(k.compose(profiles, ints, floats, lists, state, clock, work, now))


@njit(cache=True)
def gateway_sees(state: IntVector, clock: Vector, lengths: Vector, now: float) -> bool:  # pragma: no cover - compiled
    """Take in an iteration as a gateway sees it; whether a report on it is due."""
    decodes = state[lay.DECODES] - state[lay.JOINED]
    if decodes > 0:
        lengths[state[lay.LENGTHS]] = now - clock[lay.TOKENS_AT]
        state[lay.LENGTHS] += 1
    if state[lay.DECODES] > 0 or state[lay.FIRST] > 0:
        clock[lay.TOKENS_AT] = now
    if clock[lay.TOKENS_AT] != now or now - clock[lay.REPORTED_AT] < REPORT_EVERY_S:
        return False
    clock[lay.REPORTED_AT] = now
    return True


@njit(cache=True)
def median_s(lengths: Vector, count: int) -> float:  # pragma: no cover - compiled
    """The median to the microsecond; NaN of none."""
    if count == 0:
        return np.nan
    ordered = np.sort(lengths[:count])
    half = count >> 1
    middle = ordered[half] if count & 1 else (ordered[half - 1] + ordered[half]) / 2
    return float(np.rint(middle * 1e6) / 1e6)


@njit(cache=True)
def note_report(
    ints: IntMatrix,
    floats: Matrix,
    lists: IntMatrix,
    state: IntVector,
    report: IntMatrix,
    heading: IntVector,
    perfect: bool,
) -> None:  # pragma: no cover - compiled
    """Copy what a report says, since the engine goes on before anybody reads it."""
    heading[H_DUE], heading[H_QUEUED] = 1, 0
    heading[H_SLOTS], heading[H_DECODES] = state[lay.DECODING], state[lay.DECODES] - state[lay.JOINED]
    for j in range(state[lay.DECODING]):
        slot = lists[lay.DECODING, j]
        report[R_SLOTS, j], report[R_COUNTS, j] = slot, int(floats[lay.P_MADE, j])
    if not perfect:
        return
    heading[H_PREFILL], heading[H_DECODES] = state[lay.PREFILL], state[lay.DECODES]
    heading[H_KV], heading[H_HELD] = state[lay.KV], state[lay.HELD]
    for j in range(state[lay.QUEUE]):
        slot = lists[lay.QUEUE, j]
        if not ints[lay.BROUGHT, slot]:
            queued = heading[H_QUEUED]
            report[R_QUEUED, queued], report[R_LEFT, queued] = slot, ints[lay.TARGET, slot] - ints[lay.COMPUTED, slot]
            heading[H_QUEUED] += 1


@njit(cache=True)
def tell(
    ints: IntMatrix,
    floats: Matrix,
    lists: IntMatrix,
    state: IntVector,
    told: Matrix,
    count: int,
    row: int,
    now: float,
) -> int:  # pragma: no cover - compiled
    """Append what a gateway notices of an iteration at once; returns how many lines there are then."""
    for kind, listed in ((FIRST_TOKEN, lay.FIRST), (PREEMPTED, lay.PREEMPTED), (FINISHED, lay.FINISHED)):
        for j in range(state[listed]):
            slot = lists[listed, j]
            told[count, T_AT], told[count, T_KIND] = now, kind
            told[count, T_ROW], told[count, T_SLOT] = row, slot
            told[count, T_GENERATED] = ints[lay.GENERATED, slot]
            told[count, T_WORST_S], told[count, T_FIRST_AT] = floats[lay.WORST, slot], floats[lay.FIRST_AT, slot]
            count += 1
    return count


@njit(cache=True)
def advance(
    profiles: Matrix,
    ints: IntStack,
    floats: Stack,
    lists: IntStack,
    state: IntMatrix,
    clock: Matrix,
    work: Matrix,
    noise: Matrix,
    lengths: Matrix,
    heap: IntVector,
    own: IntVector,
    told: Matrix,
    report: IntMatrix,
    heading: IntVector,
    woken: IntVector,
    wakes: int,
    now: float,
    horizon: float,
    inclusive: bool,
    quiet_until: float,
    sight: int,
) -> tuple[int, int, float, int, float, float]:  # pragma: no cover - compiled
    """Begin the `woken` at `now`, then run iterations that end before `horizon`, or at it where that is `inclusive`.

    Comes back at the first end of which there is something to tell that is not before `quiet_until`. Returns why; the
    row that this concerns, where something is told that of which there is a report (-1: none); when the latest of the
    iterations ended that it ran (-inf: none); how many lines are told; the iteration length that a report infers (NaN:
    none); and when the next iteration ends.
    """
    heading[H_DUE] = 0
    count, seconds, at = 0, np.nan, -np.inf
    for i in range(wakes):
        e = woken[i]
        if not state[e, lay.BUSY] and state[e, lay.DECODING] + state[e, lay.QUEUE] > 0:
            if not start(profiles, ints[e], floats[e], lists[e], state[e], clock[e], work, noise[e], own, now):
                return STUCK, e, at, 0, seconds, now
            heap[own[HEAPED]] = e
            own[HEAPED] += 1
            sift(heap, own, state, clock, own[HEAPED] - 1)
    while own[HEAPED] > 0:
        e = heap[0]
        now = clock[e, lay.ENDS_AT]
        if now > horizon or (now == horizon and not inclusive):
            break
        its_state, its_clock = state[e], clock[e]
        residents = its_state[lay.DECODING] + its_state[lay.QUEUE]
        if count > 0 and (now >= quiet_until or count + 3 * residents > told.shape[0]):
            break
        if its_state[lay.JITTERS] and its_state[lay.DRAWN] == noise.shape[1]:
            return DRAW, e, at, count, seconds, now
        if its_state[lay.LENGTHS] == lengths.shape[1]:
            return LENGTHEN, e, at, count, seconds, now
        at = now
        its_ints, its_floats, its_lists = ints[e], floats[e], lists[e]
        news = k.settle(its_ints, its_floats, its_lists, its_state, its_clock, now) > 0
        if news:
            count = tell(its_ints, its_floats, its_lists, its_state, told, count, e, now)
        if sight == PERFECT or (sight == GATEWAY and gateway_sees(its_state, its_clock, lengths[e], now)):
            note_report(its_ints, its_floats, its_lists, its_state, report, heading, sight == PERFECT)
            seconds = its_clock[lay.LENGTH]
            if sight == GATEWAY:
                seconds = median_s(lengths[e], its_state[lay.LENGTHS])
                its_state[lay.LENGTHS] = 0
            news = True
        if its_state[lay.DECODING] + its_state[lay.QUEUE] == 0:
            take_out(heap, own, state, clock, e)
        else:
            if not start(profiles, its_ints, its_floats, its_lists, its_state, its_clock, work, noise[e], own, now):
                return STUCK, e, at, 0, seconds, now
            sift(heap, own, state, clock, 0)
        if news and now >= quiet_until:
            then = clock[heap[0], lay.ENDS_AT] if own[HEAPED] > 0 else np.inf
            return TOLD, e if heading[H_DUE] else -1, at, count, seconds, then
    then = clock[heap[0], lay.ENDS_AT] if own[HEAPED] > 0 else np.inf
    return TOLD if count > 0 else HORIZON, -1, at, count, seconds, then
