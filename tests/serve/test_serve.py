"""Listeners, signals and the end: what `polyserve serve` does around the requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from fake_engine import FakeEngine
from live import make_plan, until

from polyserve.serve.gateway import Gateway
from polyserve.serve.house import House, serve
from polyserve.serve.listener import GatewayError
from polyserve.serve.plan import Address, Plan

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Served:
    """A `serve` in the background."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.gateway: Gateway | None = None
        self.task = asyncio.create_task(serve(plan, self._ready))

    def _ready(self, house: House, port: int) -> None:
        (self.gateway,) = house.gateways.values()

    async def ready(self) -> Gateway:
        await until(lambda: self.gateway is not None and self.gateway.fleet.ready)
        assert self.gateway is not None
        return self.gateway

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.plan.listen.port}{path}"


@contextlib.asynccontextmanager
async def served(engine: FakeEngine, **values: Any) -> AsyncIterator[tuple[Served, aiohttp.ClientSession]]:
    async with engine.running(), aiohttp.ClientSession() as http:
        plan = make_plan([engine.url], **values)
        running = Served(replace(plan, listen=Address("127.0.0.1", free_port())))
        try:
            await running.ready()
            yield running, http
        finally:
            running.task.cancel()
            await asyncio.gather(running.task, return_exceptions=True)


async def test_a_signal_ends_the_gateway_after_its_streams() -> None:
    async with (
        served(FakeEngine(tokens=30, every_s=0.01), limits={"probe_s": 0.05, "shutdown_s": 20}) as (running, http),
        http.post(running.url("/v1/chat/completions"), json=CHAT) as answer,
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        text = await answer.text()
        assert text.count("data: ") == 32
        assert text.endswith("data: [DONE]\n\n")
        await running.task
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(running.url("/health"))


async def test_a_stream_that_outlasts_the_bound_is_told_that_the_gateway_ends() -> None:
    async with (
        served(FakeEngine(tokens=100_000, every_s=0.01), limits={"probe_s": 0.05, "shutdown_s": 0.1}) as (
            running,
            http,
        ),
        http.post(running.url("/v1/chat/completions"), json=CHAT) as answer,
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        *_, last, _ = (await answer.text()).split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        await running.task


async def test_a_brain_that_breaks_ends_the_gateway_with_an_error() -> None:
    async with served(FakeEngine()) as (running, _):
        gateway = await running.ready()
        gateway.driver.failed.set_result(AssertionError("time runs one way"))
        with pytest.raises(GatewayError, match="the controller failed: AssertionError"):
            await running.task


async def test_the_admin_api_can_have_a_listener_of_its_own() -> None:
    admin = free_port()
    async with served(FakeEngine(), admin={"port": admin}) as (running, http):
        async with http.get(running.url("/admin/fleet")) as answer:
            assert answer.status == 404
        async with http.get(f"http://127.0.0.1:{admin}/admin/fleet") as answer:
            assert answer.status == 200
            assert len((await answer.json())["instances"]) == 1
        async with http.get(running.url("/v1/models")) as answer:
            assert answer.status == 200


async def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        plan = replace(make_plan(["http://127.0.0.1:1"]), listen=Address("127.0.0.1", port))
        with pytest.raises(GatewayError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await serve(plan)


async def test_a_journal_that_cannot_be_written_is_said_in_one_line(tmp_path: Any) -> None:
    plan = replace(make_plan(["http://127.0.0.1:1"], journal=tmp_path), listen=Address("127.0.0.1", 0))
    with pytest.raises(GatewayError, match=r"journal .*: cannot be written: Is a directory"):
        await serve(plan)
