"""Latency in the mean against cases done by hand, and the compiled formula against the plain one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import STEADY, Crew
from test_routing import costly, steady

from polyserve.core.fleet import Books, Job
from polyserve.core.latency import Predictor, latency
from polyserve.core.profile import Profile
from polyserve.core.types import ChunkRule
from polyserve.profiles.store import load

FIXED = ChunkRule("fixed", 128)


def predicted(crew: Crew, books: Books, job: Job) -> tuple[float, float]:
    found = Predictor(crew.demand, 0.0, job.prefill_tokens).of(books)
    return found.ttft_s, found.tpot_s


def test_an_idle_instance_is_predicted_to_take_the_prompt_in_chunks() -> None:
    crew = steady()
    books = crew.instance("i", chunk=FIXED)
    ttft_s, tpot_s = predicted(crew, books, crew.job("r", "tight", prompt=300))
    assert ttft_s == pytest.approx(2 * (0.01 + 0.0128) + 0.01 + 0.0044), "128, 128 and 44 tokens"
    assert tpot_s == pytest.approx(0.0101), "nothing is known of prompts to come"


def test_a_batch_is_predicted_to_draw_the_prompts_that_it_will_be_followed_by() -> None:
    crew = steady()
    books = crew.instance("i", residents=4, chunk=FIXED)
    for _ in range(10):
        crew.demand.arrived(0.0, "tight", 1000)
        crew.demand.ended("tight", 1000, 100)
    prompt, output = crew.demand.lengths
    drawn = 5 * prompt / output
    assert 10 < drawn < 128
    assert predicted(crew, books, crew.job("r", "tight"))[1] == pytest.approx(0.01 + (drawn + 5) * 1e-4)


@given(st.integers(0, 12), st.integers(1, 2000), st.integers(1, 2000))
def test_more_to_do_is_never_predicted_to_be_done_sooner(residents: int, prompt: int, more: int) -> None:
    crew = costly()
    books = crew.instance("i", residents=residents, chunk=FIXED)
    short = predicted(crew, books, crew.job("short", "tight", prompt=prompt))
    long = predicted(crew, books, crew.job("long", "tight", prompt=prompt + more))
    assert long[0] > short[0]
    assert long[1] >= short[1]


def plain(
    profile: Profile, decodes: int, kv: float, queued: int, left: int, prompt: int, chunk: int, mean: float, out: float
) -> tuple[float, float]:
    """The formula again, chunk by chunk."""
    chunks = [min(chunk, left + prompt - begun) for begun in range(0, left + prompt, chunk)]
    past = 0.5 * max(mean, prompt)
    ttft_s = sum(profile.iteration_s(c, decodes, kv, c * past) for c in chunks)
    if decodes + queued:
        now = min(left, chunk)
        ttft_s += profile.iteration_s(now, decodes, kv, now * past) / 2
    drawn = min((decodes + queued + 1) * mean / out, chunk)
    return ttft_s, profile.iteration_s(drawn, decodes + queued + 1, kv + left + prompt, drawn * mean / 2)


@given(
    st.sampled_from([STEADY, load("a100-llama-3-8b-mixed")]),
    st.integers(0, 200),
    st.integers(0, 20),
    st.integers(1, 5000),
    st.integers(1, 2048),
    st.floats(0.0, 5000.0),
    st.floats(1.0, 2000.0),
)
def test_the_compiled_formula_is_the_plain_one(
    profile: Profile, decodes: int, queued: int, prompt: int, chunk: int, mean: float, out: float
) -> None:
    shape = (decodes, 300.0 * decodes, queued, 700 * queued, prompt, chunk, mean, out)
    assert latency(profile.packed, *shape) == pytest.approx(plain(profile, *shape))
