"""`polyserve up`: the gateway and emulated engines as real processes, from the first to the last."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from live import until

from polyserve.core.types import Iteration, Progressed, SetPace
from polyserve.journal import read_journal, replay

pytestmark = pytest.mark.live

CONFIG: dict[str, Any] = {
    "model": "llama",
    "listen": {"port": 0},
    "profile": "h200-llama-3-8b",
    "tiers": [{"name": "fast", "tpot_ms": 25, "ttft_ms": 500}, {"name": "slow", "tpot_ms": 100, "ttft_ms": 2000}],
    "launcher": {"kind": "local", "min": 2, "max": 2},
    "limits": {"shutdown_s": 5},
}


@dataclass
class Up:
    """A running `polyserve up`."""

    process: asyncio.subprocess.Process
    url: str
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI

    async def get(self, path: str) -> Any:
        async with self.http.get(self.url + path) as answer:
            return await answer.json() if "json" in answer.content_type else await answer.text()

    async def ready(self, instances: int) -> None:
        async with asyncio.timeout(60):
            while await self._ready() < instances:  # noqa: ASYNC110 - another process, no event
                await asyncio.sleep(0.05)

    async def _ready(self) -> int:
        return sum(instance["state"] == "ready" for instance in (await self.get("/admin/fleet"))["instances"])


def children(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


@contextlib.asynccontextmanager
async def up(folder: Path, **values: Any) -> AsyncIterator[Up]:
    path = folder / "fleet.yaml"
    path.write_text(json.dumps(CONFIG | values))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "polyserve", "up", str(path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        url = line.split()[-1].removesuffix("/v1")
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        async with aiohttp.ClientSession() as http, client:
            yield Up(process, url, http, client)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def ask(running: Up, tokens: int, **headers: str) -> tuple[str, int]:
    """(tier that served it, tokens that came) of one streamed answer."""
    stream = await running.openai.chat.completions.with_raw_response.create(
        model="llama",
        messages=[{"role": "user", "content": "tell me something long"}],
        max_tokens=tokens,
        stream=True,
        extra_headers={name.replace("_", "-"): value for name, value in headers.items()},
    )
    chunks = [chunk async for chunk in stream.parse()]
    return stream.headers["x-polyserve-tier"], sum(bool(c.choices and c.choices[0].delta.content) for c in chunks)


async def test_a_fleet_comes_up_serves_each_pace_and_leaves_nothing_behind(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    async with up(tmp_path, journal=str(journal)) as running:
        await running.ready(2)
        engines = children(running.process.pid)
        assert len(engines) == 2
        asked = [ask(running, 30, x_slo_tpot_ms="30", x_slo_ttft_ms="400") for _ in range(4)]
        asked += [ask(running, 30, x_polyserve_tier="slow") for _ in range(4)]
        answers = await asyncio.gather(*asked)
        assert answers == [("fast", 30)] * 4 + [("slow", 30)] * 4
        metrics = await running.get("/metrics")
        assert 'polyserve_requests_total{model="llama",outcome="ok",tier="fast"} 4.0' in metrics
        kinds = {instance["engine"] for instance in (await running.get("/admin/fleet"))["instances"]}
        assert kinds == {"emulator"}
        running.process.send_signal(signal.SIGTERM)
        assert await running.process.wait() == 0
        await until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in engines))
    steps = list(read_journal(journal))
    told = [step.event.iteration for step in steps if isinstance(step.event, Progressed)]
    assert any(isinstance(iteration, Iteration) and not iteration.inferred for iteration in told)
    assert any(isinstance(action, SetPace) for step in steps for action in step.actions)
    assert replay(journal).mismatch is None


async def test_an_engine_that_is_killed_is_replaced_and_its_requests_are_answered(tmp_path: Path) -> None:
    async with up(tmp_path, launcher={"kind": "local", "min": 1, "max": 2}) as running:
        await running.ready(1)
        (first,) = children(running.process.pid)
        os.kill(first, signal.SIGKILL)
        assert (await ask(running, 5, x_slo_tpot_ms="100", x_slo_ttft_ms="60000")) == ("slow", 5)
        await running.ready(1)
        await until(lambda: first not in children(running.process.pid))
