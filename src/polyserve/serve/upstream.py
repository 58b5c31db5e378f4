"""The way of one request to an engine and of its answer back, byte for byte.

Until the first token has arrived nothing is sent to the client, so any failure before it is mended on another instance
without anybody noticing. After it the bytes are passed on as they come, in whole events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from polyserve.core.types import Dispatch, Refuse
from polyserve.serve import continuation
from polyserve.serve.ask import Ask, rewritten
from polyserve.serve.driver import Driver
from polyserve.serve.errors import ApiError, Headers, refusal
from polyserve.serve.fleet import PATHS, Fleet, Node
from polyserve.serve.inflight import Ticket
from polyserve.serve.sse import EventScanner, NotAStreamError, Usage, assembled
from polyserve.serve.wire import Answer, ConnectError

log = logging.getLogger(__name__)

Send = Callable[[Any], Awaitable[None]]

# RFC 9110, 7.6.1, and what the two ends of a proxy each say for themselves.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade".split()
)
NOT_UPSTREAM = HOP_BY_HOP | frozenset(b"host content-length accept-encoding content-type expect x-request-id".split())
NOT_DOWNSTREAM = HOP_BY_HOP | frozenset(b"content-length content-encoding date server x-request-id".split())
OUR_HEADERS = [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]
OURS = (b"x-polyserve-", b"x-slo-", b"x-llm-d-slo-", b"x-sgl-")

# What remains after `[DONE]` is the end of the chunked body; a connection that gives it is used again.
GOODBYE_S = 1.0
LONGEST_ERROR = 1024 * 1024
LONGEST_ANSWER = 256 * 1024 * 1024
# The engine's answers that another instance may better.
WORTH_ANOTHER = frozenset((408, 425, 429))


class StreamFailedError(Exception):
    """The engine did not bring the answer to its end; `refused`: nobody listens at its address."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class Exchange:
    """One request, from its first dispatch to the end of its answer."""

    def __init__(self, ticket: Ticket, ask: Ask, headers: Mapping[bytes, bytes], send: Send, driver: Driver) -> None:
        self.ticket = ticket
        self.ask = ask
        self.status = 200
        self.usage: Usage | None = None
        self._headers = headers
        self._send = send
        self._now = driver.now
        self._asked_at = driver.now()
        self._decided_at = 0.0
        self.started = False  # the client has got the head of the answer
        self._kept = continuation.kept_for(ask, ticket.request)
        self._begun: str | None = None  # text that the client has, and the next engine goes on from

    def __repr__(self) -> str:
        return f"<exchange of {self.ticket!r}>"

    async def run(self, fleet: Fleet, attempts: int) -> None:
        """Answer the client; raises `ApiError` as long as a status can still tell it."""
        failures = 0
        while True:
            decision = await self.ticket.decision()
            if isinstance(decision, Refuse):
                raise refusal(decision)
            self._decided_at = self._now()
            try:
                if await self._attempt(fleet.get(decision.instance), decision):
                    return
            except StreamFailedError as error:
                failures += 1
                log.info("request %s on %s: %s", self.ticket.request.id, decision.instance, error)
                if self.started or failures >= attempts:
                    await self.give_up(ApiError(502, "upstream_error", f"the engine failed: {error}"))
                    return

    async def _attempt(self, node: Node | None, dispatch: Dispatch) -> bool:
        """Whether the client has its answer; False: the brain says where to go next. Raises `StreamFailedError`."""
        ticket = self.ticket
        if node is None or node.engine is None:
            ticket.broke_off(dispatch)
            raise StreamFailedError("the instance has gone", refused=True)
        if self._begun is not None and not node.engine.continues:
            ticket.broke_off(dispatch)
            raise StreamFailedError("it cannot go on with an answer that was begun elsewhere")
        ticket.board(node, ticket.tokens if self.started else dispatch.resume_from, continues=self.started)
        try:
            await self._converse(node, dispatch)
            return True
        except asyncio.CancelledError:
            why = ticket.interruption()
            if why is None:
                raise
            if why != "silent":  # the brain took it off the instance already
                ticket.alight()
                if self.started and not (why == "evicted" and self._keep_text()):
                    raise StreamFailedError(f"its request was {why}") from None
                return False
            ticket.broke(delivered=self.started)
            raise StreamFailedError("no token for too long") from None
        except StreamFailedError as error:
            ticket.broke(delivered=self.started)
            node.suspect(error.refused)
            raise

    def _keep_text(self) -> bool:
        """Whether the answer can go on elsewhere from the text that the client has."""
        if self._kept is None:
            return False
        try:
            self._begun = self._kept.text(chat=self.ask.endpoint == "chat")
        except NotAStreamError:
            return False
        return True

    async def give_up(self, error: ApiError) -> None:
        """Tell the client that there will be no more; raises the error while a status can still tell it."""
        if self.ticket.outcome == "ok":
            return
        self.ticket.outcome = "failed"
        if not self.started:
            raise error
        self.ticket.close()
        await self._send({"type": "http.response.body", "body": error.event, "more_body": False})

    async def _converse(self, node: Node, dispatch: Dispatch) -> None:
        answer = await self._open(node, dispatch)
        try:
            if answer.status != 200:
                await self._reject(answer)
            elif not self.ask.streamable:
                await self._relay_whole(answer)
            elif not (kind := answer.header(b"content-type")).startswith(b"text/event-stream"):
                raise StreamFailedError(f"it sent {kind.decode('latin-1')!r} in place of an event stream")
            else:
                await self._relay(answer, dispatch)
        except OSError as error:
            raise StreamFailedError(f"its stream broke: {_why(error)}") from error
        finally:
            answer.close()  # which cancels the request on the engine, unless the answer was read to its end

    # -- to the engine

    async def _open(self, node: Node, dispatch: Dispatch) -> Answer:
        body = self._body(node, dispatch)
        try:
            return await node.wire.post(PATHS[self.ask.endpoint], self._upstream_headers(), body)
        except ConnectError as error:
            raise StreamFailedError(f"it cannot be reached: {_why(error)}", refused=True) from error
        except OSError as error:
            raise StreamFailedError(f"it did not answer: {_why(error)}") from error

    def _body(self, node: Node, dispatch: Dispatch) -> bytes:
        assert node.engine is not None, "a dispatch goes to an engine that was met"
        slo, arrived_at = dispatch.slo, self.ticket.request.arrived_at
        due_at = slo.due_at(arrived_at, 0) if slo else math.inf
        changes = node.engine.changes(self.ask, slo, max(due_at - self._now(), 0.001), due_at)
        if self.ask.model != node.model:  # an alias, which is ours and not the engine's
            changes["model"] = node.model
        if self._begun is not None:
            changes |= continuation.changes(self.ask, self._begun, self.ticket.base)
        return rewritten(self.ask.fields, changes) if changes else self.ask.raw

    def _upstream_headers(self) -> Headers:
        theirs = [
            header
            for header in self._headers.items()
            if header[0] not in NOT_UPSTREAM and not header[0].startswith(OURS)
        ]
        return [*theirs, *OUR_HEADERS, (b"x-request-id", self.ticket.request.id.encode())]

    # -- to the client

    async def _relay(self, answer: Answer, dispatch: Dispatch) -> None:
        """Pass a stream on, or gather it for a client that wants the answer whole."""
        ticket, send, kept, streaming = self.ticket, self._send, self._kept, self.ask.stream
        scanner = EventScanner(strip_usage=not self.ask.include_usage and streaming, strip_role=self.started)
        read = answer.read
        held: list[bytes] = []  # what came before the first token, or everything for an answer that is sent whole
        while not scanner.done:
            data = await read()
            if not data:
                raise StreamFailedError("its stream ended before [DONE]")
            seen = scanner.events
            try:
                piece = scanner.feed(data)
            except NotAStreamError as error:
                raise StreamFailedError(str(error)) from None
            if scanner.events != seen:
                ticket.advance(scanner.events - seen)
            flows = self.started or (streaming and scanner.events > 0 and scanner.error is None)
            if scanner.done or not flows:
                held.append(piece)
            elif piece:
                if not self.started:
                    await self._start(answer, dispatch, [])
                    piece = b"".join([*held, piece])
                    held.clear()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if kept is not None:
                    kept.add(piece)
            if scanner.error is not None:
                raise StreamFailedError(f"it says {scanner.error[:300].decode(errors='replace')}")
        last = b"".join(held) if streaming else self._assemble(held)
        self._finish(scanner.usage)
        await self._end(answer, dispatch, last)

    def _assemble(self, pieces: list[bytes]) -> bytes:
        try:
            return assembled(b"".join(pieces), chat=self.ask.endpoint == "chat")
        except NotAStreamError as error:
            raise StreamFailedError(str(error)) from None

    async def _relay_whole(self, answer: Answer) -> None:
        """An answer that no engine streams: its tokens are seen only when all are there."""
        body = await answer.whole(LONGEST_ANSWER)
        try:
            usage = msgspec.json.decode(body, type=_Whole).usage
        except msgspec.MsgspecError:
            raise StreamFailedError("its answer is no completion") from None
        self.ticket.advance(1)
        self._finish(usage)
        await self._end(answer, self.ticket.dispatch, body)

    async def _reject(self, answer: Answer) -> None:
        """Pass on what the engine has against the request; what is not the request's fault is a failure."""
        status = answer.status
        body = await answer.whole(LONGEST_ERROR)
        if status < 400 or status >= 500 or status in WORTH_ANOTHER:
            raise StreamFailedError(f"it answered {status}: {body[:300].decode(errors='replace')}")
        self.status = status
        self.ticket.outcome = "rejected"
        self.ticket.close()
        await self._end(answer, self.ticket.dispatch, body)

    def _finish(self, usage: Usage | None) -> None:
        self.usage = usage
        self.ticket.finish(usage.completion_tokens if usage else None, usage.prompt_tokens if usage else None)

    async def _end(self, answer: Answer, dispatch: Dispatch | None, last: bytes) -> None:
        """Send the last of the answer, and the head before it where it is still to come."""
        if not self.started:
            whole = [(b"content-length", b"%d" % len(last))]
            if not self.ask.stream and self.status == 200:
                whole.append((b"content-type", b"application/json"))
            await self._start(answer, dispatch, whole)
        await self._send({"type": "http.response.body", "body": last, "more_body": False})
        if not answer.ended:
            with contextlib.suppress(OSError):  # which a timeout is, too
                async with asyncio.timeout(GOODBYE_S):
                    while await answer.read():
                        pass

    async def _start(self, answer: Answer, dispatch: Dispatch | None, more: Headers) -> None:
        named = {name for name, _ in more}
        headers = [header for header in answer.headers if header[0] not in NOT_DOWNSTREAM and header[0] not in named]
        self.started = True
        head = [*headers, *more, *self._our_headers(dispatch)]
        await self._send({"type": "http.response.start", "status": self.status, "headers": head})

    def _our_headers(self, dispatch: Dispatch | None) -> Headers:
        ticket = self.ticket
        headers: Headers = [(b"x-request-id", ticket.client_id)]
        if dispatch is None:
            return headers
        arrived_at = ticket.request.arrived_at
        queue_s = self._decided_at - self._asked_at
        overhead_s = (self._asked_at - arrived_at) + (ticket.boarded_at - self._decided_at)
        headers += [
            (b"x-polyserve-tier", (dispatch.tier or "best-effort").encode()),
            (b"x-polyserve-instance", dispatch.instance.encode()),
            (b"x-polyserve-promoted", b"true" if dispatch.promoted else b"false"),
            (b"x-polyserve-queue-ms", b"%.3f" % (queue_s * 1e3)),
            (b"x-polyserve-overhead-ms", b"%.3f" % (overhead_s * 1e3)),
        ]
        if dispatch.predicted_ttft_s is not None:
            headers.append((b"x-polyserve-predicted-ttft-ms", b"%.1f" % (dispatch.predicted_ttft_s * 1e3)))
        return headers


class _Whole(msgspec.Struct):
    usage: Usage | None = None


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
