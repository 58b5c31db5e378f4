"""Scores as folds over what became of each request: the simulator's truth, or what a live client saw.

A request attains its SLO when it finished and every token came by `arrived + ttft + i * tpot`. Whoever
watches the tokens keeps the worst lateness of a request in its `Outcome`; everything below is arithmetic on
outcomes. Scored are the requests that arrive in a window, so that a fleet can be warm first. Refused,
failed and unfinished requests are misses; requests whose client left, and best-effort requests, are counted
apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from polyserve.core.types import InstanceId, RequestId, Slo

# Half a microsecond, the resolution of every time: a token due and made at the same one is on time.
TOLERANCE_S = 5e-7

Ending = Literal["finished", "refused", "failed", "cancelled", "unfinished"]


@dataclass(slots=True)
class Outcome:
    """What became of one request, as its client saw it. Times in seconds on the clock of `arrived_at`."""

    request: RequestId
    arrived_at: float
    prompt_tokens: int
    slo: Slo | None
    ending: Ending = "unfinished"
    code: str | None = None  # of a refusal or failure
    first_at: float | None = None
    last_at: float | None = None
    output_tokens: int = 0  # delivered so far
    late_s: float = -math.inf  # worst lateness of any token delivered
    instance: InstanceId | None = None  # the last that served it
    promoted: bool = False
    preemptions: int = 0

    def delivered(self, times: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Take in the next tokens, one time each, ascending."""
        if not len(times):
            return
        if self.slo is not None:
            due = self.slo.due_at(self.arrived_at, self.output_tokens)
            lateness = np.asarray(times) - np.arange(len(times)) * self.slo.tpot_s
            self.late_s = max(self.late_s, float(lateness.max()) - due)
        if self.first_at is None:
            self.first_at = float(times[0])
        self.last_at = float(times[-1])
        self.output_tokens += len(times)

    @property
    def attained(self) -> bool:
        return self.ending == "finished" and self.late_s <= TOLERANCE_S

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.arrived_at

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first."""
        if self.first_at is None or self.last_at is None or self.output_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.output_tokens - 1)


# ---------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a sample in seconds; None when it was empty."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None

    @staticmethod
    def of(sample: Iterable[float | None]) -> Percentiles:
        values = [v for v in sample if v is not None]
        return Percentiles(*map(float, np.percentile(values, (50, 90, 99)))) if values else Percentiles()


@dataclass(frozen=True, slots=True)
class Share:
    """Some requests and how many of them attained their SLO."""

    requests: int
    attained: int

    @property
    def attainment(self) -> float | None:
        return self.attained / self.requests if self.requests else None

    @staticmethod
    def of(outcomes: Sequence[Outcome]) -> Share:
        return Share(len(outcomes), sum(o.attained for o in outcomes))


@dataclass(frozen=True, slots=True)
class TierScore:
    """How the requests of one pace fared."""

    share: Share
    refused: int
    failed: int
    unfinished: int
    promoted: int
    ttft_s: Percentiles
    tpot_s: Percentiles
    late_s: Percentiles  # worst lateness per finished request; negative: early


@dataclass(frozen=True, slots=True)
class Quartile:
    """A quarter of the requests by prompt length, shortest first: refusal sheds the longest by itself."""

    prompt_tokens_to: int
    share: Share


@dataclass(frozen=True, slots=True)
class Score:
    """The requests of a window; `tiers` by TPOT in ms."""

    window: tuple[float, float]
    overall: TierScore
    tiers: dict[str, TierScore]
    quartiles: list[Quartile]
    cancelled: int
    best_effort: int
    best_effort_finished: int

    def _rate(self, requests: int) -> float | None:
        seconds = self.window[1] - self.window[0]
        return requests / seconds if 0 < seconds < math.inf else None

    @property
    def offered_rate(self) -> float | None:
        """Requests with an SLO per second."""
        return self._rate(self.overall.share.requests)

    @property
    def attained_rate(self) -> float | None:
        return self._rate(self.overall.share.attained)

    @property
    def worst_tier(self) -> float | None:
        return min((a for t in self.tiers.values() if (a := t.share.attainment) is not None), default=None)


def tier_key(tpot_s: float) -> str:
    """A tier's name in reports: its TPOT in milliseconds."""
    return f"{tpot_s * 1e3:g}"


