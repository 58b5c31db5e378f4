import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Literal

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from polyserve.core.types import Request, Slo
from polyserve.demand import Workload
from polyserve.report import Outcome, score
from polyserve.serve.replay import (
    Endpoint,
    Prompts,
    Replayed,
    ReplayError,
    body,
    headers,
    lag_note,
    replay,
    to_rows,
    window,
)
from polyserve.traces import Trace

EASY = Slo(10.0, 10.0)
Answer = Callable[[web.Request, dict[str, object]], Awaitable[web.StreamResponse]]


def trace_of(prompts: list[int], blocks: tuple[tuple[int, ...], ...] | None = None) -> Trace:
    counts = np.array(prompts, np.int64)
    return Trace("made", counts, np.full(len(prompts), 3, np.int64), None, blocks, block_tokens=16)


def workload_of(prompts: list[int], slo: Slo | None = EASY, gap_s: float = 0.01) -> Workload:
    requests = [Request(f"r{i}", i * gap_s, tokens, slo) for i, tokens in enumerate(prompts)]
    return Workload(requests, [3] * len(prompts), np.arange(len(prompts)), 0, 1.0)


async def streamed(request: web.Request, asked: dict[str, object], tokens: int = 3) -> web.StreamResponse:
    """What a well-behaved engine says."""
    response = web.StreamResponse(headers={"x-polyserve-instance": "i1", "x-polyserve-promoted": "true"})
    await response.prepare(request)
    for _ in range(tokens):
        await response.write(b'data: {"choices":[{"text":" a","finish_reason":null}]}\n\n')
    ending = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}}
    await response.write(f"data: {json.dumps(ending)}\n\ndata: [DONE]\n\n".encode())
    return response


@pytest.fixture
async def server() -> AsyncIterator[Callable[[Answer], Awaitable[str]]]:
    """Starts a real HTTP server that answers as told, and gives its URL."""
    started: list[TestServer] = []

    async def start(answer: Answer) -> str:
        async def completions(request: web.Request) -> web.StreamResponse:
            return await answer(request, await request.json())

        async def models(request: web.Request) -> web.Response:
            return web.json_response({"object": "list", "data": [{"id": "m"}]})

        app = web.Application()
        app.router.add_post("/v1/completions", completions)
        app.router.add_get("/v1/models", models)
        running = TestServer(app)
        await running.start_server()
        started.append(running)
        return str(running.make_url("/"))

    yield start
    for running in started:
        await running.close()


Start = Callable[[Answer], Awaitable[str]]


async def replayed(url: str, prompts: list[int], slo: Slo | None = EASY, patience_s: float = 60.0) -> Replayed:
    workload = workload_of(prompts, slo)
    endpoint = Endpoint(url, "m", patience_s=patience_s)
    return await replay(workload, Prompts(trace_of(prompts), workload), endpoint)


async def outcome_of(server: Start, answer: Answer, slo: Slo | None = EASY, patience_s: float = 60.0) -> Outcome:
    run = await replayed(await server(answer), [5], slo, patience_s)
    [outcome] = run.outcomes
    return outcome


