"""The event stream of OpenAI's Responses API: counted like that of a chat, passed on byte for byte.

Its events have names; those whose name ends in `.delta` carry a token. It ends with the whole response in one event,
and that is also the answer for a client that wants it whole.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

from polyserve.serve.fields import rewritten
from polyserve.serve.sse import LONGEST_EVENT, NotAStreamError, Usage, event_payload

_NAME = re.compile(rb'(?:^|\n)event:\s*(\S+)|"type"\s*:\s*"([^"]+)"')
_ENDS = (b"response.completed", b"response.incomplete")
_ERRORS = (b"response.failed", b"error")


class _Usage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0


class _Response(msgspec.Struct):
    usage: _Usage | None = None


class _Last(msgspec.Struct):
    response: Raw


class ResponseScanner:
    """Takes bytes as they come and gives back whole events, as `EventScanner` does."""

    __slots__ = ("_last", "_separator", "_tail", "done", "error", "events", "usage")

    def __init__(self) -> None:
        self._separator = b"\n\n"
        self._tail = b""
        self._last = b""  # payload of the event that ended it
        self.events = 0  # that carried a token
        self.done = False
        self.error: bytes | None = None  # payload of an error event, which is not passed on
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        """The whole events that `data` completes; raises `NotAStreamError`."""
        data = self._tail + data
        if b"\r\n\r\n" in data:
            self._separator = b"\r\n\r\n"
        *whole, self._tail = data.split(self._separator)
        if len(self._tail) > LONGEST_EVENT:
            raise NotAStreamError("an event without an end")
        return b"".join([event + self._separator for event in whole if self._keep(event)])

    def _keep(self, event: bytes) -> bool:
        name = _name(event)
        if name.endswith(b".delta"):
            self.events += 1
        elif name in _ENDS:
            self._last = event_payload(event) or b""
            self.usage = _usage(self.response())
            self.done = True
        elif name in _ERRORS:
            self.error = event_payload(event) or b""
            return False
        return True

    def response(self, service_tier: str | None = None) -> bytes:
        """The response as a whole, its bytes untouched but for its service tier; raises `NotAStreamError`."""
        try:
            whole = bytes(msgspec.json.decode(self._last, type=_Last).response)
            if service_tier is None:
                return whole
            return rewritten(msgspec.json.decode(whole, type=dict[str, Raw]), {"service_tier": service_tier})
        except msgspec.MsgspecError as error:
            raise NotAStreamError(f"an end without a response: {error}") from None


def _name(event: bytes) -> bytes:
    match = _NAME.search(event)
    return b"" if match is None else match[1] or match[2]


def _usage(response: bytes) -> Usage | None:
    try:
        usage = msgspec.json.decode(response, type=_Response).usage
    except msgspec.MsgspecError:
        return None
    return None if usage is None else Usage(usage.input_tokens, usage.output_tokens)