def tier_of(slo: Slo, paces_s: Sequence[float]) -> float:
    """The tier that an SLO falls into: the loosest that is not looser, else the tightest."""
    held = [pace for pace in paces_s if pace <= slo.tpot_s + TOLERANCE_S]
    return max(held) if held else min(paces_s)


def score(outcomes: Iterable[Outcome], window: tuple[float, float], paces_s: Sequence[float]) -> Score:
    """Fold the outcomes of requests that arrived in `window`, its end excluded, for tiers of these TPOTs."""
    inside = [o for o in outcomes if window[0] <= o.arrived_at < window[1]]
    scored = [o for o in inside if o.slo is not None and o.ending != "cancelled"]
    best_effort = [o for o in inside if o.slo is None and o.ending != "cancelled"]
    by_tier: dict[float, list[Outcome]] = {pace: [] for pace in sorted(paces_s)}
    for outcome in scored:
        assert outcome.slo is not None
        by_tier[tier_of(outcome.slo, paces_s)].append(outcome)
    return Score(
        window=window,
        overall=_tier_score(scored),
        tiers={tier_key(pace): _tier_score(members) for pace, members in by_tier.items()},
        quartiles=_quartiles(scored),
        cancelled=sum(o.ending == "cancelled" for o in inside),
        best_effort=len(best_effort),
        best_effort_finished=sum(o.ending == "finished" for o in best_effort),
    )


def _tier_score(outcomes: Sequence[Outcome]) -> TierScore:
    endings = [o.ending for o in outcomes]
    return TierScore(
        share=Share.of(outcomes),
        refused=endings.count("refused"),
        failed=endings.count("failed"),
        unfinished=endings.count("unfinished"),
        promoted=sum(o.promoted for o in outcomes),
        ttft_s=Percentiles.of(o.ttft_s for o in outcomes),
        tpot_s=Percentiles.of(o.tpot_s for o in outcomes),
        late_s=Percentiles.of(o.late_s for o in outcomes if o.ending == "finished"),
    )


