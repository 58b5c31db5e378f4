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
from prometheus_client import generate_latest

from polyserve.serve import admin
from polyserve.serve.access import Operators
from polyserve.serve.app import Front
from polyserve.serve.doors import Doors, opened
from polyserve.serve.gateway import Gateway
from polyserve.serve.handed import Line, Sockets
from polyserve.serve.listener import GatewayError, bound, make_room
from polyserve.serve.metrics import exposition
from polyserve.serve.names import LastKnown
from polyserve.serve.plan import Bounds, Plan, PlanError
from polyserve.serve.reload import Reloader, Source

log = logging.getLogger(__name__)

# Engines close idle connections after 5 s (uvicorn's default); ours are given up before that.
KEEP_ALIVE_S = 4.0
_TASKS = b"# HELP polyserve_tasks Tasks of the event loop.\n# TYPE polyserve_tasks gauge\npolyserve_tasks %d\n"
# A process that takes over from another has met its engines by then, or they do not answer.
FIRST_ENGINES_S = 10.0


class House:
    """Every model's gateway, and what they share; made and used inside a running event loop, by `running`."""

    def __init__(self, plan: Plan, gateways: list[Gateway], source: Source | None = None) -> None:
        self.plan = plan
        self.reloader = None if source is None else Reloader(self, source)
        self.gateways = {gateway.model: gateway for gateway in gateways}
        self.created = int(time.time())
        shared = plan.admin is not None and plan.admin == plan.listen
        operators = Operators(plan.admin_keys)
        beside = admin.public(self, with_admin=shared, with_metrics=not plan.tenants)
        self.beside = beside
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

    async def first_engines(self, within_s: float) -> None:
        """Come back when every model has an instance, or after a while: some may have none, whoever serves it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not all(gateway.fleet.ready for gateway in self.gateways.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    def rebound(self, bounds: Bounds) -> None:
        """Other bounds from now on."""
        self.front.bounds = bounds
        for gateway in self.gateways.values():
            gateway.rebound(bounds)

    def metrics_text(self) -> bytes:
        """What all models count, and the house itself, in Prometheus' text format."""
        models = exposition({model: gateway.metrics for model, gateway in self.gateways.items()})
        own = _TASKS % len(asyncio.all_tasks())
        return models + own if self.reloader is None else models + own + generate_latest(self.reloader.registry)

    @property
    def failure(self) -> BaseException | None:
        """What broke a model's brain, if anything did."""
        failures = (gateway.driver.failed for gateway in self.gateways.values())
        return next((failed.result() for failed in failures if failed.done()), None)


@contextlib.asynccontextmanager
async def running(plan: Plan, source: Source | None = None, beside_another: bool = False) -> AsyncIterator[House]:
    """Gateways at work, without listeners; raises `GatewayError`. With `source` the plan can be changed.

    `beside_another`: a process with the same config may still write its journal, which is then moved aside.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, resolver=LastKnown())
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=plan.bounds.connect_s)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        )
        gateways = []
        for model in plan.models:
            journal = stack.enter_context(_journal(model.journal, aside=beside_another))
            gateways.append(Gateway(model, plan.bounds, session, journal))
        house = House(plan, gateways, source)
        _say_what_is_open(plan)
        for gateway in gateways:
            stack.push_async_callback(gateway.close)
            gateway.open()
        if house.reloader is not None:
            watching = asyncio.create_task(house.reloader.watch())
            stack.callback(watching.cancel)
        yield house


def _say_what_is_open(plan: Plan) -> None:
    """Name what anybody can reach without a key."""
    if not plan.tenants and not plan.listen.loopback:
        where = f"{plan.listen.host}:{plan.listen.port}"
        log.warning("anybody who reaches %s may send requests: the config has no tenants", where)


@contextlib.contextmanager
def _journal(path: Path | None, aside: bool) -> Iterator[IO[bytes] | None]:
    if path is None:
        yield None
        return
    try:
        if aside and path.is_file():
            path.replace(path.with_name(f"{path.name}.before"))
        file = path.open("wb")
    except OSError as error:
        raise GatewayError(f"journal {path}: cannot be written: {error.strerror}") from None
    with file:
        yield file


async def serve(plan: Plan, on_ready: Callable[[House, int], None] | None = None, source: Source | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let streams end; raises `GatewayError`. SIGHUP reads `source` again.

    Sockets that were handed down are used (`handed.py`), and a supervisor is answered to. `on_ready` is told of the
    house and of the port it listens on.
    """
    make_room(plan.bounds)
    apart = plan.admin if plan.admin != plan.listen else None
    sockets, line = Sockets.from_environment(), Line.from_environment()
    async with contextlib.AsyncExitStack() as stack:
        addresses = [plan.listen] if apart is None else [plan.listen, apart]
        listeners = [stack.enter_context(sockets.take(one) or bound(one)) for one in addresses]
        if left := sockets.drop_rest():
            log.warning("handed down, but the config listens elsewhere: %s", ", ".join(left))
        house = await stack.enter_async_context(running(plan, source, beside_another=line is not None))
        if line is not None:
            stack.callback(line.close)
            await house.first_engines(FIRST_ENGINES_S)
        doors = await stack.enter_async_context(opened(house, listeners))
        with _signals(house, doors):
            if line is not None:
                line.listen(doors.retire, doors.stop)
                line.ready(listeners)
            if on_ready is not None:
                on_ready(house, listeners[0].getsockname()[1])
            await doors.closed()
        if house.failure is not None:
            raise GatewayError(f"the controller failed: {house.failure!r}")


@contextlib.contextmanager
def _signals(house: House, doors: Doors) -> Iterator[None]:
    """Begin the end at a signal or when the brain fails; a second signal does not wait for streams."""

    def stop() -> None:
        house.refuse_new()
        doors.stop()

    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        if house.reloader is not None:
            task = loop.create_task(_reload(house.reloader))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

    ours = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: reload}
    numbers = list(ours) if threading.current_thread() is threading.main_thread() else []
    for number in numbers:
        loop.add_signal_handler(number, ours[number])
    for gateway in house.gateways.values():
        gateway.driver.failed.add_done_callback(lambda _: stop())
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _reload(reloader: Reloader) -> None:
    with contextlib.suppress(PlanError):  # the log has it
        await reloader.reload("SIGHUP")
