"""A relay: a process that answers clients, and has its decisions made by the brain of another process.

It is the gateway's front, its requests in flight and its streams as they are in one process; only the brain behind the
driver is far away. Tokens are counted here and told in batches. What is no completion is passed on to the brain's
process. A relay ends when the line to its brain does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, cast

import aiohttp
import uvloop

from polyserve.core.types import Configured, Dispatch, Event, InstanceId, Refuse, RequestId
from polyserve.progress import REPORT_EVERY_S, ProgressCollector
from polyserve.serve.access import Operators
from polyserve.serve.adapters import KINDS
from polyserve.serve.app import Front
from polyserve.serve.driver import Driver
from polyserve.serve.errors import ApiError
from polyserve.serve.estimate import TokenEstimator
from polyserve.serve.fleet import Fleet, Node
from polyserve.serve.frames import (
    SAID,
    Answered,
    Begin,
    Engine,
    Interrupt,
    Leave,
    Link,
    Planned,
    Serving,
    Suspected,
    Tokens,
)
from polyserve.serve.gateway import SILENCE_LOOK_S, Gateway, longest_context
from polyserve.serve.inflight import Inflight, Ticket
from polyserve.serve.listener import Server, make_room
from polyserve.serve.pace import Paces
from polyserve.serve.plan import Bounds, ModelPlan, Plan
from polyserve.serve.tokens import PromptCounter, tokenizer

log = logging.getLogger(__name__)

# What one may send and get beside completions at once; pictures of the fleet, lists of models.
LONGEST_BODY = 16 * 1024 * 1024
BESIDE = aiohttp.ClientTimeout(total=30.0)


class _FarBrain:
    """The brain as a relay's driver sees it: it takes events, and answers in its own time."""

    wake_at = None

    def __init__(self, model: int, link: Link) -> None:
        self._model = model
        self._link = link

    def step(self, now: float, event: Event) -> list[Any]:
        if not isinstance(event, Configured):
            self._link.send(self._model, event)
        return []


class _TokenLog(ProgressCollector):
    """Token arrivals of one instance, kept until they are sent to the one who makes sense of them."""

    def __init__(self, instance: InstanceId) -> None:
        super().__init__(instance)
        self.arrivals: list[tuple[float, RequestId, int, int]] = []

    def token(self, now: float, request: RequestId, count: int, events: int = 1) -> None:
        self.arrivals.append((now, request, count, events))


class _Inflight(Inflight):
    """Requests of this relay. Other relays' are not known here, so no client's id is an id that is free."""

    def __contains__(self, request: RequestId) -> bool:
        return True


class _Node(Node):
    """An engine that the brain's process looks after."""

    def __init__(self, told: Engine, relayed: Relayed, session: aiohttp.ClientSession, bounds: Bounds) -> None:
        super().__init__(
            told.spec, relayed.driver, session, relayed.model, bounds.probe_s, bounds.connect_s, lambda _: None
        )
        spec = told.spec
        self.progress: _TokenLog = _TokenLog(spec.id)
        self.engine = KINDS[told.kind](session, spec.url, spec.send_priority, spec.api_key)
        self.state = "ready"
        self._relayed = relayed

    def suspect(self, refused: bool = False) -> None:
        self._relayed.tell(Suspected(self.id, refused))


class _Fleet(Fleet):
    """The engines that this relay was sent to so far."""

    def put(self, node: Node) -> None:
        if (old := self._nodes.get(node.id)) is not None:
            old.wire.close()
        self._nodes[node.id] = node


class Relayed:
    """One model, as far as a relay has it: what `Front` wants of a gateway."""

    def __init__(
        self, place: int, plan: ModelPlan, bounds: Bounds, link: Link, epoch: float, session: aiohttp.ClientSession
    ) -> None:
        self.plan = plan
        self.model = plan.name
        self._place = place
        self._link = link
        self._bounds = bounds
        self._session = session
        self.driver = Driver(_FarBrain(place, link), plan.configured, lambda _: None, lambda *_: None)
        self.driver.epoch = epoch
        self.driver.start()
        self.inflight = _Inflight(self.driver, bounds.open_requests)
        self.fleet = _Fleet(self.driver, session, plan.name, bounds.probe_s, bounds.connect_s, lambda _: None)
        self.paces = Paces(plan.configured.tiers, plan.service_tiers, plan.default_tier)
        own = None if plan.tokenizer is None else tokenizer(plan.tokenizer)
        self.counter = PromptCounter(TokenEstimator(), own, longest_context(plan))

    def tell(self, value: Any) -> None:
        self._link.send(self._place, value)

    def take(self, value: Any) -> None:
        """Carry out what the brain says."""
        match value:
            case Dispatch() | Refuse():
                if (ticket := self.inflight.get(value.request)) is not None:
                    ticket.answer(value)
            case Interrupt():
                if (ticket := self.inflight.get(value.request)) is not None:
                    ticket.interrupt(value.why)
            case Engine():
                self.fleet.put(_Node(value, self, self._session, self._bounds))
            case _:
                raise AssertionError(f"the brain does not say {value!r}")

    def answered(self, ticket: Ticket) -> None:
        """Tell of a request that is over."""
        assert ticket.outcome is not None, "a closed ticket has an outcome"
        self.tell(Answered(ticket.request.id, *(getattr(ticket, name) for name in SAID)))

    def follow(self, plan: ModelPlan, bounds: Bounds) -> None:
        """Another plan is in force."""
        self.plan, self._bounds = plan, bounds
        self.inflight.most = bounds.open_requests
        self.paces = Paces(plan.configured.tiers, plan.service_tiers, plan.default_tier)

    def report(self) -> None:
        """Send the token arrivals since the last time."""
        for node in self.fleet:
            log_of = node.progress
            if isinstance(log_of, _TokenLog) and log_of.arrivals:
                self.tell(Tokens(node.id, log_of.arrivals))
                log_of.arrivals = []

    def watch_silence(self) -> None:
        """Interrupt the streams that have said nothing for too long."""
        now = self.driver.now()
        for node in self.fleet:
            for ticket in list(node.tickets.values()):
                if now - ticket.last_at > self._bounds.silence_s and not ticket.unread:
                    ticket.interrupt("silent")


