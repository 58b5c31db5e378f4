"""What Prometheus is told, and the last decisions for whoever asks why."""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from polyserve.core.controller import Controller
from polyserve.core.types import Slo
from polyserve.serve.fleet import STALE_S, Fleet
from polyserve.serve.inflight import Inflight, Ticket

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30)
TPOT_BUCKETS = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
DECISION_BUCKETS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)
RATIO_BUCKETS = (0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 4)
LATENESS_BUCKETS = (0, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

BEST_EFFORT = "best-effort"


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
        )
        self._arrived = Counter("arrived_requests", "Requests as they arrive: the demand.", **by_tier)
        self._refused = Counter("refused_requests", "Requests refused, by the code told.", ["tier", "code"], **own)
        self._continued = Counter("continued_requests", "Requests that went on at another instance.", **by_tier)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of requests that were served.", **by_tier)
        self.output_tokens = Counter("output_tokens", "Output tokens that were made.", **by_tier)
        self._tiers: dict[str, _TierSeries] = {}
        self._decision = Histogram("decision_seconds", "Where a request goes.", buckets=DECISION_BUCKETS, **own)

    def forecast(self, kind: str, ratio: float) -> None:
        """Count a prediction by what became of it, observed over predicted."""
        self._forecast.labels(kind).observe(ratio)

    def arrived(self, tier: str | None, took_s: float) -> None:
        """Count a request of a tier (None: best effort), and the step that decided on it."""
        self._decision.observe(took_s)
        self._arrived.labels(tier or BEST_EFFORT).inc()

    def answered(self, ticket: Ticket) -> None:
        """Count a request that is over."""
        dispatch, request, outcome = ticket.dispatch, ticket.request, ticket.outcome
        assert outcome is not None, "a closed ticket has an outcome"
        tier = (dispatch.tier if dispatch else ticket.refused_by) or (BEST_EFFORT if request.slo is None else "none")
        series = self._tiers.get(tier)
        if series is None:
            series = self._tiers[tier] = _TierSeries(self, tier)
        self._requests.labels(tier, outcome).inc()
        if outcome == "refused":
            self._refused.labels(tier, ticket.code or "unknown").inc()
        if ticket.continuations:
            self._continued.labels(tier).inc()
        if dispatch is not None:
            series.prompt_tokens.inc(request.prompt_tokens)
            series.output_tokens.inc(ticket.tokens * request.n)
            series.queue.observe(max(0.0, ticket.boarded_at - request.arrived_at))
            if dispatch.promoted:
                self._promoted.labels(tier, dispatch.host).inc()
        if outcome == "ok" and ticket.first_at is not None:
            series.ttft.observe(ticket.first_at - request.arrived_at)
            if (tpot_s := ticket.tpot_s) is not None:
                series.tpot.observe(tpot_s)
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
        self.prompt_tokens = metrics.prompt_tokens.labels(tier)
        self.output_tokens = metrics.output_tokens.labels(tier)


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
        now = self._clock()
        stale = sum(1 for node in self._fleet if node.load is not None and now - node.load_at > STALE_S)
        yield GaugeMetricFamily("polyserve_stale_instances", "Instances whose metrics are old.", value=stale)

    def _believed(self) -> Iterator[GaugeMetricFamily]:
        load = GaugeMetricFamily("polyserve_instance_load", "Peak iteration over pace.", labels=["instance"])
        ratio = GaugeMetricFamily(
            "polyserve_profile_correction_ratio", "Observed over believed iteration time.", labels=["instance"]
        )
        pace = GaugeMetricFamily("polyserve_pace_seconds", "Bound on an instance's iterations.", labels=["instance"])
        for books in self._brain.fleet:
            if math.isfinite(books.pace_s):  # one that is starting, and all of a policy without paces, have none
                pace.add_metric([books.id], books.pace_s)
            load.add_metric([books.id], books.load)
            ratio.add_metric([books.id], books.correction.ratio)
        yield pace
        yield load
        yield ratio