async def test_every_request_is_sent_once_and_its_tokens_are_seen(server: Start) -> None:
    seen: list[dict[str, object]] = []

    async def answer(request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        seen.append(asked)
        return await streamed(request, asked)

    run = await replayed(await server(answer), [7, 1, 300])
    assert sorted(len(asked["prompt"]) for asked in seen) == [1, 7, 300]  # type: ignore[arg-type]
    assert [o.request for o in run.outcomes] == ["r0", "r1", "r2"]
    for outcome in run.outcomes:
        assert outcome.attained
        assert outcome.output_tokens == 3
        assert outcome.instance == "i1"
        assert outcome.promoted
        assert outcome.ttft_s is not None
        assert outcome.ttft_s > 0


async def test_a_token_after_its_deadline_is_late_by_that_much(server: Start) -> None:
    outcome = await outcome_of(server, streamed, Slo(0.0, 0.0))
    assert outcome.ending == "finished"
    assert not outcome.attained
    assert outcome.last_at is not None
    assert outcome.late_s == pytest.approx(outcome.last_at - outcome.arrived_at)


async def test_best_effort_requests_ask_for_no_pace(server: Start) -> None:
    asked_for: list[str] = []

    async def answer(request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        asked_for.extend(name.lower() for name in request.headers)
        return await streamed(request, asked)

    assert (await outcome_of(server, answer, slo=None)).ending == "finished"
    assert not [name for name in asked_for if name.startswith("x-slo")]


@pytest.mark.parametrize(
    ("status", "code", "ending"),
    [
        (429, "overloaded", "refused"),
        (429, "rate_limit_exceeded", "refused"),
        (400, "slo_infeasible", "refused"),
        (503, "no_instances", "refused"),
        (400, "invalid_slo", "failed"),
        (502, None, "failed"),
    ],
)
async def test_an_error_answer_is_a_refusal_or_a_failure_with_its_code(
    server: Start, status: int, code: str | None, ending: str
) -> None:
    async def answer(request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        if code is None:
            return web.Response(status=status, text="bad gateway")
        return web.json_response({"error": {"message": "no", "type": "x", "code": code}}, status=status)

    outcome = await outcome_of(server, answer)
    assert (outcome.ending, outcome.code) == (ending, code or str(status))
    assert not outcome.attained


async def test_an_error_inside_the_stream_is_a_failure(server: Start) -> None:
    async def answer(request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"text":" a"}]}\n\n')
        await response.write(b'data: {"error":{"message":"lost","code":"upstream_error"}}\n\n')
        return response

    outcome = await outcome_of(server, answer)
    assert (outcome.ending, outcome.code, outcome.output_tokens) == ("failed", "upstream_error", 1)


async def test_a_stream_that_ends_without_done_is_a_failure(server: Start) -> None:
    async def answer(request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"text":" a"}]}\n\n')
        return response

    outcome = await outcome_of(server, answer)
    assert (outcome.ending, outcome.code, outcome.output_tokens) == ("failed", "stream_cut", 1)


async def test_a_connection_that_breaks_is_a_failure_that_keeps_its_tokens(server: Start) -> None:
    async def answer(request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"text":" a"}]}\n\n')
        assert request.transport is not None
        request.transport.abort()
        return response

    outcome = await outcome_of(server, answer)
    assert outcome.ending == "failed"
    assert outcome.code is not None


async def test_a_stream_still_open_when_patience_ends_is_unfinished(server: Start) -> None:
    async def answer(request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"text":" a"}]}\n\n')
        await asyncio.Event().wait()
        return response

    outcome = await outcome_of(server, answer, patience_s=0.2)
    assert (outcome.ending, outcome.output_tokens) == ("unfinished", 1)


