"""The chunk rule: its laws, and the compiled rule against its plain twin."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyserve.core import kernels
from polyserve.core.chunking import ChunkLaw, Prefill, Verdict, chunk_law, fit_chunks, plan_prefill
from polyserve.core.kernels import ALWAYS, DYNAMIC, FIXED, IF_NEEDED, NEVER
from polyserve.core.profile import Limits, Profile, attention_work
from polyserve.core.types import ChunkRule, Instance

LIMITS = Limits(kv_tokens=100_000, max_num_seqs=64, max_num_batched_tokens=256)
# Tokens cost 0.1 ms each above a floor of 10 ms; round figures, to be checked by hand.
PLAIN = Profile("plain", (0, 1000), (0.01, 0.11), 0.0, 0.0, 0.0, LIMITS)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Laws with every term, some of them nil."""
    rises = draw(st.lists(st.sampled_from([0.0, 0.001, 0.004, 0.01]), min_size=3, max_size=3))
    first = draw(st.sampled_from([0.002, 0.005]))
    return Profile(
        "drawn",
        (0, 32, 64, 256),
        tuple(first + sum(rises[:n]) for n in range(4)),
        draw(st.sampled_from([0.0, 2e-5])),
        draw(st.sampled_from([0.0, 1e-6])),
        draw(st.sampled_from([0.0, 1e-7])),
        LIMITS,
        mixed_kv_factor=draw(st.sampled_from([1.0, 1.76])),
        mixed_per_decode_s=draw(st.sampled_from([0.0, 1.5e-5])),
    )


@dataclass(frozen=True)
class Moment:
    """All that the rule asks about an engine's next iteration."""

    law: ChunkLaw
    pace_s: float
    kv: float
    slacks_s: list[float]
    head_slack_s: float
    queue: list[Prefill]


seconds = st.floats(-0.01, 0.06) | st.just(math.inf)
prefills = st.builds(Prefill, st.integers(1, 300), st.integers(0, 500))
laws = st.builds(
    ChunkLaw,
    st.sampled_from([DYNAMIC, DYNAMIC, FIXED]),
    st.sampled_from([4, 64, 256]),
    st.sampled_from([NEVER, ALWAYS, IF_NEEDED]),
    st.sampled_from([1, 16, 64]),
)
moments = st.builds(
    Moment,
    laws,
    st.floats(0.001, 0.05) | st.just(math.inf),
    st.integers(0, 20_000).map(float),
    st.lists(seconds, max_size=8),
    seconds,
    st.lists(prefills, max_size=5),
)


def plan(profile: Profile, now: Moment) -> tuple[list[int], Verdict]:
    return plan_prefill(profile, now.law, now.pace_s, now.kv, now.slacks_s, now.head_slack_s, now.queue)


def compiled(profile: Profile, now: Moment) -> tuple[list[int], int, int]:
    out = np.full(len(now.queue), 7.0)
    total, verdict = kernels.plan_prefill(
        profile.packed,
        now.law.kind,
        now.law.tokens,
        now.law.spend,
        now.law.floor,
        now.pace_s,
        len(now.slacks_s),
        now.kv,
        np.array(now.slacks_s, float),
        now.head_slack_s,
        np.array([p.remaining for p in now.queue], float),
        np.array([p.past for p in now.queue], float),
        len(now.queue),
        out,
    )
    return [int(c) for c in out], total, verdict


def length_s(profile: Profile, now: Moment, chunks: list[int]) -> float:
    work = sum(attention_work(c, p.past) for c, p in zip(chunks, now.queue, strict=True))
    return profile.iteration_s(sum(chunks), len(now.slacks_s), now.kv, work)


@settings(max_examples=400)
@given(profiles(), moments)
def test_the_compiled_rule_is_the_plain_one(profile: Profile, now: Moment) -> None:
    chunks, verdict = plan(profile, now)
    assert compiled(profile, now) == (chunks, sum(chunks), verdict)


@given(profiles(), moments)
def test_chunks_stay_within_the_prompts_and_the_engine(profile: Profile, now: Moment) -> None:
    chunks, verdict = plan(profile, now)
    assert all(0 <= c <= p.remaining for c, p in zip(chunks, now.queue, strict=True))
    assert not any(chunks) or sum(chunks) + len(now.slacks_s) <= now.law.tokens
    assert any(chunks) == bool(now.queue) or verdict == Verdict.WAITS


@given(profiles(), moments)
def test_nobody_gets_a_chunk_before_those_ahead_have_theirs_whole(profile: Profile, now: Moment) -> None:
    chunks, _ = plan(profile, now)
    partial = [c < p.remaining for c, p in zip(chunks, now.queue, strict=True)]
    if True in partial:
        assert not any(chunks[partial.index(True) + 1 :])


@given(profiles(), moments)
def test_no_chunk_that_fits_makes_a_decode_late(profile: Profile, now: Moment) -> None:
    chunks, verdict = plan(profile, now)
    if now.law.kind == FIXED or verdict != Verdict.FITS or not any(chunks):
        return
    alone, mixed = length_s(profile, now, [0] * len(chunks)), length_s(profile, now, chunks)
    assert all(slack >= mixed or slack < alone for slack in now.slacks_s)


