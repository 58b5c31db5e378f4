"""The fit: a law is found again from its own times, and stays monotone whatever it is given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.profile import Limits, Profile, ProfileError, attention_work
from polyserve.profiles.fit import Shapes, fit_law, nonnegative_least_squares

KNOTS = (0.0, 32.0, 128.0, 512.0, 2048.0)


def shapes(seconds_of: Profile | None, seed: int = 0, count: int = 400) -> Shapes:
    """Random batch shapes with the profile's times, or with times that follow nothing."""
    random = np.random.default_rng(seed)
    chunk = np.where(random.random(count) < 0.3, 0.0, random.integers(1, 2048, count))
    decodes = np.where((chunk > 0) & (random.random(count) < 0.3), 0.0, random.integers(1, 256, count))
    kv = decodes * random.integers(10, 3000, count).astype(float)
    past = random.integers(0, 8000, count).astype(float)
    work = np.array([attention_work(c, p) for c, p in zip(chunk, past, strict=True)])
    if seconds_of is None:
        return Shapes(chunk, decodes, kv, work, random.uniform(0.001, 0.1, count))
    rows = zip(chunk, decodes, kv, work, strict=True)
    return Shapes(chunk, decodes, kv, work, np.array([seconds_of.iteration_s(*row) for row in rows]))


@st.composite
def laws(draw: st.DrawFn) -> Profile:
    values = np.cumsum([draw(st.floats(0.001, 0.02)), *draw(st.lists(st.floats(0, 0.05), min_size=4, max_size=4))])
    per_decode, per_kv, per_attention = (draw(st.floats(0, most)) for most in (1e-4, 1e-7, 3e-9))
    knot_s = tuple(map(float, values))
    return Profile("drawn", KNOTS, knot_s, per_decode, per_kv, per_attention, Limits(10**6, 256, 2048))


@given(laws(), st.integers(0, 99))
def test_a_law_is_found_again_from_its_own_times(profile: Profile, seed: int) -> None:
    law = fit_law(shapes(profile, seed), KNOTS)
    assert law.max_error < 1e-5
    assert law.knot_s == pytest.approx(profile.knot_s, rel=1e-3, abs=1e-6)
    assert law.per_kv_token_s == pytest.approx(profile.per_kv_token_s, rel=1e-3, abs=1e-12)


@given(st.integers(0, 10**6))
def test_a_fit_is_monotone_whatever_it_is_given(seed: int) -> None:
    law = fit_law(shapes(None, seed, 60), KNOTS)
    assert all(b >= a for a, b in zip(law.knot_s, law.knot_s[1:], strict=False))
    assert min(law.knot_s[0], law.per_decode_s, law.per_kv_token_s, law.per_attention_s) >= 0


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_nonnegative_least_squares_meets_its_optimality_conditions(seed: int, width: int) -> None:
    random = np.random.default_rng(seed)
    terms, target = random.normal(size=(40, width)), random.normal(size=40)
    x = nonnegative_least_squares(terms, target)
    gradient = terms.T @ (terms @ x - target)
    assert (x >= 0).all()
    assert (gradient >= -1e-7).all()  # no number would rather grow
    assert np.abs(gradient[x > 0]).max(initial=0.0) < 1e-7  # and none that is used would rather move


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ProfileError, match="at least 8 iterations"):
        fit_law(shapes(None, count=5), KNOTS)