async def test_a_request_waits_for_nobody_before_it(server: Start) -> None:
    """Open loop: the first answer comes only when the last request has been sent."""
    arrived = asyncio.Event()

    async def answer(request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        if len(asked["prompt"]) == 9:  # type: ignore[arg-type]
            arrived.set()
        await arrived.wait()
        return await streamed(request, asked)

    run = await replayed(await server(answer), [5, 5, 5, 9])
    assert [o.ending for o in run.outcomes] == ["finished"] * 4


async def test_nobody_there_is_said_before_the_first_request() -> None:
    with pytest.raises(ReplayError, match="does not answer"):
        await replayed("http://127.0.0.1:1", [5])


async def test_another_model_is_said_with_those_that_there_are(server: Start) -> None:
    url = await server(streamed)
    workload = workload_of([5])
    with pytest.raises(ReplayError, match="does not serve 'llama'; models there: m"):
        await replay(workload, Prompts(trace_of([5]), workload), Endpoint(url, "llama"))


async def test_the_only_model_need_not_be_named(server: Start) -> None:
    workload = workload_of([5])
    run = await replay(workload, Prompts(trace_of([5]), workload), Endpoint(await server(streamed)))
    assert run.outcomes[0].attained


async def test_outcomes_score_and_write_like_simulated_ones(server: Start) -> None:
    run = await replayed(await server(streamed), [7, 1, 300])
    assert score(run.outcomes, window(workload_of([7, 1, 300]), run), [10.0]).overall.share.attained == 3
    assert [row["attained"] for row in json.loads(json.dumps(to_rows(run.outcomes)))] == [True] * 3
    assert lag_note(run.lag).startswith("client lag p99")


def test_the_output_length_travels_as_asked() -> None:
    exact = json.loads(body(Endpoint("http://x"), 40, 900, [100, 101]))
    assert (exact["max_tokens"], exact["ignore_eos"]) == (40, True)
    hidden = json.loads(body(Endpoint("http://x", max_tokens="none"), 40, 900, [100, 101]))
    assert hidden["vllm_xargs"] == {"output_tokens": 40}
    assert hidden["max_tokens"] == 900
    assert "ignore_eos" not in hidden


def test_a_chat_has_about_as_many_words_as_the_prompt_has_tokens() -> None:
    asked = json.loads(body(Endpoint("http://x", api="chat"), 40, 900, list(range(100, 150))))
    [message] = asked["messages"]
    assert len(message["content"].split()) == 50


def test_the_pace_travels_in_decimal_milliseconds() -> None:
    named = headers(Endpoint("http://x", "m", api_key="k"), Request("r0", 0.0, 2, Slo(0.3, 0.0125)))
    assert {(b"x-slo-ttft-ms", b"300"), (b"x-slo-tpot-ms", b"12.5"), (b"authorization", b"Bearer k")} <= set(named)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_url_may_end_in_v1_or_not(url: str) -> None:
    assert Endpoint(url, "m").base == "http://h:1"
    assert Endpoint(url, "m").path == "/v1/completions"
    assert Endpoint(f"{url}/", "m", api="chat").path == "/v1/chat/completions"


def test_prompts_share_the_prefix_that_the_trace_shares_and_nothing_else() -> None:
    prompts = [40, 40, 20]
    made = Prompts(trace_of(prompts, ((1, 2), (1, 3), ())), workload_of(prompts))
    first, second, third = made.ids(0), made.ids(1), made.ids(2)
    assert [len(first), len(second), len(third)] == prompts
    assert first[:16] == second[:16]
    assert first[16:32] != second[16:32]
    assert third[:16] != first[:16]
    assert made.ids(0) == first


# ------------------------------------------------------------------------------------------ against our own engine


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    """An emulated engine as a process of its own; its URL."""
    command = [sys.executable, "-m", "polyserve", "engine", "--profile", "a100-llama-3-8b", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = re.search(r"http://\S+?(?=/v1|\s|$)", process.stdout.readline())
        assert url is not None, "it says where it listens"
        yield url[0]
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.live
@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("max_tokens", ["exact", "none"])
async def test_an_emulated_engine_answers_with_the_length_of_the_trace(
    engine: str, api: Literal["completions", "chat"], max_tokens: Literal["exact", "none"]
) -> None:
    lengths = [(700, 1), (20, 17), (300, 60), (5, 5)]
    counts = np.array(lengths, np.int64)
    trace = Trace("made", counts[:, 0], counts[:, 1])
    requests = [Request(f"r{i}", 0.02 * i, prompt, Slo(2.0, 0.2)) for i, (prompt, _) in enumerate(lengths)]
    workload = Workload(requests, [output for _, output in lengths], np.arange(4), 0, 1.0)
    endpoint = Endpoint(engine, api=api, max_tokens=max_tokens)
    run = await replay(workload, Prompts(trace, workload), endpoint)
    assert [(o.ending, o.output_tokens) for o in run.outcomes] == [("finished", output) for _, output in lengths]
    assert all(o.attained for o in run.outcomes)
