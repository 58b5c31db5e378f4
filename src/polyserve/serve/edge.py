"""One client's connection, on top of uvicorn's: what it may keep us waiting for, and how much of it we keep.

Nobody holds a connection by sending a head or a body in drops, by opening it and saying nothing, or by not reading the
answer. A request that arrives in one piece sets no timer. A client that does not read is waited for where its answer
is written: the transport holds `WRITE_BUFFER` of it, the relay then stops reading from the engine, and after `stall_s`
the connection is cut, which cancels the request like any other client's leaving.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from enum import Enum, auto
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from polyserve.serve.corked import CorkedProtocol
from polyserve.serve.errors import ApiError
from polyserve.serve.plan import Bounds

log = logging.getLogger(__name__)

# Bytes of an answer that wait for a client to read, beyond those in the kernel.
WRITE_BUFFER = 64 * 1024
LEAST_READ = WRITE_BUFFER // 2
# The application answers a body that comes too slowly; this much later the connection is cut in any case.
GRACE_S = 5.0
# A client that is told of its mistake has this long to read it.
LINGER_S = 1.0
# More than the bound by this much are not even told.
MUCH_TOO_MANY = 1.1
# What a client waits that found too many others here.
CROWDED_S = 1.0
SAY_EVERY_S = 60.0


class EdgeConfig(uvicorn.Config):
    """uvicorn's configuration, and our bounds."""

    def __init__(self, app: Any, bounds: Bounds, **values: Any) -> None:
        super().__init__(app, http=Edge, **values)
        self.bounds = bounds
        self.said_crowded_at = -SAY_EVERY_S


class _Awaited(Enum):
    """What the client has to send next, as long as it owes us anything."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()


class Edge(CorkedProtocol):
    """A connection from a client."""

    config: EdgeConfig

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self._bounds = self.config.bounds
        self._awaited = self._timed = _Awaited.NOTHING
        self._head_bytes = 0
        self._patience: asyncio.TimerHandle | None = None  # with a client that sends too slowly
        self._stall: asyncio.TimerHandle | None = None  # with a client that reads too slowly
        self._unread = 0
        self._ended = False
        self._answered: RequestResponseCycle | None = None  # the first of those in the pipeline

    # -- what the client sends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER)
        if len(self.connections) > self._bounds.connections:
            self._crowded()
            return
        self._awaited = _Awaited.HEAD
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        super().data_received(data)
        if self._awaited is _Awaited.HEAD:
            self._head_bytes += len(data)
            if self._head_bytes > self._bounds.head_bytes:
                message = f"the head is larger than {self._bounds.head_bytes} bytes"
                self._end(ApiError(431, "headers_too_large", message))
        if self._awaited is not self._timed and not self._ended:
            self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._awaited, self._head_bytes = _Awaited.HEAD, 0

    def on_headers_complete(self) -> None:
        self._awaited = _Awaited.BODY
        super().on_headers_complete()
        if not self.pipeline:
            self._answered = self.cycle

    def on_message_complete(self) -> None:
        self._awaited = _Awaited.NOTHING
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(ApiError(400, "invalid_http", "the request is not HTTP/1.1 as RFC 9112 has it"))

    def _crowded(self) -> None:
        now, most = time.monotonic(), self._bounds.connections
        if now - self.config.said_crowded_at >= SAY_EVERY_S:
            self.config.said_crowded_at = now
            log.warning("%d connections are open, the most there may be; more are refused", most)
        if len(self.connections) > most * MUCH_TOO_MANY:
            self._ended = True
            self.transport.abort()
        else:
            error = ApiError(503, "too_many_connections", "too many connections are open", retry_after_s=CROWDED_S)
            self._end(error)

    def _wait(self) -> None:
        """Begin to wait for what the client owes us now."""
        self._forget_sender()
        self._timed = self._awaited
        if self._awaited is not _Awaited.NOTHING and not self.transport.is_closing():
            within_s = self._bounds.head_s if self._awaited is _Awaited.HEAD else self._bounds.upload_s + GRACE_S
            self._patience = self.loop.call_later(within_s, self._too_slow)

    def _forget_sender(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _too_slow(self) -> None:
        if self.flow.read_paused:  # it may have sent all there is: we are the ones who do not take it
            self._wait()
        elif self._awaited is _Awaited.HEAD and self._head_bytes:
            self._end(ApiError(408, "request_timeout", f"the head did not arrive within {self._bounds.head_s:g} s"))
        else:
            self.transport.abort()

    def _end(self, error: ApiError) -> None:
        """Say why, unless an answer is under way, and close."""
        if self._ended:
            return
        answered = self._answered
        if not self.pipeline and (answered is None or answered.response_complete or not answered.response_started):
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(error.body))]
            lines = [b"%s: %s\r\n" % header for header in (*headers, *error.headers, (b"connection", b"close"))]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", error.body]))
        self._ended = True
        self._give_up_answers()
        with contextlib.suppress(OSError):  # it has hung up
            self.transport.write_eof()
        # What it has sent and nobody read would make the kernel forget what it has not read.
        self._forget_sender()
        self._patience = self.loop.call_later(LINGER_S, self.transport.abort)

    def _give_up_answers(self) -> None:
        """Nothing more is written: to the application the client has gone."""
        self.pipeline.clear()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.waiting_for_100_continue = False
            self._answered.disconnected = True
            self._answered.message_event.set()

    # -- what the client reads

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_reader()

    def on_response_complete(self) -> None:
        self._answered = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_sender()
        self._forget_reader()
        super().connection_lost(exc)

    def _watch_reader(self) -> None:
        """Give the client `stall_s` to read what waits for it, or at least `LEAST_READ` bytes of it."""
        if self._stall is None:
            self._unread = self.transport.get_write_buffer_size()
            self._stall = self.loop.call_later(self._bounds.stall_s, self._stalled)

    def _forget_reader(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _stalled(self) -> None:
        self._stall = None
        unread = self.transport.get_write_buffer_size()
        if not unread:
            return
        if unread <= self._unread - LEAST_READ or not (self.flow.write_paused or self._done):
            self._watch_reader()
            return
        log.info("a client read less than %d bytes in %g s and was cut off", LEAST_READ, self._bounds.stall_s)
        self.transport.abort()

    @property
    def _done(self) -> bool:
        """Whether nothing more will be written that could tell that the client does not read."""
        return self.cycle is None or self.cycle.response_complete
