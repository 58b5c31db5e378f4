"""What no scheduler can beat: an empty instance for one request, and the fluid optimum for a fleet.

The fluid optimum holds the mean iteration, not each one, within a tier's pace. On one instance every
iteration carries b decodes, and a share f of them also carries c = b * P / (D * f) prompt tokens (P, D: mean
prompt and output), so that prompts enter as fast as answers leave. The mean iteration is
`m = f * T_mixed + (1 - f) * T_decode`, the rate `b / (D * m)`, and the optimum is over b and f with m within
the pace and b, b + c and b * C (C: mean context) within the engine's limits.

For a given b the cost of prefill per prompt token is, between two knots of the profile, linear over linear in
c; so the best c is at a knot or at an end, and no search over f is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyserve.core.profile import Limits, Profile
from polyserve.core.types import ChunkRule, Slo

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class TierMix(NamedTuple):
    """The requests of one tier as the fluid sees them: means, and the tier's share of all requests."""

    tpot_s: float
    share: float
    prompt: float  # mean prompt tokens, P
    output: float  # mean output tokens, D
    context: float  # mean context of a resident decode, weighted by output length, C
    attention: float  # mean attention work of a prompt, A = P * P / 2


def tier_mix(tpot_s: float, share: float, prompts: Ints, outputs: Ints) -> TierMix:
    """The means of requests with these lengths, of which there is at least one."""
    prompt, output = prompts.astype(float), outputs.astype(float)
    context = float((output * (prompt + (output + 1) / 2)).sum() / output.sum())
    return TierMix(tpot_s, share, float(prompt.mean()), float(output.mean()), context, float((prompt**2).mean() / 2))


# -------------------------------------------------------------------------------------- one request, alone


def largest_solo_chunk(limits: Limits, chunk: ChunkRule) -> int:
    """Prompt tokens one iteration of an otherwise empty instance takes: all it can, or its fixed budget."""
    most = limits.max_num_batched_tokens
    return min(chunk.tokens, most) if chunk.kind == "fixed" else most


def solo_ttft_s(profile: Profile, chunk: ChunkRule, prompts: Ints) -> Floats:
    """Seconds until the first token on an empty instance, for each prompt length."""
    size = largest_solo_chunk(profile.limits, chunk)
    whole, rest = np.divmod(prompts, size)
    full_s, rest_s = _token_s(profile, np.array([float(size)]))[0], _token_s(profile, rest.astype(float))
    work = prompts.astype(float) ** 2 / 2  # summed over chunks, however they are cut
    seconds: Floats = whole * full_s + np.where(rest > 0, rest_s, 0.0) + profile.per_attention_s * work
    return seconds


def feasible(
    profile: Profile,
    chunk: ChunkRule,
    prompts: Ints,
    outputs: Ints,
    slo: Slo,
    link: tuple[float, float] | None = None,
) -> Bools:
    """Which requests an empty instance would serve on time to the last token, within memory and context.

    In PD `link` is what a hand-over of KV takes, to begin with and per token: it comes before the second token.
    """
    last = prompts + outputs
    limits = profile.limits
    decode_s = _decode_s(profile, np.ones(1), last.astype(float))
    first_s = solo_ttft_s(profile, chunk, prompts)
    if link is not None:
        first_s = first_s + np.maximum(link[0] + link[1] * prompts + decode_s - slo.tpot_s, 0.0)
    fits: Bools = (
        (first_s <= slo.ttft_s) & (decode_s <= slo.tpot_s) & (last <= min(limits.kv_tokens, limits.context_tokens))
    )
    return fits


def _token_s(profile: Profile, tokens: Floats) -> Floats:
    """The part of an iteration that depends on its token count alone, host overhead included."""
    knots, values = np.asarray(profile.knots), np.asarray(profile.knot_s)
    beyond = np.maximum(tokens - knots[-1], 0.0) * (values[-1] - values[-2]) / (knots[-1] - knots[-2])
    seconds: Floats = np.interp(tokens, knots, values) + beyond + profile.host_overhead_s
    return seconds


def _decode_s(profile: Profile, decodes: Floats, kv: Floats) -> Floats:
    seconds: Floats = _token_s(profile, decodes) + profile.per_decode_s * decodes + profile.per_kv_token_s * kv
    return seconds


def _mixed_s(profile: Profile, chunk: Floats, decodes: Floats, kv: Floats, attention: Floats) -> Floats:
    seconds: Floats = (
        _token_s(profile, chunk + decodes)
        + (profile.per_decode_s + profile.mixed_per_decode_s) * decodes
        + profile.per_kv_token_s * profile.mixed_kv_factor * kv
        + profile.per_attention_s * attention
    )
    return seconds


