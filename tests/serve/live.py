"""A real gateway on a real socket, in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import openai

from polyserve.config import Config, plan
from polyserve.serve.gateway import Gateway
from polyserve.serve.house import House, running
from polyserve.serve.listener import Server, bound
from polyserve.serve.plan import Plan
from polyserve.serve.reload import Source

PROFILE = "a100-llama-3-8b"
TIERS = [
    {"name": "fast", "tpot_ms": 20, "ttft_ms": 500},
    {"name": "slow", "tpot_ms": 100, "ttft_ms": 1000},
]


def make_plan(urls: Sequence[str], **values: Any) -> Plan:
    """A plan over engines at these URLs, with the keys of a config replaced."""
    plain = {
        "model": "tiny",
        "profile": PROFILE,
        "tiers": TIERS,
        "instances": [{"id": f"e{n}", "url": url} for n, url in enumerate(urls)],
        "limits": {"probe_s": 0.05, "shutdown_s": 1},
    }
    return plan(Config.model_validate(plain | values), "test.yaml")


@dataclass
class Live:
    """A gateway that listens, and clients for it."""

    house: House
    url: str
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI

    @property
    def gateway(self) -> Gateway:
        """That of the only model, or of the first."""
        return next(iter(self.house.gateways.values()))

    async def ready(self, instances: int = 1) -> None:
        """Wait until so many instances take requests."""
        await until(lambda: sum(node.state == "ready" for node in self.gateway.fleet) >= instances)

    async def quiet(self) -> None:
        """Wait until nothing is in flight, neither here nor in the brain's books."""
        await until(lambda: not self.held())

    def held(self) -> list[str]:
        """Requests that anybody still has in their books."""
        books = self.gateway.decisions.brain
        held = [repr(ticket) for node in self.gateway.fleet for ticket in node.tickets.values()]
        held += [f"{job} on {instance.id}" for instance in books.fleet for job in instance.jobs]
        held += [f"{job.id} waits" for queue in books.pending.queues.values() for job in queue]
        held += [f"{job} waits" for job in books.pending.best_effort]
        return held + (["inflight"] if len(self.gateway.inflight) else [])


async def until(condition: Any, within_s: float = 10.0) -> None:
    """Wait for something that happens by itself."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def listening(plan: Plan, source: Source | None = None) -> AsyncIterator[Live]:
    """A gateway at work on a free port."""
    shared = replace(plan.listen, port=0)
    plan = replace(plan, listen=shared, admin=shared if plan.admin == plan.listen else plan.admin)
    listener = bound(plan.listen)
    async with running(plan, source) as house:
        server = Server(house.front, plan.bounds)
        serving = asyncio.create_task(server.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        try:
            async with aiohttp.ClientSession() as http, client:
                yield Live(house, url, http, client)
        finally:
            server.should_exit = True
            await serving
