"""The brain's side of its relays: started, told, heard, and replaced when one dies.

A relay that dies takes its own streams with it and nobody else's: the brain is told that their clients have gone. To
the brain's process a request of a relay is a ticket like any other; only its task is somewhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

from polyserve.core.types import Arrived, Cancelled, Dispatch, Event, Refuse, Request, RequestId
from polyserve.serve.adapters import OpenAIEngine
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
from polyserve.serve.gateway import Gateway
from polyserve.serve.inflight import Interruption, Ticket
from polyserve.serve.listener import GatewayError
from polyserve.serve.plan import Plan

log = logging.getLogger(__name__)

FULL_RETRY_S = 1.0
# A relay that dies at once is not started more often than this.
AGAIN_S = 1.0
START_S = 60.0
# Relays go by a changed config this much later at most.
FOLLOW_S = 0.2


class RemoteTicket(Ticket):
    """A request whose client is at a relay."""

    def __init__(self, request: Request, gateway: Gateway, relay: RelayProcess, place: int) -> None:
        super().__init__(request, request.id.encode(), gateway.inflight, gateway.driver)
        self.last_at = math.inf  # its relay watches for silence
        self._gateway = gateway
        self._relay = relay
        self._place = place

    def __repr__(self) -> str:
        return f"<ticket {self.request.id} at {self._relay!r}>"

    def _owner(self) -> asyncio.Task[Any]:
        return cast(asyncio.Task[Any], None)  # it is in the relay's process

    def answer(self, decision: Dispatch | Refuse) -> None:
        """Pass the brain's decision on, and before it what the relay has to know of the instance."""
        self.alight()
        if isinstance(decision, Dispatch):
            self.dispatch, self.base = decision, decision.resume_from
            node = self._gateway.fleet.get(decision.instance)
            if node is not None and node.engine is not None:
                self._relay.introduce(self._place, Engine(node.spec, node.engine.kind), node.engine)
                node.tickets[self.request.id] = self
        self._relay.link.send(self._place, decision)

    def interrupt(self, why: Interruption) -> None:
        self._relay.link.send(self._place, Interrupt(self.request.id, why))
        self.alight()

    def alight(self) -> None:
        """No engine has it, as far as the brain's process knows."""
        if self.dispatch is not None and (node := self._gateway.fleet.get(self.dispatch.instance)) is not None:
            node.forget(self.request.id)


class RelayProcess:
    """One relay: its process, its line, and the requests it has."""

    def __init__(self, process: subprocess.Popen[bytes], gateways: list[Gateway]) -> None:
        self.process = process
        self.link = Link(self._take, self._lost)
        self.serving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone = asyncio.Event()
        self._gateways = gateways
        self._tickets: list[dict[RequestId, RemoteTicket]] = [{} for _ in gateways]
        self._met: dict[tuple[int, str], OpenAIEngine] = {}

    def __repr__(self) -> str:
        return f"<relay {self.process.pid}, {sum(map(len, self._tickets))} requests>"

    @property
    def pid(self) -> int:
        return self.process.pid

    def introduce(self, place: int, engine: Engine, known_as: OpenAIEngine) -> None:
        """Tell of an instance, once, and again when it has come back as another."""
        key = (place, engine.spec.id)
        if self._met.get(key) is not known_as:
            self._met[key] = known_as
            self.link.send(place, engine)

    # -- what it says

    def _take(self, place: int, value: Any) -> None:
        gateway, tickets = self._gateways[place], self._tickets[place]
        match value:
            case Tokens():
                _count(gateway, tickets, value)
            case Arrived():
                self._arrived(place, value)
            case Answered():
                self._answered(gateway, tickets, value)
            case Suspected():
                if (node := gateway.fleet.get(value.instance)) is not None:
                    node.suspect(value.refused)
            case Serving():
                if not self.serving.done():
                    self.serving.set_result(None)
            case _:
                gateway.driver.post(cast(Event, value))

    def _arrived(self, place: int, event: Arrived) -> None:
        gateway, request = self._gateways[place], event.request
        ticket = RemoteTicket(request, gateway, self, place)
        if gateway.inflight.adopt(ticket):
            self._tickets[place][request.id] = ticket
        else:
            self.link.send(place, Refuse(request.id, "queue_full", None, FULL_RETRY_S))

    @staticmethod
    def _answered(gateway: Gateway, tickets: dict[RequestId, RemoteTicket], said: Answered) -> None:
        ticket = tickets.pop(said.request, None)
        if ticket is None:
            return
        for name in SAID:
            setattr(ticket, name, getattr(said, name))
        gateway.inflight.remove(ticket)
        ticket.alight()
        gateway.answered(ticket)

    def _lost(self) -> None:
        """It has died, or ended: the clients that it had have gone."""
        for gateway, tickets in zip(self._gateways, self._tickets, strict=True):
            for request, ticket in tickets.items():
                ticket.outcome = "cancelled"
                gateway.inflight.remove(ticket)
                ticket.alight()
                gateway.driver.post(Cancelled(gateway.driver.now(), request))
                gateway.answered(ticket)
            tickets.clear()
        self.gone.set()


