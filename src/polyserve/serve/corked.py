"""The head of an answer leaves with the first of its body: one system call and one packet less per request."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState


class State(ServerState):
    """What the connections of a server share."""

    def __init__(self) -> None:
        super().__init__()
        self.retiring = False  # another process takes new connections: each answer is its connection's last


class CorkedProtocol(HttpToolsProtocol):
    """uvicorn's protocol on a transport that keeps the head of each answer until something follows it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Corked(transport, self)))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if cast(State, self.server_state).retiring:
            self.cycle.keep_alive = False

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete


class _Corked:
    """A transport; what is first written of an answer, its head, waits for what is written next."""

    __slots__ = ("_begun", "_head", "_protocol", "_transport")

    def __init__(self, transport: asyncio.Transport, protocol: CorkedProtocol) -> None:
        self._transport = transport
        self._protocol = protocol
        self._begun: RequestResponseCycle | None = None  # the answer whose head was written last
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        else:
            # Of requests in a pipeline this is the latest to be read; answers before it are written as they come.
            cycle = self._protocol.cycle
            if cycle is not None and cycle is not self._begun and cycle.response_started:
                self._begun, self._head = cycle, data
                return
        self._transport.write(data)

    def close(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""
        self._transport.close()
