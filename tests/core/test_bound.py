"""The fluid optimum against cases done by hand and a search, and one request alone against its chunks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyserve.core.bound import (
    TierMix,
    answer_rate,
    best_split,
    ceiling,
    feasible,
    instance_rate,
    largest_solo_chunk,
    optimal_rate,
    partition_sizes,
    prompt_rate,
    solo_ttft_s,
    split_ceiling,
    split_needs,
    split_rate,
    tier_mix,
)
from polyserve.core.kernels import one_solo_ttft_s
from polyserve.core.profile import Limits, Profile, attention_work
from polyserve.core.types import ChunkRule, Slo

DYNAMIC = ChunkRule()
LIMITS = Limits(kv_tokens=10**7, max_num_seqs=50, max_num_batched_tokens=1000)


def law(floor_s: float, per_token_s: float, limits: Limits = LIMITS, per_kv_token_s: float = 0.0) -> Profile:
    """T = floor + slope * tokens + slope * KV."""
    values = (floor_s, floor_s + 1000 * per_token_s)
    return Profile("law", (0.0, 1000.0), values, 0.0, per_kv_token_s, 0.0, limits)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    rises = draw(st.lists(st.floats(0, 0.02), min_size=4, max_size=4))
    values = np.cumsum([draw(st.floats(0.001, 0.02)), *rises])
    return Profile(
        "drawn",
        (0.0, 32.0, 128.0, 512.0, 2048.0),
        tuple(float(v) for v in values),
        per_decode_s=draw(st.floats(0, 2e-5)),
        per_kv_token_s=draw(st.floats(0, 1e-7)),
        per_attention_s=draw(st.floats(0, 3e-9)),
        mixed_kv_factor=draw(st.floats(1, 3)),
        mixed_per_decode_s=draw(st.floats(0, 2e-5)),
        host_overhead_s=draw(st.floats(0, 0.002)),
        limits=Limits(draw(st.integers(20_000, 10**6)), draw(st.integers(8, 300)), draw(st.integers(300, 4096))),
    )


@st.composite
def mixes(draw: st.DrawFn, shortest: int = 1) -> TierMix:
    prompts = np.array(draw(st.lists(st.integers(1, 4000), min_size=1, max_size=5)))
    outputs = np.array(draw(st.lists(st.integers(shortest, 1000), min_size=len(prompts), max_size=len(prompts))))
    return tier_mix(draw(st.sampled_from([0.02, 0.03, 0.05, 0.1])), 1.0, prompts, outputs)


def rate(profile: Profile, mix: TierMix, tpot_s: float, strict: bool = False) -> float:
    return instance_rate(profile, mix.prompt, mix.output, mix.context, mix.attention, tpot_s, strict=strict)


# Iterations of 10 ms whatever they carry, 50 residents, 100 tokens each: one leaves every 20 ms.
def test_where_iterations_are_free_the_most_residents_set_the_rate() -> None:
    assert instance_rate(law(0.010, 0.0), 100, 100, 150, 0, 0.02) == pytest.approx(50 / (100 * 0.010))


# 2 b tokens an iteration (a decode and its prompt token) fill the 15 ms above the floor at b = 75.
def test_where_the_pace_binds_the_batch_is_what_fits_it() -> None:
    profile = law(0.005, 1e-4, dataclasses.replace(LIMITS, max_num_seqs=1000))
    assert instance_rate(profile, 100, 100, 150, 0, 0.02) == pytest.approx(75 / (100 * 0.02))


# 6,000 tokens of memory hold 40 residents of 150.
def test_where_memory_binds_the_batch_is_what_it_holds() -> None:
    profile = law(0.010, 0.0, dataclasses.replace(LIMITS, kv_tokens=6000))
    assert instance_rate(profile, 100, 100, 150, 0, 0.02) == pytest.approx(40 / (100 * 0.010))


# A mixed iteration costs 10 ms, a pure one 2; so the prompt budget (1,000 - b) is best used full.
def test_few_full_chunks_beat_many_small_ones() -> None:
    knots, knot_s = (0.0, 50.0, 51.0, 1000.0), (0.002, 0.002, 0.010, 0.010)
    profile = Profile("step", knots, knot_s, 0.0, 0.0, 0.0, LIMITS)
    share = 50 * 1.0 / (1000 - 50)  # of iterations that carry prompt tokens, at b = 50 and P = D
    mean_s = share * 0.010 + (1 - share) * 0.002
    assert instance_rate(profile, 100, 100, 150, 0, 0.02) == pytest.approx(50 / (100 * mean_s), rel=1e-6)
    assert instance_rate(profile, 100, 100, 150, 0, 0.005, strict=True) < instance_rate(
        profile, 100, 100, 150, 0, 0.005
    )


def test_a_pace_below_the_floor_serves_nobody() -> None:
    mix = TierMix(0.02, 1.0, 100, 100, 150, 5000)
    assert rate(law(0.03, 1e-4), mix, 0.02) == 0.0
    assert optimal_rate(law(0.03, 1e-4), 20, [mix]) == 0.0
    assert ceiling(law(0.03, 1e-4), [mix]) is None


@given(profiles(), mixes(), st.booleans())
def test_a_looser_pace_never_lowers_the_rate(profile: Profile, mix: TierMix, strict: bool) -> None:
    rates = [rate(profile, mix, tau, strict) for tau in (0.01, 0.015, 0.0201, 0.03, 0.05, 0.1, 0.5)]
    assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(rates))


@given(profiles(), mixes())
def test_strict_never_beats_the_mean(profile: Profile, mix: TierMix) -> None:
    assert rate(profile, mix, mix.tpot_s, strict=True) <= rate(profile, mix, mix.tpot_s) * (1 + 1e-9)


def searched_rate(profile: Profile, mix: TierMix, tpot_s: float, strict: bool) -> float:
    """PAPER's formula by brute force over b and f."""
    best = 0.0
    for b in np.geomspace(0.01, profile.limits.max_num_seqs, 40):
        for f in np.geomspace(0.002, 1.0, 25):
            chunk = b * mix.prompt / (mix.output * f)
            if b + chunk > profile.limits.max_num_batched_tokens or b * mix.context > profile.limits.kv_tokens:
                continue
            kv = b * mix.context
            mixed = profile.iteration_s(chunk, b, kv, mix.attention * chunk / mix.prompt)
            mean = f * mixed + (1 - f) * profile.iteration_s(0, b, kv)
            if mean <= tpot_s and (not strict or mixed <= tpot_s):
                best = max(best, b / (mix.output * mean))
    return best


