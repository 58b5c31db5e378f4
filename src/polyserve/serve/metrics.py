"""What Prometheus is told, and the last decisions for whoever asks why."""

from __future__ import annotations

from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from polyserve.core.controller import Controller
from polyserve.core.types import Action, Arrived, Dispatch, Event, Refuse, Slo
from polyserve.serve.fleet import STALE_S, Fleet
from polyserve.serve.inflight import Inflight, Ticket

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30)
TPOT_BUCKETS = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
DECISION_BUCKETS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)
RATIO_BUCKETS = (0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 4)
LATENESS_BUCKETS = (0, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

BEST_EFFORT = "best-effort"
DECISIONS_KEPT = 1000


class Metrics:
    """Counts answers as they are given; gauges are read from the books when somebody scrapes."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a series of start times beside every other one, for nobody
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "polyserve", "registry": self.registry}
        by_tier = {"labelnames": ["tier"], **own}
        self._requests = Counter("requests", "Requests by how they ended.", ["tier", "outcome"], **own)
        self.attained = Counter("slo_attained", "Requests with every token by its deadline.", **by_tier)
        self._missed = Counter("slo_missed", "Requests with a token after its deadline.", ["tier", "cause"], **own)
        self._promoted = Counter("promoted_requests", "Requests on a tighter tier.", ["from", "to"], **own)
        self.ttft = Histogram("request_ttft_seconds", "To the first token.", buckets=TTFT_BUCKETS, **by_tier)
        self.tpot = Histogram("request_tpot_seconds", "Per further token.", buckets=TPOT_BUCKETS, **by_tier)
        self.lateness = Histogram(
            "request_lateness_seconds", "Of a request's latest token.", buckets=LATENESS_BUCKETS, **by_tier
        )
        self.queue = Histogram("queue_seconds", "From arrival to dispatch.", buckets=TTFT_BUCKETS, **by_tier)
        self._forecast = Histogram(
            "forecast_error_ratio", "Seen over predicted.", ["kind"], buckets=RATIO_BUCKETS, **own
        ).labels("ttft")
        self._tiers: dict[str, _TierSeries] = {}
        self._decision = Histogram("decision_seconds", "Where a request goes.", buckets=DECISION_BUCKETS, **own)

    def stepped(self, event: Event, took_s: float) -> None:
        """Count a step of the brain, if it was a decision."""
        if isinstance(event, Arrived):
            self._decision.observe(took_s)

    def answered(self, ticket: Ticket) -> None:
        """Count a request that is over."""
        dispatch, request, outcome = ticket.dispatch, ticket.request, ticket.outcome
        assert outcome is not None, "a closed ticket has an outcome"
        tier = (dispatch.tier if dispatch else ticket.refused_by) or (BEST_EFFORT if request.slo is None else "none")
        series = self._tiers.get(tier)
        if series is None:
            series = self._tiers[tier] = _TierSeries(self, tier)
        self._requests.labels(tier, outcome).inc()
        if dispatch is not None:
            series.queue.observe(max(0.0, ticket.boarded_at - request.arrived_at))
            if dispatch.promoted:
                self._promoted.labels(tier, dispatch.host).inc()
        if outcome == "ok" and ticket.first_at is not None:
            series.ttft.observe(ticket.first_at - request.arrived_at)
            if dispatch is not None and dispatch.predicted_ttft_s:
                self._forecast.observe((ticket.first_at - request.arrived_at) / dispatch.predicted_ttft_s)
            if ticket.tokens > 1:
                series.tpot.observe((ticket.last_at - ticket.first_at) / (ticket.tokens - 1))
        if request.slo is not None and outcome not in ("cancelled", "rejected"):
            self._judge(ticket, request.slo, series)

    def _judge(self, ticket: Ticket, slo: Slo, series: _TierSeries) -> None:
        if ticket.outcome != "ok":
            self._missed.labels(series.tier, ticket.outcome).inc()
            return
        series.lateness.observe(ticket.lateness_s)
        if ticket.lateness_s <= 0.0:
            series.attained.inc()
        else:
            late_first = ticket.first_at is not None and ticket.first_at > slo.due_at(ticket.request.arrived_at, 0)
            self._missed.labels(series.tier, "ttft" if late_first else "tpot").inc()


def exposition(models: Mapping[str, Metrics]) -> bytes:
    """What several models count, each series with its model, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Labelled(models))
    return generate_latest(registry)


class _Labelled(Collector):
    """The series of all models, one family of each name."""

    def __init__(self, models: Mapping[str, Metrics]) -> None:
        self._models = models

    def describe(self) -> Iterator[Metric]:
        return iter(())  # nothing to clash with: the registry is its own

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for model, metrics in self._models.items():
            for family in metrics.registry.collect():
                whole = families.get(family.name)
                if whole is None:
                    whole = families[family.name] = Metric(family.name, family.documentation, family.type)
                whole.samples += [one._replace(labels={"model": model, **one.labels}) for one in family.samples]
        yield from families.values()


