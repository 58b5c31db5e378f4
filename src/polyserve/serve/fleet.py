"""The engines that the gateway knows: what each is, whether it lives, and what it says of itself.

Each node has one task that probes it and tells the brain of its coming and going. An engine that cannot be reached is
kept and probed again: it is lost to the brain only once, and joins again when it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Literal

import aiohttp

from polyserve.core.types import (
    ChunkRule,
    Instance,
    InstanceId,
    Iteration,
    Joined,
    Lost,
    Progressed,
    Ready,
    Reported,
    RequestId,
    Restarted,
    TierName,
    to_microsecond,
)
from polyserve.progress import ProgressCollector
from polyserve.serve.adapters import (
    UNREACHABLE,
    Facts,
    KeyRefusedError,
    Load,
    OpenAIEngine,
    Telemetry,
    chunk_rule,
    detect,
)
from polyserve.serve.ask import Endpoint
from polyserve.serve.driver import Driver
from polyserve.serve.inflight import Ticket
from polyserve.serve.plan import EngineSpec
from polyserve.serve.wire import Wire

log = logging.getLogger(__name__)

State = Literal["unreachable", "starting", "ready", "resting", "draining"]

# Probes in a row that fail before an engine counts as lost: a busy API server may miss one or two.
PROBES_TO_LOSE = 3
# An engine that sent a token this recently lives, whatever its health endpoint says.
ALIVE_S = 2.0
# Telemetry this old no longer stands in for what the streams show.
TELLS_S = 1.0
STALE_S = 5.0
# Streams shorter than this say little about tokens per event.
LEAST_EVENTS = 16

SILENT = "answers nothing"

PATHS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
    "responses": "/v1/responses",
}


class Node:
    """One engine of the fleet, seen from the gateway."""

    def __init__(
        self,
        spec: EngineSpec,
        driver: Driver,
        session: aiohttp.ClientSession,
        model: str,
        probe_s: float,
        connect_s: float,
        on_end: Callable[[InstanceId], None],
    ) -> None:
        self.spec = spec
        self.id = spec.id
        self.state: State = "unreachable"
        self.tier: TierName | None = None
        self.pace_s: float | None = None
        self.engine: OpenAIEngine | None = None
        self.instance: Instance | None = None  # as it joined
        self.load: Load | None = None
        self.load_at = float("-inf")
        self.moved_at = float("-inf")  # when the latest token arrived
        self.worked_at = float("-inf")  # when its counters were last seen to have gone up
        self.tickets: dict[RequestId, Ticket] = {}
        self.progress = ProgressCollector(spec.id)
        self.tokens_per_event = 1.0
        self.wire = Wire(spec.url, connect_s)
        self.credentials = [] if spec.api_key is None else [(b"authorization", b"Bearer " + spec.api_key.encode())]
        self.tells = False  # its own telemetry stands in for what its streams show
        self._told_at = float("-inf")
        self._driver = driver
        self._session = session
        self.model = model
        self._probe_s = probe_s
        self._on_end = on_end
        self._tasks: set[asyncio.Task[None]] = set()
        self._look = asyncio.Event()
        self._refused = False
        self._pace_told: float | None = None

    def __repr__(self) -> str:
        return f"<{self.id} {self.state}, {len(self.tickets)} streams>"

    # -- what streams tell

    def look_whether_told(self) -> None:
        """Telemetry that has fallen silent while tokens come no longer stands in for them."""
        if self.tells and self.moved_at > self._told_at + TELLS_S:
            self.tells = False

    def silent_since(self) -> float | None:
        """Since when nothing has come of it, though somebody reads; None: nobody waits for anything."""
        boarded = [ticket.boarded_at for ticket in self.tickets.values() if not (ticket.sending or ticket.mute)]
        if not boarded or self.instance is None:
            return None
        return max(min(boarded), self.moved_at, self.worked_at, self._told_at)

    def forget(self, request: RequestId) -> None:
        self.tickets.pop(request, None)
        self.progress.drop(request)

    def learn(self, events: int, tokens: int) -> None:
        """Take in how many tokens a whole stream of events really had."""
        if events >= LEAST_EVENTS:
            ratio = tokens / events
            # Off by an opening or closing event is not a ratio.
            ratio = 1.0 if abs(tokens - events) <= 2 else ratio
            self.tokens_per_event += 0.1 * (ratio - self.tokens_per_event)
            if abs(self.tokens_per_event - 1.0) < 1e-3:
                self.tokens_per_event = 1.0

    def suspect(self, refused: bool = False) -> None:
        """Something went wrong with a stream: look at once; `refused` means that nobody listens any more."""
        self._refused = self._refused or refused
        self._look.set()

    # -- its life

    def start(self) -> None:
        """Begin to probe it."""
        self._spawn(self._watch())

    async def close(self) -> None:
        """Stop looking at it; the streams on it go on."""
        self.wire.close()
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def lose(self) -> None:
        """It has gone, and everything on it."""
        if self.instance is not None:
            now = self._driver.now()
            if tokens := {name: ticket.tokens for name, ticket in self.tickets.items() if ticket.tokens}:
                self._driver.post(Progressed(now, self.id, tokens))
            self._driver.post(Lost(now, self.id))
        self.load = None
        self.instance, self.engine, self.state, self._pace_told = None, None, "unreachable", None
        self.tier = None
        for ticket in list(self.tickets.values()):
            ticket.interrupt("lost")

    def set_pace(self, pace_s: float) -> None:
        """Tell the engine the bound for its iterations, in the background; the latest wins."""
        self.pace_s = pace_s
        self._spawn(self._tell_pace())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_pace(self) -> None:
        engine, pace_s = self.engine, self.pace_s
        if engine is None or pace_s is None or pace_s == self._pace_told:
            return
        self._pace_told = pace_s
        with contextlib.suppress(*UNREACHABLE):
            await engine.set_pace(pace_s)

    async def _watch(self) -> None:
        said = ""  # why it is not there, as far as the log knows
        failures = 0
        while True:
            if self.engine is None:
                why_not = await self._join()
                if not why_not:
                    failures = 0
                elif why_not != said:
                    log.warning("instance %s: %s %s; it is tried again", self.id, self.spec.url, why_not)
                    self._join_unseen()
                said = why_not
            elif await self._alive():
                failures = 0
                await self._ask_load()
            else:
                failures += 1
                # One that ends in order listens no more, and brings its streams to their end.
                ends = bool(self.tickets) and self._driver.now() - self.moved_at < ALIVE_S
                if not ends and (failures >= PROBES_TO_LOSE or self._refused or self.engine.refused):
                    log.warning("instance %s: %s is lost; it is tried again", self.id, self.spec.url)
                    said = SILENT
                    leaves = self.spec.launched or self.state == "draining"
                    self.lose()
                    if leaves:
                        self._on_end(self.id)
                        return
            self._refused = False
            self._look.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._look.wait(), self._probe_s)

    async def _alive(self) -> bool:
        assert self.engine is not None
        recent = self._driver.now() - self.moved_at < ALIVE_S and not self._look.is_set()
        return recent or await self.engine.healthy()

    async def _join(self) -> str:
        """Take it in if it answers and can serve; says why not, or nothing."""
        engine = await detect(self._session, self.spec)
        if engine is None:
            return SILENT
        try:
            models = await engine.models()
        except KeyRefusedError as error:  # it would refuse every request
            return str(error)
        if models and self.model not in models:  # it would refuse every request, and so fast that it got most
            return f"serves {', '.join(map(repr, models))}, not {self.model!r}"
        try:
            facts = await engine.facts()
            instance = _instance(self.spec, engine, facts)
        except UNREACHABLE as error:
            return f"says of itself what cannot be read: {error}"
        if self.instance is not None and self.instance != instance:
            self._driver.post(Lost(self._driver.now(), self.id))
            self.instance = None
        if self.instance is None:
            self._driver.post(Joined(self._driver.now(), instance))
        self.engine, self.instance = engine, instance
        self._driver.post(Ready(self._driver.now(), self.id))
        self.state = "ready"
        log.info("instance %s: ready at %s (%s)", self.id, engine.url, engine.kind)
        self._spawn(self._listen(engine))
        self._spawn(self._tell_pace())
        return ""

    def _join_unseen(self) -> None:
        """Let the brain know of an engine that has not answered yet."""
        if self.instance is None:
            self.instance = _instance(self.spec, None, Facts())
            self._driver.post(Joined(self._driver.now(), self.instance))
            self.state = "starting"

    async def _ask_load(self) -> None:
        assert self.engine is not None
        load = await self.engine.load()
        if load is None or self.instance is None:
            return
        before, before_at = self.load, self.load_at
        self.load, self.load_at = load, self._driver.now()
        if before is not None and load.restarted_since(before):
            await self._restarted(before_at)
        elif before is not None and load.work > before.work:
            self.worked_at = self.load_at
        if self.instance is None:
            return
        capacity = load.kv_capacity_tokens or self.instance.kv_tokens
        kv = None if load.kv_share is None or capacity is None else round(load.kv_share * capacity)
        self._driver.post(Reported(self.load_at, self.id, load.running, load.waiting, kv))

    async def _restarted(self, last_seen_at: float) -> None:
        """Another process answers at its address: what was sent to the one before is lost."""
        assert self.engine is not None
        log.warning("instance %s: %s was restarted", self.id, self.spec.url)
        try:
            instance = _instance(self.spec, self.engine, await self.engine.facts())
        except UNREACHABLE:
            instance = None
        if self.instance is None:
            return
        if instance != self.instance:  # it is another engine, too: it joins anew at the next look
            self.lose()
            self.suspect()
            return
        # Who boarded since may be on either process. Connections to the first one break by themselves.
        lost = [ticket for ticket in self.tickets.values() if ticket.boarded_at <= last_seen_at]
        now = self._driver.now()
        if tokens := {ticket.request.id: ticket.tokens for ticket in lost if ticket.tokens}:
            self._driver.post(Progressed(now, self.id, tokens))
        self._driver.post(Restarted(now, self.id, tuple(ticket.request.id for ticket in lost)))
        for ticket in lost:
            ticket.interrupt("lost")
        self.wire.close()
        self._pace_told = None
        self._spawn(self._tell_pace())

    async def _listen(self, engine: OpenAIEngine) -> None:
        """Pass the engine's own telemetry on for as long as it tells any."""
        while self.engine is engine:
            with contextlib.suppress(*UNREACHABLE):
                async for line in engine.telemetry():
                    if self.engine is not engine:
                        return
                    self._take(line)
            if self._told_at == float("-inf"):
                return
            await asyncio.sleep(self._probe_s)

    def _take(self, line: Telemetry) -> None:
        self._told_at = now = self._driver.now()
        self.tells = True
        iteration = Iteration(
            to_microsecond(now - max(0.0, line.ended_at_ago_s)),
            to_microsecond(max(0.0, line.seconds)),
            line.prefill_tokens,
            line.decodes,
            line.kv_tokens,
        )
        mine = self.tickets
        tokens = {request: count + mine[request].base for request, count in line.tokens.items() if request in mine}
        prefilling = {request: left for request, left in line.prefilling.items() if request in mine}
        self._driver.post(Progressed(now, self.id, tokens, prefilling, iteration, line.kv_held))


