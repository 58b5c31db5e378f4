"""Streams that lose their engine after the first byte: what the client sees, and what the next engine is asked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_engine import FIRST_ID, FakeEngine
from live import Live, listening, make_plan

from polyserve.serve import ask as asks
from polyserve.serve.continuation import Kept, NotContinuableError, obstacle

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 9}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Count.", "max_tokens": 9}
ALL = "".join(f"t{n} " for n in range(9))
PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


def engines(*hang_up_after: int | None, **values: Any) -> list[FakeEngine]:
    """Engines that lose their streams after so many events, each with an id and a clock of its own."""
    return [
        FakeEngine(tokens=9, every_s=0.002, hang_up_after=after, name=f"cmpl-{n}", created=100 + n, **values)
        for n, after in enumerate(hang_up_after)
    ]


@contextlib.asynccontextmanager
async def over(*fakes: FakeEngine, kind: str = "vllm") -> AsyncIterator[Live]:
    """A gateway over these engines, which the first is asked first."""
    async with contextlib.AsyncExitStack() as stack:
        for engine in fakes:
            await stack.enter_async_context(engine.running())
        instances = [{"id": f"e{n}", "url": engine.url, "kind": kind} for n, engine in enumerate(fakes)]
        live = await stack.enter_async_context(listening(make_plan([], instances=instances)))
        await live.ready(len(fakes))
        yield live


async def ask(live: Live, body: dict[str, Any]) -> tuple[int, str]:
    path = next(path for key, path in PATHS.items() if key in body)
    async with live.http.post(live.url + path, json=body) as answer:
        return answer.status, await answer.text()


def told(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ended as it should."""
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def words(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice.get("delta", choice).get("content") or choice.get("text") or "" for choice in choices)


@pytest.mark.parametrize("body", [CHAT, TEXT, TEXT | {"prompt": [1, 2, 3]}, TEXT | {"prompt": ["Count."]}])
@pytest.mark.parametrize("include_usage", [True, False])
async def test_a_stream_goes_on_elsewhere_as_if_nothing_had_happened(body: dict[str, Any], include_usage: bool) -> None:
    fakes = engines(4, None)
    async with over(*fakes) as live:
        asked = body | {"stream": True, "stream_options": {"include_usage": include_usage}}
        status, text = await ask(live, asked)
        events = told(text)
        assert (status, words(events)) == (200, ALL)
        assert {(event["id"], event["created"]) for event in events} == {("cmpl-0", 100)}
        usages = [event["usage"] for event in events if event.get("usage")]
        wanted = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
        assert usages == ([wanted] if include_usage else [])
        reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
        assert [reason for reason in reasons if reason] == ["stop"]
        await live.quiet()
    had = 3 if "messages" in body else 4  # a chat's first event is no token
    _, _, resumed = fakes[1].seen[-1]
    assert resumed["max_tokens"] == 9 - had
    if "messages" in body:
        begun = {"role": "assistant", "content": "".join(f"t{n} " for n in range(had))}
        assert resumed["messages"] == [*body["messages"], begun]
        assert (resumed["continue_final_message"], resumed["add_generation_prompt"]) == (True, False)
    elif body["prompt"] == [1, 2, 3]:
        assert resumed["prompt"] == [1, 2, 3, *range(FIRST_ID, FIRST_ID + had)]
    else:
        assert resumed["prompt"] == "Count." + "".join(f"t{n} " for n in range(had))


async def test_several_losses_in_a_row_are_one_stream() -> None:
    fakes = engines(2, 2, 2, 2, None)
    async with over(*fakes) as live:
        _, text = await ask(live, TEXT | {"stream": True, "stream_options": {"include_usage": True}})
        events = told(text)
        assert words(events) == ALL
        assert events[-1]["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
        assert {(event["id"], event["created"]) for event in events} == {("cmpl-0", 100)}
        assert [len(engine.seen) for engine in fakes] == [1, 1, 1, 1, 1]
        await live.quiet()


@pytest.mark.parametrize("body", [CHAT, TEXT])
async def test_a_whole_answer_goes_on_elsewhere_and_is_counted_as_one(body: dict[str, Any]) -> None:
    fakes = engines(5, None)
    async with over(*fakes) as live:
        status, text = await ask(live, body)
        answer = json.loads(text)
        (choice,) = answer["choices"]
        assert (status, choice.get("text") or choice["message"]["content"]) == (200, ALL)
        assert (answer["id"], answer["created"], choice["finish_reason"]) == ("cmpl-0", 100, "stop")
        assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
        assert fakes[1].seen[-1][2]["max_tokens"] < 9
        await live.quiet()


@pytest.mark.parametrize("includes", [
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"logprobs": True},
    {"n": 2},
    {"response_format": {"type": "json_object"}},
    {"guided_regex": "t.*"},
], ids=lambda body: next(iter(body)))  # fmt: skip
async def test_what_two_parts_could_not_keep_is_not_continued_and_the_client_is_told(includes: dict[str, Any]) -> None:
    fakes = engines(6, None)
    async with over(*fakes) as live:
        _, text = await ask(live, CHAT | includes | {"stream": True})
        *_, last, end = text.split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], end) == ("upstream_error", "")
        assert repr(next(iter(includes))) in error["message"]
        await live.quiet()
        status, text = await ask(live, CHAT | includes)  # nobody has seen any of this one: it is made again
        assert (status, json.loads(text)["choices"][0]["message"]["content"]) == (200, ALL)
        await live.quiet()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("include_usage", [True, False])
