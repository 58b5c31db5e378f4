"""What a brain and its relays say to each other: events and actions as they are, and a few words of their own.

A frame is its length (4 bytes), what it is (1), the model's place in the config (1), and MessagePack (msgspec). Times
stay the floats they are: both ends read the same monotonic clock.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, cast

import msgspec

from polyserve.core.types import (
    Arrived,
    Broken,
    Cancelled,
    Corrected,
    Dispatch,
    Finished,
    FirstToken,
    InstanceId,
    Refuse,
    RequestId,
)
from polyserve.serve.inflight import Interruption, Outcome
from polyserve.serve.plan import EngineSpec

_HEAD = struct.Struct(">IBB")
# A frame is a request without its body, or 50 ms of tokens; more than this is none of ours.
LONGEST = 64 * 1024 * 1024


class Begin(msgspec.Struct, array_like=True):
    """The first frame to a relay."""

    plan: bytes  # a pickled `Plan`: the two ends are parent and child
    epochs: list[float]  # when each model's clock was 0
    beside: str  # path of the socket where everything else is answered


class Planned(msgspec.Struct, array_like=True):
    """Another plan is in force."""

    plan: bytes


class Serving(msgspec.Struct, array_like=True):
    """A relay takes connections from now on."""


class Leave(msgspec.Struct, array_like=True):
    """A relay is to end: after its last stream, or as at SIGTERM."""

    retire: bool


class Engine(msgspec.Struct, array_like=True):
    """What a relay has to know of an instance before it is sent there."""

    spec: EngineSpec
    kind: str


class Interrupt(msgspec.Struct, array_like=True):
    """A request is to leave the engine that it is on."""

    request: RequestId
    why: Interruption


class Tokens(msgspec.Struct, array_like=True):
    """Token arrivals of one instance's streams, in order."""

    instance: InstanceId
    arrivals: list[tuple[float, RequestId, int, int]]  # when, whose, how many so far, events at once


class Suspected(msgspec.Struct, array_like=True):
    """Something went wrong with a stream of this instance."""

    instance: InstanceId
    refused: bool


class Answered(msgspec.Struct, array_like=True):
    """A relay is through with a request; what metrics count of it."""

    request: RequestId
    outcome: Outcome
    refused_by: str | None
    code: str | None
    boarded_at: float
    first_at: float | None
    last_at: float
    tokens: int
    lateness_s: float
    continuations: int


SAID = Answered.__struct_fields__[1:]  # of a ticket


_KINDS: tuple[type[Any], ...] = (
    *(Arrived, Corrected, Cancelled, FirstToken, Finished, Broken),  # of events, those that relays see
    *(Dispatch, Refuse),
    *(Begin, Planned, Serving, Leave, Engine, Interrupt, Tokens, Suspected, Answered),
)
_CODES = {kind: code for code, kind in enumerate(_KINDS)}
_encode = msgspec.msgpack.Encoder().encode
_decoders = [msgspec.msgpack.Decoder(kind).decode for kind in _KINDS]


def pack(model: int, value: Any) -> bytes:
    """A value as a frame."""
    payload = _encode(value)
    return _HEAD.pack(len(payload), _CODES[type(value)], model) + payload


class Unpacker:
    """Frames from bytes as they come."""

    def __init__(self) -> None:
        self._left = b""

    def feed(self, data: bytes) -> list[tuple[int, Any]]:
        """(model, value) of each frame that `data` completes; raises `ValueError`."""
        data = self._left + data
        found, at, size = [], 0, len(data)
        while size - at >= _HEAD.size:
            length, code, model = _HEAD.unpack_from(data, at)
            if length > LONGEST or code >= len(_decoders):
                raise ValueError("what came is no frame")
            end = at + _HEAD.size + length
            if end > size:
                break
            found.append((model, _decoders[code](data[at + _HEAD.size : end])))
            at = end
        self._left = data[at:]
        return found


class Link(asyncio.Protocol):
    """One end of the line between a brain and a relay; frames of one turn of the loop leave together."""

    def __init__(self, take: Callable[[int, Any], None], lost: Callable[[], None]) -> None:
        self._take = take
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._unpacker = Unpacker()
        self._waiting: list[bytes] = []
        self._loop = asyncio.get_running_loop()

    def send(self, model: int, value: Any) -> None:
        """Send a value, soon; in vain where the other end has gone."""
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(pack(model, value))

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(waiting))

    def close(self) -> None:
        self.flush()
        if self._transport is not None:
            self._transport.close()

    # Called by the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for model, value in self._unpacker.feed(data):
            self._take(model, value)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()