@given(profiles(), moments, st.floats(0.001, 0.06))
def test_the_last_chunk_is_the_largest_that_keeps_the_bound(profile: Profile, now: Moment, bound_s: float) -> None:
    decodes = len(now.slacks_s)
    chunks = fit_chunks(profile, bound_s, 200, decodes, now.kv, now.queue)
    given_to = sum(c > 0 for c in chunks)
    assert not any(chunks) or length_s(profile, now, chunks) <= bound_s
    for i in (given_to - 1, given_to):  # one more token for the last, or a first one for the next
        if not 0 <= i < len(chunks) or (i == given_to and given_to and chunks[i - 1] < now.queue[i - 1].remaining):
            continue
        more = [c + (j == i) for j, c in enumerate(chunks)]
        full = more[i] > now.queue[i].remaining or sum(more) > 200
        assert full or length_s(profile, now, more) > bound_s


@given(profiles(), moments)
def test_without_decodes_the_engine_takes_all_it_can(profile: Profile, now: Moment) -> None:
    idle = dataclasses.replace(now, slacks_s=[])
    chunks, verdict = plan(profile, idle)
    assert verdict == Verdict.FITS
    assert sum(chunks) == min(sum(p.remaining for p in now.queue), now.law.tokens)


@given(profiles(), moments)
def test_what_waits_could_still_be_in_time_after_one_more_iteration(profile: Profile, now: Moment) -> None:
    _, verdict = plan(profile, now)
    decodes = len(now.slacks_s)
    if verdict == Verdict.WAITS and now.law.kind == DYNAMIC and decodes < now.law.tokens:
        head = now.queue[0]
        whole = min(head.remaining, now.law.tokens - decodes)
        alone = profile.iteration_s(0, decodes, now.kv)
        whole_s = profile.iteration_s(whole, decodes, now.kv, attention_work(whole, head.past))
        assert now.head_slack_s > alone + whole_s


def moment(
    slacks_s: list[float], queue: list[int], head_slack_s: float = 9.0, pace_s: float = 0.02, spend: int = NEVER
) -> Moment:
    law = ChunkLaw(DYNAMIC, 256, spend, 64)
    return Moment(law, pace_s, 0.0, slacks_s, head_slack_s, [Prefill(n, 0) for n in queue])


@pytest.mark.parametrize(
    ("now", "chunks", "verdict"),
    [
        # One decode and a pace of 20 ms: 99 prompt tokens beside it make exactly that.
        (moment([9.0], [300]), [99], Verdict.FITS),
        (moment([9.0], [50, 300]), [50, 49], Verdict.FITS),
        # A resident with less slack than the pace bounds the chunk; one that is late anyway does not.
        (moment([0.01801, 9.0], [300]), [78], Verdict.FITS),
        (moment([0.005, 9.0], [300]), [98], Verdict.FITS),
        # At a pace of 15 ms 49 would fit: below the floor. Slack is spent instead, or the prompt waits.
        (moment([9.0], [300], pace_s=0.015), [255], Verdict.FITS),
        (moment([0.015], [300], pace_s=0.015), [0], Verdict.WAITS),
        # A prompt shorter than the floor does not wait for it.
        (moment([0.015], [40], pace_s=0.015), [40], Verdict.FITS),
        # Spending slack, the pace is no bound.
        (moment([0.025], [300], spend=ALWAYS), [149], Verdict.FITS),
        # Where it is spent if needed, a head that is in time at the pace needs none, nor does one that is late anyway;
        # one that would be late gets the slack but for one iteration at the pace.
        (moment([0.055], [250], head_slack_s=0.06, spend=IF_NEEDED), [99], Verdict.FITS),
        (moment([0.055], [250], head_slack_s=-0.01, spend=IF_NEEDED), [99], Verdict.FITS),
        (moment([0.0451], [250], head_slack_s=0.05, spend=IF_NEEDED), [150], Verdict.FITS),
        # Waiting would lose the head: the whole prompt, when that saves it at the cost of one other ...
        (moment([0.015, 9.0], [100], head_slack_s=0.025, pace_s=0.015), [100], Verdict.FORCED),
        # ... and the floor when it costs two, or saves nobody.
        (moment([0.015, 0.016], [100], head_slack_s=0.025, pace_s=0.015), [64], Verdict.FORCED),
        (moment([0.015], [100], head_slack_s=0.012, pace_s=0.015), [64], Verdict.FORCED),
    ],
)
def test_the_rule_in_plain_cases(now: Moment, chunks: list[int], verdict: Verdict) -> None:
    assert plan(PLAIN, now) == (chunks, verdict)


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        (ChunkRule(), ChunkLaw(DYNAMIC, 256, ALWAYS, 32)),
        (ChunkRule("fixed", 100), ChunkLaw(FIXED, 100, NEVER, 32)),
        (ChunkRule("fixed", 9999), ChunkLaw(FIXED, 256, NEVER, 32)),
        (ChunkRule("unknown"), ChunkLaw(FIXED, 256, NEVER, 32)),
    ],
)
def test_an_instance_states_its_law(rule: ChunkRule, law: ChunkLaw) -> None:
    assert chunk_law(Instance("i", "plain", rule), PLAIN, "slack", 32) == law


def test_an_instance_may_allow_fewer_tokens_than_its_profile() -> None:
    assert chunk_law(Instance("i", "plain", max_num_batched_tokens=128), PLAIN).tokens == 128
