"""What PolyServe would have done, beside what an incumbent rule did: for people, for programs, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from polyserve.core.controller import Controller
from polyserve.core.observing import Disagreement, Observed, OverLeastRequests, OverRoundRobin, Tally
from polyserve.serve import wording
from polyserve.serve.audit import Audit
from polyserve.serve.plan import Plan

INCUMBENTS = {rule.name: rule for rule in (OverRoundRobin, OverLeastRequests)}
VERDICTS = ("agreed", "elsewhere", "placed_later", "refused")


def watching(plan: Plan, incumbent: str) -> Plan:
    """The plan with an incumbent rule in PolyServe's place: nothing is refused, paced, queued, started or stopped."""
    rule = INCUMBENTS[incumbent]
    names = {
        "router": f"{rule.__module__}:{rule.__name__}",
        "max_instances": 0,
        "queue_limit": 0,
        "queue_timeout_s": 0.0,
    }
    models = []
    for model in plan.models:
        told = model.configured
        tiers = tuple(replace(tier, on_late=None) for tier in told.tiers)
        settings = told.settings | rule.settings | names
        models.append(replace(model, configured=replace(told, settings=settings, tiers=tiers, tenants=())))
    return replace(plan, models=tuple(models))


def observed(brain: Controller) -> Observed | None:
    """Who watches, where somebody does."""
    return brain.router if isinstance(brain.router, Observed) else None


def told(shadow: Observed, audit: Audit, limit: int) -> dict[str, Any]:
    """Counts per tier, and the last requests that would have gone elsewhere."""
    latest = list(shadow.disagreements)[-limit:][::-1] if limit else []
    return {
        "incumbent": shadow.name,
        "tiers": {name: _tier(name, tally, audit) for name, tally in shadow.tallies.items()},
        "disagreements": [_disagreement(one) for one in latest],
    }


def _tier(name: str, tally: Tally, audit: Audit) -> dict[str, Any]:
    record = audit.tiers.get(name)
    return {
        "requests": tally.requests,
        **{verdict: getattr(tally, verdict) for verdict in VERDICTS},
        "foreseen_in_time_as_routed": _share(tally.in_time, tally.requests),
        "foreseen_in_time_by_polyserve": _share(tally.own_in_time, tally.requests),
        "attained_as_served": None if record is None or record.coverage is None else round(record.coverage, 4),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _disagreement(one: Disagreement) -> dict[str, Any]:
    there = wording.fits(one.forecast)
    own = "it would have waited" if one.own is None else f"PolyServe would have sent it to {one.own}"
    return {
        "at": one.at,
        "request": one.request,
        "tier": one.tier,
        "went_to": one.went_to,
        "own": one.own,
        "why": f"went to {one.went_to}, where {there}; {own}",
    }


def summary(model: str, shadow: Observed, audit: Audit) -> list[str]:
    """What there is to say at the end, a line a tier."""
    lines = [f"{model}: routed by {shadow.name}; PolyServe would have, by its forecast:"]
    for name, tally in shadow.tallies.items():
        if not tally.requests:
            continue
        shares = [_percent(tally.in_time, tally.requests), _percent(tally.own_in_time, tally.requests)]
        record = audit.tiers.get(name)
        real = "-" if record is None or record.coverage is None else f"{100 * record.coverage:.1f} %"
        lines.append(
            f"  {name}: {tally.requests} requests, in time {real} as served ({shares[0]} foreseen), {shares[1]} by "
            f"PolyServe: {tally.agreed} to the same instance, {tally.elsewhere} to another, {tally.placed_later} after "
            f"a wait, {tally.refused} refused"
        )
    return lines


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


class ObserveSeries(Collector):
    """The counts per tier, where somebody watches."""

    def __init__(self, brain: Controller) -> None:
        self._brain = brain

    def collect(self) -> Iterator[CounterMetricFamily]:
        shadow = observed(self._brain)
        if shadow is None:
            return
        verdicts = CounterMetricFamily(
            "polyserve_observed_requests", "What PolyServe would have done.", labels=["tier", "verdict"]
        )
        in_time = CounterMetricFamily(
            "polyserve_observed_in_time", "Requests foreseen in time, by who routes.", labels=["tier", "router"]
        )
        for name, tally in shadow.tallies.items():
            for verdict in VERDICTS:
                verdicts.add_metric([name, verdict], getattr(tally, verdict))
            in_time.add_metric([name, "incumbent"], tally.in_time)
            in_time.add_metric([name, "polyserve"], tally.own_in_time)
        yield verdicts
        yield in_time