async def test_an_answer_whose_last_token_came_is_ended_without_its_engine(stream: bool, include_usage: bool) -> None:
    async with over(*engines(10, None)) as live:
        options = {"stream_options": {"include_usage": include_usage}} if stream else {}
        _, text = await ask(live, CHAT | {"stream": stream} | options)
        if not stream:
            answer = json.loads(text)
            assert answer["choices"][0]["message"]["content"] == ALL
            assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
        else:
            events = told(text)
            assert words(events) == ALL
            assert (events[-1].get("usage") or {}).get("completion_tokens") == (9 if include_usage else None)
        await live.quiet()


async def test_an_engine_that_never_says_done_is_understood_by_its_last_token() -> None:
    async with over(*engines(None, says_done=False)) as live:
        _, text = await ask(live, TEXT | {"stream": True})
        assert words(told(text)) == ALL
        await live.quiet()


async def test_a_chat_is_not_continued_by_an_engine_that_does_not_know_how() -> None:
    async with over(*engines(4, None), kind="openai") as live:
        _, text = await ask(live, CHAT | {"stream": True})
        assert '"upstream_error"' in text
        assert "cannot go on" in text
        _, text = await ask(live, TEXT | {"stream": True})  # a text can be continued by any
        assert words(told(text)) == ALL
        await live.quiet()


async def test_the_journal_marks_what_was_continued(tmp_path: Any) -> None:
    fakes = engines(4, None)
    async with contextlib.AsyncExitStack() as stack:
        for engine in fakes:
            await stack.enter_async_context(engine.running())
        instances = [{"id": f"e{n}", "url": engine.url, "kind": "vllm"} for n, engine in enumerate(fakes)]
        made = make_plan([], instances=instances, journal=tmp_path / "journal.jsonl")
        live = await stack.enter_async_context(listening(made))
        await live.ready(2)
        await ask(live, TEXT | {"stream": True})
        await live.quiet()
    steps = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [step["event"]["tokens"] for step in steps if step["event"]["type"] == "Broken"] == [4]
    dispatches = [action for step in steps for action in step["actions"] if action["type"] == "Dispatch"]
    assert [(each["instance"], each["resume_from"]) for each in dispatches] == [("e0", 0), ("e1", 4)]


# ------------------------------------------------------------------------------------------------------ what is kept


def asked(**fields: Any) -> asks.Ask:
    return asks.parse("chat", json.dumps(CHAT | fields).encode())


@pytest.mark.parametrize(("fields", "wanted"), [
    ({"logprobs": False, "tools": None, "response_format": {"type": "text"}}, None),
    ({"tools": [{"type": "function"}], "tool_choice": "none"}, None),
    ({"logprobs": 0}, "logprobs"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"stream_options": {"continuous_usage_stats": True}}, "continuous_usage_stats"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
])  # fmt: skip
def test_a_field_is_in_the_way_when_it_asks_for_something(fields: dict[str, Any], wanted: str | None) -> None:
    assert obstacle(asked(**fields)) == wanted


def chunk(**delta: Any) -> bytes:
    return b"data: " + json.dumps({"id": "a", "choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


def test_a_long_stream_is_kept_as_its_text() -> None:
    kept = Kept(asked(stream=True))
    for n in range(5_000):
        kept.add(chunk(content=f"t{n} "))
    assert sum(map(len, kept.pieces)) < 70_000
    begun = kept.begun(5_000)
    assert begun is not None
    assert begun.text == "".join(f"t{n} " for n in range(5_000))


@pytest.mark.parametrize("delta", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}, {"refusal": "no"}])
def test_what_is_no_text_is_not_continued(delta: dict[str, Any]) -> None:
    kept = Kept(asked(stream=True))
    kept.add(chunk(content="a"))
    kept.add(chunk(**delta))
    with pytest.raises(NotContinuableError, match=next(iter(delta))):
        kept.begun(2)
