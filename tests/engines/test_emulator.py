"""The emulated engine as its clients see it: over HTTP, with the openai SDK, in real time."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from quick_engine import QUICK, running

from polyserve.core.settings import Settings
from polyserve.core.types import Instance
from polyserve.engines.emulator import Answer, Emulator
from polyserve.engines.server import EngineError, EngineOptions, run_engine
from polyserve.engines.words import count_tokens, read_text, voice, word

QUESTION = "Why is the sky blue?"  # five tokens
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def words(text: str, count: int, choice: int = 0) -> str:
    """What the engine answers to a completion prompt."""
    own = voice(read_text(text.encode(), 0).identity, 0, choice)
    return b"".join(word(own, position) for position in range(count)).decode()


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    async with running(tmp_path) as urls:
        yield urls[0]


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def metrics(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Samples by name, summed over their labels."""
    async with http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


async def until(http: aiohttp.ClientSession, url: str, **wanted: float) -> dict[str, float]:
    """The metrics once those named have the values wanted."""
    async with asyncio.timeout(20):
        while True:
            values = await metrics(http, url)
            if all(values[f"vllm:{name}"] == value for name, value in wanted.items()):
                return values
            await asyncio.sleep(0.005)


async def test_a_chat_streams_one_event_per_token_and_ends_with_usage(sdk: AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="quick",
        messages=MESSAGES,
        max_completion_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(said) == 7
    assert all(count_tokens(text.encode()) == 1 for text in said if text)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 7, 12)


