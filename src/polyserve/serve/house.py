"""The gateways of all models under one roof: one listener, one API, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import IO

import aiohttp

from polyserve.serve import admin
from polyserve.serve.access import Operators
from polyserve.serve.app import Front
from polyserve.serve.gateway import Gateway
from polyserve.serve.listener import GatewayError, Server, bound, make_room
from polyserve.serve.metrics import exposition
from polyserve.serve.plan import Plan

log = logging.getLogger(__name__)

# Engines close idle connections after 5 s (uvicorn's default); ours are given up before that.
KEEP_ALIVE_S = 4.0


class House:
    """Every model's gateway, and what they share; made and used inside a running event loop, by `running`."""

    def __init__(self, plan: Plan, gateways: list[Gateway]) -> None:
        self.plan = plan
        self.gateways = {gateway.model: gateway for gateway in gateways}
        self.created = int(time.time())
        shared = plan.admin is not None and plan.admin == plan.listen
        operators = Operators(plan.admin_keys)
        beside = admin.public(self, with_admin=shared, with_metrics=not plan.tenants)
        self.front = Front(gateways, plan.bounds, beside, plan.tenants, operators if shared else None)
        self.admin = admin.admin(self, operators)

    def __repr__(self) -> str:
        return f"<house of {', '.join(self.gateways)}>"

    def accepting(self) -> bool:
        """Whether new requests are taken in."""
        return all(gateway.accepting() for gateway in self.gateways.values())

    def refuse_new(self) -> None:
        """Take in no more requests; the end is near."""
        for gateway in self.gateways.values():
            gateway.refuse_new()

    def metrics_text(self) -> bytes:
        """What all models count, in Prometheus' text format."""
        return exposition({model: gateway.metrics for model, gateway in self.gateways.items()})

    @property
    def failure(self) -> BaseException | None:
        """What broke a model's brain, if anything did."""
        failures = (gateway.driver.failed for gateway in self.gateways.values())
        return next((failed.result() for failed in failures if failed.done()), None)


@contextlib.asynccontextmanager
async def running(plan: Plan) -> AsyncIterator[House]:
    """Gateways at work, without listeners; raises `GatewayError`."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=plan.bounds.connect_s)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        )
        gateways = []
        for model in plan.models:
            journal = stack.enter_context(_journal(model.journal))
            gateways.append(Gateway(model, plan.bounds, session, journal))
        house = House(plan, gateways)
        _say_what_is_open(plan)
        for gateway in gateways:
            stack.push_async_callback(gateway.close)
            gateway.open()
        yield house


def _say_what_is_open(plan: Plan) -> None:
    """Name what anybody can reach without a key."""
    if not plan.tenants and not plan.listen.loopback:
        where = f"{plan.listen.host}:{plan.listen.port}"
        log.warning("anybody who reaches %s may send requests: the config has no tenants", where)


@contextlib.contextmanager
def _journal(path: Path | None) -> Iterator[IO[bytes] | None]:
    if path is None:
        yield None
        return
    try:
        file = path.open("wb")
    except OSError as error:
        raise GatewayError(f"journal {path}: cannot be written: {error.strerror}") from None
    with file:
        yield file


async def serve(plan: Plan, on_ready: Callable[[House, int], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let streams end; raises `GatewayError`.

    `on_ready` is told of the house and of the port it listens on.
    """
    make_room(plan.bounds)
    apart = plan.admin if plan.admin != plan.listen else None
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(bound(plan.listen))
        admin_listener = stack.enter_context(bound(apart)) if apart is not None else None
        house = await stack.enter_async_context(running(plan))
        front = Server(house.front, plan.bounds)
        serving = [asyncio.create_task(front.serve([listener]))]
        servers = [front]
        if admin_listener is not None:
            servers.append(Server(house.admin, plan.bounds))
            serving.append(asyncio.create_task(servers[1].serve([admin_listener])))
        with _signals(house, servers):
            if on_ready is not None:
                on_ready(house, listener.getsockname()[1])
            await asyncio.gather(*serving)
        if house.failure is not None:
            raise GatewayError(f"the controller failed: {house.failure!r}")


@contextlib.contextmanager
def _signals(house: House, servers: list[Server]) -> Iterator[None]:
    """Begin the end at a signal or when the brain fails; a second signal does not wait for streams."""

    def stop() -> None:
        house.refuse_new()
        for server in servers:
            server.force_exit = server.should_exit
            server.should_exit = True

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    for number in numbers:
        loop.add_signal_handler(number, stop)
    for gateway in house.gateways.values():
        gateway.driver.failed.add_done_callback(lambda _: stop())
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
