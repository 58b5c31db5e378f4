"""The openai SDK for Python against a live gateway: every error is the right exception, every helper works."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live import Live, until
from pydantic import BaseModel
from sdk_house import CASES, LARGEST_MIB, REJECTED, TOOL, Case, Engines, house

MESSAGES: Any = [{"role": "user", "content": "How is the weather?"}]
House = tuple[asyncio.AbstractEventLoop, Live, Engines]


@pytest.fixture(scope="module")
def served() -> Iterator[House]:
    """One gateway for all cases, in a loop of its own."""
    loop = asyncio.new_event_loop()
    context = house()
    live, engines = loop.run_until_complete(context.__aenter__())
    yield loop, live, engines
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


@pytest.mark.parametrize("case", [*CASES, REJECTED], ids=lambda case: case.name)
def test_each_error_is_the_right_exception(served: House, case: Case) -> None:
    loop, live, _ = served
    asking = live.openai.chat.completions.create(
        model=case.model, messages=MESSAGES, extra_headers=case.headers, extra_body=case.body
    )
    with pytest.raises(openai.APIStatusError) as caught:
        loop.run_until_complete(asking)
    error = caught.value
    assert (type(error).__name__, error.status_code, str(error.code)) == (case.raised, case.status, case.code)
    assert error.message
    assert error.type
    assert error.request_id
    retried = error.status_code in (429, 503)
    assert (int(error.response.headers.get("retry-after-ms", 0)) > 0) is retried
    assert (int(error.response.headers.get("retry-after", 0)) > 0) is retried


def test_a_body_that_is_too_large_is_a_status_error(served: House) -> None:
    loop, live, _ = served
    huge: Any = [{"role": "user", "content": "x" * round(LARGEST_MIB * 2**21)}]
    with pytest.raises(openai.APIStatusError) as caught:
        loop.run_until_complete(live.openai.chat.completions.create(model="good", messages=huge))
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


def test_an_error_within_a_stream_is_raised_from_it(served: House) -> None:
    loop, live, _ = served

    async def ask() -> None:
        async for _ in await live.openai.chat.completions.create(model="breaking", messages=MESSAGES, n=2, stream=True):
            pass

    with pytest.raises(openai.APIError) as caught:
        loop.run_until_complete(ask())
    assert caught.value.code == "upstream_error"


class Refusals:
    """What a client was answered, and how long it waited before it asked again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[tuple[int, str | None, str]] = []
        self.waits: list[float] = []
        self.before_waiting: Any = None
        monkeypatch.setattr("openai._base_client.anyio.sleep", self._wait)

    def client(self, live: Live, retries: int) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [self._answered]})
        return openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=retries, http_client=http)

    async def _answered(self, response: Any) -> None:
        count = response.request.headers["x-stainless-retry-count"]
        self.answers.append((response.status_code, response.headers.get("retry-after-ms"), count))

    async def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        if self.before_waiting is not None:
            await self.before_waiting()


def test_the_time_to_come_back_is_honoured(served: House, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, live, _ = served
    refusals = Refusals(monkeypatch)

    async def ask() -> str | None:
        holding = await live.openai.chat.completions.create(model="again", messages=MESSAGES, stream=True)
        refusals.before_waiting = holding.close
        async with refusals.client(live, retries=2) as client:
            answer = await client.chat.completions.create(model="again", messages=MESSAGES, max_tokens=5)
            return answer.choices[0].message.content

    assert loop.run_until_complete(ask())
    (refused, after_ms, _), (served_then, _, count) = refusals.answers
    assert (refused, served_then, count) == (429, 200, "1")
    assert after_ms is not None
    assert refusals.waits == [int(after_ms) / 1e3]


def test_what_may_be_tried_again_is_and_what_may_not_is_not(served: House, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, live, _ = served
    attempts = {}
    for case in CASES:
        refusals = Refusals(monkeypatch)

        async def ask(case: Case = case, refusals: Refusals = refusals) -> None:
            async with refusals.client(live, retries=1) as client:
                with pytest.raises(openai.APIStatusError):
                    await client.chat.completions.create(
                        model=case.model, messages=MESSAGES, extra_headers=case.headers, extra_body=case.body
                    )

        loop.run_until_complete(ask())
        attempts[case.name] = len(refusals.answers)
        told = [int(after_ms) / 1e3 for _, after_ms, _ in refusals.answers if after_ms]
        assert refusals.waits == told[:-1] or case.name == "engine fails"
    assert attempts == {case.name: 2 if case.status >= 429 else 1 for case in CASES}


def test_the_sync_client_works_too(served: House) -> None:
    loop, live, _ = served

    def ask() -> str:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            whole = client.chat.completions.create(model="good", messages=MESSAGES)
            stream = client.chat.completions.create(model="good", messages=MESSAGES, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert text == whole.choices[0].message.content
            return text

    assert loop.run_until_complete(asyncio.to_thread(ask)) == "t0 t1 t2 t3 t4 "


def test_the_streaming_helper_gathers_text_and_usage(served: House) -> None:
    loop, live, _ = served

    async def ask() -> tuple[str, Any]:
        options: Any = {"include_usage": True}
        async with live.openai.chat.completions.stream(
            model="good", messages=MESSAGES, stream_options=options
        ) as stream:
            text = "".join([event.delta async for event in stream if event.type == "content.delta"])
            return text, await stream.get_final_completion()

    text, final = loop.run_until_complete(ask())
    assert text == final.choices[0].message.content == "t0 t1 t2 t3 t4 "
    assert final.usage.completion_tokens == 5


def test_the_streaming_helper_gathers_tool_calls(served: House) -> None:
    loop, live, _ = served

    async def ask() -> tuple[list[str], Any]:
        async with live.openai.chat.completions.stream(model="calling", messages=MESSAGES, tools=[TOOL]) as stream:
            done = [event.name async for event in stream if event.type == "tool_calls.function.arguments.done"]
            return done, await stream.get_final_completion()

    done, final = loop.run_until_complete(ask())
    assert done == ["weather"]
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == {"city": "Bonn"}


class Place(BaseModel):
    city: str


def test_structured_output_is_parsed(served: House) -> None:
    loop, live, _ = served
    answer = loop.run_until_complete(
        live.openai.chat.completions.parse(model="structured", messages=MESSAGES, response_format=Place)
    )
    assert answer.choices[0].message.parsed == Place(city="Bonn")


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_who_goes_takes_the_request_off_the_engine(served: House, how: str) -> None:
    loop, live, engines = served

    async def ask() -> None:
        cut = engines.slow.cut
        stream = await live.openai.chat.completions.create(model="slow", messages=MESSAGES, stream=True)
        if how == "close":
            await stream.close()
        else:
            whole = asyncio.create_task(live.openai.chat.completions.create(model="slow", messages=MESSAGES))
            await until(lambda: engines.slow.streams == 2)
            whole.cancel()
            await until(lambda: engines.slow.streams == 1)
            await stream.close()
        await until(lambda: engines.slow.streams == 0)
        assert engines.slow.cut == cut + (1 if how == "close" else 2)

    loop.run_until_complete(ask())
