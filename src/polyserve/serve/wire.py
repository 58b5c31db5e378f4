"""The HTTP/1.1 client for streamed answers: the gateway's to its engines, and the replay's to any endpoint.

It does what many streams at once need and no more: post a body, read the answer's bytes as they come, close. A relay
reads when it gets round to it; a client that measures is told of each piece inside the event loop's own read, with no
task to wake and nothing to delay the clock.

With aiohttp's client the gateway took 1.37 times the processor time per chunk of a bare relay over aiohttp and 2.2
times that per request, with this one 1.05 to 1.2 times and 1.8 (256 streams; `make bench-gateway` compares them anew);
the replay took 51 us per token, with a client like this one 38 (400 streams of 25 tokens a second, slow system calls).
aiohttp still asks everything that is not a token: health, metrics, telemetry.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import cast
from urllib.parse import urlsplit

import httptools

Headers = Sequence[tuple[bytes, bytes]]
Listener = Callable[[int, bytes], None]  # (status, a piece of the body)

# uvicorn (vLLM's server and ours) closes an idle connection after 5 s: the client lets go first.
KEEP_ALIVE_S = 4.0
# An answer whose reader is this far behind is read no further until the reader has caught up.
HIGH_WATER = 256 * 1024
# Of an answer's status line and headers, those of interim answers (1xx) included.
LONGEST_HEAD = 256 * 1024


class ConnectError(OSError):
    """Nobody took the connection; the request was not sent."""


class Answer:
    """An answer as it comes: status and headers (lower-case names) are there from the start.

    The body is read, or goes to a listener piece by piece as it arrives.
    """

    __slots__ = ("_broken", "_connection", "_listener", "_pieces", "_size", "_waiter", "ended", "headers", "status")

    def __init__(self, connection: _Connection, listener: Listener | None) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.ended = False  # the whole body has arrived
        self._connection = connection
        self._listener = listener
        self._pieces: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._broken: OSError | None = None

    def __repr__(self) -> str:
        return f"<answer {self.status}, {'whole' if self.ended else 'under way'}>"

    @property
    def unread(self) -> int:
        """Bytes of the body that have arrived and were not read yet."""
        return self._size

    def header(self, name: bytes) -> bytes:
        """The first value of a header, empty when it is not there."""
        return next((value for known, value in self.headers if known == name), b"")

    async def read(self) -> bytes:
        """What has arrived since the last time, at least something; empty at the end. Raises `OSError`."""
        while not self._pieces:
            if self.ended:
                return b""
            if self._broken is not None:
                raise self._broken
            await self._news()
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._size > HIGH_WATER:
            self._connection.resume()
        self._size = 0
        return data

    async def whole(self, most: int) -> bytes:
        """The rest of the body, cut off at `most` bytes; raises `OSError`."""
        pieces: list[bytes] = []
        size = 0
        while size < most and (piece := await self.read()):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)[:most]

    async def heard(self) -> None:
        """Come back when the listener has the whole body; raises `OSError`."""
        while not self.ended:
            if self._broken is not None:
                raise self._broken
            await self._news()

    def close(self) -> None:
        """Stop the engine, unless it is through."""
        if not self.ended:
            self._connection.abort()

    # Called by the connection.

    async def _news(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def take(self, data: bytes) -> None:
        if self._listener is not None:
            self._listener(self.status, data)
            return
        self._pieces.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER:
            self._connection.pause()
        self.wake()

    def end(self) -> None:
        self.ended = True
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: OSError) -> None:
        self._broken = error
        self.wake()

    async def head(self) -> None:
        """Come back when status and headers are there; raises `OSError`."""
        while not self.status:
            if self._broken is not None:
                raise self._broken
            await self._news()


class _Connection(asyncio.Protocol):
    """One connection, with at most one answer under way."""

    def __init__(self, idle: Idle) -> None:
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self._idle = idle
        self._answer: Answer | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._head_bytes = 0

    @property
    def open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def send(self, head: bytes, body: bytes, listener: Listener | None) -> Answer:
        """Send a request; its answer has neither status nor headers yet."""
        assert self.transport is not None, "connected"
        self._answer = answer = Answer(self, listener)
        self._head_bytes = 0
        self._parser = httptools.HttpResponseParser(self)
        if len(body) < HIGH_WATER:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        return answer

    def abort(self) -> None:
        self._answer = None
        if self.transport is not None:
            self.transport.abort()

    def pause(self) -> None:
        if self.open:
            cast(asyncio.Transport, self.transport).pause_reading()

    def resume(self) -> None:
        if self.open:
            cast(asyncio.Transport, self.transport).resume_reading()

    # Called by the loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # nobody asked
            self.abort()
            return
        if not answer.status:
            self._head_bytes += len(data)
            if self._head_bytes > LONGEST_HEAD:
                answer.fail(ConnectionError(f"its head is larger than {LONGEST_HEAD} bytes"))
                self.abort()
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            answer.fail(ConnectionError(f"not HTTP: {error}"))
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._idle.drop(self)
        answer, self._answer = self._answer, None
        if answer is None:
            return
        framed = answer.header(b"content-length") or answer.header(b"transfer-encoding")
        if error is None and answer.status and not framed:  # such a body ends with its connection
            answer.end()
        else:
            answer.fail(ConnectionResetError(f"the connection was lost{f': {error}' if error else ''}"))

    # Called by the parser.

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._answer is not None, "headers come with an answer"
        self._answer.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._answer is not None, "headers come with an answer"
        self._status = self._parser.get_status_code()
        if self._status < 200:  # the real head is still to come
            self._answer.headers.clear()
        else:
            self._answer.status = self._status
            self._answer.wake()

    def on_body(self, data: bytes) -> None:
        assert self._answer is not None, "a body comes with an answer"
        self._answer.take(data)

    def on_message_complete(self) -> None:
        answer = self._answer
        assert answer is not None, "an end comes with an answer"
        if self._status < 200:
            return
        answer.end()
        self._answer = None
        if self._parser.should_keep_alive() and self.open:
            self.resume()
            self._idle.keep(self)
        elif self.transport is not None:
            self.transport.close()


class Idle:
    """Kept connections, those used last at the end; each is let go when it was of no use for `KEEP_ALIVE_S`."""

    def __init__(self) -> None:
        self._kept: list[_Connection] = []
        self._look: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._kept.append(connection)
        if self._look is None:
            self._look = loop.call_later(KEEP_ALIVE_S, self._let_go)

    def take(self) -> _Connection | None:
        """The connection used last, if it is fresh."""
        oldest = asyncio.get_running_loop().time() - KEEP_ALIVE_S
        while self._kept:
            connection = self._kept.pop()
            if connection.open and connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    def drop(self, connection: _Connection) -> None:
        if connection in self._kept:
            self._kept.remove(connection)

    def close(self) -> None:
        """Let go of all of them."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        kept, self._kept = self._kept, []
        for connection in kept:
            connection.abort()

    def _let_go(self) -> None:
        loop, self._look = asyncio.get_running_loop(), None
        while self._kept and self._kept[0].idle_since + KEEP_ALIVE_S <= loop.time():
            self._kept.pop(0).abort()
        if self._kept:
            self._look = loop.call_at(self._kept[0].idle_since + KEEP_ALIVE_S, self._let_go)


