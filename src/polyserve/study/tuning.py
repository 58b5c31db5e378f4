"""What an operator would tune before comparing: each baseline's knobs, on one seed at one load, a few values each.

Knobs are tuned one after the other, each at the best of those before it, at most six runs altogether. What is best
attains most in its worst tier, then overall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from polyserve.core import bound
from polyserve.core.settings import engine_wish, policy
from polyserve.study.ground import Case
from polyserve.study.settings import Entry, Pairs

# Fixed chunks that are tried, where nothing else is tuned, beside another knob, and where time is short; those beyond
# the engine's limit come down to it.
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
FEWER_CHUNKS = (512, 1024, 2048, 8192)
QUICK_CHUNKS = (512, 2048, 8192)
BESIDE_DYNAMIC = (512, 2048)


class Choice(NamedTuple):
    """How an entry is run."""

    chunk: int | None  # fixed; None: the policy's own rule
    values: Pairs = ()


Knob = Callable[[Case, Entry, bool], list[object]]


def stages(case: Case, entry: Entry, quick: bool) -> list[tuple[str, list[object]]]:
    """Each knob with the values to try, in the order in which they are tuned."""
    tunes = entry.tunes
    if case.fleet.disaggregated and entry.role == "baseline":
        tunes = ("prefill_instances", *tunes)
    return [(name, KNOBS[name](case, entry, quick)) for name in tunes if name in KNOBS]


def tried(best: Choice, knob: str, value: object) -> Choice:
    """The best so far with one knob turned."""
    if knob == "chunk":
        assert value is None or isinstance(value, int)
        return Choice(value, best.values)
    return Choice(best.chunk, (*((key, old) for key, old in best.values if key != knob), (knob, value)))


def _chunks(case: Case, entry: Entry, quick: bool) -> list[object]:
    """Fixed chunks; where engines size chunks themselves, that first and few fixed ones beside it."""
    limit = case.limits.max_num_batched_tokens
    if entry.role != "variant" and engine_wish(policy(entry.policy).router).chunk == "dynamic":
        return [None, *sorted({min(chunk, limit) for chunk in BESIDE_DYNAMIC[quick:]})]
    values = QUICK_CHUNKS if quick else CHUNKS if len(entry.tunes) == 1 else FEWER_CHUNKS
    return [*sorted({min(chunk, limit) for chunk in values})]


def _sizes(case: Case, entry: Entry, quick: bool) -> list[object]:
    """Partitions, besides the one that serves most in the fluid (none given): tight tiers rounded up."""
    return ["", ",".join(map(str, tight_up(needed(case))))]


def _splits(case: Case, entry: Entry, quick: bool) -> list[object]:
    """Instances for prompts: as many as serve most in the fluid, and one fewer and one more."""
    instances = case.fleet.instances
    needs = bound.split_needs(case.true(case.fleet.profile), case.mixes(case.paces))
    if needs is None:
        return [instances // 2]
    best = bound.best_split(instances, needs.prefill, needs.decode)
    return [count for count in (best, best - 1, best + 1) if 0 < count < instances]


KNOBS: dict[str, Knob] = {
    "prefill_instances": _splits,
    "chunk": _chunks,
    "chunk_bound": lambda case, entry, quick: ["slack", "need"],
    "chunk_floor_tokens": lambda case, entry, quick: [64, 256] if quick else [64, 128, 256, 512],
    "balance": lambda case, entry, quick: ["least-requests", "round-robin"],
    "static_sizes": _sizes,
    "slo_buffer": lambda case, entry, quick: [1.0, 0.85] if quick else [1.0, 0.9, 0.75],
}


def needed(case: Case) -> list[float]:
    """Instances that each tier needs at the optimum, tightest first; the mean of both mixes where shares change."""
    both = [_needs_of(case, shares) for shares in (case.paces, case.world.later) if shares]
    return [sum(needs) / len(both) for needs in zip(*both, strict=True)]


def _needs_of(case: Case, shares: tuple[tuple[float, float], ...]) -> list[float]:
    true, mixes = case.true(case.fleet.profile), case.mixes(shares)
    each = [m.share / bound.instance_rate(true, m.prompt, m.output, m.context, m.attention, m.tpot_s) for m in mixes]
    return [need * case.fleet.instances / sum(each) for need in each]


def tight_up(needs: Sequence[float]) -> list[int]:
    """Cumulative ceilings from the tightest, so that loose tiers get what is left."""
    total = round(sum(needs))
    ends = [min(math.ceil(upto - 1e-9), total) for upto in accumulate(needs)]
    ends[-1] = total
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
