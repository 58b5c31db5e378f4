"""The decodes of a simulated engine: who joins, who leaves, and their next tokens.

What is told of them side by side (`layout.P_*`) is what each has generated, when the next token is due, how late the
latest was, what its last block has room for, and which iteration makes its last token. The KV that a decode has
computed is its prompt and all it has generated but the last token.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from polyserve.core.kernels import Matrix, Vector
from polyserve.sim import layout as lay
from polyserve.sim.layout import IntMatrix, IntVector

NEVER = np.iinfo(np.int64).max


@njit(cache=True)
def join(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector, slot: int
) -> None:  # pragma: no cover - compiled
    """A slot decodes from the next iteration on."""
    j = state[lay.DECODING]
    made = ints[lay.GENERATED, slot]
    base, tpot = floats[lay.BASE, slot], floats[lay.TPOT, slot]
    lists[lay.DECODING, j] = slot
    lists[lay.P_LAST, j] = state[lay.ITERATIONS] + ints[lay.OUTPUT, slot] - made
    lists[lay.P_ROOM, j] = ints[lay.BLOCKS, slot] * state[lay.BLOCK] - ints[lay.COMPUTED, slot]
    floats[lay.P_MADE, j], floats[lay.P_BASE, j], floats[lay.P_TPOT, j] = made, base, tpot
    floats[lay.P_DUE, j] = base + made * tpot
    floats[lay.P_WORST, j] = floats[lay.WORST, slot]
    if j == 0:
        state[lay.NEXT_LAST], clock[lay.TIGHTEST] = NEVER, np.inf
    state[lay.NEXT_LAST] = min(state[lay.NEXT_LAST], lists[lay.P_LAST, j])
    clock[lay.TIGHTEST] = min(clock[lay.TIGHTEST], tpot)
    state[lay.DECODING] += 1
    state[lay.READ] += ints[lay.COMPUTED, slot]


@njit(cache=True)
def write_back(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, j: int
) -> None:  # pragma: no cover - compiled
    """Bring the slot's own column of the decode at a place up to date."""
    slot = lists[lay.DECODING, j]
    made = int(floats[lay.P_MADE, j])
    ints[lay.COMPUTED, slot] += made - ints[lay.GENERATED, slot]
    ints[lay.GENERATED, slot] = made
    ints[lay.BLOCKS, slot] = (ints[lay.COMPUTED, slot] + lists[lay.P_ROOM, j]) // state[lay.BLOCK]
    floats[lay.WORST, slot] = floats[lay.P_WORST, j]


@njit(cache=True)
def place_of(lists: IntMatrix, state: IntVector, slot: int) -> int:  # pragma: no cover - compiled
    """The place of a slot among the decodes; -1 when it does not decode."""
    for j in range(state[lay.DECODING]):
        if lists[lay.DECODING, j] == slot:
            return j
    return -1


@njit(cache=True)
def keep(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, clock: Vector, leaving: int
) -> None:  # pragma: no cover - compiled
    """Close the gaps: without the decode at `leaving`, or where that is -1 without all whose last token is made."""
    stay = 0
    last, tightest = NEVER, np.inf
    for j in range(state[lay.DECODING]):
        if j == leaving or (leaving < 0 and lists[lay.P_LAST, j] == state[lay.ITERATIONS]):
            write_back(ints, floats, lists, state, j)
            state[lay.READ] -= ints[lay.COMPUTED, lists[lay.DECODING, j]]
            continue
        if stay < j:
            for row in (lay.DECODING, lay.P_LAST, lay.P_ROOM):
                lists[row, stay] = lists[row, j]
            for row in (lay.P_MADE, lay.P_DUE, lay.P_BASE, lay.P_TPOT, lay.P_WORST):
                floats[row, stay] = floats[row, j]
        last = min(last, lists[lay.P_LAST, stay])
        tightest = min(tightest, floats[lay.P_TPOT, stay])
        stay += 1
    state[lay.DECODING], state[lay.NEXT_LAST], clock[lay.TIGHTEST] = stay, last, tightest


@njit(cache=True)
def blocks_needed(lists: IntMatrix, state: IntVector) -> int:  # pragma: no cover - compiled
    """How many decodes need a block for their next token."""
    room = lists[lay.P_ROOM]
    needed = 0
    for j in range(state[lay.DECODING]):
        needed += room[j] == 0
    return needed


@njit(cache=True)
def take_blocks(lists: IntMatrix, state: IntVector, needed: int) -> None:  # pragma: no cover - compiled
    """Give a block to each decode that needs one; there are enough."""
    room = lists[lay.P_ROOM]
    for j in range(state[lay.DECODING]):
        room[j] += state[lay.BLOCK] if room[j] == 0 else 0
    state[lay.FREE] -= needed


@njit(cache=True)
def make_tokens(floats: Matrix, lists: IntMatrix, state: IntVector, now: float) -> None:  # pragma: no cover - compiled
    """Every decode has its next token."""
    count = state[lay.DECODING]
    made, due, base = floats[lay.P_MADE], floats[lay.P_DUE], floats[lay.P_BASE]
    tpot, worst, room = floats[lay.P_TPOT], floats[lay.P_WORST], lists[lay.P_ROOM]
    for j in range(count):
        late = now - due[j]
        worst[j] = late if late > worst[j] else worst[j]
        made[j] += 1.0
        due[j] = base[j] + made[j] * tpot[j]
    for j in range(count):
        room[j] -= 1
    state[lay.READ] += count
