"""Dialects of engines: what vLLM's metrics say, and what each kind of engine is sent."""

from __future__ import annotations

import json
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from polyserve.core.types import ChunkRule, Slo
from polyserve.serve.adapters import (
    LAST_PRIORITY,
    Load,
    OpenAIEngine,
    SglangEngine,
    VllmEngine,
    chunk_rule,
    detect,
    parsed_metrics,
    parsed_sglang_metrics,
)
from polyserve.serve.ask import parse
from polyserve.serve.plan import EngineSpec

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


SGLANG_METRICS = """\
# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="tiny",tp_rank="0"} 5.0
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="tiny",tp_rank="0"} 0.28
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{model_name="tiny",tp_rank="0"} 2.0
"""


def test_sglangs_gauges_are_read() -> None:
    assert parsed_sglang_metrics(SGLANG_METRICS) == Load(5, 2, 0.28)
    assert parsed_sglang_metrics(SGLANG_METRICS.replace("token_usage", "x")) == Load(5, 2, None)
    assert parsed_sglang_metrics(METRICS) is None
    assert parsed_metrics(SGLANG_METRICS) is None


@pytest.mark.parametrize("told", [True, False])
async def test_sglang_is_known_by_its_metrics_and_asked_what_it_holds(told: bool) -> None:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=SGLANG_METRICS)

    async def info(request: web.Request) -> web.Response:
        said = {"max_total_num_tokens": 4096, "max_running_requests": None, "model_path": "tiny"}
        return web.json_response(said, status=200 if told else 404)

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/get_server_info", info)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with aiohttp.ClientSession() as session:
            engine = await detect(session, EngineSpec("e", f"http://127.0.0.1:{runner.addresses[0][1]}", "p"))
            assert isinstance(engine, SglangEngine)
            assert (await engine.facts()).kv_tokens == (4096 if told else None)
            assert await engine.load() == Load(5, 2, 0.28)
    finally:
        await runner.cleanup()


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


def test_priority_is_the_other_way_round_in_sglang() -> None:
    soon, late = (
        SglangEngine(cast(aiohttp.ClientSession, None), "http://e", True).changes(
            parse("chat", json.dumps(BODY).encode()), Slo(0.5, 0.04), 0.25, due_at
        )["priority"]
        for due_at in (12.5, 13.5)
    )
    assert cast(int, soon) > cast(int, late)
    assert changes(SglangEngine, None, send_priority=True)["priority"] == 0
    assert changes(SglangEngine, None)["priority"] is None


def test_embeddings_and_responses_are_ranked_like_others_and_told_no_arguments_of_ours() -> None:
    for endpoint in ("embeddings", "responses"):
        ask = parse(cast(Any, endpoint), json.dumps({"model": "m", "input": "a", "vllm_xargs": {"mine": 1}}).encode())
        engine = VllmEngine(cast(aiohttp.ClientSession, None), "http://e", True)
        got = engine.changes(ask, Slo(0.5, 0.04), 0.25, 12.5)
        assert (got["priority"], got["vllm_xargs"]) == (12_500, None)


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
