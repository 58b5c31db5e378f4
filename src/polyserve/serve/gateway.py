"""The gateway as a whole: wiring, the brain's actions carried out, listeners, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import IO, Any, assert_never

import aiohttp
import uvicorn

from polyserve.core.controller import Controller
from polyserve.core.profile import Profile
from polyserve.core.types import (
    Action,
    Arrived,
    Assign,
    Cancel,
    Dispatch,
    Drain,
    DrainAsked,
    Event,
    Evict,
    Failed,
    FirstToken,
    HandOver,
    Instance,
    InstanceId,
    Joined,
    Lost,
    Progressed,
    Ready,
    Refuse,
    Request,
    SetPace,
    SetRole,
    Slo,
    Start,
    Stop,
    Tier,
)
from polyserve.progress import REPORT_EVERY_S
from polyserve.serve import admin
from polyserve.serve.app import Front
from polyserve.serve.driver import Driver
from polyserve.serve.fleet import Fleet
from polyserve.serve.inflight import Inflight
from polyserve.serve.launchers import Launcher, LaunchError
from polyserve.serve.launchers.local import LocalLauncher
from polyserve.serve.launchers.static import StaticLauncher
from polyserve.serve.metrics import Books, Decisions, Metrics
from polyserve.serve.pace import Paces
from polyserve.serve.plan import Address, EngineSpec, Plan

log = logging.getLogger(__name__)

# Engines close idle connections after 5 s (uvicorn's default); ours are given up before that.
KEEP_ALIVE_S = 4.0
SILENCE_LOOK_S = 5.0
BACKLOG = 4096


class GatewayError(Exception):
    """The gateway cannot start; the message says why in one line."""


class Gateway:
    """One model's gateway; made and used inside a running event loop, by `running`."""

    def __init__(self, plan: Plan, session: aiohttp.ClientSession, journal: IO[bytes] | None) -> None:
        self.plan = plan
        self.model = plan.model
        self.created = int(time.time())
        self.tiers: tuple[Tier, ...] = plan.configured.tiers
        self.profiles = tuple(plan.configured.profiles)
        self.metrics = Metrics()
        self._launcher: Launcher = LocalLauncher(plan.launcher, session) if plan.launcher else StaticLauncher()
        self._work: set[asyncio.Task[None]] = set()
        self._closing = False
        brain = Controller()
        self.driver = Driver(brain, plan.configured, self._act, self._observe, journal)
        self.inflight = Inflight(self.driver, plan.bounds.open_requests)
        self.fleet = Fleet(self.driver, session, plan.model, plan.bounds.probe_s, plan.bounds.connect_s, self._ended)
        self.decisions = Decisions(brain, self.inflight)
        self.metrics.registry.register(Books(brain, self.fleet, self.inflight, self.driver.now))
        shared = plan.admin is not None and plan.admin == plan.listen
        self.front = Front(
            plan.model,
            Paces(self.tiers, plan.service_tiers, plan.default_tier),
            plan.bounds,
            self.driver,
            self.fleet,
            self.inflight,
            self.metrics,
            admin.public(self, with_admin=shared),
        )
        self.admin = admin.admin(self)

    def __repr__(self) -> str:
        return f"<gateway for {self.model}: {self.fleet!r}, {self.inflight!r}>"

    def accepting(self) -> bool:
        """Whether new requests are taken in."""
        return not self._closing and not self.driver.failed.done()

    def open(self) -> None:
        """Begin to work."""
        _warm_up(self.plan)
        _say_what_is_too_slow(self.plan)
        self.driver.start()
        for spec in self.plan.engines:
            self.fleet.add(spec)
        self._spawn(self._report())
        self._spawn(self._watch_silence())

    def refuse_new(self) -> None:
        """Take in no more requests; the end is near."""
        self._closing = True

    async def close(self) -> None:
        """Stop everything that `open` and the brain began; launched instances are ended."""
        self._closing = True
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self.fleet.close()
        self.driver.close()
        await self._launcher.close()

    # -- what the admin API asks

    def join(self, spec: EngineSpec) -> None:
        self.fleet.add(spec)

    def drain(self, instance: InstanceId) -> None:
        self.driver.post(DrainAsked(self.driver.now(), instance))

    async def remove(self, instance: InstanceId) -> None:
        """Take an instance out at once; its requests go elsewhere."""
        self.driver.post(Lost(self.driver.now(), instance))
        await self._stop(instance)

    # -- what the brain asks

    def _act(self, action: Action) -> None:
        match action:
            case Dispatch() | Refuse():
                if (ticket := self.inflight.get(action.request)) is not None:
                    ticket.answer(action)
            case Evict():
                if (ticket := self.inflight.get(action.request)) is not None:
                    ticket.interrupt("evicted")
            case Cancel():
                pass  # the stream was closed before the brain was told that the client has gone
            case Start():
                self._spawn(self._start(action.instance))
            case Stop():
                self._spawn(self._stop(action.instance))
            case Drain() | Assign() | SetPace():
                self._tell_node(action)
            case HandOver() | SetRole():
                raise AssertionError("the configuration has no PD")
            case _:
                assert_never(action)

    def _tell_node(self, action: Drain | Assign | SetPace) -> None:
        node = self.fleet.get(action.instance)
        if node is None:
            return
        match action:
            case Drain():
                node.state = "draining"
            case Assign():
                node.tier = action.tier
            case SetPace():
                node.set_pace(action.pace_s)

    def _observe(self, now: float, event: Event, actions: list[Action], took_s: float) -> None:
        self.metrics.stepped(event, took_s)
        if actions:
            self.decisions.observe(now, event, actions)

    def _ended(self, instance: InstanceId) -> None:
        """A launched instance has died; the brain knows, and starts another if it wants one."""
        self._spawn(self._stop(instance))

    async def _start(self, instance: InstanceId) -> None:
        try:
            url = await self._launcher.start(instance)
        except LaunchError as error:
            log.warning("%s", error)
            self.driver.post(Failed(self.driver.now(), instance, str(error)))
            return
        profile = self.plan.launcher.profile if self.plan.launcher else self.profiles[0]
        self.fleet.add(EngineSpec(instance, url, profile, launched=True))

    async def _stop(self, instance: InstanceId) -> None:
        await self.fleet.remove(instance)
        await self._launcher.stop(instance)

    # -- what goes on all the time

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work in the background failed", exc_info=error)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self.fleet.report(self.driver.post)

    async def _watch_silence(self) -> None:
        bound_s = self.plan.bounds.silence_s
        while True:
            await asyncio.sleep(min(SILENCE_LOOK_S, bound_s))
            now = self.driver.now()
            for node in self.fleet:
                for ticket in list(node.tickets.values()):
                    if now - ticket.last_at > bound_s:
                        ticket.interrupt("silent")


