"""How many prompt tokens ride along in the next iteration before somebody is late.

One rule, used by the simulated engine, the emulator, the forecast and the vLLM scheduler alike. Each iteration takes
all decodes and then prefills in the engine's order:

- `fixed`: up to a token budget, whatever it costs (stock vLLM);
- `dynamic`: as many tokens as the profile allows within the bound: the pace, and never beyond the smallest slack of a
  resident that can still be on time; or, spending banked slack, that slack alone; or, spending it if needed, within
  the pace unless that loses the head of the queue. Without a decode: the engine's
  maximum. Because an iteration jumps when a chunk joins it, chunks below a floor are saved up: when less fits, banked
  slack is spent, and if that does not reach the floor the prefills wait, until waiting would lose the head's deadline.
  Then a chunk is forced: the whole rest of the prompt if that saves the head and costs at most one other, else the
  floor.

`polyserve.core.kernels` has the compiled twins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from polyserve.core.kernels import ALWAYS, DYNAMIC, FITS, FIXED, FORCED, IF_NEEDED, NEVER, WAITS
from polyserve.core.profile import Profile, attention_work
from polyserve.core.types import ChunkBound, Instance


class Verdict(IntEnum):
    """How the chunks of an iteration came about."""

    FITS = FITS
    WAITS = WAITS
    FORCED = FORCED


@dataclass(frozen=True, slots=True)
class ChunkLaw:
    """One instance's chunk rule, resolved against its limits."""

    kind: int  # kernels.DYNAMIC or kernels.FIXED
    tokens: int  # most tokens of one iteration, decodes included
    spend: int = NEVER  # kernels.NEVER, ALWAYS or IF_NEEDED
    floor: int = 64


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt that is not computed yet: `past` tokens are, `remaining` are not."""

    remaining: int
    past: int


SPENDS: dict[ChunkBound, int] = {"pace": NEVER, "slack": ALWAYS, "need": IF_NEEDED}


def chunk_law(instance: Instance, profile: Profile, bound: ChunkBound = "pace", floor: int = 64) -> ChunkLaw:
    """The law that an instance's engine follows; `unknown` is taken for `fixed` at the engine's maximum."""
    most = instance.max_num_batched_tokens or profile.limits.max_num_batched_tokens
    match instance.chunk.kind:
        case "dynamic":
            return ChunkLaw(DYNAMIC, most, SPENDS[bound], floor)
        case "fixed":
            return ChunkLaw(FIXED, min(instance.chunk.tokens or most, most), NEVER, floor)
        case "unknown":
            return ChunkLaw(FIXED, most, NEVER, floor)


def fit_chunks(
    profile: Profile, bound_s: float, budget: int, decodes: float, kv: float, queue: Sequence[Prefill]
) -> list[int]:
    """Chunks for the prefills, in order, while the iteration keeps within `bound_s` and `budget` tokens."""
    chunks = [0] * len(queue)
    total, work = 0, 0.0
    for i, prefill in enumerate(queue):
        room = min(prefill.remaining, budget - total)
        chunk = max(
            (
                c
                for c in range(1, room + 1)
                if math.isinf(bound_s)
                or profile.iteration_s(total + c, decodes, kv, work + attention_work(c, prefill.past)) <= bound_s
            ),
            default=0,
        )
        if chunk == 0:
            break
        chunks[i] = chunk
        total += chunk
        work += attention_work(chunk, prefill.past)
        if chunk < prefill.remaining:
            break
    return chunks


def is_pressed(bound_s: float, chunk: int, head: Prefill, slack_s: float) -> bool:
    """Whether the first of the queue would be late at one such chunk every `bound_s`; not if it is late already."""
    return 0 < chunk < head.remaining and 0.0 < slack_s < bound_s * head.remaining / chunk


def plan_prefill(
    profile: Profile,
    law: ChunkLaw,
    pace_s: float,
    kv: float,
    slacks_s: Sequence[float],
    head_slack_s: float,
    queue: Sequence[Prefill],
) -> tuple[list[int], Verdict]:
    """The prefill chunks of the next iteration, and how they came about.

    `slacks_s` has one entry per decode: seconds until its next token is due (inf without a deadline). `head_slack_s`:
    seconds until the first prefill's first token is due. `kv`: tokens that the decodes read.
    """
    decodes = len(slacks_s)
    none = [0] * len(queue)
    budget = law.tokens - decodes
    if not queue or budget <= 0:
        return none, Verdict.WAITS if queue else Verdict.FITS
    if law.kind == FIXED or decodes == 0:
        return fit_chunks(profile, math.inf, budget, decodes, kv, queue), Verdict.FITS
    alone = profile.iteration_s(0, decodes, kv)
    banked = min((s for s in slacks_s if s >= alone), default=math.inf)
    enough = min(law.floor, queue[0].remaining)
    for bound in (banked if law.spend == ALWAYS else min(pace_s, banked), banked):
        chunks = fit_chunks(profile, bound, budget, decodes, kv, queue)
        spent = banked - pace_s
        if law.spend == IF_NEEDED and spent > bound and is_pressed(bound, chunks[0], queue[0], head_slack_s):
            chunks = fit_chunks(profile, spent, budget, decodes, kv, queue)
        if sum(chunks) >= enough:
            return chunks, Verdict.FITS
    whole = min(queue[0].remaining, budget)
    whole_s = profile.iteration_s(whole, decodes, kv, attention_work(whole, queue[0].past))
    if head_slack_s > whole_s + alone:
        return none, Verdict.WAITS
    chunk = min(law.floor, whole)
    saves = head_slack_s >= whole_s and whole == queue[0].remaining
    if saves and sum(alone <= s < whole_s for s in slacks_s) <= 1:
        chunk = whole
    return [chunk, *none[1:]], Verdict.FORCED