# ----------------------------------------------------------------------------------------------- the fluid


def instance_rate(
    profile: Profile,
    prompt: float,
    output: float,
    context: float,
    attention: float,
    tpot_s: float,
    *,
    strict: bool = False,
    limits: Limits | None = None,
) -> float:
    """Requests per second that one instance can serve at best at that pace; 0 when it cannot hold it at all.

    The means are `TierMix`'s. `strict` also asks each single iteration to stay within the pace.
    """
    limits = limits or profile.limits
    b = _batches(limits, prompt, output, context)
    least, most = b * prompt / output, limits.max_num_batched_tokens - b  # as f is at most 1, c is at least c(1)
    kv, work = b * context, attention / prompt
    pure = _decode_s(profile, b, kv)
    every = _mixed_s(profile, least, b, kv, work * least)  # a chunk in every iteration: the shortest mixed one
    chunks = [np.asarray(profile.knots)[None, :] - b[:, None], least[:, None], most[:, None]]
    if strict:
        most = _widest(profile, b, most, kv, work, tpot_s)
        chunks.append(most[:, None])
    c = np.clip(np.concatenate(chunks, axis=1), least[:, None], np.maximum(least, most)[:, None])
    mixed = _mixed_s(profile, c, b[:, None], kv[:, None], work * c)
    mean = (pure[:, None] + least[:, None] / c * (mixed - pure[:, None])).min(axis=1)
    return _best_rate(b, mean, every if strict else mean, tpot_s) / output


def _batches(limits: Limits, prompt: float, output: float, context: float) -> Floats:
    """Batch sizes to look at, rising: fixed by the limits alone, so that a looser pace can only find more."""
    most = min(
        float(limits.max_num_seqs),
        limits.kv_tokens / context,
        limits.max_num_batched_tokens / (1.0 + prompt / output),  # c >= b * P / D, as f is at most 1
    )
    grid = np.concatenate([np.geomspace(most / 4096, most, 129), np.arange(1.0, min(33.0, most))])
    return np.unique(grid)


def _widest(
    profile: Profile, decodes: Floats, most: Floats, kv: Floats, work_per_token: float, bound_s: float
) -> Floats:
    """The largest chunk beside each batch whose iteration stays within the bound, by bisection."""
    low, high = np.zeros_like(decodes), most
    for _ in range(40):
        middle = (low + high) / 2
        within = _mixed_s(profile, middle, decodes, kv, work_per_token * middle) <= bound_s
        low, high = np.where(within, middle, low), np.where(within, high, middle)
    return low


def _best_rate(decodes: Floats, mean_s: Floats, held_s: Floats, bound_s: float) -> float:
    """The largest decodes / mean with `held_s` within the bound, all linear between neighbours in the grid.

    On a straight piece the ratio is monotone, so the best is at a grid point or where `held_s` meets the bound.
    """
    within = held_s <= bound_s
    best = float((decodes[within] / mean_s[within]).max()) if within.any() else 0.0
    for i in np.flatnonzero(within[1:] != within[:-1]):
        share = (bound_s - held_s[i]) / (held_s[i + 1] - held_s[i])
        crossing = float(decodes[i] + share * (decodes[i + 1] - decodes[i]))
        best = max(best, crossing / bound_s)
    return best


def prompt_rate(profile: Profile, prompt: float, attention: float) -> float:
    """Prompts per second that one instance can compute at best where it does nothing else.

    Between two knots the cost of a token is linear over linear in the chunk, so the best chunk is at a knot or an end.
    """
    most = float(profile.limits.max_num_batched_tokens)
    chunks = np.array([*(c for c in profile.knots if 1.0 < c < most), 1.0, most])
    token_s = float((_token_s(profile, chunks) / chunks).min())
    return 1.0 / (prompt * token_s + profile.per_attention_s * attention)


def answer_rate(profile: Profile, output: float, context: float, tpot_s: float) -> float:
    """Answers per second, less their first tokens, that one instance can make at best where prompts are none of its.

    0 when it cannot hold the pace; inf when there is nothing to make.
    """
    if output <= 1.0:
        return np.inf
    b = _batches(profile.limits, 0.0, 1.0, context)
    seconds = _decode_s(profile, b, b * context)
    return _best_rate(b, seconds, seconds, tpot_s) / (output - 1.0)


