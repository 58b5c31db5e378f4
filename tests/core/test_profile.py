"""Profiles: monotone laws, their inverse against a search, their compiled twin, and what a bad file is told."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core import kernels
from polyserve.core.profile import Limits, Profile, ProfileError, attention_work

LIMITS = Limits(kv_tokens=100_000, max_num_seqs=64, max_num_batched_tokens=512)

per_unit = st.sampled_from([0.0, 1e-7, 3e-5]) | st.floats(0, 1e-4)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    knots = sorted(draw(st.sets(st.integers(1, 4000), min_size=1, max_size=6)))
    rises = draw(st.lists(st.floats(0, 0.02), min_size=len(knots), max_size=len(knots)))
    values = [draw(st.floats(1e-3, 0.02))]
    for rise in rises:
        values.append(values[-1] + rise)
    return Profile(
        "drawn",
        (0.0, *map(float, knots)),
        tuple(values),
        draw(per_unit),
        draw(per_unit),
        draw(per_unit),
        LIMITS,
        mixed_kv_factor=draw(st.floats(1, 6)),
        mixed_per_decode_s=draw(per_unit),
        host_overhead_s=draw(per_unit),
        measured_to=(512.0, 64.0, math.inf),
        notes={"origin": "drawn"},
    )


shapes = st.tuples(st.integers(0, 9000), st.integers(0, 512), st.integers(0, 500_000), st.integers(0, 10**8))


@given(profiles(), shapes, shapes)
def test_more_of_anything_never_takes_less_time(
    profile: Profile, shape: tuple[int, ...], more: tuple[int, ...]
) -> None:
    larger = tuple(a + b for a, b in zip(shape, more, strict=True))
    assert profile.iteration_s(*larger) >= profile.iteration_s(*shape) * (1 - 1e-12)
    assert 0 < profile.iteration_s(*larger) < math.inf


@given(profiles(), shapes)
def test_the_compiled_law_is_the_plain_one(profile: Profile, shape: tuple[int, ...]) -> None:
    assert kernels.iteration_s(profile.packed, *map(float, shape)) == profile.iteration_s(*shape)


@given(profiles(), st.floats(0, 0.2), st.integers(0, 64), st.integers(0, 50_000), st.integers(0, 4000))
def test_the_inverse_is_what_a_search_finds(profile: Profile, bound_s: float, decodes: int, kv: int, past: int) -> None:
    longest = 300
    fitting = [
        c for c in range(1, longest + 1) if profile.iteration_s(c, decodes, kv, attention_work(c, past)) <= bound_s
    ]
    found = max(fitting, default=0)
    assert profile.largest_chunk(bound_s, decodes, kv, past, longest) == found
    assert kernels.largest_chunk(profile.packed, bound_s, decodes, kv, past, longest) == found


def test_a_batch_that_carries_prefill_pays_the_mixed_price() -> None:
    profile = Profile(
        "mixed", (0, 100), (0.01, 0.02), 1e-3, 1e-6, 1e-9, LIMITS, mixed_kv_factor=2.0, mixed_per_decode_s=1e-4
    )
    assert profile.iteration_s(0, 10, 1000) == pytest.approx(0.011 + 0.010 + 0.001)
    assert profile.iteration_s(10, 10, 1000, 5000) == pytest.approx(0.012 + 0.011 + 0.002 + 5e-6)


def test_beyond_the_last_knot_the_last_slope_goes_on() -> None:
    profile = Profile("line", (0, 100, 200), (0.01, 0.02, 0.04), 0.0, 0.0, 0.0, LIMITS)
    assert profile.iteration_s(400, 0, 0) == pytest.approx(0.08)


def test_a_shape_outside_what_was_measured_is_said_to_be_extrapolated() -> None:
    profile = dataclasses.replace(
        Profile("line", (0, 100), (0.01, 0.02), 0.0, 0.0, 0.0, LIMITS), measured_to=(100.0, 8.0, 1000.0)
    )
    assert not profile.extrapolates(92, 8, 1000)
    assert profile.extrapolates(93, 8, 1000)
    assert profile.extrapolates(0, 9, 0)
    assert profile.extrapolates(0, 8, 1001)


@given(profiles(), st.floats(0.5, 3), shapes)
def test_a_slowed_profile_is_slower_by_that_much_everywhere(
    profile: Profile, factor: float, shape: tuple[int, ...]
) -> None:
    assert profile.slowed(factor).iteration_s(*shape) == pytest.approx(factor * profile.iteration_s(*shape))


@given(profiles(), st.floats(0.5, 3))
def test_a_pace_is_held_from_one_decode_alone_upwards(profile: Profile, scale: float) -> None:
    alone_s = profile.iteration_s(0, 1, 1) * scale
    assert profile.holds(alone_s, scale)
    assert profile.holds(2 * alone_s, scale)
    assert not profile.holds(0.99 * alone_s, scale)


@given(profiles())
def test_a_profile_survives_its_file(profile: Profile) -> None:
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict(), allow_nan=False))) == profile


def plain(**changes: Any) -> dict[str, Any]:
    profile = Profile("line", (0, 100), (0.01, 0.02), 0.0, 0.0, 0.0, LIMITS)
    values = {**profile.to_dict(), **changes}
    return {name: value for name, value in values.items() if value != "absent"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"colour": 1}, r"x\.json: unknown field 'colour'; there are: .*knots"),
        ({"knots": "absent"}, r"x\.json: field 'knots' is missing"),
        ({"knots": 3}, r"x\.json: field 'knots' has a value that does not fit"),
        ({"knots": [0, "many"]}, r"x\.json: field 'knots' has a value that does not fit"),
        ({"knots": [0]}, r"knots and knot_s want the same length, at least 2"),
        ({"knots": [1, 100]}, r"knots start at 0 and rise"),
        ({"knots": [0, 0]}, r"knots start at 0 and rise"),
        ({"knots": [0, math.nan]}, r"knots"),
        ({"knot_s": [0.02, 0.01]}, r"knot_s never falls"),
        ({"knot_s": [-0.01, 0.01]}, r"knot_s never falls and is never negative"),
        ({"knot_s": [0.01, math.nan]}, r"knot_s"),
        ({"knot_s": [0.01, math.inf]}, r"knot_s"),
        ({"knot_s": [0, 0]}, r"an iteration takes time"),
        ({"per_decode_s": -1}, r"per_decode_s is finite and not negative"),
        ({"per_decode_s": math.nan}, r"per_decode_s is finite and not negative"),
        ({"per_decode_s": None}, r"x\.json: field 'per_decode_s' has a value that does not fit"),
        ({"mixed_kv_factor": 0.5}, r"mixed_kv_factor is at least 1"),
        ({"limits": {"kv_tokens": 5}}, r"x\.json: field 'limits' has a value that does not fit"),
        ({"limits": 5}, r"x\.json: field 'limits' has a value that does not fit"),
        (
            {"limits": {"kv_tokens": 5, "max_num_seqs": 0, "max_num_batched_tokens": 5}},
            r"limits are positive",
        ),
        ({"measured_to": [1, 2]}, r"x\.json: field 'measured_to' has a value that does not fit"),
        ({"name": 3}, r"x\.json: field 'name'"),
        ({"notes": 3}, r"x\.json: field 'notes'"),
        ({"kv_bytes_per_token": "x"}, r"x\.json: field 'kv_bytes_per_token' has a value that does not fit"),
    ],
)
def test_a_bad_profile_is_told_what_is_wrong(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ProfileError, match=complaint) as caught:
        Profile.from_dict(plain(**changes), "x.json")
    assert "\n" not in str(caught.value)