@settings(max_examples=40)
@given(profiles(), mixes(20), st.booleans())
def test_the_rate_is_the_best_that_a_search_finds(profile: Profile, mix: TierMix, strict: bool) -> None:
    found, searched = rate(profile, mix, mix.tpot_s, strict), searched_rate(profile, mix, mix.tpot_s, strict)
    assert found >= searched * 0.995  # the search may lie between two batches of the grid
    eased = searched_rate(profile, mix, mix.tpot_s * 1.05, strict)
    assert found <= eased * 1.6  # the grid of the search is coarse, most of all where little fits


@given(profiles(), mixes(), mixes())
def test_binning_never_loses(profile: Profile, one: TierMix, other: TierMix) -> None:
    won = ceiling(profile, [one, other._replace(share=2.0)])
    assert won is None or won >= 1.0 - 1e-12


def test_the_fleet_divides_itself_by_need() -> None:
    profile = law(0.005, 1e-4, dataclasses.replace(LIMITS, max_num_seqs=1000))
    tight, loose = TierMix(0.02, 0.25, 100, 100, 150, 0), TierMix(0.04, 0.75, 100, 100, 150, 0)
    need = 0.25 / rate(profile, tight, 0.02) + 0.75 / rate(profile, loose, 0.04)
    assert optimal_rate(profile, 10, [tight, loose]) == pytest.approx(10 / need)
    assert optimal_rate(profile, 10, [tight._replace(share=1), loose._replace(share=3)]) == pytest.approx(10 / need)


