"""Server-sent events as engines stream them: split into events and counted, without parsing JSON.

One event is one token per choice, except: comments, the opening event of a chat choice that only names the role,
the usage event (`"choices": []`), `[DONE]` and errors. Only these are looked at closely; an event that is nothing but
a token is recognised by a handful of byte tests.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

# An event longer than this without an end is not an event stream.
LONGEST_EVENT = 8 * 1024 * 1024

_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_ERROR = re.compile(rb'\{\s*"(error"|object"\s*:\s*"error")')
_ROLE_ONLY = re.compile(rb'"role"\s*:\s*"assistant"')
_NO_DATA = re.compile(rb":|(event|id|retry)\s*:")
_EMPTY_CONTENT = re.compile(rb'"content"\s*:\s*(""|null)')


class NotAStreamError(Exception):
    """What the engine sent is no event stream."""


class Usage(msgspec.Struct, frozen=True):
    """Token counts as the engine gives them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class _UsageEvent(msgspec.Struct):
    usage: Usage | None = None


_usage_event = msgspec.json.Decoder(_UsageEvent)


class EventScanner:
    """Takes bytes as they come and gives back whole events; counts those that carry tokens."""

    __slots__ = (
        "_begun", "_separator", "_strip_role", "_strip_usage", "_tail", "done", "error", "events", "told", "usage",
    )  # fmt: skip

    def __init__(self, strip_usage: bool = False, strip_role: bool = False) -> None:
        self._strip_usage = strip_usage
        self._strip_role = strip_role  # the client has it from an earlier part of the stream
        self._separator = b"\n\n"
        self._tail = b""
        self._begun = False  # a token has been seen: only then can the quick test tell
        self.events = 0  # that carried a token
        self.done = False  # `[DONE]` was seen
        self.error: bytes | None = None  # payload of an error event, which is not passed on
        self.usage: Usage | None = None
        self.told: bytes | None = None  # payload of the event with the usage

    def feed(self, data: bytes) -> bytes:
        """The whole events that `data` completes, as they are to be passed on; raises `NotAStreamError`."""
        if self._tail:
            if b"\n" not in data:  # which ends no event: a long one is not looked through again for every piece
                self._tail += data
                self._bound_tail()
                return b""
            data = self._tail + data
            self._tail = b""
        if (
            self._begun
            and data.startswith(b"data: {")
            and data.endswith(b"}\n\n")
            and b"[]" not in data
            and b'"error"' not in data
            and (ends := data.count(b"\n\n")) == data.count(b"}\n\ndata: {") + 1
        ):
            self.events += ends
            return data
        return self._closely(data)

    def _closely(self, data: bytes) -> bytes:
        if not self._begun and b"\r\n\r\n" in data:
            self._separator = b"\r\n\r\n"
        *whole, self._tail = data.split(self._separator)
        self._bound_tail()
        return b"".join([event + self._separator for event in whole if self._keep(event)])

    def _bound_tail(self) -> None:
        if len(self._tail) > LONGEST_EVENT:
            raise NotAStreamError("an event without an end")

    def _keep(self, event: bytes) -> bool:
        """Count one event; whether it is passed on."""
        payload = event_payload(event)
        if payload is None:
            if event.strip() and not _NO_DATA.match(event):
                raise NotAStreamError(f"it sent {event[:60]!r} in place of an event")
            return True
        if payload == b"[DONE]":
            self.done = True
        elif _ERROR.match(payload):
            self.error = payload
            return False
        elif b'"usage"' in payload and _NO_CHOICES.search(payload):
            self.usage, self.told = _parsed_usage(payload), payload
            return not self._strip_usage
        elif _ROLE_ONLY.search(payload) and _EMPTY_CONTENT.search(payload):
            return not self._strip_role
        elif not (payload.startswith(b"{") and payload.endswith(b"}")):
            raise NotAStreamError(f"it sent {payload[:60]!r} in place of a chunk")
        else:
            self.events += 1
            self._begun = self._separator == b"\n\n"
        return True


def event_payload(event: bytes) -> bytes | None:
    """What follows `data:` in an event, its lines joined; None for comments and events without data."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[5:].strip()
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _parsed_usage(payload: bytes) -> Usage | None:
    try:
        return _usage_event.decode(payload).usage
    except msgspec.MsgspecError:
        return None


def assembled(stream: bytes, chat: bool) -> bytes:
    """The non-streaming answer that these events would have been; raises `NotAStreamError`."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in re.split(rb"\r?\n\r?\n", stream):
        payload = event_payload(event)
        if payload is None or payload == b"[DONE]":
            continue
        try:
            chunk = msgspec.json.decode(payload, type=dict[str, Any])
            for part in chunk.pop("choices", ()):
                index = int(part.get("index", 0))
                _add_choice(choices.setdefault(index, {"index": index}), part, chat)
        except (msgspec.MsgspecError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise NotAStreamError(f"an event that is no completion chunk: {error}") from None
        whole.update({key: value for key, value in chunk.items() if value is not None or key not in whole})
    whole["object"] = "chat.completion" if chat else "text_completion"
    whole["choices"] = [choices[index] for index in sorted(choices)]
    return msgspec.json.encode(whole)


def _add_choice(choice: dict[str, Any], part: dict[str, Any], chat: bool) -> None:
    if chat:
        message = choice.setdefault("message", {"role": "assistant", "content": None})
        _add_delta(message, part.pop("delta", None) or {})
    else:
        choice["text"] = choice.get("text", "") + (part.pop("text", None) or "")
    for key, value in part.items():
        if key == "logprobs" and isinstance(value, dict):
            choice[key] = _joined(choice.get(key) or {}, value)
        elif value is not None or key not in choice:
            choice[key] = value


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add one delta of a chat message: texts are joined, tool calls gathered by index."""
    for key, value in delta.items():
        if key == "tool_calls":
            if value:
                _add_tool_calls(message.setdefault(key, []), value)
        elif key == "function_call" and value:
            message[key] = _joined(message.get(key) or {}, value)
        elif key == "role":
            message[key] = value or message[key]
        elif isinstance(value, str):
            message[key] = (message.get(key) or "") + value
        elif value is not None or key not in message:
            message[key] = value


def _add_tool_calls(calls: list[dict[str, Any]], deltas: list[dict[str, Any]]) -> None:
    for delta in deltas:
        index = delta.pop("index", len(calls))
        if index == len(calls):
            calls.append({"type": "function", "function": {}})
        function = delta.pop("function", None) or {}
        calls[index].update({key: value for key, value in delta.items() if value is not None})
        calls[index]["function"] = _joined(calls[index]["function"], function)


def _joined(some: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two parts of one object: texts and lists are put end to end, anything else is replaced."""
    joined = dict(some)
    for key, value in more.items():
        before = joined.get(key)
        if isinstance(before, str) and isinstance(value, str):
            joined[key] = before + value if key == "arguments" else value
        elif isinstance(before, list) and isinstance(value, list):
            joined[key] = before + value
        elif value is not None or key not in joined:
            joined[key] = value
    return joined
