"""The gateway as its clients meet it: the openai SDK and plain HTTP over real sockets, engines that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from live import TIERS, Live, listening, make_plan, until

from polyserve.core.types import Arrived, Request

MESSAGES: Any = [{"role": "user", "content": "How many tokens are in here?"}]
CHAT = {"model": "tiny", "messages": MESSAGES}


@contextlib.asynccontextmanager
async def over(*engines: FakeEngine, **values: Any) -> AsyncIterator[Live]:
    """A gateway over these engines, ready."""
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine.running())
        live = await stack.enter_async_context(listening(make_plan([e.url for e in engines], **values)))
        await live.ready(len(engines))
        yield live


async def post(live: Live, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any, Any]:
    """Status, body and headers of an answer to a plain HTTP request."""
    data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with live.http.post(live.url + path, data=data, headers=named) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if text.startswith("{") else text, answer.headers


# -------------------------------------------------------------------------------------------------- as it should be


async def test_a_chat_answer_is_whole_though_the_engine_streams_it() -> None:
    engine = FakeEngine()
    async with over(engine) as live:
        answer = await live.openai.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].message.content == "t0 t1 t2 t3 t4 "
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        assert engine.seen[0][2]["stream"] is True


async def test_choices_of_one_request_are_kept_apart() -> None:
    async with over(FakeEngine(tokens=3)) as live:
        answer = await live.openai.chat.completions.create(model="tiny", messages=MESSAGES, n=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert {choice.message.content for choice in answer.choices} == {"t0 t1 t2 "}


async def test_plain_completions_work_too() -> None:
    async with over(FakeEngine(tokens=3)) as live:
        answer = await live.openai.completions.create(model="tiny", prompt="once", max_tokens=3)
        assert answer.choices[0].text == "t0 t1 t2 "
        stream = await live.openai.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=3, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "t0 t1 t2 "


@pytest.mark.parametrize("separator", [b"\n\n", b"\r\n\r\n"])
async def test_a_stream_is_the_engines_bytes_without_the_usage_nobody_asked_for(separator: bytes) -> None:
    engine = FakeEngine(separator=separator)
    async with over(engine) as live:
        status, text, headers = await post(live, CHAT | {"stream": True})
        wanted = engine.events("/v1/chat/completions", CHAT)
        assert status == 200
        assert text.encode() == b"".join(b"data: " + event + separator for event in wanted)
        assert headers["content-type"].startswith("text/event-stream")
        assert headers["x-engine"] == "fake"


async def test_what_no_engine_streams_is_passed_on_whole() -> None:
    answer = {"object": "text_completion", "choices": [{"text": "best"}], "usage": {"completion_tokens": 1}}
    async with over(FakeEngine(answer=json.dumps(answer).encode(), answer_type="application/json")) as live:
        got = await post(live, {"model": "tiny", "prompt": "a", "best_of": 3}, "/v1/completions")
        assert got[:2] == (200, answer)
        await live.quiet()


async def test_usage_that_was_asked_for_is_passed_on() -> None:
    async with over(FakeEngine()) as live:
        stream = await live.openai.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens == 7


async def test_the_answer_says_how_the_request_was_served() -> None:
    async with over(FakeEngine()) as live:
        _, _, headers = await post(live, CHAT, x_request_id="mine-1", x_polyserve_tier="fast")
        assert headers["x-request-id"] == "mine-1"
        assert headers["x-polyserve-tier"] == "fast"
        assert headers["x-polyserve-instance"] == "e0"
        assert headers["x-polyserve-promoted"] == "false"
        for name in ("predicted-ttft-ms", "queue-ms", "overhead-ms"):
            assert 0.0 <= float(headers[f"x-polyserve-{name}"]) < 1000.0


async def test_engines_get_the_clients_headers_but_not_ours_nor_the_hops() -> None:
    engine = FakeEngine()
    async with over(engine) as live:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await post(live, CHAT, traceparent=trace, x_slo_tpot_ms="50", x_request_id="abc", te="trailers")
        headers = engine.seen[0][1]
        assert headers["traceparent"] == trace
        assert headers["x-request-id"] == "abc"
        assert not headers.keys() & {"te", "x-slo-tpot-ms"}


async def test_two_requests_under_one_id_are_both_served() -> None:
    engine = FakeEngine(every_s=0.01)
    async with over(engine) as live:
        answers = await asyncio.gather(*(post(live, CHAT, x_request_id="same") for _ in range(2)))
        assert [(status, headers["x-request-id"]) for status, _, headers in answers] == [(200, "same")] * 2
        assert len({headers["x-request-id"] for _, headers, _ in engine.seen}) == 2


async def test_the_estimate_of_prompt_tokens_learns_from_usage() -> None:
    async with over(FakeEngine(prompt_tokens=1000)) as live:
        before = live.gateway.estimator.bytes_per_token
        for _ in range(5):
            await post(live, {"model": "tiny", "messages": [{"role": "user", "content": "x" * 2000}]})
        assert live.gateway.estimator.bytes_per_token < before * 0.8


# ------------------------------------------------------------------------------------------------- bad input


BAD_REQUESTS: list[tuple[str, Any, dict[str, str], int, str, str | None]] = [
    ("not JSON", b"{not json", {}, 400, "invalid_json", None),
    ("an empty body", b"", {}, 400, "invalid_json", None),
    ("no object", b"[1, 2]", {}, 400, "invalid_json", None),
    ("no model", {"messages": MESSAGES}, {}, 400, "missing_field", "model"),
    ("another model", CHAT | {"model": "gpt-9"}, {}, 404, "model_not_found", "model"),
    ("no messages", {"model": "tiny"}, {}, 400, "missing_field", "messages"),
    ("messages that are text", CHAT | {"messages": "hi"}, {}, 400, "invalid_type", "messages"),
    ("max_tokens in words", CHAT | {"max_tokens": "ten"}, {}, 400, "invalid_type", "max_tokens"),
    ("no tokens at all", CHAT | {"max_completion_tokens": 0}, {}, 400, "invalid_type", "max_completion_tokens"),
    ("half a choice", CHAT | {"n": 0.5}, {}, 400, "invalid_type", "n"),
    ("too many choices", CHAT | {"n": 100_000}, {}, 400, "invalid_type", "n"),
    ("a stream that is maybe", CHAT | {"stream": "yes"}, {}, 400, "invalid_type", "stream"),
    ("options in a list", CHAT | {"stream_options": []}, {}, 400, "invalid_type", "stream_options"),
    ("an unknown service tier", CHAT | {"service_tier": "gold"}, {}, 400, "invalid_type", "service_tier"),
    ("a pace in words", CHAT, {"x-slo-ttft-ms": "fast"}, 400, "invalid_slo", "x-slo-ttft-ms"),
    ("a pace of zero", CHAT, {"x-slo-tpot-ms": "0"}, 400, "invalid_slo", "x-slo-tpot-ms"),
    ("a negative pace", CHAT, {"x-llm-d-slo-tpot-ms": "-5"}, 400, "invalid_slo", "x-llm-d-slo-tpot-ms"),
    ("no number", CHAT, {"x-sgl-tps-slo": "NaN"}, 400, "invalid_slo", "x-sgl-tps-slo"),
    ("an unknown tier", CHAT, {"x-polyserve-tier": "gold"}, 400, "invalid_slo", "x-polyserve-tier"),
    ("an impossible pace", CHAT, {"x-slo-ttft-ms": "1"}, 400, "slo_infeasible", None),
    ("longer than the context", CHAT | {"max_tokens": 10**9}, {}, 400, "context_length_exceeded", None),
]


@pytest.fixture(scope="module")
def refusing() -> Any:
    """Bad requests never reach an engine, so one gateway serves all of them, in a loop of its own."""
    loop = asyncio.new_event_loop()
    engine = FakeEngine()
    context = over(engine)
    live = loop.run_until_complete(context.__aenter__())
    yield loop, live, engine
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


@pytest.mark.parametrize(("body", "headers", "status", "code", "param"), [
    pytest.param(*row, id=name) for name, *row in BAD_REQUESTS
])  # fmt: skip
def test_bad_requests_are_refused_by_name(
    refusing: Any, body: Any, headers: dict[str, str], status: int, code: str, param: str | None
) -> None:
    loop, live, engine = refusing
    got, answer, got_headers = loop.run_until_complete(post(live, body, **headers))
    assert (got, answer["error"]["code"], answer["error"]["param"]) == (status, code, param)
    assert answer["error"]["message"]
    assert answer["error"]["type"]
    assert got_headers["x-should-retry"] == "false"
    assert not engine.seen
    assert not live.held()


async def test_a_body_of_50_mb_is_too_large_and_the_gateway_lives_on() -> None:
    async with over(FakeEngine()) as live:
        huge = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 50_000_000}]}
        status, answer, _ = await post(live, huge)
        assert (status, answer["error"]["code"]) == (413, "request_too_large")

        async def unannounced() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b"x" * 1_000_000

        async with live.http.post(f"{live.url}/v1/completions", data=unannounced()) as chunked:
            assert chunked.status == 413
        assert (await post(live, CHAT))[0] == 200


async def test_what_the_engine_has_against_a_request_is_passed_on() -> None:
    async with over(FakeEngine(status=422)) as live:
        status, answer, headers = await post(live, CHAT)
        assert (status, answer["error"]["message"]) == (422, "engine says no")
        assert headers["x-polyserve-instance"] == "e0"
        await live.quiet()


async def test_unknown_paths_and_methods_are_openai_errors() -> None:
    async with over(FakeEngine()) as live:
        for method, path, status, code in (
            ("GET", "/v1/nothing", 404, "not_found"),
            ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
            ("POST", "/health", 405, "method_not_allowed"),
        ):
            async with live.http.request(method, live.url + path) as answer:
                assert answer.status == status
                assert (await answer.json())["error"]["code"] == code


async def test_the_sdk_sees_its_own_error_types() -> None:
    async with over(FakeEngine()) as live:
        with pytest.raises(openai.NotFoundError):
            await live.openai.chat.completions.create(model="gpt-9", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="x-slo-tpot-ms"):
            await live.openai.chat.completions.create(
                model="tiny", messages=MESSAGES, extra_headers={"x-slo-tpot-ms": "soon"}
            )


# -------------------------------------------------------------------------------------------- engines that fail


@pytest.mark.parametrize("broken", [
    FakeEngine(hang_up_after=-1),
    FakeEngine(hang_up_after=0),
    FakeEngine(hang_up_after=1),
    FakeEngine(status=500),
    FakeEngine(status=503),
    FakeEngine(answer=b"<html>surprise</html>", answer_type="text/html"),
    FakeEngine(answer=b"what is this\n\n"),
    FakeEngine(answer=b""),
], ids=["no head", "no event", "role only", "500", "503", "html", "garbage", "nothing"])  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_fails_before_its_first_token_costs_nobody_anything(
    broken: FakeEngine, stream: bool
) -> None:
    sound = FakeEngine()
    async with over(broken, sound) as live:
        for _ in range(4):
            status, answer, headers = await post(live, CHAT | {"stream": stream})
            assert status == 200
            assert headers["x-polyserve-instance"] == "e1"
            assert "t4" in json.dumps(answer)
        assert broken.seen
        await live.quiet()


async def test_a_whole_answer_survives_an_engine_that_fails_in_the_middle_of_it() -> None:
    async with over(FakeEngine(hang_up_after=4), FakeEngine()) as live:
        for _ in range(3):
            _, answer, _ = await post(live, CHAT)
            assert answer["choices"][0]["message"]["content"] == "t0 t1 t2 t3 t4 "
        await live.quiet()


@pytest.mark.parametrize("broken", [
    FakeEngine(hang_up_after=3, every_s=0.01),
    FakeEngine(error_event=True, every_s=0.01),
], ids=["connection lost", "error event"])  # fmt: skip
async def test_a_stream_that_breaks_after_its_first_token_says_so_and_ends(broken: FakeEngine) -> None:
    async with over(broken) as live:
        status, text, _ = await post(live, CHAT | {"stream": True})
        *events, last, end = text.split("\n\n")
        assert status == 200
        assert (json.loads(last.removeprefix("data: "))["error"]["code"], end) == ("upstream_error", "")
        assert "t0" in events[1]
        with pytest.raises(openai.APIError, match="engine failed"):
            async for _ in await live.openai.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
                pass
        await live.quiet()


async def test_when_every_engine_fails_the_client_may_come_back() -> None:
    async with over(FakeEngine(hang_up_after=-1), FakeEngine(hang_up_after=-1)) as live:
        status, answer, headers = await post(live, CHAT)
        assert status in (502, 503)
        assert answer["error"]["code"] in ("upstream_error", "no_instances")
        assert status == 502 or int(headers["retry-after-ms"]) > 0
        await live.quiet()


async def test_a_kept_connection_that_the_engine_closed_costs_one_more_try_and_no_detour() -> None:
    engine = FakeEngine()
    async with over(engine) as live:
        assert (await post(live, CHAT))[0] == 200
        engine.hang_ups = 1
        assert (await post(live, CHAT))[0] == 200
        assert len(engine.seen) == 3


async def test_a_deadline_out_of_reach_is_refused_with_the_time_to_come_back() -> None:
    instances = [{"id": "e0", "url": "", "max_num_seqs": 1}]
    engine = FakeEngine(first_after_s=60)
    async with engine.running():
        instances[0]["url"] = engine.url
        async with listening(make_plan([], instances=instances)) as live:
            await live.ready()
            first = asyncio.create_task(post(live, CHAT))
            await until(lambda: engine.streams == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                await live.openai.chat.completions.create(
                    model="tiny", messages=MESSAGES, extra_headers={"x-slo-ttft-ms": "100", "x-slo-tpot-ms": "100"}
                )
            assert caught.value.code == "overloaded"
            assert int(caught.value.response.headers["retry-after-ms"]) >= 1
            assert int(caught.value.response.headers["retry-after"]) >= 1
            first.cancel()
            await live.quiet()


async def test_more_requests_than_may_be_open_are_refused() -> None:
    engine = FakeEngine(first_after_s=60)
    limits = {"probe_s": 0.05, "shutdown_s": 1, "open_requests": 2}
    async with over(engine, limits=limits) as live:
        asked = [asyncio.create_task(post(live, CHAT)) for _ in range(2)]
        await until(lambda: len(live.gateway.inflight) == 2)
        status, answer, headers = await post(live, CHAT)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert headers["retry-after"] == "1"
        for task in asked:
            task.cancel()
        await live.quiet()


async def test_a_stream_that_falls_silent_is_given_up() -> None:
    limits = {"probe_s": 0.05, "shutdown_s": 1, "silence_s": 0.2}
    async with over(FakeEngine(first_after_s=60), FakeEngine(), limits=limits) as live:
        answers = await asyncio.gather(*(post(live, CHAT) for _ in range(4)))
        assert {status for status, _, _ in answers} == {200}
        assert {headers["x-polyserve-instance"] for _, _, headers in answers} == {"e1"}
        await live.quiet()


async def test_no_engine_at_all_is_said_at_once_and_an_engine_that_comes_is_taken(caplog: Any) -> None:
    engine = FakeEngine()
    async with engine.running():
        pass  # its port is free again, and nobody answers there
    async with listening(make_plan([engine.url])) as live:
        await until(lambda: "answers nothing" in caplog.text)
        assert caplog.text.count("answers nothing") == 1
        async with live.http.get(f"{live.url}/ready") as answer:
            assert answer.status == 503
        async with engine.running(engine.port):
            await live.ready()
            assert (await post(live, CHAT))[0] == 200


async def test_a_pace_that_only_the_tiers_forbid_is_not_blamed_on_the_instances() -> None:
    tiers = [{"name": "calm", "tpot_ms": 50, "ttft_ms": 500}]
    async with over(FakeEngine(), tiers=tiers) as live:
        status, answer, _ = await post(live, CHAT, x_slo_tpot_ms="30")  # an idle instance needs 12 ms
        assert status == 400
        assert "tighter than every tier" in answer["error"]["message"]


async def test_an_engine_of_another_model_is_named_and_gets_no_requests(caplog: Any) -> None:
    other, right = FakeEngine(models=("big", "huge")), FakeEngine(models=("huge", "tiny"))
    async with other.running(), right.running(), listening(make_plan([other.url, right.url])) as live:
        await until(lambda: "serves" in caplog.text and live.gateway.fleet.ready)
        answers = await asyncio.gather(*(post(live, CHAT) for _ in range(4)))
        assert [status for status, _, _ in answers] == [200] * 4
        assert not other.seen
        said = [record.getMessage() for record in caplog.records if "serves" in record.getMessage()]
        assert said == [f"instance e0: {other.url} serves 'big', 'huge', not 'tiny'; it is tried again"]
        other.models = ("tiny",)
        await live.ready(2)


async def test_a_refusal_beside_the_proxy_leaves_no_traceback_in_the_log(caplog: Any) -> None:
    async with over(FakeEngine()) as live, live.http.get(f"{live.url}/v1/models/another") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "model_not_found")
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_tier_that_no_instance_of_a_profile_can_hold_is_said_at_start(caplog: Any) -> None:
    tiers = [{"name": "rushed", "tpot_ms": 10, "ttft_ms": 500}, {"name": "fast", "tpot_ms": 20, "ttft_ms": 500}]
    async with over(FakeEngine(), tiers=tiers):
        said = [record.getMessage() for record in caplog.records if "cannot hold" in record.getMessage()]
    assert said == [
        "profile a100-llama-3-8b cannot hold tier rushed: a token takes an idle instance 11.8 ms, and 10 ms is asked"
    ]


async def test_requests_on_a_lost_engine_go_to_another() -> None:
    slow, sound = FakeEngine(first_after_s=60), FakeEngine()
    async with contextlib.AsyncExitStack() as stack:
        async with slow.running():
            await stack.enter_async_context(sound.running())
            live = await stack.enter_async_context(listening(make_plan([slow.url, sound.url])))
            await live.ready(2)
            asked = [asyncio.create_task(post(live, CHAT)) for _ in range(6)]
            await until(lambda: slow.streams > 0)
        assert {status for status, _, _ in await asyncio.gather(*asked)} == {200}
        await until(lambda: [node.state for node in live.gateway.fleet] == ["unreachable", "ready"])
        await live.quiet()


# ---------------------------------------------------------------------------------------------------- best effort


@contextlib.asynccontextmanager
async def crowded(engine: FakeEngine, kind: str) -> AsyncIterator[Live]:
    """A gateway over an engine that serves one request at a time."""
    async with engine.running():
        instances = [{"id": "e0", "url": engine.url, "max_num_seqs": 1, "kind": kind}]
        async with listening(make_plan([], instances=instances, settings={"best_effort_headroom": 0})) as live:
            await live.ready()
            yield live


EASY = {"x-polyserve-tier": "best-effort"}


@pytest.mark.parametrize(("path", "body", "texts"), [
    ("/v1/chat/completions", CHAT | {"max_tokens": 60}, "content"),
    ("/v1/completions", {"model": "tiny", "prompt": "once", "max_tokens": 60}, "text"),
])  # fmt: skip
async def test_a_stream_that_makes_room_goes_on_where_it_stopped(path: str, body: dict[str, Any], texts: str) -> None:
    engine = FakeEngine(tokens=60, every_s=0.005)
    async with crowded(engine, "vllm") as live:
        easy = asyncio.create_task(post(live, body | {"stream": True}, path, **EASY))
        await until(lambda: engine.streams == 1)
        await asyncio.sleep(0.05)
        status, _, headers = await post(live, CHAT, x_slo_ttft_ms="300", x_slo_tpot_ms="100")
        assert (status, headers["x-polyserve-tier"]) == (200, "slow")
        status, text, _ = await easy
        events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
        parts = [event["choices"][0].get("delta", event["choices"][0]) for event in events]
        assert status == 200
        assert [part["role"] for part in parts if "role" in part] in ([], ["assistant"])
        assert "".join(part[texts] for part in parts if part[texts]) == "".join(f"t{n} " for n in range(60))
        assert text.endswith("data: [DONE]\n\n")
        _, _, resumed = engine.seen[-1]
        assert 0 < resumed["max_tokens"] < 60
        await live.quiet()


async def test_a_whole_answer_that_makes_room_is_made_again() -> None:
    engine = FakeEngine(tokens=60, every_s=0.005)
    async with crowded(engine, "openai") as live:
        easy = asyncio.create_task(post(live, CHAT, **EASY))
        await until(lambda: engine.streams == 1)
        assert (await post(live, CHAT, x_slo_ttft_ms="300", x_slo_tpot_ms="100"))[0] == 200
        _, answer, _ = await easy
        assert answer["choices"][0]["message"]["content"] == "".join(f"t{n} " for n in range(60))
        await live.quiet()


async def test_a_stream_that_makes_room_on_an_engine_that_cannot_continue_says_so() -> None:
    engine = FakeEngine(tokens=60, every_s=0.005)
    async with crowded(engine, "openai") as live:
        easy = asyncio.create_task(post(live, CHAT | {"stream": True}, **EASY))
        await until(lambda: engine.streams == 1)
        await asyncio.sleep(0.05)
        assert (await post(live, CHAT, x_slo_ttft_ms="300", x_slo_tpot_ms="100"))[0] == 200
        _, text, _ = await easy
        assert "upstream_error" in text
        await live.quiet()


# ------------------------------------------------------------------------------------------------- clients that go


async def test_a_client_that_goes_takes_its_request_off_the_engine() -> None:
    engine = FakeEngine(tokens=1000, every_s=0.01)
    async with over(engine) as live:
        stream = await live.openai.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await live.quiet()
        await until(lambda: engine.streams == 0)
        assert engine.cut == 1


async def test_clients_may_go_at_any_moment_and_nothing_is_left_behind() -> None:
    engine = FakeEngine(tokens=8, every_s=0.004, first_after_s=0.01)
    async with over(engine, engine2 := FakeEngine(tokens=8, every_s=0.004)) as live:
        for wave in range(6):
            asked = [asyncio.create_task(post(live, CHAT | {"stream": bool(n % 2)})) for n in range(12)]
            for n, task in enumerate(asked):
                await asyncio.sleep(0.0013 * (wave + n % 3))
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        await live.quiet()
        await until(lambda: engine.streams + engine2.streams == 0)
        assert (await post(live, CHAT))[0] == 200


# -------------------------------------------------------------------------------------------------------- operations


async def test_what_operators_read_is_there() -> None:
    async with over(FakeEngine(), settings={"explain": True}) as live:
        await post(live, CHAT, x_polyserve_tier="fast")
        async with live.http.get(f"{live.url}/metrics") as answer:
            text = await answer.text()
        for line in (
            'polyserve_requests_total{model="tiny",outcome="ok",tier="fast"} 1.0',
            'polyserve_slo_attained_total{model="tiny",tier="fast"} 1.0',
            'polyserve_request_ttft_seconds_count{model="tiny",tier="fast"} 1.0',
            'polyserve_instances{model="tiny",state="ready",tier="fast"} 1.0',
            'polyserve_queue_size{model="tiny",tier="slow"} 0.0',
        ):
            assert line in text
        async with live.http.get(f"{live.url}/admin/fleet") as answer:
            (instance,) = (await answer.json())["instances"]
        assert (instance["id"], instance["state"], instance["tier"]) == ("e0", "ready", "fast")
        async with live.http.get(f"{live.url}/admin/decisions?limit=1") as answer:
            (decision,) = (await answer.json())["decisions"]
        assert (decision["decision"], decision["instance"], decision["tier"]) == ("dispatch", "e0", "fast")
        assert decision["forecast"]["token1_s"] > 0
        async with live.http.get(f"{live.url}/admin/tiers") as answer:
            assert [tier["name"] for tier in (await answer.json())["tiers"]] == [tier["name"] for tier in TIERS]
        models = [model.id async for model in live.openai.models.list()]
        assert models == ["tiny"]


async def test_instances_join_drain_and_leave_by_the_admin_api() -> None:
    second = FakeEngine()
    async with second.running(), over(FakeEngine(tokens=40, every_s=0.01)) as live:
        asked = asyncio.create_task(post(live, CHAT | {"stream": True}))
        await until(lambda: len(live.gateway.inflight) == 1)
        async with live.http.post(f"{live.url}/admin/instances", json={"id": "new", "url": second.url}) as answer:
            assert answer.status == 202
        await live.ready(2)
        async with live.http.post(f"{live.url}/admin/instances/e0/drain") as answer:
            assert answer.status == 202
        _, _, headers = await post(live, CHAT)
        assert headers["x-polyserve-instance"] == "new"
        status, text, _ = await asked
        assert (status, text.count("data: ")) == (200, 42)
        await until(lambda: [node.id for node in live.gateway.fleet] == ["new"])
        async with live.http.delete(f"{live.url}/admin/instances/new") as answer:
            assert answer.status == 204
        status, answer, headers = await post(live, CHAT)
        assert (status, answer["error"]["code"]) == (503, "no_instances")
        assert int(headers["retry-after"]) >= 1


@pytest.mark.parametrize(("body", "code"), [
    ({"id": "e0", "url": "http://127.0.0.1:1"}, "instance_exists"),
    ({"id": "x"}, "invalid_instance"),
    ({"id": "x", "url": "ftp://nowhere"}, "invalid_url"),
    ({"id": "a b", "url": "http://127.0.0.1:1"}, "invalid_id"),
    ({"id": "x", "url": "http://127.0.0.1:1", "profile": "tpu"}, "unknown_profile"),
    ({"id": "x", "url": "http://127.0.0.1:1", "kind": "oracle"}, "invalid_kind"),
    ({"id": "x", "url": "http://127.0.0.1:1", "chunk": "big"}, "invalid_instance"),
])  # fmt: skip
async def test_instances_that_cannot_be_are_refused(body: Any, code: str) -> None:
    async with over(FakeEngine()) as live, live.http.post(f"{live.url}/admin/instances", json=body) as answer:
        assert answer.status in (400, 409)
        assert (await answer.json())["error"]["code"] == code


async def test_a_request_that_nobody_waits_for_any_more_keeps_no_place_in_the_books() -> None:
    """It ended while the brain took it off its instance, to which its end is then stale news."""
    async with over(FakeEngine()) as live:
        driver, decided = live.gateway.driver, live.gateway.decisions
        driver.post(Arrived(driver.now(), Request("ended", driver.now(), 10, None)))
        await until(lambda: any(one["request"] == "ended" for one in decided.last(9)))
        await live.quiet()
