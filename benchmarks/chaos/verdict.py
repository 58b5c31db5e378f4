"""The law, applied to what one client saw: nothing lost, nothing twice, nothing cut short in silence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from chaos.asks import Ask, Expected, expected
from chaos.client import Seen

Fate = Literal["completed", "refused", "error event", "abandoned", "broken"]

# Refusals that are right whatever happens to the engines, and whether they say when to come back.
REFUSALS: dict[tuple[int, str], bool] = {
    (429, "overloaded"): True,
    (429, "queue_full"): True,
    (429, "queue_timeout"): True,
    (503, "no_instances"): True,
    (502, "upstream_error"): False,  # every attempt failed before the first byte
}
TYPES = {429: "rate_limit_error", 502: "server_error", 503: "server_error"}
EVENT_CODES = ("upstream_error", "overloaded", "no_instances", "queue_full", "queue_timeout")


@dataclass(frozen=True)
class Verdict:
    """What became of a request; `why` says what is broken, or the code of a refusal."""

    fate: Fate
    why: str = ""


class BrokenError(Exception):
    """The law is broken; the message says how."""


@dataclass
class _Stream:
    """A stream as a strict client reads it."""

    texts: dict[int, str]
    reasons: dict[int, str]
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    rest: bytes = b""  # of an event that is not whole


def judge(seen: Seen) -> Verdict:
    """What became of the request."""
    right = expected(seen.ask)
    try:
        if seen.how == "waiting":
            raise BrokenError("lost: no end within the patience of the run")
        if seen.status is None:
            if seen.how == "left":
                return Verdict("abandoned")
            raise BrokenError(f"lost: no answer, {seen.problem}")
        if seen.status != 200:
            return Verdict("refused", _refused(seen))
        return _streamed(seen, right) if seen.ask.streams else _whole(seen, right)
    except BrokenError as error:
        return Verdict("broken", str(error))


def _refused(seen: Seen) -> str:
    """The code of a refusal that is right."""
    if seen.how == "cut":
        raise BrokenError(f"lost: an error of status {seen.status} that was cut off, {seen.problem}")
    error = _error(seen.data)
    code = str(error["code"])
    wanted = REFUSALS.get((seen.status or 0, code))
    if wanted is None:
        raise BrokenError(f"wrong refusal: {seen.status} {seen.data[:300]!r}")
    if error["type"] != TYPES[seen.status or 0]:
        raise BrokenError(f"wrong type {error['type']!r} with status {seen.status}")
    for name in ("retry-after", "retry-after-ms"):
        if wanted and not seen.headers.get(name, "").isdigit():
            raise BrokenError(f"refusal {seen.status} {code} without {name}")
    return code


def _error(body: bytes) -> dict[str, Any]:
    try:
        error = json.loads(body)["error"]
        if set(error) >= {"message", "type", "param", "code"}:
            return dict(error)
    except (ValueError, KeyError, TypeError):
        pass
    raise BrokenError(f"not an OpenAI error: {body[:300]!r}")


def _whole(seen: Seen, right: Expected) -> Verdict:
    if seen.how == "left":
        return Verdict("abandoned")
    if seen.how == "cut":
        raise BrokenError(f"truncated: {seen.problem}")
    try:
        body = json.loads(seen.data)
        choices = sorted(body["choices"], key=lambda choice: int(choice["index"]))
        texts = [choice["message"]["content"] if seen.ask.chat else choice["text"] for choice in choices]
        reasons = [choice["finish_reason"] for choice in choices]
    except (ValueError, KeyError, TypeError):
        raise BrokenError(f"not a completion: {seen.data[:300]!r}") from None
    for index, text in enumerate(texts):
        _compare(text, right.texts[index] if index < len(right.texts) else "", whole=True)
    if reasons != right.reasons:
        raise BrokenError(f"finish reasons {reasons}, not {right.reasons}")
    _check_usage(body.get("usage"), right)
    return Verdict("completed")


def _streamed(seen: Seen, right: Expected) -> Verdict:
    stream = _parsed(seen.data, seen.ask)
    ended = stream.done and seen.how == "ended"
    for index, wanted in enumerate(right.texts):
        _compare(stream.texts.get(index, ""), wanted, whole=ended)
    if seen.how == "left":
        return Verdict("abandoned")
    if stream.error is not None:
        return _error_event(seen, stream.error)
    if seen.how == "cut":
        raise BrokenError(f"truncated in silence: {seen.problem}, after {_shown(stream, right)}")
    if not stream.done or stream.rest:
        raise BrokenError(f"truncated in silence: no [DONE], after {_shown(stream, right)}")
    reasons = [stream.reasons.get(index) for index in range(len(right.reasons))]
    if reasons != right.reasons:
        raise BrokenError(f"finish reasons {reasons}, not {right.reasons}")
    asked_usage = "stream_options" in seen.ask.body
    if asked_usage:
        _check_usage(stream.usage, right)
    elif stream.usage is not None:
        raise BrokenError("a usage event that nobody asked for")
    return Verdict("completed")


def _error_event(seen: Seen, error: dict[str, Any]) -> Verdict:
    code = str(error.get("code"))
    if code not in EVENT_CODES or not {"message", "type", "param"} <= set(error):
        raise BrokenError(f"wrong error event: {error}")
    if seen.ask.exact:
        raise BrokenError(f"given up, although it could be continued exactly: {error['message']}")
    return Verdict("error event", code)


def _shown(stream: _Stream, right: Expected) -> str:
    got, all_of_it = sum(map(len, stream.texts.values())), sum(map(len, right.texts))
    return f"{got} of {all_of_it} characters"


def _check_usage(usage: dict[str, Any] | None, right: Expected) -> None:
    wanted = (right.prompt_tokens, right.completion_tokens)
    got = None if usage is None else (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if got != wanted:
        raise BrokenError(f"usage {got}, not {wanted}")


def _compare(got: str, wanted: str, whole: bool) -> None:
    """One choice's text against the right one; a part of it is right if it is the beginning."""
    if got == wanted or (not whole and wanted.startswith(got)):
        return
    same = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    kind = "truncated in silence" if wanted.startswith(got) else "duplicated" if _repeats(got, same) else "wrong"
    around = slice(max(0, same - 20), same + 40)
    raise BrokenError(
        f"{kind}: {len(got)} characters for {len(wanted)}; from {same}: {got[around]!r}, not {wanted[around]!r}"
    )


