"""Profile files: the shipped ones, reading, writing and what is said about bad ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.profile import ProfileError
from polyserve.profiles import store

BASES = ["a100-llama-3-8b", "h200-llama-3-70b-tp4", "h200-llama-3-8b"]
NAMES = [name + suffix for name in BASES for suffix in ("", "-mixed")]
SHIPPED = {name: store.load(name) for name in NAMES}


def test_the_promised_profiles_ship() -> None:
    assert store.shipped_names() == sorted(NAMES)
    assert all(profile.name == name for name, profile in SHIPPED.items())


@pytest.mark.parametrize("name", NAMES)
def test_each_says_where_it_comes_from_and_what_it_assumes(name: str) -> None:
    notes = SHIPPED[name].notes
    assert {"origin", "licence", "composition", "fit", "mixed", "kv_tokens", "host_overhead", "context"} <= set(notes)
    assert "Apache-2.0" in notes["licence"]
    assert ("assumption" in notes["mixed"]) == name.endswith("-mixed")


@pytest.mark.parametrize("name", BASES)
def test_mixed_differs_from_its_base_in_the_penalty_alone(name: str) -> None:
    base, mixed = SHIPPED[name], SHIPPED[f"{name}-mixed"]
    assert (base.mixed_kv_factor, base.mixed_per_decode_s) == (1.0, 0.0)
    assert mixed.mixed_kv_factor == 1.76
    assert mixed.mixed_per_decode_s == pytest.approx(15e-6 * (80 if "70b" in name else 32) / 32)
    same = dataclasses.replace(mixed, name=base.name, mixed_kv_factor=1.0, mixed_per_decode_s=0.0, notes=base.notes)
    assert same == base


def test_limits_are_as_vllm_sets_them() -> None:
    for name, profile in SHIPPED.items():
        limits = profile.limits
        expected = (256, 2048) if "a100" in name else (1024, 8192)
        assert (limits.max_num_seqs, limits.max_num_batched_tokens) == expected
        assert limits.kv_tokens % limits.block_size == 0
    # vLLM reports about 0.44 M tokens for 8B on an 80 GB A100; H200 holds twice the memory and the same weights.
    assert 400_000 < SHIPPED["a100-llama-3-8b"].limits.kv_tokens < 460_000
    assert 850_000 < SHIPPED["h200-llama-3-8b"].limits.kv_tokens < 930_000


@given(
    st.sampled_from(NAMES),
    st.tuples(st.integers(0, 8192), st.integers(0, 1024), st.integers(0, 10**6), st.integers(0, 10**9)),
    st.tuples(st.integers(0, 999), st.integers(0, 99), st.integers(0, 10**5), st.integers(0, 10**8)),
)
def test_more_of_anything_never_takes_less_time(
    name: str, shape: tuple[int, int, int, int], more: tuple[int, int, int, int]
) -> None:
    profile = SHIPPED[name]
    larger = tuple(a + b for a, b in zip(shape, more, strict=True))
    assert profile.iteration_s(*larger) >= profile.iteration_s(*shape) > 0


# Whole-engine figures of the same order, so that a slip of units cannot pass: Llama-3-8B needs about 5 ms (H200) and
# 11 ms (A100) to read its weights once; 2,048 tokens at 50-60 % of peak FLOP/s take about 45 and 120 ms.
@pytest.mark.parametrize(
    ("name", "floor_ms", "prompt_ms"), [("h200-llama-3-8b", 5.5, 45), ("a100-llama-3-8b", 12, 122)]
)
def test_times_have_the_size_of_the_hardware(name: str, floor_ms: float, prompt_ms: float) -> None:
    profile = SHIPPED[name]
    assert profile.iteration_s(0, 1, 1000) * 1e3 == pytest.approx(floor_ms, rel=0.05)
    assert profile.iteration_s(2048, 0, 0, 2048**2 / 2) * 1e3 == pytest.approx(prompt_ms, rel=0.08)


def test_a_saved_profile_loads_equal(tmp_path: Path) -> None:
    profile = SHIPPED["h200-llama-3-8b-mixed"]
    store.save(profile, tmp_path / "copy.json")
    assert store.load(tmp_path / "copy.json") == profile
    store.save(profile, tmp_path / "again.json")
    assert (tmp_path / "copy.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_the_digest_tells_profiles_apart_and_only_those() -> None:
    assert len({store.digest(p) for p in SHIPPED.values()}) == len(NAMES)
    profile = SHIPPED["a100-llama-3-8b"]
    assert store.digest(profile) == store.digest(store.load("a100-llama-3-8b"))
    assert store.digest(profile) != store.digest(dataclasses.replace(profile, host_overhead_s=0.001))


@pytest.mark.parametrize("name", ["h100", "", "../etc", "h200-llama-3-8b "])
def test_an_unknown_profile_is_told_what_exists(name: str) -> None:
    with pytest.raises(ProfileError, match=r"unknown profile .* there are: a100-llama-3-8b, .*h200-llama-3-8b"):
        store.load(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "a profile is a JSON object"),
        ("{}", "is missing"),
        ('{"nmae": 1}', "unknown field 'nmae'"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError, match=says) as caught:
        store.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_does_not_fit_is_named(tmp_path: Path) -> None:
    plain = SHIPPED["a100-llama-3-8b"].to_dict()
    for field, value in [("per_decode_s", "fast"), ("per_kv_token_s", -1.0), ("knots", [1, 2]), ("limits", None)]:
        (tmp_path / "p.json").write_text(json.dumps(plain | {field: value}), encoding="utf-8")
        with pytest.raises(ProfileError, match=field):
            store.load(tmp_path / "p.json")


def test_a_missing_file_is_told_from_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such profile file"):
        store.load(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="cannot be written"):
        store.save(SHIPPED["a100-llama-3-8b"], tmp_path / "no" / "such" / "folder.json")