async def test_streamed_or_not_the_answer_is_the_same(sdk: AsyncOpenAI) -> None:
    whole = await sdk.chat.completions.create(model="quick", messages=MESSAGES, n=2, max_tokens=20)
    texts = {0: "", 1: ""}
    reasons = {}
    stream = await sdk.chat.completions.create(model="quick", messages=MESSAGES, n=2, max_tokens=20, stream=True)
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert [texts[0], texts[1]] == [choice.message.content for choice in whole.choices]
    assert [reasons[0], reasons[1]] == [choice.finish_reason for choice in whole.choices]
    assert texts[0] != texts[1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == sum(count_tokens(text.encode()) for text in texts.values())


async def test_tokens_are_a_function_of_request_and_position(sdk: AsyncOpenAI) -> None:
    answer = await sdk.completions.create(
        model="quick", prompt=[QUESTION, "And the sea?"], max_tokens=9, n=2, extra_body={"ignore_eos": True}
    )
    assert [choice.text for choice in answer.choices] == [
        words(QUESTION, 9),
        words(QUESTION, 9, 1),
        words("And the sea?", 9),
        words("And the sea?", 9, 1),
    ]
    other = await sdk.completions.create(model="quick", prompt=QUESTION, max_tokens=9, seed=5)
    assert other.choices[0].text[:6] != answer.choices[0].text[:6]


async def test_a_completion_that_ends_with_its_answer_goes_on_exactly(sdk: AsyncOpenAI) -> None:
    for made in (1, 6):
        answer = await sdk.completions.create(
            model="quick",
            prompt=QUESTION + words(QUESTION, made),
            max_tokens=10 - made,
            extra_body={"ignore_eos": True},
        )
        assert words(QUESTION, made) + answer.choices[0].text == words(QUESTION, 10)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 5 + made


async def test_token_ids_go_on_exactly_too(sdk: AsyncOpenAI) -> None:
    async def made(prompt: list[int], tokens: int) -> list[int]:
        answer = await sdk.completions.create(
            model="quick",
            prompt=prompt,
            max_tokens=tokens,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        ids = answer.choices[0].model_dump()["token_ids"]
        assert isinstance(ids, list)
        return ids

    prompt = [5, 6, 7]
    whole = await made(prompt, 8)
    assert whole[:3] + await made(prompt + whole[:3], 5) == whole


@pytest.mark.parametrize("begun", ["", "Well,"])
async def test_a_chat_whose_last_message_is_its_answer_goes_on_exactly(sdk: AsyncOpenAI, begun: str) -> None:
    def chat(said: str) -> Any:
        return [*MESSAGES, {"role": "assistant", "content": said}] if said else MESSAGES

    async def answer(said: str, tokens: int) -> str:
        extra: dict[str, object] = {"ignore_eos": True}
        if said:
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        got = await sdk.chat.completions.create(model="quick", messages=chat(said), max_tokens=tokens, extra_body=extra)
        return got.choices[0].message.content or ""

    whole = await answer(begun, 9)
    part = "".join(re.findall(r" \w+~\w+", whole)[:4])
    assert part + await answer(begun + part, 5) == whole


async def test_an_answer_ends_where_it_would_have_without_the_break(sdk: AsyncOpenAI) -> None:
    whole = await sdk.completions.create(model="quick", prompt="Say something long.", max_tokens=2000)
    text = whole.choices[0].text
    assert whole.choices[0].finish_reason == "stop"
    half = "".join(re.findall(r" \w+~\w+", text)[: count_tokens(text.encode()) // 2])
    rest = await sdk.completions.create(model="quick", prompt=f"Say something long.{half}", max_tokens=2000)
    assert half + rest.choices[0].text == text
    assert rest.choices[0].finish_reason == "stop"


async def test_a_replay_may_tell_how_long_the_answer_is(sdk: AsyncOpenAI) -> None:
    async def answer(prompt: str, max_tokens: int) -> Any:
        extra = {"vllm_xargs": {"output_tokens": 12}}
        got = await sdk.completions.create(model="quick", prompt=prompt, max_tokens=max_tokens, extra_body=extra)
        return got.choices[0].text, got.choices[0].finish_reason

    assert await answer(QUESTION, 50) == (words(QUESTION, 12), "stop")
    assert await answer(QUESTION, 9) == (words(QUESTION, 9), "length")
    assert await answer(QUESTION + words(QUESTION, 9), 50) == (words(QUESTION, 12)[len(words(QUESTION, 9)) :], "stop")


async def test_a_client_that_leaves_frees_its_place(url: str, sdk: AsyncOpenAI, http: aiohttp.ClientSession) -> None:
    stream = await sdk.completions.create(
        model="quick", prompt=QUESTION, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await until(http, url, num_requests_running=1)
    await stream.close()
    values = await until(http, url, num_requests_running=0)
    assert values["vllm:kv_cache_usage_perc"] == 0
    assert values["vllm:generation_tokens_total"] < 4000


async def test_a_client_that_leaves_without_streaming_frees_its_place(url: str, http: aiohttp.ClientSession) -> None:
    body = {"prompt": QUESTION, "max_tokens": 4000, "ignore_eos": True}
    request = asyncio.create_task(http.post(f"{url}/v1/completions", json=body))
    await until(http, url, num_requests_running=1)
    request.cancel()
    await until(http, url, num_requests_running=0)


async def test_metrics_carry_vllm_names_and_count_what_was_done(
    url: str, sdk: AsyncOpenAI, http: aiohttp.ClientSession
) -> None:
    await sdk.completions.create(model="quick", prompt=QUESTION, max_tokens=6, extra_body={"ignore_eos": True})
    values = await metrics(http, url)
    assert values["vllm:prompt_tokens_total"] == 5
    assert values["vllm:generation_tokens_total"] == 6
    assert values["vllm:request_success_total"] == 1
    assert values["vllm:time_to_first_token_seconds_count"] == 1
    assert values["vllm:inter_token_latency_seconds_count"] == 5
    assert values["vllm:num_requests_waiting"] == values["vllm:num_preemptions_total"] == 0
    assert {"polyserve_emulator_lag_seconds", "polyserve_emulator_keeps_real_time"} <= set(values)
    async with http.get(f"{url}/metrics") as answer:
        assert 'num_gpu_blocks="1250"' in await answer.text()


async def test_requests_beyond_the_seats_wait(url: str, sdk: AsyncOpenAI, http: aiohttp.ClientSession) -> None:
    async def one() -> Any:
        return await sdk.completions.create(
            model="quick", prompt=QUESTION, max_tokens=100, extra_body={"ignore_eos": True}
        )

    asked = [asyncio.create_task(one()) for _ in range(10)]
    await until(http, url, num_requests_running=8, num_requests_waiting=2)
    assert all(answer.usage.completion_tokens == 100 for answer in await asyncio.gather(*asked))


async def test_it_says_what_it_is_and_takes_a_pace(url: str, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{url}/polyserve/pace", json={"pace_s": 0.05}) as answer:
        assert answer.status == 200
    async with http.get(f"{url}/polyserve/info") as answer:
        facts = await answer.json()
    assert {key: facts[key] for key in ("profile", "chunk", "order", "kv_tokens", "max_num_seqs", "pace_s")} == {
        "profile": "quick",
        "chunk": "dynamic",
        "order": "deadline",
        "kv_tokens": 20_000,
        "max_num_seqs": 8,
        "pace_s": 0.05,
    }
    async with http.get(f"{url}/health") as answer:
        assert answer.status == 200
    async with http.get(f"{url}/version") as answer:
        assert (await answer.json())["version"]
    async with http.get(f"{url}/v1/models") as answer:
        model = (await answer.json())["data"][0]
    assert (model["id"], model["max_model_len"]) == ("quick", 4096)


async def test_telemetry_follows_requests_by_the_name_their_client_gave(url: str, http: aiohttp.ClientSession) -> None:
    body = {"prompt": [7] * 1200, "max_tokens": 150, "ignore_eos": True, "stream": True}
    async with http.get(f"{url}/polyserve/telemetry") as told:
        answer = await http.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "mine"})
        lines = [json.loads(await told.content.readline()) for _ in range(4)]
        answer.close()
    assert lines[0]["prefilling"] == {"mine": 700}
    counts = [line["tokens"]["mine"] for line in lines[1:]]
    assert counts == sorted(set(counts))
    assert all(line["kv_tokens"] == 1200 + line["tokens"]["mine"] - 1 for line in lines[2:])
    assert all(line["decodes"] == 1 and 0 < line["seconds"] < 0.01 for line in lines[2:])


class Recorder:
    """Keeps when each token was made in the engine's own time, and stalls the machine once."""

    def __init__(self) -> None:
        self.made_at: list[float] = []
        self.ended = asyncio.Event()
        self.emulator: Emulator | None = None

    def token(self, answer: Answer) -> None:
        assert self.emulator is not None
        assert self.emulator.iteration is not None
        self.made_at.append(self.emulator.iteration.ended_at)
        if answer.made == 5:
            time.sleep(0.03)
        if answer.ended:
            self.ended.set()


async def test_a_stall_of_the_machine_is_caught_up_with_and_told() -> None:
    emulator, recorder = Emulator(Instance("i", "quick"), QUICK, QUICK, settings=Settings()), Recorder()
    recorder.emulator = emulator
    running = asyncio.create_task(emulator.run())
    asked = {"prompt_tokens": 8, "delivered": 0, "output_tokens": 40, "reason": "length"}
    emulator.submit("r", recorder, 0, 0, slo=None, arrived_at=emulator.clock(), **asked)  # type: ignore[arg-type]
    await recorder.ended.wait()
    running.cancel()
    gaps = [later - earlier for earlier, later in pairwise(recorder.made_at)]
    assert gaps == pytest.approx([QUICK.iteration_s(0, 1, 9)] * 39, abs=2e-6)
    assert emulator.worst_lag_s > 0.02
    assert emulator.late_iterations > 1
    assert not emulator.keeps_real_time


async def test_the_tightest_deadline_goes_first(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    order: list[str] = []

    async def ask(url: str, name: str, tokens: int, ttft_ms: float | None) -> None:
        xargs = {"slo_ttft_ms": ttft_ms, "slo_tpot_ms": 20} if ttft_ms else None
        body = {"prompt": [1] * 400, "max_tokens": tokens, "ignore_eos": True, "vllm_xargs": xargs}
        async with http.post(f"{url}/v1/completions", json=body) as answer:
            assert answer.status == 200
        order.append(name)

    async with running(tmp_path, max_num_seqs=1) as (url,):
        asked = [asyncio.create_task(ask(url, "first", 300, None))]
        await until(http, url, num_requests_running=1)
        for name, ttft_ms in (("free", None), ("loose", 9000), ("tight", 300)):
            asked.append(asyncio.create_task(ask(url, name, 5, ttft_ms)))
        await until(http, url, num_requests_waiting=3)
        await asyncio.gather(*asked)
    assert order == ["first", "tight", "loose", "free"]


async def test_one_process_may_be_several_instances(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with running(tmp_path, 2, chunk="fixed:100", model_name="llama") as (one, two):
        body = {"prompt": "x", "max_tokens": 3, "model": "llama"}
        async with http.post(f"{one}/v1/completions", json=body) as answer:
            assert answer.status == 200
        assert (await metrics(http, one))["vllm:prompt_tokens_total"] == 1
        assert (await metrics(http, two))["vllm:prompt_tokens_total"] == 0
        async with http.get(f"{two}/polyserve/info") as answer:
            assert (await answer.json())["chunk"] == "fixed:100"


async def test_tokenize_counts_as_usage_does(url: str, sdk: AsyncOpenAI, http: aiohttp.ClientSession) -> None:
    text = QUESTION + words(QUESTION, 2) + " Ah — näher…"
    answer = await sdk.completions.create(model="quick", prompt=text, max_tokens=1)
    async with http.post(f"{url}/tokenize", json={"prompt": text}) as told:
        counted = await told.json()
    assert answer.usage is not None
    assert counted["count"] == len(counted["tokens"]) == answer.usage.prompt_tokens
    async with http.post(f"{url}/tokenize", json={"messages": MESSAGES}) as told:
        assert (await told.json())["count"] == 5


async def test_the_sdk_raises_the_errors_it_knows(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
        await sdk.completions.create(model="nope", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens") as caught:
        await sdk.chat.completions.create(model="quick", messages=MESSAGES, max_tokens=4092)
    assert caught.value.param == "max_tokens"
    most = await sdk.completions.create(
        model="quick", prompt=[1] * 4000, max_tokens=96, extra_body={"ignore_eos": True}
    )
    assert most.usage is not None
    assert most.usage.total_tokens == 4096


BAD_BODIES = [
    ("completions", "nonsense", "the body is not JSON"),
    ("completions", "[]", "Expected `object`"),
    ("completions", "{}", "prompt: Object missing required field"),
    ("completions", '{"prompt": 5}', "prompt: Expected"),
    ("completions", '{"prompt": []}', "prompt: is empty"),
    ("completions", '{"prompt": [1, "x"]}', "prompt: token ids and prompts"),
    ("completions", '{"prompt": [-1]}', "prompt[0]: Expected `int` >= 0"),
    ("completions", '{"prompt": "x", "max_tokens": "many"}', "max_tokens: Expected `int | null`, got `str`"),
    ("completions", '{"prompt": "x", "max_tokens": 0}', "max_tokens: Expected `int` >= 1"),
    ("completions", '{"prompt": "x", "n": 0}', "n: Expected `int` >= 1"),
    ("completions", '{"prompt": "x", "min_tokens": 50}', "min_tokens: 50 is more than max_tokens"),
    ("completions", '{"prompt": "x", "stream_options": {}}', "stream_options: only with stream true"),
    ("completions", '{"prompt": "x", "echo": true}', "echo: "),
    ("completions", '{"prompt": "x", "vllm_xargs": {"slo_ttft_ms": 5}}', "vllm_xargs.slo_tpot_ms: is missing"),
    (
        "completions",
        '{"prompt": "x", "vllm_xargs": {"slo_ttft_ms": "fast", "slo_tpot_ms": 5}}',
        "vllm_xargs.slo_ttft_ms: wants a positive number, not 'fast'",
    ),
    ("chat/completions", "{}", "messages: Object missing required field"),
    ("chat/completions", '{"messages": []}', "messages: Expected `array` of length >= 1"),
    ("chat/completions", '{"messages": [{"content": "x"}]}', "messages[0]: Object missing required field `role`"),
    (
        "chat/completions",
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "messages[0].content[0]: this engine reads text parts only",
    ),
    (
        "chat/completions",
        '{"messages": [{"role": "user", "content": "x"}], "continue_final_message": true}',
        "continue_final_message: wants",
    ),
]


async def test_bad_bodies_are_told_which_field_and_why(
    url: str, http: aiohttp.ClientSession, subtests: pytest.Subtests
) -> None:
    for path, body, complaint in BAD_BODIES:
        with subtests.test(body=body):
            async with http.post(f"{url}/v1/{path}", data=body) as answer:
                assert answer.status == 400
                error = (await answer.json())["error"]
            assert complaint in error["message"]
            assert set(error) == {"message", "type", "param", "code"}


async def test_a_body_of_50_mb_is_refused_and_read_to_its_end(url: str, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{url}/v1/completions", data=io.BytesIO(b"x" * 50_000_000)) as answer:
        assert answer.status == 413
        assert "larger than 32 MiB" in (await answer.json())["error"]["message"]


async def test_unknown_paths_and_methods_are_refused(url: str, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{url}/v2/completions") as answer:
        assert answer.status == 404
    async with http.get(f"{url}/v1/completions") as answer:
        assert answer.status == 405


def test_a_process_ends_in_order_on_a_signal() -> None:
    command = [sys.executable, "-m", "polyserve", "engine", "--profile", "a100-llama-3-8b", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "http://127.0.0.1:" in process.stdout.readline()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"chunk": "fixed:0"}, "--chunk: dynamic or fixed:TOKENS, not 'fixed:0'"),
        ({"jitter": 1.5}, "--jitter: from 0 to below 1"),
        ({"bias": -1.0}, "--bias: more than -1"),
        ({"instances": 0}, "--instances: at least 1"),
        ({"kv_tokens": 10}, "--kv-tokens: at least a block of 16"),
        ({"port": 65535, "instances": 2}, "--port: from 0 to 65534"),
        ({"host": "192.0.2.1"}, "--port: cannot listen on 192.0.2.1:8000"),
    ],
)
def test_engines_that_cannot_be_run_say_which_option(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EngineError, match=re.escape(complaint)):
        run_engine(EngineOptions("a100-llama-3-8b", **options))
