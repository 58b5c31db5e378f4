"""Event streams: counted however they are cut, and put together for clients that want the answer whole."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.serve.sse import EventScanner, NotAStreamError, assembled


def chunk(delta: dict[str, Any], index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m",
            "choices": [{"index": index, "delta": delta, "finish_reason": finish, **more}]}  # fmt: skip


USAGE = {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m", "choices": [],
         "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}  # fmt: skip


def sse(*payloads: Any, separator: str = "\n\n", tight: bool = True) -> bytes:
    separators = (",", ":") if tight else None
    texts = [p if isinstance(p, str) else json.dumps(p, separators=separators) for p in payloads]
    return "".join(f"data: {text}{separator}" for text in texts).encode()


TOKENS = [chunk({"content": text}) for text in ("a", "data: b\n\n[DONE]", '{"error": []}', "ü")]
STREAM = [chunk({"role": "assistant", "content": ""}), *TOKENS, USAGE, "[DONE]"]


@given(st.data(), st.booleans(), st.sampled_from(["\n\n", "\r\n\r\n"]), st.booleans())
def test_however_a_stream_is_cut_the_same_events_come_out(
    data: st.DataObject, strip: bool, separator: str, tight: bool
) -> None:
    stream = sse(*STREAM, separator=separator, tight=tight)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    scanner = EventScanner(strip_usage=strip)
    out = b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        piece = scanner.feed(stream[start:end])
        assert piece == b"" or piece.endswith(separator.encode())
        out += piece
    kept = [event for event in STREAM if not (strip and event is USAGE)]
    assert out == sse(*kept, separator=separator, tight=tight)
    assert (scanner.events, scanner.done, scanner.error) == (len(TOKENS), True, None)
    assert scanner.usage is not None
    assert scanner.usage.completion_tokens == 2


def test_comments_are_passed_on_and_are_no_tokens() -> None:
    scanner = EventScanner()
    stream = b": keep-alive\n\n" + sse(TOKENS[0]) + b": keep-alive\n\n"
    assert scanner.feed(stream) == stream
    assert scanner.events == 1


def test_an_error_event_is_kept_from_the_client() -> None:
    for begun in ([], TOKENS[:1]):
        scanner = EventScanner()
        assert scanner.feed(sse(*begun)) == sse(*begun)
        assert scanner.feed(sse({"error": {"message": "dead"}})) == b""
        assert scanner.error is not None


def test_an_event_without_an_end_is_no_stream() -> None:
    scanner = EventScanner()
    assert scanner.feed(b"x" * 5_000_000) == b""
    with pytest.raises(NotAStreamError):
        scanner.feed(b"x" * 5_000_000)


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_no_bytes_break_the_scanner(pieces: list[bytes]) -> None:
    scanner = EventScanner(strip_usage=True)
    with contextlib.suppress(NotAStreamError):
        for piece in pieces:
            scanner.feed(piece)
    with contextlib.suppress(NotAStreamError):
        assert json.loads(assembled(b"".join(pieces), chat=True))["object"] == "chat.completion"


@pytest.mark.parametrize("garbage", [b"<html>", b"data: <html>", b'data: {"choices": [{"te', b"\x00\xff"])
def test_what_is_no_event_is_not_passed_on(garbage: bytes) -> None:
    sound = b'data: {"choices":[{"index":0,"text":"a"}]}\n\n'
    scanner = EventScanner()
    assert scanner.feed(b": a comment\n\nevent: x\n\n" + sound) != b""
    with pytest.raises(NotAStreamError, match="in place of"):
        scanner.feed(garbage + b"\n\n" + sound)
    assert scanner.events == 1


def test_deltas_of_tool_calls_and_logprobs_become_one_message() -> None:
    call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "look", "arguments": ""}}
    stream = sse(
        chunk({"role": "assistant", "content": None}),
        chunk({"reasoning_content": "hm"}, logprobs={"content": [{"token": "hm"}]}),
        chunk({"reasoning_content": "m"}, logprobs={"content": [{"token": "m"}]}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}),
        chunk({"tool_calls": [{"index": 1, "id": "call-2", "function": {"name": "go", "arguments": "{}"}}]}),
        chunk({}, finish="tool_calls"),
        USAGE,
        "[DONE]",
    )
    whole = json.loads(assembled(stream, chat=True))
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["logprobs"] == {"content": [{"token": "hm"}, {"token": "m"}]}
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hmm",
        "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}},
            {"id": "call-2", "type": "function", "function": {"name": "go", "arguments": "{}"}},
        ],
    }
    assert (whole["object"], whole["usage"]["total_tokens"]) == ("chat.completion", 5)


def test_texts_and_logprobs_of_plain_completions_are_joined() -> None:
    def part(text: str, index: int) -> dict[str, Any]:
        logprobs = {"tokens": [text], "token_logprobs": [-0.5], "text_offset": [0]}
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": "stop" if text == "b" else None}
        return {"id": "c", "object": "text_completion", "created": 5, "model": "m", "choices": [choice]}

    stream = sse(part("a", 0), part("a", 1), part("b", 1), part("b", 0), "[DONE]")
    whole = json.loads(assembled(stream, chat=False))
    assert [(c["index"], c["text"], c["finish_reason"]) for c in whole["choices"]] == [
        (0, "ab", "stop"),
        (1, "ab", "stop"),
    ]
    assert whole["choices"][0]["logprobs"]["tokens"] == ["a", "b"]


@pytest.mark.parametrize("payload", ["[1]", "nonsense", '{"choices": 5}', '{"choices": ["x"]}',
    '{"choices": [{"delta": {"tool_calls": [{"index": 99999}]}}]}',
    '{"choices": [{"delta": {"tool_calls": [{"index": "a"}]}}]}'])  # fmt: skip
def test_events_that_are_no_chunks_are_refused(payload: str) -> None:
    with pytest.raises(NotAStreamError):
        assembled(sse(payload), chat=True)
