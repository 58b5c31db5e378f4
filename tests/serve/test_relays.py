"""Relays for one brain: answers as from one process, each token counted once, and who dies takes only its own."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import openai
import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from live import make_plan, until

from polyserve.core.types import Arrived, Dispatch, Finished, FirstToken, Refuse, Request, Slo, Tier
from polyserve.journal import read_journal
from polyserve.serve.doors import Doors, opened
from polyserve.serve.frames import Answered, Engine, Interrupt, Tokens, Unpacker, pack
from polyserve.serve.gateway import Gateway
from polyserve.serve.house import House, serve
from polyserve.serve.plan import Address, EngineSpec
from polyserve.serve.reload import retier

VALUES = [
    Arrived(1.5, Request("a", 1.25, 7, Slo(0.5, 0.02), 30, 2, "shop")),
    Arrived(1.5, Request("b", 1.25, 7, None)),
    FirstToken(2.000001, "a", "e0"),
    Finished(3.0, "a", "e0", 12),
    Dispatch("a", "e0", "fast", "slow", Slo(0.5, 0.02), 3, 0.25),
    Refuse("b", "overloaded", "fast", 1.5),
    Interrupt("a", "evicted"),
    Engine(EngineSpec("e0", "http://127.0.0.1:1", "h200", api_key="k"), "vllm"),
    Tokens("e0", [(1.0, "a", 1, 1), (1.5, "b", 9, 2)]),
    Answered("a", "ok", None, "lost", 1.0, None, 2.0, 5, -math.inf, 1),
]


@given(st.lists(st.tuples(st.integers(0, 255), st.sampled_from(VALUES))), st.integers(1, 50))
def test_frames_come_out_as_they_went_in_however_they_are_cut(sent: list[tuple[int, Any]], size: int) -> None:
    data = b"".join(pack(model, value) for model, value in sent)
    unpacker = Unpacker()
    came = [frame for at in range(0, len(data), size) for frame in unpacker.feed(data[at : at + size])]
    assert came == sent


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="no frame"):
        Unpacker().feed(b"GET / HTTP/1.1\r\n")


class Relayed:
    """A gateway with relays, in this process, and clients for it."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http
        self.house: House | None = None
        self.doors: Doors | None = None

    @property
    def gateway(self) -> Gateway:
        assert self.house is not None
        (gateway,) = self.house.gateways.values()
        return gateway

    def pids(self) -> list[int]:
        assert self.doors is not None
        assert self.doors.relays is not None
        return self.doors.relays.pids()

    async def ask(self, number: int) -> str:
        """The text of a stream; on a connection of its own, so that both relays get some."""
        messages: Any = [{"role": "user", "content": f"question {number}"}]
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    def held(self) -> int:
        brain = self.gateway.decisions.brain
        return sum(len(instance.jobs) for instance in brain.fleet) + len(brain.pending) + len(self.gateway.inflight)


@contextlib.asynccontextmanager
async def relayed(
    engines: list[FakeEngine], relays: int, monkeypatch: pytest.MonkeyPatch, **values: Any
) -> AsyncIterator[Relayed]:
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine.running())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        plan = make_plan([engine.url for engine in engines], relays=relays, settings={"on_late": "never"}, **values)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        running = Relayed(f"http://127.0.0.1:{port}", http)

        @contextlib.asynccontextmanager
        async def seen(*args: Any) -> AsyncIterator[Doors]:
            async with opened(*args) as running.doors:
                yield running.doors

        monkeypatch.setattr("polyserve.serve.house.opened", seen)
        task = asyncio.create_task(
            serve(replace(plan, listen=Address("127.0.0.1", port)), lambda house, _: setattr(running, "house", house))
        )
        try:
            await until(lambda: task.done() or (running.house and running.gateway.fleet.ready), 30.0)
            yield running
            await until(lambda: not running.held())
        finally:
            if not task.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(task, 20.0)


@pytest.mark.live
@pytest.mark.parametrize("relays", [1, 2])
async def test_relays_give_the_answers_that_one_process_gives_and_count_each_token_once(
    relays: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    engines = [FakeEngine(tokens=9, every_s=0.005), FakeEngine(tokens=9, every_s=0.005)]
    journal = tmp_path / "steps.jsonl"
    async with relayed(engines, relays, monkeypatch, journal=str(journal)) as gateway:
        assert len(gateway.pids()) == relays
        answers = await asyncio.gather(*(gateway.ask(number) for number in range(40)))
        assert set(answers) == {"".join(f"t{n} " for n in range(9))}
        await until(lambda: not gateway.held())
        async with gateway.http.get(f"{gateway.url}/metrics") as metrics:
            text = await metrics.text()
        assert 'polyserve_requests_total{model="tiny",outcome="ok",tier="slow"} 40.0' in text
    finished = [event for _, event, _ in read_journal(journal) if isinstance(event, Finished)]
    assert len(finished) == len({event.request for event in finished}) == 40
    assert {event.output_tokens for event in finished} == {9}
    assert sum(len(engine.seen) for engine in engines) == 40


@pytest.mark.live
async def test_a_relay_that_dies_takes_only_its_own_streams_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(tokens=150, every_s=0.01)
    async with relayed([engine], 2, monkeypatch) as gateway:
        asking = [asyncio.create_task(gateway.ask(number)) for number in range(16)]
        await until(lambda: engine.streams == 16)
        first, second = gateway.pids()
        os.kill(first, signal.SIGKILL)
        answers = await asyncio.gather(*asking, return_exceptions=True)
        whole = [answer for answer in answers if isinstance(answer, str)]
        assert all(answer.endswith("t149 ") for answer in whole)
        await until(lambda: engine.streams == 0)
        await until(lambda: second in gateway.pids() and len(gateway.pids()) == 2, 20.0)
        await until(lambda: not gateway.held())
        assert (await gateway.ask(16)).endswith("t149 ")


@pytest.mark.live
async def test_a_request_of_a_relay_goes_elsewhere_when_its_engine_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [FakeEngine(tokens=5, hang_ups=1000), FakeEngine(tokens=5)]
    async with relayed(engines, 2, monkeypatch) as gateway:
        await until(lambda: sum(node.state == "ready" for node in gateway.gateway.fleet) == 2)
        answers = await asyncio.gather(*(gateway.ask(number) for number in range(8)))
        assert set(answers) == {"t0 t1 t2 t3 t4 "}
        assert engines[0].seen


@pytest.mark.live
async def test_relays_go_by_tiers_that_were_changed_while_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relayed([FakeEngine()], 1, monkeypatch) as gateway:
        retier(gateway.gateway, (*gateway.gateway.tiers, Tier("new", 0.04, 0.9)))
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}

        async def tier() -> str | None:
            asked = gateway.http.post(
                f"{gateway.url}/v1/chat/completions", json=chat, headers={"x-polyserve-tier": "new"}
            )
            async with asked as answer:
                return answer.headers.get("x-polyserve-tier")

        async with asyncio.timeout(10.0):
            while await tier() != "new":  # noqa: ASYNC110 - relays follow within moments
                await asyncio.sleep(0.05)


@pytest.mark.live
async def test_what_is_no_completion_is_answered_by_the_brain(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relayed([FakeEngine()], 1, monkeypatch) as gateway:
        async with gateway.http.get(f"{gateway.url}/v1/models") as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["tiny"]
        async with gateway.http.get(f"{gateway.url}/ready") as answer:
            assert answer.status == 200
        async with gateway.http.post(f"{gateway.url}/v1/chat/completions", json={"model": "none"}) as answer:
            assert answer.status in (400, 404)