@given(profiles(), st.integers(1, 20_000), st.sampled_from([0, 64, 512, 100_000]))
def test_alone_a_prompt_takes_the_sum_of_its_chunks(profile: Profile, prompt: int, budget: int) -> None:
    rule = ChunkRule("fixed", budget) if budget else ChunkRule()
    size = min(budget or 100_000, profile.limits.max_num_batched_tokens)
    past, seconds = 0, 0.0
    while past < prompt:
        chunk = min(size, prompt - past)
        seconds += profile.iteration_s(chunk, 0, 0, attention_work(chunk, past))
        past += chunk
    assert solo_ttft_s(profile, rule, np.array([prompt]))[0] == pytest.approx(seconds)
    assert one_solo_ttft_s(profile.packed, largest_solo_chunk(profile.limits, rule), prompt) == pytest.approx(seconds)


def test_feasible_asks_for_the_first_token_the_last_one_and_room() -> None:
    limits = Limits(kv_tokens=3000, max_num_seqs=10, max_num_batched_tokens=1000, context_tokens=5000)
    profile = law(0.01, 1e-4, limits, per_kv_token_s=1e-5)

    def able(prompt: int, output: int, slo: Slo, rule: ChunkRule = DYNAMIC) -> bool:
        return bool(feasible(profile, rule, np.array([prompt]), np.array([output]), slo)[0])

    assert able(1000, 10, Slo(0.2, 0.05))
    assert not able(1000, 10, Slo(0.1, 0.05)), "the prompt alone takes 110 ms"
    assert not able(1000, 10, Slo(0.12, 0.05), ChunkRule("fixed", 100)), "ten chunks have ten floors"
    assert able(10, 10, Slo(0.2, 0.011)), "10.1 ms and 20 tokens of context"
    assert not able(10, 200, Slo(0.2, 0.011)), "210 tokens of context take 2.1 ms"
    assert not able(2000, 1001, Slo(9.0, 9.0)), "memory"
    assert not feasible(
        dataclasses.replace(profile, limits=dataclasses.replace(limits, context_tokens=1500, kv_tokens=9999)),
        ChunkRule(),
        np.array([1000]),
        np.array([501]),
        Slo(9.0, 9.0),
    )[0], "context"


def test_a_mix_weighs_context_by_how_long_it_is_held() -> None:
    mix = tier_mix(0.02, 1.0, np.array([100, 1000]), np.array([299, 1]))
    assert mix.context == pytest.approx((299 * (100 + 150) + 1 * 1001) / 300)
    assert mix.attention == pytest.approx((100**2 + 1000**2) / 4)


