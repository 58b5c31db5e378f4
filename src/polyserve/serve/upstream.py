"""The way of one request to an engine and of its answer back, byte for byte.

Until the first token has arrived nothing is sent to the client, so any failure before it is mended on another instance
without anybody noticing. After it the bytes are passed on as they come, in whole events, and an engine that does not
bring them to their end is followed by another that goes on where it stopped (`continuation`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping

import msgspec

from polyserve.core.types import Dispatch, Refuse
from polyserve.serve import continuation
from polyserve.serve.adapters import OpenAIEngine
from polyserve.serve.ask import Ask, rewritten
from polyserve.serve.continuation import DONE, Begun, Kept, NotContinuableError, Seam
from polyserve.serve.driver import Driver
from polyserve.serve.errors import ApiError, Headers, refusal
from polyserve.serve.fleet import PATHS, Fleet, Node
from polyserve.serve.headers import for_client, for_engine
from polyserve.serve.inflight import Interruption, Message, Send, Ticket
from polyserve.serve.pace import Paces
from polyserve.serve.plan import Bounds
from polyserve.serve.responses import ResponseScanner
from polyserve.serve.service_tier import StampingScanner, stamped
from polyserve.serve.sse import EventScanner, NotAStreamError, Usage, assembled
from polyserve.serve.wire import Answer, ConnectError

log = logging.getLogger(__name__)

Scanner = EventScanner | ResponseScanner

OUR_HEADERS = [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]

# What remains after `[DONE]` is the end of the chunked body; a connection that gives it is used again.
GOODBYE_S = 1.0
LONGEST_ERROR = 1024 * 1024
LONGEST_ANSWER = 256 * 1024 * 1024
# The engine's answers that another instance may better. What it has against our key is no business of the client's.
WORTH_ANOTHER = frozenset((401, 403, 407, 408, 425, 429))


class StreamFailedError(Exception):
    """The engine did not bring the answer to its end.

    `refused`: nobody listens at its address; `final`: no other could either, since the client has its beginning;
    not `fault`: it was asked for what it does not know. `detail` is the engine's own words and addresses: for the log,
    never for clients.
    """

    def __init__(
        self, message: str, detail: str = "", refused: bool = False, final: bool = False, fault: bool = True
    ) -> None:
        super().__init__(f"{message}: {detail}" if detail else message)
        self.told = message
        self.detail = detail
        self.refused = refused
        self.final = final
        self.fault = fault


class Exchange:
    """One request, from its first dispatch to the end of its answer."""

    def __init__(
        self,
        ticket: Ticket,
        ask: Ask,
        headers: Mapping[bytes, bytes],
        send: Send,
        driver: Driver,
        paces: Paces,
    ) -> None:
        self.ticket = ticket
        self.ask = ask
        self.paces = paces
        self.status = 200
        self.usage: Usage | None = None
        self._headers = headers
        self._send = send
        self._now = driver.now
        self._asked_at = driver.now()
        self._decided_at = 0.0
        self.started = False  # the client has got the head of the answer
        self._answer: Answer | None = None  # the latest
        self._kept = Kept(ask)
        self._begun: Begun | None = None  # what the next engine goes on from

    def __repr__(self) -> str:
        return f"<exchange of {self.ticket!r}>"

    async def run(self, fleet: Fleet, bounds: Bounds) -> None:
        """Answer the client; raises `ApiError` as long as a status can still tell it."""
        failures = had = 0
        while True:
            decision = await self._decision(bounds.silence_s)
            if not isinstance(decision, Dispatch):
                await self.give_up(decision)
                return
            self._decided_at = self._now()
            try:
                if await self._attempt(fleet.get(decision.instance), decision):
                    return
            except StreamFailedError as error:
                has = self._begun.tokens if self._begun and self._begun.left(self.ask) != 0 else 0
                failures, had = 1 if has > had else failures + 1, has  # who gets on may fail as often as it takes
                log.info("request %s on %s: %s", self.ticket.request.id, decision.instance, error)
                if error.final or failures >= bounds.attempts:
                    await self.give_up(ApiError(502, "upstream_error", f"the engine failed: {error.told}"))
                    return

    async def _decision(self, most_s: float) -> Dispatch | ApiError:
        """What the brain says next. An answer that was begun is never refused by it, but waits no longer than this."""
        try:
            async with asyncio.timeout(most_s if self.started or self._begun else None):
                decision = await self.ticket.decision()
        except TimeoutError:
            return ApiError(503, "upstream_error", "no instance could go on with the answer", retry_after_s=1.0)
        return refusal(decision, self.ticket.request) if isinstance(decision, Refuse) else decision

    async def _attempt(self, node: Node | None, dispatch: Dispatch) -> bool:
        """Whether the client has its answer; False: the brain says where to go next. Raises `StreamFailedError`."""
        ticket = self.ticket
        if node is None or node.engine is None:
            ticket.broke_off(dispatch)
            raise StreamFailedError("the instance has gone", refused=True)
        if not self._goes_on_at(node.engine):
            ticket.broke_off(dispatch)
            raise StreamFailedError("it cannot go on with an answer that was begun elsewhere")
        begun = self._begun
        ticket.mute = not self.ask.streamable
        ticket.board(node, begun.tokens if begun else dispatch.resume_from, continues=begun is not None)
        why: Interruption | None = None
        try:
            await self._converse(node, dispatch)
            return True
        except asyncio.CancelledError:
            why = ticket.interruption()
            if why is None:
                raise
            problem = StreamFailedError("no token for too long" if why == "silent" else f"its request was {why}")
        except StreamFailedError as error:
            if error.fault:
                node.suspect(error.refused)
            problem = error
        return await self._broke_off(dispatch, problem, taken=why not in (None, "silent"))

    async def _broke_off(self, dispatch: Dispatch, problem: StreamFailedError, taken: bool) -> bool:
        """What `_attempt` says of an answer without an end; `taken`: the brain took it off the instance itself."""
        obstacle = self._take_stock()
        if await self._conclude(dispatch):
            return True
        if taken:
            self.ticket.alight()
        else:
            self.ticket.broke(self._begun.tokens if self._begun else 0, problem.fault)
        if obstacle:
            raise StreamFailedError(f"{problem.told}; {obstacle}", problem.detail, final=True) from problem
        if taken:
            return False
        raise problem

    def _goes_on_at(self, engine: OpenAIEngine) -> bool:
        """Whether an engine can take the answer on; one that nobody has seen yet is made again where it cannot."""
        begun = self._begun
        if begun is None or not begun.text or engine.continues_chats or self.ask.endpoint != "chat":
            return True
        if self.started:
            return False
        self._begun = None
        self._kept.clear()
        return True

    def _take_stock(self) -> str:
        """Note what need not be made again; says what is in the way of going on elsewhere, or nothing."""
        self._begun = None
        try:
            self._begun = self._kept.begun(self.ticket.tokens)
        except NotContinuableError as error:
            if self.started:
                return str(error)
        if self._begun is None:
            self._kept.clear()  # nobody has seen it
        return ""

    async def _conclude(self, dispatch: Dispatch) -> bool:
        """End an answer whose tokens have all come, though its engine did not end it; whether it was one."""
        begun = self._begun
        if begun is None or not begun.complete(self.ask):
            return False
        ending = Seam(begun, self.ask).ending()
        try:
            last = ending + DONE if self.ask.stream else self._assemble([*self._kept.pieces, ending])
        except StreamFailedError:
            self._begun = None
            self._kept.clear()
            return False
        assert self._answer is not None, "what was begun came from an engine"
        self.ticket.complete()
        await self._end(self._answer, dispatch, last)
        return True

    async def give_up(self, error: ApiError) -> None:
        """Tell the client that there will be no more; raises the error while a status can still tell it."""
        if self.ticket.outcome == "ok":
            return
        self.ticket.code = error.code
        self.ticket.outcome = "refused" if self.ticket.outcome == "refused" and not self.started else "failed"
        if not self.started:
            raise error
        self.ticket.close()
        await self._send({"type": "http.response.body", "body": error.event, "more_body": False})

    async def _converse(self, node: Node, dispatch: Dispatch) -> None:
        self._answer = self.ticket.reading = answer = await self._open(node, dispatch)
        try:
            if answer.status != 200:
                await self._reject(answer)
            elif not self.ask.streamable:
                await self._relay_whole(answer)
            elif not (kind := answer.header(b"content-type")).startswith(b"text/event-stream"):
                raise StreamFailedError("it sent something else than an event stream", repr(kind))
            else:
                await self._relay(answer, dispatch)
        except OSError as error:
            raise StreamFailedError("its stream broke", _why(error)) from error
        finally:
            self.ticket.reading = None
            answer.close()  # which cancels the request on the engine, unless the answer was read to its end

    # -- to the engine

    async def _open(self, node: Node, dispatch: Dispatch) -> Answer:
        body = await self._body(node, dispatch)
        try:
            return await node.wire.post(PATHS[self.ask.endpoint], self._upstream_headers(node), body)
        except ConnectError as error:
            raise StreamFailedError("it cannot be reached", _why(error), refused=True) from error
        except OSError as error:
            raise StreamFailedError("it did not answer", _why(error)) from error

    async def _body(self, node: Node, dispatch: Dispatch) -> bytes:
        assert node.engine is not None, "a dispatch goes to an engine that was met"
        slo, arrived_at, begun = dispatch.slo, self.ticket.request.arrived_at, self._begun
        due_at = slo.due_at(arrived_at, 0) if slo else math.inf
        changes = node.engine.changes(self.ask, slo, max(due_at - self._now(), 0.001), due_at)
        if self.ask.model != node.model:  # an alias, which is ours and not the engine's
            changes["model"] = node.model
        if begun is not None and begun.text:
            ids: list[int] | None = []
            if continuation.prompt_ids(self.ask) is not None:
                ids = await node.engine.tokenize(node.model, begun.text)
            if ids is None:
                raise StreamFailedError("it does not say which tokens the answer so far is", fault=False)
            changes |= continuation.changes(self.ask, begun, ids)
        return rewritten(self.ask.fields, changes) if changes else self.ask.raw

    def _upstream_headers(self, node: Node) -> Headers:
        ours = [*OUR_HEADERS, *node.credentials, (b"x-request-id", self.ticket.request.id.encode())]
        return [*for_engine(self._headers), *ours]

    # -- to the client

    async def _relay(self, answer: Answer, dispatch: Dispatch) -> None:
        """Pass a stream on, or gather it for a client that wants the answer whole."""
        ticket, kept, streaming = self.ticket, self._kept, self.ask.stream
        seam = None if self._begun is None else Seam(self._begun, self.ask)
        scanner = self._scanner(dispatch, continues=seam is not None)
        read = answer.read
        held: list[bytes] = []  # of a stream: what came before its first token
        while not scanner.done:
            data = await read()
            if not data:
                raise StreamFailedError("its stream ended before [DONE]")
            seen = scanner.events
            try:
                piece = scanner.feed(data)
            except NotAStreamError as error:
                raise StreamFailedError("it sent what cannot be read", str(error)) from None
            if scanner.events != seen:
                ticket.advance(scanner.events - seen)
            if seam is not None and not scanner.done:
                piece = seam.mend(piece)
            if not streaming:
                if not scanner.done:
                    kept.add(piece)
            elif not (self.started or (scanner.events > 0 and scanner.error is None)):
                held.append(piece)
            elif piece and not scanner.done:
                if not self.started:
                    await self._start(answer, dispatch, [])
                    piece = b"".join([*held, piece])
                    held.clear()
                kept.add(piece)
                await ticket.pass_on(self._send, {"type": "http.response.body", "body": piece, "more_body": True})
            if scanner.error is not None:
                raise StreamFailedError("it broke off", scanner.error[:300].decode(errors="replace"))
        await self._last(answer, dispatch, scanner, seam, [*held, piece])

    async def _last(
        self, answer: Answer, dispatch: Dispatch, scanner: Scanner, seam: Seam | None, pieces: list[bytes]
    ) -> None:
        """Send what came with the end of the stream."""
        usage, last = scanner.usage, b"".join(pieces)
        if seam is not None and isinstance(scanner, EventScanner):
            tokens, _, end = last.rpartition(b"data:")  # which is that of [DONE]
            told = seam.count(scanner.told)
            usage = seam.usage
            last = b"".join((seam.mend(tokens), seam.ending(), told, b"data:", end))
        if not self.ask.stream:
            last = self._whole(scanner, dispatch, last)
        self._finish(usage, scanner.usage)
        await self._end(answer, dispatch, last)
        await _goodbye(answer)

    def _whole(self, scanner: Scanner, dispatch: Dispatch, last: bytes) -> bytes:
        """The answer for a client that wants it whole."""
        if isinstance(scanner, EventScanner):
            return self._assemble([*self._kept.pieces, last])
        try:
            return scanner.response(self._service_tier(dispatch))
        except NotAStreamError as error:
            raise StreamFailedError("it sent what cannot be read", str(error)) from None

    def _service_tier(self, dispatch: Dispatch | None) -> str | None:
        """What the answer says of its service tier: something only to those who asked."""
        asked = self.ask.body.get("service_tier")
        return None if asked is None or dispatch is None else self.paces.served(asked, dispatch.tier)

    def _scanner(self, dispatch: Dispatch, continues: bool) -> Scanner:
        if self.ask.endpoint == "responses":
            return ResponseScanner()
        strip_usage = continues or (self.ask.stream and not self.ask.include_usage)
        tier = self._service_tier(dispatch)
        if tier is not None:
            return StampingScanner(tier, strip_usage, strip_role=continues)
        return EventScanner(strip_usage, strip_role=continues)

    def _assemble(self, pieces: list[bytes]) -> bytes:
        try:
            return assembled(b"".join(pieces), chat=self.ask.endpoint == "chat")
        except NotAStreamError as error:
            raise StreamFailedError("it sent what cannot be read", str(error)) from None

    async def _relay_whole(self, answer: Answer) -> None:
        """An answer that no engine streams: its tokens are seen only when all are there."""
        body = await answer.whole(LONGEST_ANSWER)
        try:
            usage = msgspec.json.decode(body, type=_Whole).usage
        except msgspec.MsgspecError:
            raise StreamFailedError("its answer is no completion") from None
        if (tier := self._service_tier(self.ticket.dispatch)) is not None and self.ask.endpoint != "embeddings":
            body = stamped(body, tier)
        self.ticket.advance(1)
        self._finish(usage, usage)
        await self._end(answer, self.ticket.dispatch, body)

    async def _reject(self, answer: Answer) -> None:
        """Pass on what the engine has against the request; what is not the request's fault is a failure."""
        status = answer.status
        body = await answer.whole(LONGEST_ERROR)
        if status < 400 or status >= 500 or status in WORTH_ANOTHER:
            raise StreamFailedError(f"it answered {status}", body[:300].decode(errors="replace"))
        self.status = status
        self.ticket.outcome = "rejected"
        self.ticket.close()
        await self._end(answer, self.ticket.dispatch, body)

    def _finish(self, usage: Usage | None, here: Usage | None) -> None:
        """Note the end: the usage of the whole answer, and what of it this engine counted."""
        self.usage = usage
        self.ticket.finish(here.completion_tokens if here else None, usage.prompt_tokens if usage else None)

    async def _end(self, answer: Answer, dispatch: Dispatch | None, last: bytes) -> None:
        """Send the last of the answer, and the head before it where it is still to come."""
        if not self.started:
            whole = [(b"content-length", b"%d" % len(last))]
            if not self.ask.stream and self.status == 200:
                whole.append((b"content-type", b"application/json"))
            await self._start(answer, dispatch, whole)
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def _start(self, answer: Answer, dispatch: Dispatch | None, more: Headers) -> None:
        named = {name for name, _ in more}
        headers = [header for header in for_client(answer.headers) if header[0] not in named]
        self.started = True
        head = [*headers, *more, *self._our_headers(dispatch)]
        message: Message = {"type": "http.response.start", "status": self.status, "headers": head}
        await self.ticket.pass_on(self._send, message)

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


async def _goodbye(answer: Answer) -> None:
    """Take in the end of the chunked body, so that the connection is used again."""
    if not answer.ended:
        with contextlib.suppress(OSError):  # which a timeout is, too
            async with asyncio.timeout(GOODBYE_S):
                while await answer.read():
                    pass


class _Whole(msgspec.Struct):
    usage: Usage | None = None


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