class _Beside:
    """Passes on to the brain's process what is no completion."""

    def __init__(self, path: str) -> None:
        self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(path), timeout=BESIDE)

    async def aclose(self) -> None:
        await self._session.close()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message["body"], message["more_body"]
            if len(body) > LONGEST_BODY:
                raise ApiError(413, "request_too_large", f"the body is larger than {LONGEST_BODY} bytes")
        query = scope["query_string"].decode("latin-1")
        url = f"http://brain{scope['path']}{'?' + query if query else ''}"
        kept = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = [pair for pair in kept if pair[0] in ("content-type", "accept", "x-request-id")]
        try:
            async with self._session.request(scope["method"], url, data=body, headers=headers) as answer:
                whole = await answer.read()
        except (aiohttp.ClientError, TimeoutError):
            raise ApiError(503, "shutting_down", "the gateway is restarting", retry_after_s=1.0) from None
        head = [(name.lower().encode(), value.encode("latin-1")) for name, value in answer.headers.items()]
        passed = [pair for pair in head if pair[0] not in (b"date", b"transfer-encoding", b"content-length")]
        length = (b"content-length", b"%d" % len(whole))
        await send({"type": "http.response.start", "status": answer.status, "headers": [*passed, length]})
        await send({"type": "http.response.body", "body": whole, "more_body": False})


class Relay:
    """The process: a listener, the models, and the line to the brain."""

    def __init__(self, listener: socket.socket, line: socket.socket) -> None:
        self._listener = listener
        self._line = line
        self._models: Sequence[Relayed] = ()
        self._server: Server | None = None
        self._front: Front | None = None
        self._began: asyncio.Future[Begin] = asyncio.get_running_loop().create_future()
        self._plan: Plan | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until the brain says otherwise."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_connection(lambda: Link(self._take, self._alone), sock=self._line)
        begin = await self._began
        plan: Plan = pickle.loads(begin.plan)
        self._plan = plan
        make_room(plan.bounds)
        session = aiohttp.ClientSession(auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar())
        beside = _Beside(begin.beside)
        async with session, contextlib.aclosing(beside):
            self._models = [
                Relayed(place, model, plan.bounds, link, begin.epochs[place], session)
                for place, model in enumerate(plan.models)
            ]
            await self._serve(plan, beside, link)
        link.close()

    async def _serve(self, plan: Plan, beside: _Beside, link: Link) -> None:
        shared = plan.admin is not None and plan.admin == plan.listen
        operators = Operators(plan.admin_keys) if shared else None
        self._front = front = Front(cast(Sequence[Gateway], self._models), plan.bounds, beside, plan.tenants, operators)
        self._server = server = Server(front, plan.bounds)
        serving = asyncio.create_task(server.serve([self._listener]))
        telling = asyncio.create_task(self._tell())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        gc.collect()
        gc.freeze()
        link.send(0, Serving())
        await serving
        telling.cancel()
        for model in self._models:
            model.counter.close()

    async def _tell(self) -> None:
        looked_at = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            now = asyncio.get_running_loop().time()
            for model in self._models:
                model.report()
                if now - looked_at > SILENCE_LOOK_S:
                    model.watch_silence()
            if now - looked_at > SILENCE_LOOK_S:
                looked_at = now

    def _take(self, model: int, value: Any) -> None:
        match value:
            case Begin():
                self._began.set_result(value)
            case Leave():
                self._leave(value.retire)
            case Planned():
                self._follow(pickle.loads(value.plan))
            case _:
                self._models[model].take(value)

    def _follow(self, plan: Plan) -> None:
        self._plan = plan
        for relayed, model in zip(self._models, plan.models, strict=True):
            relayed.follow(model, plan.bounds)
        if self._front is not None:
            self._front.know(plan.tenants)
            self._front.bounds = plan.bounds

    def _leave(self, retire: bool) -> None:
        if self._server is None or self._plan is None:
            raise SystemExit(0)
        if retire:
            self._leaving = asyncio.get_running_loop().create_task(self._server.retire(self._plan.bounds.retire_s))
        else:
            self._server.force_exit = self._server.should_exit
            self._server.should_exit = True

    def _alone(self) -> None:
        """The brain has gone, and with it all that a stream needs to be continued; clients are served by the next."""
        if self._server is None or not self._server.should_exit:
            os._exit(1)


def main() -> None:
    """`python -m polyserve.serve.relay LISTENER LINE`: two file descriptors."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s relay %(process)d: %(message)s")
    listener, line = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    # The brain's process hears of signals that are meant for all, and says what they mean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.set_threshold(50_000, 20, 50)

    async def run() -> None:
        await Relay(listener, line).run()

    uvloop.run(run())


if __name__ == "__main__":
    main()
