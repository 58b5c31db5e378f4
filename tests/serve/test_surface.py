"""The whole surface of OpenAI's API: what passes through, what is told back, what is refused by name."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from live import Live
from test_gateway import CHAT, MESSAGES, over, post

from polyserve.serve.ask import parse
from polyserve.serve.errors import ApiError

SERVICE_TIERS = {"priority": "fast", "flex": "best-effort"}


def sse(*events: dict[str, Any]) -> bytes:
    """A stream of the Responses API."""
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)


USAGE = {
    "input_tokens": 7, "output_tokens": 2, "total_tokens": 9,
    "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
}  # fmt: skip
PART = {"type": "output_text", "text": "t0 t1 ", "annotations": []}
RESPONSE: dict[str, Any] = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "tiny", "status": "completed",
    "output": [{"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [PART]}],
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "service_tier": None, "usage": USAGE,
}  # fmt: skip
BEGUN = RESPONSE | {"status": "in_progress", "output": [], "usage": None}
AT = {"item_id": "m", "output_index": 0, "content_index": 0, "logprobs": []}
STREAM = sse(
    {"type": "response.created", "sequence_number": 0, "response": BEGUN},
    {"type": "response.output_item.added", "sequence_number": 1, "output_index": 0,
     "item": RESPONSE["output"][0] | {"status": "in_progress", "content": []}},
    {"type": "response.content_part.added", "sequence_number": 2, "part": PART | {"text": ""}, **AT},
    {"type": "response.output_text.delta", "sequence_number": 3, "delta": "t0 ", **AT},
    {"type": "response.output_text.delta", "sequence_number": 4, "delta": "t1 ", **AT},
    {"type": "response.completed", "sequence_number": 5, "response": RESPONSE},
)  # fmt: skip


async def tally(live: Live) -> list[str]:
    """The metrics' requests by outcome, once nothing is in flight."""
    await live.quiet()
    async with live.http.get(f"{live.url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return [line for line in lines if line.startswith("polyserve_requests_total")]


# -------------------------------------------------------------------------------------------------- service tiers


@pytest.mark.parametrize(("asked", "told", "tier"), [
    ("priority", "priority", "fast"), ("flex", "flex", "best-effort"), ("auto", "default", "slow"),
])  # fmt: skip
async def test_the_service_tier_is_told_as_served(asked: Any, told: str, tier: str) -> None:
    async with over(FakeEngine(), service_tiers=SERVICE_TIERS) as live:
        raw = await live.openai.chat.completions.with_raw_response.create(
            model="tiny", messages=MESSAGES, service_tier=asked
        )
        answer = raw.parse()
        assert (answer.service_tier, raw.headers["x-polyserve-tier"]) == (told, tier)
        stream = await live.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, service_tier=asked, stream=True
        )
        assert {chunk.service_tier async for chunk in stream} == {told}
        await live.quiet()


async def test_a_pace_in_the_headers_outdoes_the_service_tier_and_the_answer_says_so() -> None:
    async with over(FakeEngine(), service_tiers=SERVICE_TIERS) as live:
        headers = {"x_slo_ttft_ms": "2000", "x_slo_tpot_ms": "200"}
        status, answer, got = await post(live, CHAT | {"service_tier": "priority"}, **headers)
        assert (status, answer["service_tier"], got["x-polyserve-tier"]) == (200, "default", "slow")


async def test_a_client_that_names_no_service_tier_is_told_none() -> None:
    async with over(FakeEngine(), service_tiers=SERVICE_TIERS) as live:
        assert "service_tier" not in (await post(live, CHAT))[1]


async def test_an_answer_that_no_engine_streams_is_stamped_too() -> None:
    answer = {"object": "text_completion", "choices": [{"text": "best"}], "service_tier": None}
    engine = FakeEngine(answer=json.dumps(answer).encode(), answer_type="application/json")
    async with over(engine, service_tiers=SERVICE_TIERS) as live:
        body = {"model": "tiny", "prompt": "a", "best_of": 3, "service_tier": "flex"}
        assert (await post(live, body, "/v1/completions"))[1] == answer | {"service_tier": "flex"}


# ------------------------------------------------------------------------------------------------------- responses


