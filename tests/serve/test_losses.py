"""Engines that hang, fail, slow down, are replaced or drained, one at a time and in virtual time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any, cast

import pytest
from faults import TIERS, Client, scene
from live import make_plan
from memory_engine import MODEL, STEP_S, MemoryEngine
from virtual import VirtualLoop, virtual_time

from polyserve.core.fleet import State
from polyserve.core.types import Broken, Event, Evict, Restarted, Suspend
from polyserve.serve.app import Front
from polyserve.serve.gateway import Gateway
from polyserve.serve.wire import Wire

Play = Callable[["World"], Awaitable[None]]


class World:
    """A gateway over engines that the test has in its hands, and everything that its brain was told and said."""

    def __init__(self, engines: list[MemoryEngine], gateway: Gateway, front: Front) -> None:
        self.engines, self.gateway, self.front = engines, gateway, front
        self.seen: list[Any] = []
        self._observe = gateway.driver._observe
        gateway.driver._observe = self._note

    def _note(self, now: float, event: Event, actions: list[Any], took_s: float) -> None:
        self.seen += [event, *actions]
        self._observe(now, event, actions, took_s)

    def of(self, *kinds: type[Any]) -> list[Any]:
        return [each for each in self.seen if isinstance(each, kinds)]

    def ask(self, name: str, tokens: int = 40, stream: bool = True) -> tuple[Client, asyncio.Task[None]]:
        body = {"model": MODEL, "prompt": f"of {name}", "max_tokens": tokens, "stream": stream}
        body["vllm_xargs"] = {"output_tokens": tokens}
        client = Client(name, "/v1/completions", body, comes_s=0.0, tier="slow")
        return client, asyncio.get_running_loop().create_task(client.ask(self.front))

    async def busy(self) -> MemoryEngine:
        """The engine that has begun to answer."""
        while not (there := [e for e in self.engines if any(s.sent > 2 for s in e.streams)]):  # noqa: ASYNC110
            await asyncio.sleep(STEP_S)
        return there[0]

    def state(self, engine: MemoryEngine) -> State:
        return self.gateway.decisions.brain.fleet.books[engine.id].state


def play(story: Play, engines: int = 2, **settings: object) -> None:
    async def run() -> None:
        loop = cast(VirtualLoop, asyncio.get_running_loop())
        there = [MemoryEngine(loop, number) for number in range(engines)]
        limits = {"probe_s": 0.5, "connect_s": 1}
        plan = make_plan([e.url for e in there], tiers=TIERS, settings=settings, limits=limits)
        async with scene(plan) as (gateway, front), asyncio.timeout(250):  # less than the bound on silence
            await story(World(there, gateway, front))

    with virtual_time() as runner:
        runner.run(run())


def test_a_stream_on_an_engine_that_hangs_goes_on_elsewhere_within_seconds() -> None:
    async def story(world: World) -> None:
        client, asking = world.ask("r")
        (await world.busy()).stuck = True
        began = asyncio.get_running_loop().time()
        await asking
        assert client.verdict(1) == "completed"
        assert asyncio.get_running_loop().time() - began < 10.0
        assert [evict.request for evict in world.of(Evict)] == ["r"]

    play(story)


def test_without_a_bound_on_hanging_only_silence_counts() -> None:
    async def story(world: World) -> None:
        _, asking = world.ask("r")
        engine = await world.busy()
        engine.stuck = True
        await asyncio.sleep(200)
        assert not asking.done()
        engine.stuck = False
        await asking
        assert not world.of(Evict, Suspend)

    play(story, hang_iterations=0)


def test_one_silent_stream_beside_one_that_moves_is_no_hang() -> None:
    async def story(world: World) -> None:
        _, silent = world.ask("silent")
        engine = await world.busy()
        engine.streams[0].wait = 1000  # iterations, so 20 s
        while not silent.done():
            client, asking = world.ask(f"r{len(world.seen)}", tokens=20)
            await asking
            assert client.verdict(1) == "completed"
        assert not world.of(Evict, Suspend, Broken)

    play(story, engines=1)


def test_a_client_that_does_not_read_makes_no_engine_hang() -> None:
    async def story(world: World) -> None:
        client, asking = world.ask("r")
        client.stalls_s = 60.0
        await asking
        assert client.verdict(1) == "completed"
        assert not world.of(Evict, Suspend, Broken)

    play(story)


def test_an_engine_that_answers_500_is_asked_ever_more_seldom_and_again_when_it_is_sound() -> None:
    async def story(world: World) -> None:
        bad = world.engines[0]
        bad.status = 500
        refused: list[float] = []
        bad.asked_at = refused
        for n in range(150):
            client, asking = world.ask(f"r{n}", tokens=4)
            await asking
            assert client.verdict(1) == "completed"
            await asyncio.sleep(0.2)
        gaps = [later - earlier for earlier, later in pairwise(refused)]
        assert 4 < len(refused) < 20
        assert max(gaps[:3]) < 4.0 < max(gaps)
        bad.status = 200
        for n in range(150, 400):
            await world.ask(f"r{n}", tokens=4)[1]
            await asyncio.sleep(0.2)
        assert bad.served > 10
        assert world.state(bad) is State.READY

    play(story, engines=2, placement="fill")


def test_a_process_that_was_replaced_behind_its_address_is_noticed() -> None:
    async def story(world: World) -> None:
        client, asking = world.ask("r", tokens=100)
        engine = await world.busy()
        await asyncio.sleep(0.6)  # its counters have been read
        engine.streams.clear()  # and its connections stay open: a proxy holds them
        engine.start()
        began = asyncio.get_running_loop().time()
        await asking
        assert client.verdict(1) == "completed"
        assert asyncio.get_running_loop().time() - began < 4.0
        assert [(event.instance, event.lost) for event in world.of(Restarted)] == [(engine.id, ("r",))]

    play(story)


def test_a_drain_ends_no_stream_and_a_drained_engine_that_dies_does_not_come_back() -> None:
    async def story(world: World) -> None:
        client, asking = world.ask("r")
        engine = await world.busy()
        world.gateway.drain(engine.id)
        await asking
        assert client.verdict(1) == "completed"
        assert not world.of(Broken, Evict)
        await asyncio.sleep(5.0)
        assert [node.id for node in world.gateway.fleet] == [e.id for e in world.engines if e is not engine]
        other = next(e for e in world.engines if e is not engine)
        asking = world.ask("last")[1]
        await world.busy()
        world.gateway.drain(other.id)
        await asyncio.sleep(0.1)
        other.kill()
        other.start()
        await asyncio.sleep(5.0)
        assert not list(world.gateway.fleet)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    play(story)


async def test_an_engine_whose_name_has_gone_is_asked_at_its_last_address() -> None:
    answered: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    known = True

    async def getaddrinfo(host: str, *given: Any, **named: Any) -> Any:
        if not known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "getaddrinfo", getaddrinfo, raising=False)
        wire = Wire(f"http://engine.example:{port}", 1.0)
        assert (await wire.post("/", [], b"")).status == 200
        known = False
        assert (await wire.post("/", [], b"")).status == 200
        with pytest.raises(OSError, match="Name or service"):
            await Wire(f"http://other.example:{port}", 1.0).post("/", [], b"")
    assert len(answered) == 2
    server.close()