def _warm_up(plan: Plan) -> None:
    """Let a throwaway brain decide once: its loops are compiled, or loaded, at the first decision they make."""
    brain = Controller()
    brain.step(0.0, plan.configured)
    instance = Instance("warm-up", next(iter(plan.configured.profiles)))
    tier = plan.configured.tiers[0]
    events: list[Event] = [Joined(0.0, instance), Ready(0.0, instance.id)]
    for name in ("a", "b"):
        events.append(Arrived(0.0, Request(name, 0.0, 1, Slo(1e6, tier.tpot_s))))
        events.append(FirstToken(0.0, name, instance.id))
        events.append(Progressed(0.0, instance.id, {name: 1}))
    for event in events:
        brain.step(0.0, event)


def _say_what_is_too_slow(plan: Plan) -> None:
    """Name the tiers that will get no instance of a profile, however empty it is."""
    for name, plain in plan.configured.profiles.items():
        profile = Profile.from_dict(plain)
        for tier in plan.configured.tiers:
            if not profile.holds(tier.tpot_s):
                log.warning(
                    "profile %s cannot hold tier %s: a token takes an idle instance %.3g ms, and %.3g ms is asked",
                    name,
                    tier.name,
                    1e3 * profile.tightest_pace_s,
                    1e3 * tier.tpot_s,
                )


@contextlib.asynccontextmanager
async def running(plan: Plan) -> AsyncIterator[Gateway]:
    """A gateway at work, without listeners; raises `GatewayError`."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=plan.bounds.connect_s)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        with _journal(plan.journal) as journal:
            gateway = Gateway(plan, session, journal)
            gateway.open()
            try:
                yield gateway
            finally:
                await gateway.close()


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


class Server(uvicorn.Server):
    """One listener; signals are the business of `serve`."""

    def __init__(self, app: Any, shutdown_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=math.ceil(shutdown_s),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound(address: Address) -> socket.socket:
    """A socket that listens there; raises `GatewayError`."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise GatewayError(f"cannot listen on {address.host}:{address.port}: {error.strerror or error}") from None
    return listener


async def serve(plan: Plan, on_ready: Callable[[Gateway, int], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let streams end; raises `GatewayError`.

    `on_ready` is told of the gateway and of the port it listens on.
    """
    apart = plan.admin if plan.admin != plan.listen else None
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(bound(plan.listen))
        admin_listener = stack.enter_context(bound(apart)) if apart is not None else None
        gateway = await stack.enter_async_context(running(plan))
        front = Server(gateway.front, plan.bounds.shutdown_s)
        serving = [asyncio.create_task(front.serve([listener]))]
        servers = [front]
        if admin_listener is not None:
            servers.append(Server(gateway.admin, plan.bounds.shutdown_s))
            serving.append(asyncio.create_task(servers[1].serve([admin_listener])))
        with _signals(gateway, servers):
            if on_ready is not None:
                on_ready(gateway, listener.getsockname()[1])
            await asyncio.gather(*serving)
        if gateway.driver.failed.done():
            raise GatewayError(f"the controller failed: {gateway.driver.failed.result()!r}")


@contextlib.contextmanager
def _signals(gateway: Gateway, servers: list[Server]) -> Iterator[None]:
    """Begin the end at a signal or when the brain fails; a second signal does not wait for streams."""

    def stop() -> None:
        gateway.refuse_new()
        for server in servers:
            server.force_exit = server.should_exit
            server.should_exit = True

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    for number in numbers:
        loop.add_signal_handler(number, stop)
    gateway.driver.failed.add_done_callback(lambda _: stop())
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