def responding(**values: Any) -> FakeEngine:
    return FakeEngine(answer=STREAM, **values)


async def test_a_response_streams_byte_for_byte() -> None:
    engine = responding()
    async with over(engine) as live:
        body = {"model": "tiny", "input": "hi", "stream": True, "previous_response_id": "resp_0"}
        status, text, headers = await post(live, body, "/v1/responses")
        assert (status, text.encode(), headers["x-polyserve-tier"]) == (200, STREAM, "slow")
        path, _, seen = engine.seen[0]
        assert (path, seen) == ("/v1/responses", body)
        assert await tally(live) == ['polyserve_requests_total{model="tiny",outcome="ok",tier="slow"} 1.0']


async def test_the_sdks_responses_work_streamed_and_whole() -> None:
    async with over(responding(), service_tiers=SERVICE_TIERS) as live:
        async with live.openai.responses.stream(model="tiny", input="hi") as stream:
            assert "".join([e.delta async for e in stream if e.type == "response.output_text.delta"]) == "t0 t1 "
            assert (await stream.get_final_response()).output_text == "t0 t1 "
        whole = await live.openai.responses.create(model="tiny", input="hi", service_tier="flex")
        assert (whole.output_text, whole.service_tier) == ("t0 t1 ", "flex")
        assert whole.usage is not None
        assert whole.usage.output_tokens == 2
        await live.quiet()


async def test_a_response_that_fails_before_its_first_token_is_made_elsewhere() -> None:
    failed = sse(
        {"type": "response.created", "sequence_number": 0, "response": BEGUN},
        {"type": "response.failed", "sequence_number": 1, "response": BEGUN | {"status": "failed"}},
    )
    async with over(FakeEngine(answer=failed), responding()) as live:
        for _ in range(3):
            status, text, _ = await post(live, {"model": "tiny", "input": "hi", "stream": True}, "/v1/responses")
            assert (status, text.encode()) == (200, STREAM)
        await live.quiet()


async def test_a_response_cut_off_after_its_first_token_is_an_error_for_the_sdk() -> None:
    begun = sse({"type": "response.output_text.delta", "sequence_number": 1, "delta": "t0 ", **AT})
    async with over(FakeEngine(answer=begun)) as live:
        with pytest.raises(openai.APIError, match="engine failed"):
            async for _ in await live.openai.responses.create(model="tiny", input="hi", stream=True):
                pass
        await live.quiet()


# ------------------------------------------------------------------------------------------------------ embeddings

VECTORS = {
    "object": "list", "model": "tiny", "usage": {"prompt_tokens": 6, "total_tokens": 6},
    "data": [{"object": "embedding", "index": n, "embedding": [0.5, -0.25]} for n in range(2)],
}  # fmt: skip


def embedding(**values: Any) -> FakeEngine:
    return FakeEngine(answer=json.dumps(VECTORS).encode(), answer_type="application/json", **values)


async def test_embeddings_pass_through_and_are_counted() -> None:
    engine = embedding()
    async with over(engine) as live:
        answer = await live.openai.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
        assert [one.embedding for one in answer.data] == [[0.5, -0.25]] * 2
        path, _, seen = engine.seen[0]
        assert (path, seen) == ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"], "encoding_format": "float"})
        assert await tally(live) == ['polyserve_requests_total{model="tiny",outcome="ok",tier="slow"} 1.0']


async def test_embeddings_may_ask_for_a_pace_like_everybody() -> None:
    async with over(embedding()) as live:
        body = {"model": "tiny", "input": [[1, 2, 3], [4]]}
        status, _, headers = await post(live, body, "/v1/embeddings", x_polyserve_tier="fast")
        assert (status, headers["x-polyserve-tier"]) == (200, "fast")
        status, answer, _ = await post(live, body, "/v1/embeddings", x_slo_ttft_ms="1")
        assert (status, answer["error"]["code"]) == (400, "slo_infeasible")


async def test_embeddings_whose_engine_dies_are_made_by_another() -> None:
    async with over(FakeEngine(hang_up_after=-1), embedding()) as live:
        for _ in range(3):
            assert (await post(live, {"model": "tiny", "input": "a"}, "/v1/embeddings"))[1] == VECTORS
        await live.quiet()


