"""What a plan keeps of a simulation: per tier what became of its requests, and how many instances it had.

Trials of one fleet under one load, each under its own seed, are pooled into one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyserve.core.types import ChunkRule, TierName
from polyserve.report import TOLERANCE_S, Outcome, tier_key, tier_of
from polyserve.sim.scenario import Prepared, Result

# One seed is enough where misses are this many times the standard deviation above what is allowed (requests that
# miss come in clusters, so that the binomial one is too small), or no more than this share of what is allowed.
CLEARLY_ABOVE, CLEARLY_BELOW = 3.0, 0.5


@dataclass(frozen=True, slots=True)
class Fleet:
    """Some instances of one kind under one policy."""

    profile: str
    instances: int
    policy: str
    chunk: ChunkRule | None = None  # None: the policy's own

    def of(self, instances: int) -> Fleet:
        """So many of the same."""
        return dataclasses.replace(self, instances=instances)


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the requests of one tier; what is missing from `requests` was never answered."""

    requests: int = 0
    attained: int = 0
    refused: int = 0
    late_first: int = 0  # finished, the first token too late
    late_after: int = 0  # finished, the first token in time and a later one not

    def __add__(self, other: Tally) -> Tally:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Tally(*(a + b for a, b in pairs))

    @property
    def attainment(self) -> float | None:
        return self.attained / self.requests if self.requests else None


@dataclass(frozen=True)
class Trial:
    """A fleet under a load, over one seed or several. Rates per second."""

    seeds: tuple[int, ...]
    tiers: dict[TierName, Tally]
    instances: dict[TierName | None, list[int]]  # of each tier at every look; None: of no tier
    utilisation: float  # mean load: the largest of the shares of pace, memory and seats that are taken
    seconds: float  # measured, all seeds together
    tokens: int  # output tokens of the requests that were on time
    simulated: int  # requests, warm-up included
    infeasible: int  # drawn, and put aside since no idle instance of this kind could serve them in time

    @property
    def attained_rate(self) -> float:
        """Requests on time per second."""
        return sum(tally.attained for tally in self.tiers.values()) / self.seconds

    @property
    def token_rate(self) -> float:
        """Output tokens of requests on time per second."""
        return self.tokens / self.seconds

    @property
    def infeasible_share(self) -> float:
        return self.infeasible / max(self.infeasible + self.simulated, 1)

    @property
    def worst(self) -> tuple[TierName, float]:
        """The tier that fares worst, and its attainment; 0 where no tier has a request."""
        shares = [(a, name) for name, tally in self.tiers.items() if (a := tally.attainment) is not None]
        attainment, name = min(shares, default=(0.0, "-"))
        return name, attainment

    def attains(self, target: float) -> bool:
        """Whether every tier has its share of requests on time."""
        return self.worst[1] >= target - 1e-12

    @property
    def interval(self) -> tuple[float, float]:
        """What luck leaves open of the worst tier's attainment: Wilson's 95 % interval.

        Requests that miss come in clusters, so that it is rather too narrow.
        """
        tally = self.tiers.get(self.worst[0], Tally())
        if not tally.requests:
            return 0.0, 1.0
        n, share, z = tally.requests, self.worst[1], 1.96
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(middle - half, 0.0), min(middle + half, 1.0)

    def verdict(self, target: float) -> bool | None:
        """Whether it clearly attains the target, clearly does not, or another seed should be asked (None)."""
        sure = True
        for tally in self.tiers.values():
            allowed = (1 - target) * tally.requests
            misses = tally.requests - tally.attained
            if misses > allowed + CLEARLY_ABOVE * math.sqrt(max(allowed * target, 1.0)):
                return False
            sure = sure and misses <= CLEARLY_BELOW * allowed
        return True if sure else None


def pooled(trials: Sequence[Trial]) -> Trial:
    """Trials of one fleet under one load, as one."""
    instances: dict[TierName | None, list[int]] = defaultdict(list)
    for trial in trials:
        for tier, counts in trial.instances.items():
            instances[tier] += counts
    return Trial(
        seeds=tuple(seed for trial in trials for seed in trial.seeds),
        tiers={name: sum((t.tiers[name] for t in trials), Tally()) for name in trials[0].tiers},
        instances=dict(instances),
        utilisation=float(np.mean([trial.utilisation for trial in trials])),
        seconds=sum(trial.seconds for trial in trials),
        tokens=sum(trial.tokens for trial in trials),
        simulated=sum(trial.simulated for trial in trials),
        infeasible=sum(trial.infeasible for trial in trials),
    )


# ------------------------------------------------------------------------------------------- from a run to a trial


def folded(result: Result, prepared: Prepared, seed: int) -> Trial:
    """What a plan wants to know of a run, over the requests and looks of its window."""
    start, end = prepared.window
    paces = [tier.tpot_s for tier in prepared.spec.tiers]
    counted: dict[TierName, Counter[str]] = {tier_key(pace): Counter() for pace in paces}
    tokens = 0
    for outcome in result.run.outcomes:
        if start <= outcome.arrived_at < end and outcome.slo is not None:
            fate = _fate(outcome)
            counted[tier_key(tier_of(outcome.slo, paces))][fate] += 1
            tokens += outcome.output_tokens if fate == "attained" else 0
    looks = [look for look in result.run.looks if start <= look.at < end]
    return Trial(
        seeds=(seed,),
        tiers={
            name: Tally(c.total(), c["attained"], c["refused"], c["late_first"], c["late_after"])
            for name, c in counted.items()
        },
        instances=_by_tier([(look.at, look.tier) for look in looks], list(counted)),
        utilisation=float(np.mean([look.load for look in looks])) if looks else 0.0,
        seconds=end - start,
        tokens=tokens,
        simulated=len(result.run.outcomes),
        infeasible=prepared.facts.infeasible,
    )


def _fate(outcome: Outcome) -> str:
    if outcome.attained:
        return "attained"
    if outcome.ending != "finished" or outcome.slo is None or outcome.ttft_s is None:
        return outcome.ending
    return "late_first" if outcome.ttft_s > outcome.slo.ttft_s + TOLERANCE_S else "late_after"


def _by_tier(
    looks: Sequence[tuple[float, TierName | None]], tiers: Sequence[TierName]
) -> dict[TierName | None, list[int]]:
    """How many instances each tier, and no tier, had at every look."""
    at: dict[float, Counter[TierName | None]] = defaultdict(Counter)
    for moment, tier in looks:
        at[moment][tier] += 1
    return {tier: [count[tier] for count in at.values()] for tier in (*tiers, None)}
