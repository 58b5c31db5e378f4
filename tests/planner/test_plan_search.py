"""The searches find the threshold of any monotone law, with few questions and none twice."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from polyserve.planner.search import largest, smallest


@given(
    threshold=st.integers(1, 3000), guess=st.integers(-5, 3000), most=st.integers(1, 2000), known=st.integers(0, 1999)
)
def test_the_smallest_count_is_where_the_law_begins_to_hold(threshold: int, guess: int, most: int, known: int) -> None:
    below = min(known, threshold - 1, most - 1)
    asked: list[int] = []

    def holds(count: int) -> bool:
        asked.append(count)
        return count >= threshold

    found = smallest(holds, guess, most, below)
    assert found == (threshold if threshold <= most else None)
    assert len(asked) == len(set(asked))
    assert all(below < count <= most for count in asked)
    # A gallop that doubles its steps, then a bisection: both logarithmic in the way from the guess.
    assert len(asked) <= 6 + 2 * math.log2(2 + most)


@given(threshold=st.floats(1, 6), most=st.floats(1.5, 5), tolerance=st.floats(0.01, 0.2))
def test_the_largest_factor_holds_and_a_little_more_does_not(threshold: float, most: float, tolerance: float) -> None:
    found = largest(lambda factor: factor <= threshold, 1.0, most, tolerance)
    assert 1.0 <= found <= min(threshold, most)
    assert found == most or found * (1 + tolerance) >= min(threshold, most)