class _TierSeries:
    """The series of one tier; to look them up by label each time costs more than to count."""

    def __init__(self, metrics: Metrics, tier: str) -> None:
        self.tier = tier
        self.attained = metrics.attained.labels(tier)
        self.ttft = metrics.ttft.labels(tier)
        self.tpot = metrics.tpot.labels(tier)
        self.lateness = metrics.lateness.labels(tier)
        self.queue = metrics.queue.labels(tier)


class Books(Collector):
    """Gauges read at scrape time from the brain's books and from the nodes."""

    def __init__(self, brain: Controller, fleet: Fleet, inflight: Inflight, clock: Callable[[], float]) -> None:
        self._brain = brain
        self._fleet = fleet
        self._inflight = inflight
        self._clock = clock

    def collect(self) -> Iterator[GaugeMetricFamily]:
        brain = self._brain
        queue = GaugeMetricFamily("polyserve_queue_size", "Requests that wait for an instance.", labels=["tier"])
        for name, pending in brain.pending.queues.items():
            queue.add_metric([name], len(pending))
        queue.add_metric([BEST_EFFORT], len(brain.pending.best_effort))
        yield queue
        desired = GaugeMetricFamily("polyserve_desired_instances", "Instances a tier should have.", labels=["tier"])
        for name, count in brain.wanted.items():
            desired.add_metric([name], count)
        yield desired
        yield GaugeMetricFamily("polyserve_open_requests", "Requests not answered yet.", value=len(self._inflight))
        yield from self._nodes()
        yield from self._believed()

    def _nodes(self) -> Iterator[GaugeMetricFamily]:
        states = Tally((node.tier or "", node.state) for node in self._fleet)
        instances = GaugeMetricFamily("polyserve_instances", "Instances by state.", labels=["tier", "state"])
        for labels, count in sorted(states.items()):
            instances.add_metric(labels, count)
        yield instances
        pace = GaugeMetricFamily("polyserve_pace_seconds", "Bound on an instance's iterations.", labels=["instance"])
        for node in self._fleet:
            if node.pace_s is not None:
                pace.add_metric([node.id], node.pace_s)
        yield pace
        now = self._clock()
        stale = sum(1 for node in self._fleet if node.load is not None and now - node.load_at > STALE_S)
        yield GaugeMetricFamily("polyserve_stale_instances", "Instances whose metrics are old.", value=stale)

    def _believed(self) -> Iterator[GaugeMetricFamily]:
        load = GaugeMetricFamily("polyserve_instance_load", "Peak iteration over pace.", labels=["instance"])
        ratio = GaugeMetricFamily(
            "polyserve_profile_correction_ratio", "Observed over believed iteration time.", labels=["instance"]
        )
        for books in self._brain.fleet:
            load.add_metric([books.id], books.load)
            ratio.add_metric([books.id], books.correction.ratio)
        yield load
        yield ratio


class Decisions:
    """The last dispatches and refusals, and what the brain considered where it keeps that (`explain: true`)."""

    def __init__(self, brain: Controller, inflight: Inflight) -> None:
        self.brain = brain
        self._inflight = inflight
        self._kept: deque[tuple[float, Dispatch | Refuse, float | None]] = deque(maxlen=DECISIONS_KEPT)

    def observe(self, now: float, event: Event, actions: list[Action]) -> None:
        """Keep the decisions among a step's actions."""
        for action in actions:
            if isinstance(action, Dispatch | Refuse):
                ticket = self._inflight.get(action.request)
                self._kept.append((now, action, ticket.request.arrived_at if ticket else None))

    def last(self, limit: int) -> list[dict[str, Any]]:
        """The latest first, as plain values."""
        explained = {(one.at, one.request): one for one in self.brain.explanations}
        latest = list(self._kept)[-limit:][::-1] if limit else []
        return [
            _plain(now, action, arrived_at, explained.get((now, action.request))) for now, action, arrived_at in latest
        ]


def _plain(now: float, action: Dispatch | Refuse, arrived_at: float | None, explanation: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "at": now,
        "request": action.request,
        "tier": action.tier,
        "waited_s": None if arrived_at is None else round(now - arrived_at, 6),
    }
    if isinstance(action, Dispatch):
        plain |= {
            "decision": "dispatch",
            "instance": action.instance,
            "host": action.host,
            "promoted": action.promoted,
            "predicted_ttft_s": action.predicted_ttft_s,
            "slo": None if action.slo is None else {"ttft_s": action.slo.ttft_s, "tpot_s": action.slo.tpot_s},
        }
    else:
        plain |= {"decision": "refuse", "code": action.code, "retry_after_s": action.retry_after_s}
    if explanation is not None:
        plain["forecast"] = explanation.forecast
        plain["considered"] = explanation.considered
    return plain
