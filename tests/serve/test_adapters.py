"""Dialects of engines: what vLLM's metrics say, and what each kind of engine is sent."""

from __future__ import annotations

import json
from typing import Any, cast

import aiohttp
import pytest

from polyserve.core.types import ChunkRule, Slo
from polyserve.serve.adapters import LAST_PRIORITY, Load, OpenAIEngine, VllmEngine, chunk_rule, parsed_metrics
from polyserve.serve.ask import parse

# As vLLM 0.32 prints them.
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 1.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.75
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1024",sliding_window="None"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1024",sliding_window="None"} 1.0
"""


def test_vllm_gauges_are_summed_over_its_cores() -> None:
    assert parsed_metrics(METRICS) == Load(7, 1, 0.5, 32768)


@pytest.mark.parametrize("text", ["", "<html>", "vllm:num_requests_running 3.0\n", METRICS.replace("_waiting{", "_x{")])
def test_metrics_that_are_not_there_say_nothing(text: str) -> None:
    assert parsed_metrics(text) is None


def test_gauges_without_a_cache_leave_the_cache_open() -> None:
    text = 'vllm:num_requests_running 1\nvllm:num_requests_waiting 0\nvllm:cache_config_info{block_size="x"} 1\n'
    assert parsed_metrics(text) == Load(1, 0)


BODY = {
    "model": "m",
    "messages": [],
    "stream_options": {"continuous_usage_stats": True},
    "vllm_xargs": {"slo_ttft_ms": 9, "mine": 1},
    "nvext": {"router": {}},
    "priority": 5,
}


def changes(kind: type[OpenAIEngine], slo: Slo | None, send_priority: bool = False, **body: Any) -> dict[str, object]:
    ask = parse("chat", json.dumps(BODY | body).encode())
    engine = kind(cast(aiohttp.ClientSession, None), "http://e", send_priority)
    return engine.changes(ask, slo, left_s=0.25, due_at=12.5 if slo else float("inf"))


def test_a_plain_server_gets_nothing_it_may_choke_on() -> None:
    assert changes(OpenAIEngine, Slo(0.5, 0.04)) == {
        "nvext": None,
        "vllm_xargs": None,
        "priority": None,
        "stream": True,
        "stream_options": {"include_usage": True},  # usage in every chunk would come of ours
    }


def test_vllm_is_told_what_is_left_of_the_slo_and_keeps_the_clients_other_arguments() -> None:
    got = changes(VllmEngine, Slo(0.5, 0.04))
    assert got["vllm_xargs"] == {"mine": 1, "slo_ttft_ms": 250.0, "slo_tpot_ms": 40.0}
    assert got["priority"] is None
    assert changes(VllmEngine, None)["vllm_xargs"] == {"mine": 1}


def test_priority_is_the_deadline_and_best_effort_comes_last() -> None:
    assert changes(VllmEngine, Slo(0.5, 0.04), send_priority=True)["priority"] == 12_500
    assert changes(VllmEngine, None, send_priority=True)["priority"] == LAST_PRIORITY


def test_a_stream_that_is_asked_for_as_we_need_it_is_left_alone() -> None:
    got = changes(OpenAIEngine, None, stream=True, stream_options={"include_usage": True})
    assert not got.keys() & {"stream", "stream_options"}


def test_what_no_engine_streams_is_not_asked_for_as_a_stream() -> None:
    assert "stream" not in changes(OpenAIEngine, None, best_of=3)


def test_chunk_rules_are_read_as_they_are_written() -> None:
    assert [chunk_rule(text) for text in ("dynamic", "fixed:512", "unknown")] == [
        ChunkRule("dynamic"),
        ChunkRule("fixed", 512),
        ChunkRule("unknown"),
    ]
    for wrong in ("", "fixed", "fixed:", "fixed:0", "fixed:-1", "fixed:²", "Dynamic", "512"):
        with pytest.raises(ValueError, match="a chunk rule is dynamic"):
            chunk_rule(wrong)
