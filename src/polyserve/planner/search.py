"""Where a law changes from false to true: gallop from a guess, then bisect. Simulations are dear, so few are asked."""

from __future__ import annotations

from collections.abc import Callable

# The first step of a gallop, as a share of the guess; it doubles each time.
FIRST_STEP = 0.08


def smallest(holds: Callable[[int], bool], guess: int, most: int, below: int = 0) -> int | None:
    """The smallest count up to `most` that holds, if a larger one always does where a smaller one did.

    `below` and what is less than it is known not to hold. None when `most` does not hold either.
    """
    at = min(max(guess, below + 1), most)
    step = max(1, round(FIRST_STEP * at))
    low, high = below, most + 1  # low does not hold; high does, once it is at most `most`
    if holds(at):
        high = at
        while high > below + 1 and holds(at := max(high - step, below + 1)):
            high, step = at, 2 * step
        low = at if at < high else below
    else:
        low = at
        while low < most and not holds(at := min(low + step, most)):
            low, step = at, 2 * step
        if low == most:
            return None
        high = at
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def largest(holds: Callable[[float], bool], low: float, most: float, tolerance: float) -> float:
    """The largest factor from `low`, which holds, to `most`, within a relative tolerance; never one that was not tried.

    The gallop begins at twice the tolerance.
    """
    step, high = 2 * tolerance, most
    while low < most:
        at = min(low * (1 + step), most)
        if not holds(at):
            high = at
            break
        low, step = at, 2 * step
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