class SplitNeeds(NamedTuple):
    """Instances that one request per second, of all tiers together, occupies in PD."""

    prefill: float
    decode: float


def split_needs(profile: Profile, tiers: Sequence[TierMix], paces: Sequence[float] | None = None) -> SplitNeeds | None:
    """What the mean request of these tiers needs of each kind; None where a pace is never held."""
    total, prefill, decode = sum(t.share for t in tiers), 0.0, 0.0
    for tier, pace in zip(tiers, paces or [t.tpot_s for t in tiers], strict=True):
        if tier.share <= 0.0:
            continue
        rate = answer_rate(profile, tier.output, tier.context, pace)
        if rate <= 0.0:
            return None
        prefill += tier.share / total / prompt_rate(profile, tier.prompt, tier.attention)
        decode += tier.share / total / rate
    return SplitNeeds(prefill, decode)


def split_rate(
    profile: Profile, instances: float, tiers: Sequence[TierMix], paces: Sequence[float] | None = None
) -> float:
    """`optimal_rate` in PD: the best over all splits into instances for prompts and for answers, parts of one too."""
    needs = split_needs(profile, tiers, paces)
    return instances / sum(needs) if needs is not None and sum(needs) > 0.0 else 0.0


def split_ceiling(profile: Profile, tiers: Sequence[TierMix]) -> float | None:
    """`ceiling` in PD."""
    tightest = min(t.tpot_s for t in tiers if t.share > 0)
    pooled = split_rate(profile, 1.0, tiers, [tightest] * len(tiers))
    return split_rate(profile, 1.0, tiers) / pooled if pooled > 0 else None


def best_split(instances: int, prefill: float, decode: float) -> int:
    """Whole instances for prompts, of at least two in all, where loads stand to each other as given."""
    return max(range(1, instances), key=lambda count: (min(count * decode, (instances - count) * prefill), -count))


def optimal_rate(profile: Profile, instances: float, tiers: Sequence[TierMix], *, strict: bool = False) -> float:
    """Requests per second of all tiers together that the fleet can serve at best, tier shares as given."""
    return _fleet_rate(profile, instances, tiers, [t.tpot_s for t in tiers], strict)


def ceiling(profile: Profile, tiers: Sequence[TierMix], *, strict: bool = False) -> float | None:
    """What binning can win: the optimum over the same bound with everybody at the tightest pace, at least 1.

    None when somebody cannot be served at that pace at all.
    """
    tightest = min(t.tpot_s for t in tiers if t.share > 0)
    pooled = _fleet_rate(profile, 1.0, tiers, [tightest] * len(tiers), strict)
    return optimal_rate(profile, 1.0, tiers, strict=strict) / pooled if pooled > 0 else None


def _fleet_rate(
    profile: Profile, instances: float, tiers: Sequence[TierMix], paces: Sequence[float], strict: bool
) -> float:
    total = sum(t.share for t in tiers)
    need = 0.0  # instances for one request per second
    for tier, pace in zip(tiers, paces, strict=True):
        if tier.share <= 0:
            continue
        rate = instance_rate(profile, tier.prompt, tier.output, tier.context, tier.attention, pace, strict=strict)
        if rate <= 0:
            return 0.0
        need += tier.share / total / rate
    return instances / need if need > 0 else 0.0


def partition_sizes(profile: Profile, instances: int, tiers: Sequence[TierMix]) -> list[int]:
    """Whole instances for each tier, as given, of the partition that serves the highest rate where nobody shares.

    Every tier gets one, then always the one that would be full first. With fewer instances than tiers the tightest
    have one each and the others none: who is looser can be served by a tighter tier's, not the reverse.
    """
    tightest = sorted(range(len(tiers)), key=lambda i: tiers[i].tpot_s)
    sizes = [0] * len(tiers)
    for i in tightest[:instances]:
        sizes[i] = 1
    needs = [_fleet_need(profile, tier) for tier in tiers]
    for _ in range(instances - sum(sizes)):
        fullest = max(range(len(tiers)), key=lambda i: (needs[i] / sizes[i], -i))
        sizes[fullest] += 1
    return sizes


def _fleet_need(profile: Profile, tier: TierMix) -> float:
    """Instances that a tier occupies per request per second of all; 0 without requests or at a pace never held."""
    rate = instance_rate(profile, tier.prompt, tier.output, tier.context, tier.attention, tier.tpot_s)
    return tier.share / rate if rate > 0.0 and tier.share > 0.0 else 0.0