@given(
    profiles(),
    st.lists(mixes(), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.integers(1, 9),
)
@settings(max_examples=40)
def test_no_partition_serves_a_higher_rate(
    profile: Profile, tiers: list[TierMix], shares: list[int], instances: int
) -> None:
    tiers = [
        tier._replace(share=float(share), tpot_s=0.02 * (n + 1))
        for n, (tier, share) in enumerate(zip(tiers, shares, strict=False))
    ]
    rates = [instance_rate(profile, t.prompt, t.output, t.context, t.attention, t.tpot_s) for t in tiers]
    needs = [t.share / rate if rate > 0 else 0.0 for t, rate in zip(tiers, rates, strict=True)]
    sizes = partition_sizes(profile, instances, tiers)
    assert sum(sizes) == instances
    if instances < len(tiers):
        assert sizes == [1] * instances + [0] * (len(tiers) - instances), "the tightest have theirs"
        return

    def rate(partition: Sequence[int]) -> float:
        return min((size / need for size, need in zip(partition, needs, strict=True) if need > 0), default=0.0)

    everyone = itertools.product(range(1, instances + 1), repeat=len(tiers))
    best = max(rate(partition) for partition in everyone if sum(partition) == instances)
    assert rate(sizes) == pytest.approx(best)


# ---------------------------------------------------------------------------------------------------------- in PD


def test_a_split_by_hand() -> None:
    """Floor 10 ms, 0.1 ms a token: 1000 prompt tokens in 110 ms; at 15 ms 50 decodes, seats being no more."""
    tier = TierMix(0.015, 1.0, prompt=1000.0, output=101.0, context=1.0, attention=0.0)
    profile = law(0.01, 1e-4)
    assert prompt_rate(profile, 1000.0, 0.0) == pytest.approx(1 / 0.11)
    assert answer_rate(profile, 101.0, 1.0, 0.015) == pytest.approx(50 / 0.015 / 100)
    assert split_rate(profile, 20, [tier]) == pytest.approx(20 / (0.11 + 0.03))
    needs = split_needs(profile, [tier])
    assert needs is not None
    assert best_split(20, needs.prefill, needs.decode) == 15  # the fluid has 15.7, and 16 leave too few for answers


@settings(max_examples=50, deadline=None)
@given(profiles(), mixes())
def test_prompts_are_computed_no_faster_than_the_best_chunk_allows(profile: Profile, tier: TierMix) -> None:
    chunks = np.arange(1, profile.limits.max_num_batched_tokens + 1)
    token_s = min(profile.iteration_s(int(chunk), 0, 0) / chunk for chunk in chunks)
    seconds = tier.prompt * token_s + profile.per_attention_s * tier.attention
    assert prompt_rate(profile, tier.prompt, tier.attention) == pytest.approx(1 / seconds)


@settings(max_examples=50, deadline=None)
@given(profiles(), mixes(shortest=2), st.floats(0.005, 0.2))
def test_answers_are_made_no_faster_than_the_best_batch_allows(profile: Profile, tier: TierMix, pace: float) -> None:
    most = min(profile.limits.max_num_seqs, profile.limits.kv_tokens / tier.context)
    batches = np.linspace(0.01, 1.0, 400) * most
    rates = [b / s for b in batches if (s := profile.iteration_s(0, b, b * tier.context)) <= pace]
    best = max(rates, default=0.0) / (tier.output - 1)
    assert answer_rate(profile, tier.output, tier.context, pace) >= best * (1 - 1e-9)


@settings(max_examples=50, deadline=None)
@given(profiles(), st.lists(mixes(shortest=2), min_size=1, max_size=3))
def test_no_whole_split_beats_the_fluid_one(profile: Profile, tiers: list[TierMix]) -> None:
    needs = split_needs(profile, tiers)
    if needs is None:
        assert split_rate(profile, 8, tiers) == 0.0
        return
    rates = [min(count / needs.prefill, (8 - count) / needs.decode) for count in range(1, 8)]
    assert max(rates) <= split_rate(profile, 8, tiers) * (1 + 1e-9)
    assert rates[best_split(8, needs.prefill, needs.decode) - 1] == max(rates)
    assert (split_ceiling(profile, tiers) or 1.0) >= 1.0 - 1e-9


def test_a_slow_link_makes_long_prompts_infeasible() -> None:
    """500 prompt tokens take 60 ms, their KV another 50 before token 1 can be made, which is due 20 ms later."""
    profile, prompts, outputs = law(0.01, 1e-4), np.array([500, 500]), np.array([10, 10])
    slo, tight = Slo(0.11, 0.02), Slo(0.09, 0.02)
    assert feasible(profile, DYNAMIC, prompts, outputs, tight).all()
    assert not feasible(profile, DYNAMIC, prompts, outputs, tight, (0.0, 1e-4)).any()
    assert feasible(profile, DYNAMIC, prompts, outputs, slo, (0.0, 1e-4)).all()