def _repeats(got: str, at: int) -> bool:
    """Whether the word at `at` was said before."""
    begins = max(got.rfind(" ", 0, at + 1), 0)
    word = got[begins:].split(" ", 2)[1:2]
    return bool(word) and f" {word[0]}" in got[:begins]


def _parsed(data: bytes, ask: Ask) -> _Stream:
    """A stream's events, read as strictly as any client reads them; raises `BrokenError`."""
    *events, rest = data.split(b"\n\n")
    stream = _Stream({}, {}, rest=rest)
    ids: set[str] = set()
    for event in events:
        if stream.done or stream.error is not None:
            raise BrokenError(f"an event after the end: {event[:200]!r}")
        if not event.startswith(b"data: "):
            raise BrokenError(f"not an event: {event[:200]!r}")
        if event == b"data: [DONE]":
            stream.done = True
            continue
        try:
            _take(stream, ids, json.loads(event[6:]), ask.chat)
        except (ValueError, KeyError, TypeError):
            raise BrokenError(f"not a chunk: {event[:200]!r}") from None
    if len(ids) > 1:
        raise BrokenError(f"one answer under several ids: {sorted(ids)}")
    return stream


def _take(stream: _Stream, ids: set[str], chunk: dict[str, Any], chat: bool) -> None:
    if "error" in chunk:
        stream.error = dict(chunk["error"])
        return
    ids.add(chunk["id"])
    if chunk.get("usage") is not None:
        stream.usage = dict(chunk["usage"])
    for choice in chunk["choices"]:
        index = int(choice["index"])
        if chat and "role" in choice["delta"] and index in stream.texts:
            raise BrokenError("a second opening of a chat message")
        text = choice["delta"].get("content") or "" if chat else choice["text"]
        stream.texts[index] = stream.texts.get(index, "") + text
        if choice["finish_reason"] is not None:
            if index in stream.reasons:
                raise BrokenError("a second end of a choice")
            stream.reasons[index] = choice["finish_reason"]