def _instance(spec: EngineSpec, engine: OpenAIEngine | None, facts: Facts) -> Instance:
    """The instance that an engine is: what the config says, else what the engine says."""
    chunk = spec.chunk or (chunk_rule(facts.chunk) if facts.chunk else ChunkRule("unknown"))
    return Instance(
        id=spec.id,
        profile=spec.profile,
        chunk=chunk,
        order=spec.order or facts.order or "fcfs",
        kv_tokens=spec.kv_tokens or facts.kv_tokens,
        max_num_seqs=spec.max_num_seqs or facts.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens or facts.max_num_batched_tokens,
    )


class Fleet:
    """All nodes, by id."""

    def __init__(
        self,
        driver: Driver,
        session: aiohttp.ClientSession,
        model: str,
        probe_s: float,
        connect_s: float,
        on_end: Callable[[InstanceId], None],
    ) -> None:
        """`on_end` is told of a launched instance that has gone: it never comes back under the same name."""
        self._driver = driver
        self._session = session
        self._model = model
        self._probe_s = probe_s
        self._connect_s = connect_s
        self._on_end = on_end
        self._nodes: dict[InstanceId, Node] = {}

    def __repr__(self) -> str:
        return f"<fleet of {len(self._nodes)}>"

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))

    def get(self, instance: InstanceId) -> Node | None:
        return self._nodes.get(instance)

    def add(self, spec: EngineSpec) -> Node:
        """Take in an engine and begin to probe it."""
        assert spec.id not in self._nodes, "instances are known by their id"
        node = self._nodes[spec.id] = Node(
            spec, self._driver, self._session, self._model, self._probe_s, self._connect_s, self._on_end
        )
        node.start()
        return node

    async def remove(self, instance: InstanceId) -> None:
        """Forget an engine; what still runs on it is interrupted."""
        node = self._nodes.pop(instance, None)
        if node is not None:
            await node.close()
            for ticket in list(node.tickets.values()):
                ticket.interrupt("lost")

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self))

    @property
    def ready(self) -> bool:
        """Whether any engine can serve."""
        return any(node.state in ("ready", "resting") for node in self)

    def report(self, each: Callable[[Progressed], None]) -> None:
        """Pass on what the streams of each node have shown since the last time."""
        now = self._driver.now()
        for node in self._nodes.values():
            node.look_whether_told()
            if (progressed := node.progress.report(now)) is not None:
                each(progressed)
