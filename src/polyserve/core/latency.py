"""TTFT and TPOT of a request on an instance in the mean: what baselines predict, as the systems they imitate do.

From how many decode, what they hold and how many prompt tokens are queued. TTFT: the queued tokens and the newcomer's,
cut into the engine's chunks, at what such an iteration takes. TPOT: an iteration of everybody decoding, with as many
prompt tokens as such a batch draws in the long run, which is what a predictor learns that is trained on the answers of
running requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from numba import njit

from polyserve.core.fleet import Books
from polyserve.core.kernels import FIXED, Vector, iteration_s
from polyserve.core.profile import Limits, Profile
from polyserve.core.scaling import Demand
from polyserve.core.types import Role


@dataclass(frozen=True, slots=True)
class Latency:
    """What a request would get on an instance, in the mean."""

    ttft_s: float
    tpot_s: float


@njit(cache=True)
def latency(
    profile: Vector,
    decodes: int,
    kv: float,
    queued: int,
    left: float,
    prompt: int,
    chunk: int,
    mean_prompt: float,
    mean_output: float,
) -> tuple[float, float]:  # pragma: no cover - compiled
    """Seconds to the first token and for each further one, before correction."""
    full, rest = divmod(left + prompt, chunk)
    work = 0.5 * max(mean_prompt, prompt)  # attention per prompt token: half of what lies before it
    ttft_s = full * iteration_s(profile, chunk, decodes, kv, chunk * work)
    if rest > 0:
        ttft_s += iteration_s(profile, rest, decodes, kv, rest * work)
    if decodes + queued > 0:  # an iteration runs, on average half of it still
        running = min(left, chunk)
        ttft_s += 0.5 * iteration_s(profile, running, decodes, kv, running * work)
    batch = decodes + queued + 1
    drawn = min(batch * mean_prompt / mean_output, chunk)
    return ttft_s, iteration_s(profile, drawn, batch, kv + left + prompt, drawn * 0.5 * mean_prompt)


@cache
def compile_latency() -> None:
    """Have the formula compiled, or loaded from its cache, before the first decision waits for it."""
    limits = Limits(kv_tokens=1000, max_num_seqs=2, max_num_batched_tokens=64)
    profile = Profile("", (0.0, 1.0), (0.0, 1.0), 0.0, 0.0, 0.0, limits)
    latency(profile.packed, 1, 1.0, 1, 1.0, 1, 1, 1.0, 1.0)


class Predictor:
    """Asks `latency` of one instance after the other, for one request; in PD of each what it has to do with."""

    def __init__(self, demand: Demand, now: float, prompt_tokens: int) -> None:
        self._now = now
        self._prompt = prompt_tokens
        self._mean_prompt, self._mean_output = demand.lengths

    def of(self, books: Books) -> Latency:
        books.roll(self._now)
        decodes, kv, queued, left = books.tally()
        mean_prompt = 0.0 if books.role is Role.DECODE else self._mean_prompt
        ttft_s, tpot_s = latency(
            books.packed, decodes, kv, queued, left, self._prompt, _chunk(books, decodes, kv),
            mean_prompt, self._mean_output,
        )  # fmt: skip
        scale = books.scale
        if books.role is Role.PREFILL:
            tpot_s = 0.0
        elif books.role is Role.DECODE:
            ttft_s = 0.0
        return Latency(ttft_s * scale, tpot_s * scale)


def _chunk(books: Books, decodes: int, kv: float) -> int:
    """Prompt tokens beside the decodes of one iteration, on average."""
    law = books.law
    most = max(law.tokens - decodes, 1)
    if law.kind == FIXED or math.isinf(books.pace_s) or not decodes:
        return most
    fits = books.profile.largest_chunk(books.pace_s / books.scale, decodes, kv, 0, most)
    return max(min(fits, most), law.floor, 1)
