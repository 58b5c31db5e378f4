"""A profile in words and numbers, for people: what an iteration costs, and how many decodes each pace holds."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

from polyserve.core.profile import Profile

PACES_MS = (10, 15, 20, 30, 50, 100)
CONTEXTS = (256, 1024, 2048, 4096, 8192)


def largest_batch(profile: Profile, pace_s: float, context: int) -> int:
    """Most decodes of that context in an iteration within the pace, in the engine's seats and memory."""
    most = min(profile.limits.max_num_seqs, profile.limits.kv_tokens // context)
    return bisect_right(range(1, most + 1), pace_s, key=lambda n: profile.iteration_s(0, n, n * context))


def words(profile: Profile) -> list[tuple[str, str]]:
    """The law, a line per term: what it is, and how much."""
    p, limits = profile, profile.limits
    slopes = [(b - a) / (y1 - y0) for (y0, y1), (a, b) in zip(pairwise(p.knots), pairwise(p.knot_s), strict=True)]
    mixed = p.mixed_kv_factor > 1 or p.mixed_per_decode_s > 0
    tokens, decodes, kv = (f"{x:,.0f}" for x in p.measured_to)
    return [
        ("floor", f"{p.tightest_pace_s * 1e3:.2f} ms: one short decode alone"),
        ("a batched token", f"{min(slopes) * 1e6:.2f} to {max(slopes) * 1e6:.2f} us, "
         f"{slopes[-1] * 1e6:.2f} us at the end"),
        ("a full batch", f"{p.iteration_s(limits.max_num_batched_tokens, 0, 0) * 1e3:.1f} ms: "
         f"{limits.max_num_batched_tokens:,} prompt tokens, attention aside"),
        ("a decode", f"{p.per_decode_s * 1e6:.2f} us more than its token"),
        ("KV", f"{p.per_kv_token_s * 1e9:.1f} ns a token that decodes read: "
         f"{p.per_kv_token_s * 1e8:.2f} ms for 100,000"),
        ("prefill attention", f"{p.per_attention_s * 1e9:.2f} ns a pair: {p.per_attention_s * 5e5 * 1e3:.2f} ms "
         "for a prompt of 1,000 tokens"),
        ("beside a chunk", f"KV x{p.mixed_kv_factor:.3g}, a decode {p.mixed_per_decode_s * 1e6:.1f} us more"
         if mixed else "decodes cost what they cost alone"),
        ("host overhead", f"{p.host_overhead_s * 1e3:.3g} ms an iteration"),
        ("engine", f"{limits.kv_tokens:,} KV tokens, {limits.max_num_seqs:,} sequences, "
         f"{limits.max_num_batched_tokens:,} batched tokens, blocks of {limits.block_size}"),
        ("measured up to", f"{tokens} tokens, {decodes} decodes, {kv} KV tokens in a batch"),
    ]  # fmt: skip


def batches(profile: Profile) -> list[tuple[str, list[int]]]:
    """By pace, the largest batch at each of `CONTEXTS`; paces below the floor hold none."""
    return [(f"{ms} ms", [largest_batch(profile, ms / 1e3, context) for context in CONTEXTS]) for ms in PACES_MS]


def to_dict(profile: Profile) -> dict[str, object]:
    """The profile and what follows from it, as plain values."""
    held = {f"{ms}": {str(c): largest_batch(profile, ms / 1e3, c) for c in CONTEXTS} for ms in PACES_MS}
    return {
        "profile": profile.to_dict(),
        "floor_s": profile.tightest_pace_s,
        "largest_batch_by_pace_ms_and_context": held,
    }
