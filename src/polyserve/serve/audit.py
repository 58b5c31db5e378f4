"""What was predicted of requests against what became of them, and the safety margin that follows from it.

Audited are requests whose answer is complete. TTFT: observed over predicted, by the dispatch that brought the first
token. TPOT: the mean observed over the longest pure-decode iteration that the forecast saw coming, which is a bound:
a ratio above 1 says that iterations grew beyond it, by prompts that were taken in beside it or by a wrong profile.
Coverage is the share of admitted requests with an SLO that had every token in time; at `confidence` below it the
forecast promises too much. Engines that fail count against it, clients that leave do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from polyserve.core.controller import Controller
from polyserve.core.types import InstanceId, TierName
from polyserve.serve.inflight import Ticket

# Requests of one tier or instance that quantiles and coverage are taken of: enough for a p95, few enough to follow.
KEPT = 500
QUANTILES = (0.05, 0.5, 0.95)

Kind = Literal["ttft", "tpot"]
KINDS: tuple[Kind, ...] = ("ttft", "tpot")


@dataclass(slots=True)
class Record:
    """The latest of one tier or instance."""

    ratios: dict[Kind, deque[float]] = field(default_factory=lambda: {kind: deque(maxlen=KEPT) for kind in KINDS})
    in_time: deque[bool] = field(default_factory=lambda: deque(maxlen=KEPT))

    @property
    def coverage(self) -> float | None:
        return sum(self.in_time) / len(self.in_time) if self.in_time else None

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"requests": len(self.in_time), "coverage": _rounded(self.coverage)}
        for kind, ratios in self.ratios.items():
            told = {f"p{round(100 * q)}": _rounded(value) for q, value in quantiles(ratios)}
            plain[kind] = {"requests": len(ratios), **told}
        return plain


class Audit:
    """Keeps the last predictions of one brain beside what came of them."""

    def __init__(self, brain: Controller, observe: Callable[[Kind, float], None]) -> None:
        """`observe` is told of every ratio."""
        self.brain = brain
        self.tiers: dict[TierName, Record] = {}
        self.instances: dict[InstanceId, Record] = {}
        self._observe = observe

    def answered(self, ticket: Ticket) -> None:
        """Take in a request that is over."""
        dispatch = ticket.dispatch
        if dispatch is None or ticket.outcome not in ("ok", "failed"):
            return
        records = [self._of(dispatch.instance)]
        if dispatch.tier is not None:
            records.append(self.tiers.setdefault(dispatch.tier, Record()))
        if dispatch.slo is not None:
            in_time = ticket.outcome == "ok" and ticket.lateness_s <= 0.0
            for record in records:
                record.in_time.append(in_time)
        for kind, ratio in ratios(ticket):
            self._observe(kind, ratio)
            for record in records:
                record.ratios[kind].append(ratio)

    def _of(self, instance: InstanceId) -> Record:
        if instance not in self.instances:
            there = self.brain.fleet.books
            self.instances = {id: record for id, record in self.instances.items() if id in there}
            self.instances[instance] = Record()
        return self.instances[instance]

    def margins(self) -> dict[InstanceId, dict[str, float]]:
        """How far each instance is off its profile, and what is added to every forecast for what is uncertain of it."""
        return {
            books.id: {
                "correction_ratio": books.correction.ratio,
                "spread": books.correction.spread,
                "safety_margin": books.scale / books.correction.ratio - 1.0,
            }
            for books in self.brain.fleet
        }

    def to_dict(self) -> dict[str, Any]:
        settings = self.brain.settings
        rounded = {
            id: {key: _rounded(value) for key, value in margins.items()} for id, margins in self.margins().items()
        }
        known = {id: self.instances[id].to_dict() for id in rounded if id in self.instances}
        return {
            "confidence": settings.confidence,
            "ttft_margin": settings.ttft_margin,
            "safety_sigma": settings.safety_sigma,
            "tiers": {name: record.to_dict() for name, record in self.tiers.items()},
            "instances": {id: {**margins, **known.get(id, {})} for id, margins in rounded.items()},
        }


def ratios(ticket: Ticket) -> Iterator[tuple[Kind, float]]:
    """Observed over predicted, as far as something was predicted and observed."""
    foreseen, first_at = ticket.foreseen, ticket.first_at
    if foreseen is None or first_at is None or ticket.outcome != "ok":
        return
    if foreseen.ttft_s:
        yield "ttft", (first_at - ticket.request.arrived_at) / foreseen.ttft_s
    if foreseen.peak_s and ticket.tpot_s is not None:
        yield "tpot", ticket.tpot_s / foreseen.peak_s


def quantiles(values: Iterable[float]) -> list[tuple[float, float]]:
    """(quantile, value), the nearest rank; empty for no values."""
    ordered: Sequence[float] = sorted(values)
    return [(q, ordered[min(int(q * len(ordered)), len(ordered) - 1)]) for q in QUANTILES] if ordered else []


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


class AuditSeries(Collector):
    """The audit as gauges, read when somebody scrapes."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    def collect(self) -> Iterator[GaugeMetricFamily]:
        audit = self._audit
        tiers = {tier.name: audit.tiers[tier.name] for tier in audit.brain.tiers if tier.name in audit.tiers}
        there = {books.id: audit.instances[books.id] for books in audit.brain.fleet if books.id in audit.instances}
        yield self._quantiles("tier", tiers)
        yield self._quantiles("instance", there)
        coverage = GaugeMetricFamily(
            "polyserve_forecast_coverage_ratio", "Admitted requests that were in time, of the last.", labels=["tier"]
        )
        for name, record in tiers.items():
            if record.coverage is not None:
                coverage.add_metric([name], record.coverage)
        yield coverage
        confidence = audit.brain.settings.confidence
        yield GaugeMetricFamily("polyserve_forecast_confidence_ratio", "The coverage asked for.", value=confidence)
        margin = GaugeMetricFamily(
            "polyserve_safety_margin_ratio", "Added to believed iteration times.", labels=["instance"]
        )
        for id, margins in audit.margins().items():
            margin.add_metric([id], margins["safety_margin"])
        yield margin

    def _quantiles(self, label: str, records: dict[str, Record]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            f"polyserve_forecast_error_{label}_ratio",
            "Seen over predicted, of the last requests.",
            labels=[label, "kind", "quantile"],
        )
        for name, record in records.items():
            for kind, values in record.ratios.items():
                for quantile, value in quantiles(values):
                    family.add_metric([name, kind, f"{quantile:g}"], value)
        return family
