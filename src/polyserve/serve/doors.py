"""Who accepts connections: the process that decides, or relays for it; opened together and closed in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from polyserve.serve.listener import Server
from polyserve.serve.plan import Plan
from polyserve.serve.relays import Relays, socket_path

if TYPE_CHECKING:
    from polyserve.serve.house import House

log = logging.getLogger(__name__)


class Doors:
    """The listeners of a house."""

    def __init__(self, retire_s: float) -> None:
        self.servers: list[Server] = []
        self.relays: Relays | None = None
        self._retire_s = retire_s
        self._beside: Server | None = None
        self._serving: list[asyncio.Task[None]] = []
        self._retiring: list[asyncio.Task[None]] = []

    async def open(self, house: House, listeners: Sequence[socket.socket], path: str) -> None:
        """Begin to serve; `path` is where relays find what they do not answer themselves. Raises `GatewayError`."""
        plan = house.plan
        apps = (house.front, house.admin)[: len(listeners)]
        if plan.relays:
            inner = socket.socket(socket.AF_UNIX)
            inner.bind(path)
            inner.listen()
            self._beside = Server(house.beside, plan.bounds)
            self._serving.append(asyncio.create_task(self._beside.serve([inner])))
            self.relays = Relays(_in_force(house), list(house.gateways.values()), listeners[0], path)
            self._serving.append(asyncio.create_task(self._relay(self.relays, house)))
            apps, listeners = apps[1:], listeners[1:]
        for app, listener in zip(apps, listeners, strict=True):
            server = Server(app, plan.bounds)
            self.servers.append(server)
            self._serving.append(asyncio.create_task(server.serve([listener])))
        while not all(server.started for server in self.servers):  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        if self.relays is not None:
            await self.relays.started()

    def stop(self) -> None:
        """Begin the end; the second time, do not wait for streams."""
        if self.relays is not None:
            self.relays.leave(retire=False)
        for server in self.servers:
            server.force_exit = server.should_exit
            server.should_exit = True

    def retire(self) -> None:
        """Another process takes new connections: end after the last stream."""
        log.info("another process takes over; this one ends after its last stream")
        if self.relays is not None:
            self.relays.leave(retire=True)
        self._retiring = [asyncio.create_task(server.retire(self._retire_s)) for server in self.servers]

    async def closed(self) -> None:
        """Come back when all have ended."""
        await asyncio.gather(*self._serving)

    async def _relay(self, relays: Relays, house: House) -> None:
        following = asyncio.create_task(relays.follow(lambda: _in_force(house)))
        try:
            await relays.serve()
        finally:
            following.cancel()
        assert self._beside is not None, "relays have somewhere to ask"
        self._beside.should_exit = True


def _in_force(house: House) -> Plan:
    """The plan that everything goes by now, tiers changed by themselves among it."""
    return replace(house.plan, models=tuple(gateway.plan for gateway in house.gateways.values()))


@contextlib.asynccontextmanager
async def opened(house: House, listeners: Sequence[socket.socket]) -> AsyncIterator[Doors]:
    """The doors, open; raises `GatewayError`."""
    doors = Doors(house.plan.bounds.retire_s)
    async with socket_path() as path:
        try:
            await doors.open(house, listeners, path)
            yield doors
        finally:
            for task in doors._serving:
                task.cancel()
            await asyncio.gather(*doors._serving, return_exceptions=True)
            if doors.relays is not None:
                doors.relays.kill()