class Wire:
    """Posts to one server, on as many connections as there are answers under way."""

    def __init__(self, url: str, connect_s: float) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").encode()
        self._host_header = parts.netloc.rpartition("@")[2].encode()
        self._connect_s = connect_s
        self._address: str | None = None  # that the name last led to
        self._idle = Idle()

    def __repr__(self) -> str:
        return f"<wire to {self._host}:{self._port}, {len(self._idle)} idle>"

    async def post(self, path: str, headers: Headers, body: bytes, listener: Listener | None = None) -> Answer:
        """The answer, as soon as its head is there; raises `OSError`, a `ConnectError` when nobody takes it.

        A listener may be told of the body's beginning before this comes back.
        A kept connection that the other end closed in this very moment costs one more try, on a new one.
        """
        lines = [b"POST %s%s HTTP/1.1\r\nhost: %s\r\n" % (self._base, path.encode(), self._host_header)]
        lines += [b"%s: %s\r\n" % header for header in headers]
        head = b"".join([*lines, b"content-length: %d\r\n\r\n" % len(body)])
        connection = self._idle.take()
        if connection is not None:
            try:
                return await self._ask(connection, head, body, listener)
            except ConnectionError:
                pass
        return await self._ask(await self._connect(), head, body, listener)

    def close(self) -> None:
        """Let go of the connections that nobody uses."""
        self._idle.close()

    async def _ask(self, connection: _Connection, head: bytes, body: bytes, listener: Listener | None) -> Answer:
        answer = connection.send(head, body, listener)
        try:
            await answer.head()
        except BaseException:
            connection.abort()
            raise
        return answer

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(self._connect_s):
                try:
                    connection = await self._connect_to(self._host)
                except socket.gaierror:  # the name is gone, and its address may still answer
                    if self._address is None:
                        raise
                    connection = await self._connect_to(self._address)
        except TimeoutError:
            raise ConnectError(f"no connection within {self._connect_s:g} s") from None
        except OSError as error:
            raise ConnectError(error.strerror or str(error)) from None
        return connection

    async def _connect_to(self, host: str) -> _Connection:
        transport, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._idle),
            host,
            self._port,
            ssl=self._tls,
            server_hostname=self._host if self._tls else None,
        )
        peer = transport.get_extra_info("peername")
        self._address = peer[0] if peer else None
        return connection
