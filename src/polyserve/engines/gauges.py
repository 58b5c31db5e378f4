"""What the emulated engine measures, under vLLM's names."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from polyserve.core.types import Iteration
from polyserve.sim.engine import Done

if TYPE_CHECKING:
    from polyserve.engines.emulator import Answer, Emulator

# vLLM's own bounds, in seconds.
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Buckets:
    """A histogram that takes many equal values at once."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def family(self, name: str, text: str, labels: Mapping[str, str]) -> HistogramMetricFamily:
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self.sum)
        return family


class Gauges(Collector):
    """One instance's metrics."""

    def __init__(self, emulator: Emulator, model: str) -> None:
        self._emulator = emulator
        self._labels = {"model_name": model, "engine": "0"}
        self._prompt_tokens = self._generation_tokens = 0
        self._ttft, self._gap = Buckets(TTFT_S), Buckets(TOKEN_S)
        self._whole, self._per_token = Buckets(REQUEST_S), Buckets(TOKEN_S)
        self._finished = {"stop": 0, "length": 0, "abort": 0}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def iterated(self, iteration: Iteration, tokens: int) -> None:
        """An iteration has ended that made so many tokens."""
        self._generation_tokens += tokens
        if iteration.decodes:
            self._gap.observe(iteration.seconds, iteration.decodes)

    def first_token(self, answer: Answer, at: float) -> None:
        self._prompt_tokens += answer.job.prompt_tokens + answer.job.resume_from
        self._ttft.observe(at - answer.job.arrived_at)

    def finished(self, answer: Answer, done: Done) -> None:
        self._finished[answer.reason] += 1
        self._whole.observe(done.last_token_at - answer.job.arrived_at)
        gaps = done.output_tokens - answer.job.resume_from - 1
        if gaps:
            self._per_token.observe((done.last_token_at - done.first_token_at) / gaps)

    def aborted(self) -> None:
        self._finished["abort"] += 1

    def exposition(self) -> bytes:
        """The metrics as Prometheus reads them."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        emulator, engine = self._emulator, self._emulator.engine
        yield self._gauge("vllm:num_requests_running", "Requests in the batch.", engine.residents - engine.waiting)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for a seat or memory.", engine.waiting)
        usage = engine.kv_allocated / engine.kv_capacity
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", usage)
        yield self._cache_config()
        yield self._counter("vllm:num_preemptions", "Preemptions by recompute.", engine.preemptions)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed.", self._prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens made.", self._generation_tokens)
        yield self._requests()
        yield self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", self._ttft)
        yield self._histogram("vllm:inter_token_latency_seconds", "Between tokens of one answer.", self._gap)
        text = "Mean time per token after the first, of finished requests."
        yield self._histogram("vllm:request_time_per_output_token_seconds", text, self._per_token)
        yield self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", self._whole)
        forced = "Prefill chunks given although somebody is late by them."
        yield self._counter("polyserve_emulator_forced_chunks", forced, engine.forced_chunks)
        yield self._counter("polyserve_emulator_iterations", "Iterations ended.", engine.iterations)
        late = "Iterations that this machine ended more than 5 ms late."
        yield self._counter("polyserve_emulator_late_iterations", late, emulator.late_iterations)
        lag = "How late this machine ended the last iteration."
        yield self._gauge("polyserve_emulator_lag_seconds", lag, emulator.lag_s)
        yield self._gauge("polyserve_emulator_worst_lag_seconds", "The largest lag so far.", emulator.worst_lag_s)
        real = "1 while at most one iteration in a hundred ended late: else the times seen are the machine's."
        yield self._gauge("polyserve_emulator_keeps_real_time", real, float(emulator.keeps_real_time))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, buckets: Buckets) -> Metric:
        return buckets.family(name, text, self._labels)

    def _requests(self) -> Metric:
        text = "Requests that ended, by why."
        family = CounterMetricFamily("vllm:request_success", text, labels=[*self._labels, "finished_reason"])
        for reason, count in self._finished.items():
            family.add_metric([*self._labels.values(), reason], count)
        return family

    def _cache_config(self) -> Metric:
        engine = self._emulator.engine
        labels = {
            "block_size": str(engine.block_size),
            "cache_dtype": "auto",
            "engine": "0",
            "num_gpu_blocks": str(engine.kv_capacity // engine.block_size),
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "Its KV cache.", labels=list(labels))
        family.add_metric(list(labels.values()), 1.0)
        return family
