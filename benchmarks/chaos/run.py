"""A whole run: the stage set up, load and faults let loose, everything mended, and the account made."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import aiohttp

from chaos import scene
from chaos.account import Account, grown, held, held_by
from chaos.asks import draw, optimum
from chaos.client import Seen, send, session
from chaos.faults import Stage, trouble
from chaos.processes import EngineProcess, GatewayProcess, Place
from polyserve.journal import replay

# A loaded machine takes its time to start seven processes.
START_PATIENCE_S = 120.0
# What is left to do once the last request was sent; a request open after that is lost.
PATIENCE_S = 120.0
QUIET_S = 20.0


@dataclass(frozen=True)
class Options:
    """How a run is to be."""

    minutes: float
    seed: int
    load: float = 0.8  # of what the engines hold at best
    every_s: float = 4.0  # between two faults, on average; 0: none
    keep: Path | None = None  # where logs and journal stay


def admin_session() -> aiohttp.ClientSession:
    """For the admin API: a connection for each request, since one kept may be closed in the moment of the next."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))


class StageError(Exception):
    """The stage could not be set up; the message says why."""


async def run(options: Options) -> Account:
    """Do it all; raises `StageError`."""
    with tempfile.TemporaryDirectory(prefix="polyserve-chaos-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rate = options.load * optimum()
        async with admin_session() as http, staged(folder, http) as stage, session() as clients:
            memory, files = await warmed_up(stage, clients)
            seen = await under_load(stage, clients, options, rate)
            await clients.close()
            account = Account(options.seed, options.minutes, rate, stage.injected)
            account.take(seen)
            account.left_over += await _left_over(stage, memory, files)
            account.figures = _figures(stage, memory, files)
            account.left_over += await _ended(stage)
        account.read(folder / "journal.jsonl")
        if (mismatch := replay(folder / "journal.jsonl").mismatch) is not None:
            account.left_over.append(f"the journal does not replay: {mismatch}")
        return account


@contextlib.asynccontextmanager
async def staged(folder: Path, http: aiohttp.ClientSession) -> AsyncIterator[Stage]:
    """Engines and gateway, up and ready."""
    profile = scene.write_profile(folder)
    with contextlib.ExitStack() as stack:
        names = [*(f"e{number}" for number in range(scene.ENGINES)), "spare"]
        engines = [EngineProcess(name, folder, profile, scene.MODEL) for name in names]
        for engine in engines:
            stack.callback(engine.close)
        *engines, spare = engines
        for engine in engines:
            engine.start()
        place = Place()
        config = scene.config(folder, place.port, [engine.place.url for engine in engines])
        file = scene.write_config(folder, config)
        gateway = GatewayProcess(file, place, folder / "gateway.log")
        stack.callback(gateway.close)
        stage = Stage(engines, gateway, http, spare, file, config)
        await _ready(stage)
        yield stage


async def _ready(stage: Stage) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_PATIENCE_S):
            while stage.gateway.up:
                with contextlib.suppress(aiohttp.ClientError):
                    if list((await stage.states()).values()).count("ready") == len(stage.engines):
                        return
                await asyncio.sleep(0.1)
    end = stage.gateway.log.read_text(errors="replace")[-2000:]
    raise StageError(f"the fleet is not ready; the end of the gateway's log:\n{end}")


async def warmed_up(stage: Stage, clients: aiohttp.ClientSession) -> tuple[int, int]:
    """Let everything happen once, and come back with the gateway's memory and open files."""
    asks = [draw(-1, number) for number in range(20)]
    await asyncio.gather(*(send(clients, stage.url, ask, Seen(ask)) for ask in asks))
    return stage.gateway.memory_bytes(), stage.gateway.files()


async def under_load(stage: Stage, clients: aiohttp.ClientSession, options: Options, rate: float) -> list[Seen]:
    """Load and faults for as long as asked; comes back when all clients are through, or have waited long enough."""
    loop = asyncio.get_running_loop()
    until = loop.time() + options.minutes * 60
    faults = asyncio.create_task(trouble(stage, options.seed, options.every_s, until)) if options.every_s else None
    all_seen: list[Seen] = []
    open_tasks: set[asyncio.Task[None]] = set()
    random, at = Random(f"{options.seed} arrivals"), loop.time()
    while (at := at + random.expovariate(rate)) < until:
        await asyncio.sleep(max(0.0, at - loop.time()))
        seen = Seen(draw(options.seed, len(all_seen)))
        all_seen.append(seen)
        task = asyncio.create_task(send(clients, stage.url, seen.ask, seen))
        open_tasks.add(task)
        task.add_done_callback(open_tasks.discard)
    if faults is not None:
        await faults
    if open_tasks:
        _, late = await asyncio.wait(open_tasks, timeout=PATIENCE_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    return all_seen


async def _left_over(stage: Stage, memory_bytes: int, files: int) -> list[str]:
    """What is still held when everything had time to come to rest."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + QUIET_S
    while True:
        found = list(stage.problems)
        found += [f"the gateway's log: {line}" for line in stage.gateway.complaints()[:5]]
        if not stage.gateway.up:
            return [*found, "the gateway has ended"]
        found += await held(stage.http, stage.url)
        for engine in stage.engines:
            found += await held_by(stage.http, engine)
        found += grown(stage.gateway, memory_bytes, files)
        if not found or loop.time() > deadline:
            return found
        await asyncio.sleep(0.5)


def _figures(stage: Stage, memory_bytes: int, files: int) -> dict[str, float]:
    gateway = stage.gateway
    return {
        "gateway_mib_before": round(memory_bytes / 2**20, 1),
        "gateway_mib_after": round(gateway.memory_bytes() / 2**20, 1),
        "gateway_files_before": files,
        "gateway_files_after": gateway.files(),
        "gateway_processor_s": round(gateway.processor_s(), 1),
    }


async def _ended(stage: Stage) -> list[str]:
    """End the gateway in order."""
    stage.gateway.signal(signal.SIGTERM)
    code = await stage.gateway.ended(30.0)
    if code is None:
        return ["the gateway does not end at a signal"]
    return [] if code == 0 else [f"the gateway ended with code {code}"]