@pytest.mark.parametrize(("endpoint", "body", "code", "param"), [
    ("embeddings", {}, "missing_field", "input"),
    ("embeddings", {"input": 5}, "invalid_type", "input"),
    ("embeddings", {"input": []}, "invalid_type", "input"),
    ("responses", {"input": 5}, "invalid_type", "input"),
    ("responses", {"input": "a", "background": True}, "unsupported_parameter", "background"),
    ("responses", {"input": "a", "max_output_tokens": 0}, "invalid_type", "max_output_tokens"),
    ("responses", {"input": "a", "stream": "yes"}, "invalid_type", "stream"),
    ("responses", {"input": "a", "vllm_xargs": [1]}, "invalid_type", "vllm_xargs"),
])  # fmt: skip
def test_what_cannot_be_passed_on_is_refused_by_name(endpoint: Any, body: Any, code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(endpoint, json.dumps({"model": "tiny"} | body).encode())
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


# ---------------------------------------------------------------------------------------- chats, as engines make them

TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def chat_stream(*choices: dict[str, Any], **more: Any) -> bytes:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny", **more}
    events = [json.dumps({**head, "choices": [choice]}) for choice in choices]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


def delta(finish: str | None = None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": fields, "finish_reason": finish}


def call(arguments: str, **more: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": arguments} | more.pop("function", {}), **more}]}


CALLING = chat_stream(
    delta(role="assistant", content=None, **call("", id="call_1", type="function", function={"name": "weather"})),
    delta(**call('{"city": "')),
    delta(**call('Bonn"}')),
    delta(finish="tool_calls"),
)


async def test_tool_calls_are_the_same_streamed_and_whole() -> None:
    engine = FakeEngine(answer=CALLING)
    async with over(engine) as live:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required"}
        answer = await live.openai.chat.completions.create(**asked, parallel_tool_calls=False)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        (whole,) = choice.message.tool_calls
        assert whole.type == "function"
        assert (whole.id, whole.function.name, whole.function.arguments) == ("call_1", "weather", '{"city": "Bonn"}')
        async with live.openai.chat.completions.stream(**asked) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.tool_calls is not None
        (streamed,) = final.choices[0].message.tool_calls
        assert (streamed.function.name, streamed.function.arguments) == ("weather", '{"city": "Bonn"}')
        assert engine.seen[0][2] == asked | {
            "parallel_tool_calls": False, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip


async def test_logprobs_are_put_together() -> None:
    def probable(token: str) -> dict[str, Any]:
        one = {"token": token, "logprob": -0.5, "bytes": [116], "top_logprobs": []}
        return {**delta(content=token), "logprobs": {"content": [one], "refusal": None}}

    async with over(FakeEngine(answer=chat_stream(probable("t0 "), probable("t1 "), delta(finish="stop")))) as live:
        answer = await live.openai.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert [one.token for one in logprobs.content or ()] == ["t0 ", "t1 "]


PICTURE = "data:image/png;base64," + base64.b64encode(bytes(200_000)).decode()
SOUND = base64.b64encode(bytes(300_000)).decode()


async def test_pictures_and_sound_pass_untouched_and_cost_what_they_cost() -> None:
    engine = FakeEngine(prompt_tokens=1500)
    messages = [
        {"role": "user", "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}},
        ]},
    ]  # fmt: skip
    async with over(engine) as live:
        status, _, _ = await post(live, {"model": "tiny", "messages": messages})
        assert status == 200
        assert engine.seen[0][2]["messages"] == messages
        estimator = live.gateway.estimator
        before = estimator.tokens_per_medium
        for _ in range(8):
            await post(live, {"model": "tiny", "messages": messages})
        assert before > estimator.tokens_per_medium > 690
        assert estimator.bytes_per_token == 4.0  # pictures say nothing about text


async def test_usage_in_every_chunk_is_not_forced_on_a_client_that_wants_none() -> None:
    engine = FakeEngine()
    async with over(engine) as live:
        options = {"include_usage": False, "continuous_usage_stats": True}
        status, text, _ = await post(live, CHAT | {"stream": True, "stream_options": options})
        assert status == 200
        assert "usage" not in text
        assert engine.seen[0][2]["stream_options"] == {"include_usage": True}
