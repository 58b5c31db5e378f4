"""One model's gateway: wiring, the brain's actions carried out, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import IO, Any, assert_never

import aiohttp

from polyserve.core.controller import Controller
from polyserve.core.profile import Profile
from polyserve.core.types import (
    Action,
    Arrived,
    Assign,
    Cancel,
    Cancelled,
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
    Resume,
    SetPace,
    SetRole,
    Silent,
    Slo,
    Start,
    Stop,
    Suspend,
    Tier,
)
from polyserve.progress import REPORT_EVERY_S
from polyserve.serve import logs
from polyserve.serve.audit import Audit, AuditSeries
from polyserve.serve.decisions import Decisions
from polyserve.serve.driver import Driver
from polyserve.serve.estimate import TokenEstimator
from polyserve.serve.fleet import Fleet
from polyserve.serve.inflight import Inflight, Ticket
from polyserve.serve.launchers import Launcher, LaunchError
from polyserve.serve.launchers.local import LocalLauncher
from polyserve.serve.launchers.static import StaticLauncher
from polyserve.serve.metrics import Books, Metrics
from polyserve.serve.observe import ObserveSeries
from polyserve.serve.pace import Paces
from polyserve.serve.plan import Bounds, EngineSpec, ModelPlan
from polyserve.serve.tokens import PromptCounter, tokenizer

log = logging.getLogger(__name__)

# A silence that the brain is told of; it says from when on an instance hangs.
SILENCE_LOOK_S = 1.0


class Gateway:
    """What serves one model: its brain, its engines, and the requests between them."""

    def __init__(
        self,
        plan: ModelPlan,
        bounds: Bounds,
        session: aiohttp.ClientSession,
        journal: IO[bytes] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.bounds = bounds
        self.model = plan.name
        self.tiers: tuple[Tier, ...] = plan.configured.tiers
        self.profiles = tuple(plan.configured.profiles)
        self.metrics = Metrics()
        self._launcher: Launcher = LocalLauncher(plan.launcher, session) if plan.launcher else StaticLauncher()
        self._work: set[asyncio.Task[None]] = set()
        self._closing = False
        self.brain = brain = Controller()
        self.driver = Driver(brain, plan.configured, self._act, self._observe, journal, clock)
        self.inflight = Inflight(self.driver, bounds.open_requests)
        self.fleet = Fleet(self.driver, session, plan.name, bounds.probe_s, bounds.connect_s, self._ended)
        self.decisions = Decisions(brain, self.inflight)
        self.audit = Audit(brain, self.metrics.forecast)
        self.metrics.registry.register(Books(brain, self.fleet, self.inflight, self.driver.now))
        self.metrics.registry.register(AuditSeries(self.audit))
        self.metrics.registry.register(ObserveSeries(brain))
        self.paces = Paces(self.tiers, plan.service_tiers, plan.default_tier)
        self.estimator = TokenEstimator()
        own = None if plan.tokenizer is None else tokenizer(plan.tokenizer)
        self.counter = PromptCounter(self.estimator, own, longest_context(plan))

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
        self.counter.close()
        await self._launcher.close()

    def answered(self, ticket: Ticket) -> None:
        """A request is over: count it, and compare it with what was foreseen."""
        self.metrics.answered(ticket)
        self.audit.answered(ticket)
        logs.answered(self.model, ticket)

    # -- what the admin API asks

    def join(self, spec: EngineSpec) -> None:
        self.fleet.add(spec)

    def drain(self, instance: InstanceId) -> None:
        self.driver.post(DrainAsked(self.driver.now(), instance))

    def let_go(self, instance: InstanceId) -> None:
        """Drain an instance that is to leave for good; one that the brain does not know of goes at once."""
        node = self.fleet.get(instance)
        if node is not None and node.instance is None:
            self._spawn(self.remove(instance))
        elif node is not None:
            self.drain(instance)

    def rebound(self, bounds: Bounds) -> None:
        """Other bounds from now on."""
        self.bounds = bounds
        self.inflight.most = bounds.open_requests

    async def remove(self, instance: InstanceId) -> None:
        """Take an instance out at once; its requests go elsewhere."""
        self.driver.post(Lost(self.driver.now(), instance))
        await self._stop(instance)

    # -- what the brain asks

    def _act(self, action: Action) -> None:
        match action:
            case Dispatch() | Refuse() | Evict():
                self._tell_ticket(action)
            case Cancel():
                pass  # the stream was closed before the brain was told that the client has gone
            case Start():
                self._spawn(self._start(action.instance))
            case Stop():
                self._spawn(self._stop(action.instance))
            case Drain() | Suspend() | Resume() | Assign() | SetPace():
                self._tell_node(action)
            case HandOver() | SetRole():
                raise AssertionError("the configuration has no PD")
            case _:
                assert_never(action)

    def _tell_ticket(self, action: Dispatch | Refuse | Evict) -> None:
        ticket = self.inflight.get(action.request)
        if ticket is None or ticket.outcome is not None:
            # It ended in the very moment in which the brain took it off its instance: to the brain its end was stale
            # news, and it would keep a place for it for ever.
            self.driver.post(Cancelled(self.driver.now(), action.request))
        elif isinstance(action, Evict):
            ticket.interrupt("evicted")
        else:
            ticket.answer(action)

    def _tell_node(self, action: Drain | Suspend | Resume | Assign | SetPace) -> None:
        node = self.fleet.get(action.instance)
        if node is None:
            return
        match action:
            case Drain():
                node.state = "draining"
            case Suspend():
                log.warning("instance %s: rests until %.3f on the brain's clock", node.id, action.until)
                node.state = "resting" if node.state == "ready" else node.state
            case Resume():
                log.info("instance %s: is sound again", node.id)
                node.state = "ready" if node.state == "resting" else node.state
            case Assign():
                node.tier = action.tier
            case SetPace():
                node.set_pace(action.pace_s)

    def _observe(self, now: float, event: Event, actions: list[Action], took_s: float) -> None:
        if isinstance(event, Arrived):
            slo = event.request.slo
            self.metrics.arrived(self.brain.bin(slo) if slo else None, took_s)
        if actions:
            self.decisions.observe(now, actions)

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
        api_key = self.plan.launcher.api_key if self.plan.launcher else None
        self.fleet.add(EngineSpec(instance, url, profile, launched=True, api_key=api_key))

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
        bound_s = self.bounds.silence_s
        while True:
            await asyncio.sleep(min(SILENCE_LOOK_S, bound_s))
            now = self.driver.now()
            for node in self.fleet:
                if (since := node.silent_since()) is not None and now - since >= SILENCE_LOOK_S:
                    self.driver.post(Silent(now, node.id, since))
                for ticket in list(node.tickets.values()):
                    if now - ticket.last_at > bound_s and not (ticket.sending or ticket.unread):
                        ticket.interrupt("silent")


def longest_context(plan: ModelPlan) -> int:
    """The longest context that any instance has, as far as the config says."""
    limits = {name: Profile.from_dict(plain).limits for name, plain in plan.configured.profiles.items()}
    rooms = [(limits[spec.profile], spec.kv_tokens) for spec in plan.engines] or [
        (one, None) for one in limits.values()
    ]
    return max(min(limit.context_tokens, room or limit.kv_tokens) for limit, room in rooms)


def _warm_up(plan: ModelPlan) -> None:
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


def _say_what_is_too_slow(plan: ModelPlan) -> None:
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