def _count(gateway: Gateway, tickets: dict[RequestId, RemoteTicket], told: Tokens) -> None:
    """Take in tokens of streams that still run; an instance's own telemetry knows better."""
    node = gateway.fleet.get(told.instance)
    if node is None or node.tells:
        return
    for at, request, count, events in told.arrivals:
        if request in node.tickets and request in tickets:
            node.progress.token(at, request, count, events)
    node.moved_at = max(node.moved_at, told.arrivals[-1][0])


class Relays:
    """As many relays as the config says, on one listening socket."""

    def __init__(self, plan: Plan, gateways: list[Gateway], listener: socket.socket, beside: str) -> None:
        self._plan = plan
        self._gateways = gateways
        self._listener = listener
        self._beside = beside
        self._running: set[RelayProcess] = set()
        self._leaving = False

    def __repr__(self) -> str:
        return f"<relays {sorted(relay.pid for relay in self._running)}>"

    def pids(self) -> list[int]:
        """Of the relays that run."""
        return sorted(relay.pid for relay in self._running)

    async def serve(self) -> None:
        """Keep the relays running until they are told to leave and have left."""
        await asyncio.gather(*(self._keep() for _ in range(self._plan.relays)))

    async def started(self) -> None:
        """Come back when all relays take connections; raises `GatewayError`."""
        try:
            async with asyncio.timeout(START_S):
                while len(self._running) < self._plan.relays:  # noqa: ASYNC110 - they come one by one
                    await asyncio.sleep(0.01)
                await asyncio.gather(*(relay.serving for relay in self._running))
        except TimeoutError:
            raise GatewayError(f"the relays did not start within {START_S:g} s") from None

    async def follow(self, plan: Callable[[], Plan]) -> None:
        """Tell the relays of every other plan that comes to be in force."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            if (now := plan()) != self._plan:
                self._plan = now
                for relay in self._running:
                    relay.link.send(0, Planned(pickle.dumps(now)))

    def leave(self, retire: bool) -> None:
        """Tell all to end, after their last streams or as at SIGTERM."""
        self._leaving = True
        for relay in self._running:
            relay.link.send(0, Leave(retire))

    def kill(self) -> None:
        """End whatever still runs."""
        for relay in self._running:
            relay.link.close()
            relay.process.kill()
            relay.process.wait()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._leaving:
            began_at = loop.time()
            relay = await self._start()
            await relay.gone.wait()
            self._running.discard(relay)
            code = await loop.run_in_executor(None, relay.process.wait)
            if not self._leaving:
                log.error("relay %d ended with %d, and its streams with it; another is started", relay.pid, code)
                await asyncio.sleep(max(0.0, AGAIN_S - (loop.time() - began_at)))

    async def _start(self) -> RelayProcess:
        ours, theirs = socket.socketpair()
        numbers = (self._listener.fileno(), theirs.fileno())
        with theirs:
            relay = RelayProcess(_spawned(numbers), self._gateways)
        await asyncio.get_running_loop().create_connection(lambda: relay.link, sock=ours)
        epochs = [gateway.driver.epoch for gateway in self._gateways]
        relay.link.send(0, Begin(pickle.dumps(self._plan), epochs, self._beside))
        self._running.add(relay)
        return relay


def _spawned(numbers: tuple[int, int]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "polyserve.serve.relay", *map(str, numbers)]
    return subprocess.Popen(command, pass_fds=numbers, env=os.environ.copy())


@contextlib.asynccontextmanager
async def socket_path() -> AsyncIterator[str]:
    """Where a socket may lie that only we can reach."""
    with tempfile.TemporaryDirectory(prefix="polyserve-") as folder:
        yield str(Path(folder) / "brain")
