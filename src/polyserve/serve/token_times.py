"""When each token of a streamed answer came, from its bytes, without reading them while they come.

A token comes with its server-sent event. Events are only counted while they stream, since many streams at
once leave no time to decode each. What is no token (who speaks, usage, `[DONE]`) is at the ends of a stream,
which are kept and read when it has ended. The engine's own count in `usage` settles what events leave open.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

_EVENT = b"\ndata:"
_HEAD, _TAIL = 2048, 4096  # bytes of a stream that are read: its first event, and its last few


class TokenStream:
    """When each token of one stream came, from its bytes, without reading them while they come."""

    __slots__ = ("_edge", "_head", "_tail", "event_at")

    def __init__(self) -> None:
        self.event_at = array("d")
        self._edge = b"\n"  # what an event cut in two by a read may begin with
        self._head = self._tail = b""

    def feed(self, now: float, data: bytes) -> None:
        """Take in the next bytes, which came at `now`."""
        seen = self._edge + data
        events = seen.count(_EVENT)
        if events == 1:
            self.event_at.append(now)
        elif events:
            self.event_at.extend((now,) * events)
        self._edge = seen[1 - len(_EVENT) :]
        if len(self._head) < _HEAD:
            self._head += data
        self._tail = (self._tail + data)[-_TAIL:]

    def ended(self) -> Ended:
        """Read the ends of the stream and say what it was."""
        first = next(iter(_events(b"\n" + self._head)), None)
        lead = 1 if self.event_at and first is not None and _is_role(first) else 0
        ended = Ended([])
        trail = 0
        for event in reversed(_events(self._tail if len(self._tail) == _TAIL else b"\n" + self._tail)):
            if event == b"[DONE]":
                ended.done = True
            elif ended.hollow or not _is_epilogue(event, ended):
                break
            trail += 1
        until = max(len(self.event_at) - trail, lead)
        tokens = until - lead if ended.usage is None else ended.usage
        if ended.hollow and tokens > until - lead:
            until += 1  # a last event without text was a token all the same: the engine counted its stop token
        ended.token_at = _spread(self.event_at[lead:until], tokens)
        return ended


@dataclass(slots=True)
class Ended:
    """A stream that has ended: when its tokens came, and what its last events said."""

    token_at: list[float]
    done: bool = False
    usage: int | None = None  # completion tokens as the engine counted them
    error: str | None = None
    hollow: bool = False  # the last choice says that it is finished and brings no text


def _events(data: bytes) -> list[bytes]:
    """Payloads of the events that begin in `data`."""
    return [part.split(b"\n", 1)[0].strip() for part in data.replace(b"\r\n", b"\n").split(_EVENT)[1:]]


def json_object(event: bytes) -> Mapping[str, Any]:
    try:
        value = msgspec.json.decode(event)
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _choice(value: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first choice of an event, and its delta (of a completion, the choice itself); None without one."""
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    delta = choices[0].get("delta", choices[0])
    return choices[0], delta if isinstance(delta, dict) else {}


def _brings_text(delta: Mapping[str, Any]) -> bool:
    said = ("content", "text", "reasoning", "reasoning_content", "tool_calls", "token_ids")
    return any(delta.get(name) for name in said)


def _is_role(event: bytes) -> bool:
    """Whether this first event of a chat only says who speaks."""
    choice = _choice(json_object(event))
    return choice is not None and "role" in choice[1] and not _brings_text(choice[1])


def _is_epilogue(event: bytes, ended: Ended) -> bool:
    """Whether one of the last events brings no token; what it says goes into `ended`."""
    value = json_object(event)
    if isinstance(value.get("usage"), dict):
        tokens = value["usage"].get("completion_tokens")
        ended.usage = tokens if isinstance(tokens, int) else ended.usage
    if (error := value.get("error")) is not None:
        ended.error = str(error.get("code") or error.get("type")) if isinstance(error, dict) else str(error)
        return True
    choice = _choice(value)
    if choice is None:
        return bool(value)
    ended.hollow = bool(choice[0].get("finish_reason")) and not _brings_text(choice[1])
    return ended.hollow


def _spread(event_at: array[float], tokens: int) -> list[float]:
    """One time per token: an event that brings several tokens brings them all at its time."""
    events = len(event_at)
    if tokens == events or not events:
        return event_at.tolist()
    return [event_at[-(-(i + 1) * events // tokens) - 1] for i in range(tokens)]