def _quartiles(outcomes: Sequence[Outcome]) -> list[Quartile]:
    ordered = sorted(outcomes, key=lambda o: (o.prompt_tokens, o.request))
    cuts = [len(ordered) * i // 4 for i in range(5)]
    quarters = [ordered[a:b] for a, b in pairwise(cuts) if b > a]
    return [Quartile(quarter[-1].prompt_tokens, Share.of(quarter)) for quarter in quarters]


# ---------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True, slots=True)
class Facts:
    """What a report says beside the score: the set-up and the fleet's counters. None: nobody measured it."""

    policy: str
    profile: str | None = None
    trace: str | None = None
    seed: int | None = None
    instances: int | None = None
    settings: dict[str, object] = field(default_factory=dict)  # those that differ from the policy's own
    infeasible: int = 0  # left out beforehand: no SLO that an idle instance could meet
    optimal_rate: float | None = None
    strict_optimal_rate: float | None = None
    ceiling: float | None = None  # optimal over that of one ideal pool at the tightest pace
    other_bounds: dict[str, float | None] = field(default_factory=dict)  # the optimum under sibling profiles
    preemptions: int | None = None
    forced_chunks: int | None = None
    instance_seconds: float | None = None
    iterations: int | None = None
    simulated_requests: int | None = None  # warm-up included
    wall_s: float | None = None
    steps: int | None = None
    decision_us: dict[str, float] = field(default_factory=dict)  # mean and p99 of one step
    notes: list[str] = field(default_factory=list)


def to_dict(result: Score, facts: Facts) -> dict[str, Any]:
    """The report as JSON values."""
    overall = result.overall
    tiers = result.tiers
    share_of_optimal = None
    if facts.optimal_rate and result.attained_rate is not None:
        share_of_optimal = result.attained_rate / facts.optimal_rate
    stated = dataclasses.asdict(facts)
    return {
        **{name: stated[name] for name in ("policy", "profile", "trace", "seed", "instances", "settings")},
        "window_s": [t if math.isfinite(t) else None for t in result.window],
        "attainment": {
            "overall": overall.share.attainment,
            "worst_tier": result.worst_tier,
            "tiers": {key: tier.share.attainment for key, tier in tiers.items()},
            "prompt_quartiles": [
                {
                    "prompt_tokens_to": quartile.prompt_tokens_to,
                    "requests": quartile.share.requests,
                    "attainment": quartile.share.attainment,
                }
                for quartile in result.quartiles
            ],
        },
        "offered_rate": result.offered_rate,
        "attained_rate": result.attained_rate,
        "share_of_optimal": share_of_optimal,
        "requests": overall.share.requests,
        "refused": overall.refused,
        "failed": overall.failed,
        "unfinished": overall.unfinished,
        "promoted": overall.promoted,
        "cancelled": result.cancelled,
        "best_effort": {"requests": result.best_effort, "finished": result.best_effort_finished},
        "by_tier": {
            key: {
                "requests": tier.share.requests,
                "attained": tier.share.attained,
                "refused": tier.refused,
                "failed": tier.failed,
                "unfinished": tier.unfinished,
                "promoted": tier.promoted,
            }
            for key, tier in tiers.items()
        },
        **{
            name: {key: dataclasses.asdict(getattr(tier, name)) for key, tier in tiers.items()}
            for name in ("ttft_s", "tpot_s", "late_s")
        },
        **{
            name: value
            for name, value in stated.items()
            if name not in ("policy", "profile", "trace", "seed", "instances", "settings")
        },
    }


def table(result: Score, facts: Facts, title: str | None = None) -> Group:
    """The report for people: a table per tier, then what holds for the whole run."""
    rows = Table(title=title or _title(facts), title_justify="left", title_style="bold")
    rows.add_column("TPOT ms", justify="right")
    for heading in ("requests", "attained", "refused", "unfinished", "promoted"):
        rows.add_column(heading, justify="right")
    for heading in ("TTFT ms", "TPOT ms"):
        rows.add_column(f"{heading}\np50 / p90 / p99", justify="right", no_wrap=True)
    for key, tier in result.tiers.items():
        rows.add_row(key, *_cells(tier))
    rows.add_section()
    rows.add_row("all", *_cells(result.overall))
    return Group(rows, *(Text(line) for line in _lines(result, facts)))


def _title(facts: Facts) -> str:
    fleet = f"{facts.instances} x {facts.profile}" if facts.instances and facts.profile else facts.profile
    return ", ".join(str(part) for part in (facts.policy, fleet, facts.trace) if part)


def _cells(tier: TierScore) -> list[str]:
    return [
        str(tier.share.requests),
        _percent(tier.share.attainment),
        str(tier.refused + tier.failed),
        str(tier.unfinished),
        str(tier.promoted),
        " / ".join(_ms(value, 0) for value in dataclasses.astuple(tier.ttft_s)),
        " / ".join(_ms(value, 1) for value in dataclasses.astuple(tier.tpot_s)),
    ]


def _lines(result: Score, facts: Facts) -> Iterable[str]:
    rate = f"offered {_number(result.offered_rate)}/s, attained {_number(result.attained_rate)}/s"
    if facts.optimal_rate and result.attained_rate is not None:
        rate += f" = {_percent(result.attained_rate / facts.optimal_rate)} of optimal"
    if facts.optimal_rate is not None:
        rate += f" {_number(facts.optimal_rate)}/s (ceiling of binning {_number(facts.ceiling)}x)"
    for name, value in facts.other_bounds.items():
        rate += f"; optimal with {name} {_number(value)}/s"
    yield rate
    if result.quartiles:
        quartiles = ", ".join(
            f"to {q.prompt_tokens_to} tokens {_percent(q.share.attainment)}" for q in result.quartiles
        )
        yield f"attained by prompt length: {quartiles}"
    counted = {
        "infeasible": facts.infeasible,
        "cancelled": result.cancelled or None,
        "best effort": result.best_effort or None,
        "preemptions": facts.preemptions,
        "forced chunks": facts.forced_chunks,
        "instance-seconds": facts.instance_seconds and round(facts.instance_seconds),
        "iterations": facts.iterations,
    }
    yield ", ".join(f"{name} {value}" for name, value in counted.items() if value is not None)
    if facts.wall_s:
        speed = f"took {facts.wall_s:.1f} s"
        if facts.simulated_requests:
            speed += f", {facts.simulated_requests / facts.wall_s:,.0f} requests/s simulated"
        if facts.decision_us:
            speed += ", a step " + ", ".join(f"{k} {v:.0f} us" for k, v in facts.decision_us.items())
        yield speed
    yield from facts.notes


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _ms(seconds: float | None, digits: int) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.{digits}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
