"""The ordered lists of a simulated engine: who is computed first."""

from __future__ import annotations

import numpy as np
from numba import njit

from polyserve.core.kernels import Matrix
from polyserve.sim import layout as lay
from polyserve.sim.layout import IntMatrix, IntVector


@njit(cache=True)
def next_due(ints: IntMatrix, floats: Matrix, slot: int) -> float:  # pragma: no cover - compiled
    """When the slot's next token is late."""
    if np.isinf(floats[lay.BASE, slot]):
        return np.inf
    due: float = floats[lay.BASE, slot] + ints[lay.GENERATED, slot] * floats[lay.TPOT, slot]
    return due


@njit(cache=True)
def precedes(ints: IntMatrix, floats: Matrix, state: IntVector, a: int, b: int) -> bool:  # pragma: no cover - compiled
    """Whether `a` is computed before `b`: the relegated last, by deadline where the engine goes by it, by arrival."""
    if ints[lay.RELEGATED, a] != ints[lay.RELEGATED, b]:
        return bool(ints[lay.RELEGATED, a] < ints[lay.RELEGATED, b])
    if state[lay.BY_DEADLINE]:
        due_a, due_b = next_due(ints, floats, a), next_due(ints, floats, b)
        if due_a != due_b:
            return due_a < due_b
    earlier: bool = ints[lay.SEQUENCE, a] < ints[lay.SEQUENCE, b]
    return earlier


@njit(cache=True)
def enqueue(
    ints: IntMatrix, floats: Matrix, lists: IntMatrix, state: IntVector, slot: int
) -> None:  # pragma: no cover - compiled
    """Put a slot in its place in the queue, all that it has generated being part of what it must compute."""
    ints[lay.TARGET, slot] = ints[lay.PROMPT, slot] + ints[lay.GENERATED, slot]
    low, high = 0, state[lay.QUEUE]
    while low < high:
        middle = (low + high) >> 1
        if precedes(ints, floats, state, lists[lay.QUEUE, middle], slot):
            low = middle + 1
        else:
            high = middle
    for j in range(state[lay.QUEUE], low, -1):
        lists[lay.QUEUE, j] = lists[lay.QUEUE, j - 1]
    lists[lay.QUEUE, low] = slot
    state[lay.QUEUE] += 1


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
