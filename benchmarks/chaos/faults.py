"""What is done to a fleet under load, one fault at a time or a few at once, all of it mended before the run ends."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import yaml

from chaos.processes import EngineProcess, GatewayProcess

# Most engines that suffer at the same time: a fleet that has gone altogether proves little.
MOST_HURT = 2
RESTART_S = (0.1, 3.0)
FREEZE_S = (0.3, 12.0)
SLOW_S = (3.0, 10.0)
SLOW_BIAS = 1.0  # iterations take twice as long
STUTTER_ON_S, STUTTER_OFF_S = 0.05, 0.15
# A drain waits for streams; longer than any answer here takes.
DRAIN_PATIENCE_S = 60.0


@dataclass
class Stage:
    """What there is to hurt."""

    engines: list[EngineProcess]
    gateway: GatewayProcess
    http: aiohttp.ClientSession
    spare: EngineProcess  # joins now and then, and leaves again
    config: Path
    plain: dict[str, Any]  # what stands in the config
    hurt: set[str] = field(default_factory=set)
    injected: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)  # faults that could not be done as meant

    @property
    def url(self) -> str:
        return self.gateway.place.url

    async def states(self) -> dict[str, str]:
        """The state of each instance, as the gateway says."""
        async with self.http.get(f"{self.url}/admin/fleet") as answer:
            return {one["id"]: one["state"] for one in (await answer.json())["instances"]}

    async def reaches(self, condition: Callable[[dict[str, str]], bool], within_s: float) -> bool:
        """Whether the fleet comes to look as wanted."""
        deadline = asyncio.get_running_loop().time() + within_s
        while not condition(await self.states()):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.1)
        return True

    async def join(self, engine: EngineProcess) -> None:
        async with self.http.post(
            f"{self.url}/admin/instances", json={"id": engine.name, "url": engine.place.url}
        ) as answer:
            if answer.status != 202:
                self.problems.append(f"join {engine.name}: {answer.status} {await answer.text()}")

    async def drain(self, engine: EngineProcess) -> None:
        async with self.http.post(f"{self.url}/admin/instances/{engine.name}/drain") as answer:
            if answer.status != 202:
                self.problems.append(f"drain {engine.name}: {answer.status} {await answer.text()}")
                return
        if not await self.reaches(lambda states: engine.name not in states, DRAIN_PATIENCE_S):
            self.problems.append(f"drain {engine.name}: still there after {DRAIN_PATIENCE_S:.0f} s")

    async def remove(self, engine: EngineProcess) -> None:
        async with self.http.delete(f"{self.url}/admin/instances/{engine.name}") as answer:
            if answer.status != 204:
                self.problems.append(f"remove {engine.name}: {answer.status} {await answer.text()}")

    async def reload(self, plain: dict[str, Any], status: int) -> None:
        """Have the gateway read another config, which it answers with `status`."""
        self.config.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
        async with self.http.post(f"{self.url}/admin/reload") as answer:
            if answer.status != status:
                self.problems.append(f"reload: {answer.status}, not {status}: {await answer.text()}")


Fault = Callable[[Stage, EngineProcess, Random], Awaitable[None]]


async def kill(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Killed, and started again at the same address."""
    await engine.kill()
    await asyncio.sleep(random.uniform(*RESTART_S))
    engine.start()


async def kill_and_restart_at_once(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Killed, and there again before the next probe."""
    await engine.kill()
    engine.start()


async def restart(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Asked to end, as an operator would, and started again."""
    engine.signal(signal.SIGTERM)
    await engine.gone()
    engine.start()


async def freeze(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Stopped for a while: it keeps its connections and says nothing."""
    engine.signal(signal.SIGSTOP)
    await asyncio.sleep(random.uniform(*FREEZE_S))
    engine.signal(signal.SIGCONT)


async def freeze_and_kill(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Stopped, and then killed without having come to itself."""
    engine.signal(signal.SIGSTOP)
    await asyncio.sleep(random.uniform(*FREEZE_S))
    await kill(stage, engine, random)


async def stutter(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Gets the processor only a quarter of the time."""
    for _ in range(round(random.uniform(*SLOW_S) / (STUTTER_ON_S + STUTTER_OFF_S))):
        engine.signal(signal.SIGSTOP)
        await asyncio.sleep(STUTTER_OFF_S)
        engine.signal(signal.SIGCONT)
        await asyncio.sleep(STUTTER_ON_S)


async def slow(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Comes back from a restart at half its speed, and after a while from another one as it was."""
    await engine.kill()
    engine.start(bias=SLOW_BIAS)
    await asyncio.sleep(random.uniform(*SLOW_S))
    await engine.kill()
    engine.start()


async def drain(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Drained to the last stream, and joined again."""
    await stage.drain(engine)
    await stage.join(engine)


async def remove(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Taken out at once with all that runs on it, and joined again."""
    await stage.remove(engine)
    await asyncio.sleep(random.uniform(0.0, 1.0))
    await stage.join(engine)


async def grow(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """One more instance joins, and is drained again."""
    spare = stage.spare
    spare.start()
    await stage.join(spare)
    await asyncio.sleep(random.uniform(*SLOW_S))
    await stage.drain(spare)
    await spare.kill()


async def reload(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """Another tier comes with the config, and goes again."""
    extra = {"name": "extra", "tpot_ms": 150, "ttft_ms": 4_000}
    await stage.reload(stage.plain | {"tiers": [*stage.plain["tiers"], extra]}, 200)
    await asyncio.sleep(random.uniform(1.0, 4.0))
    await stage.reload(stage.plain, 200)


async def reload_badly(stage: Stage, engine: EngineProcess, random: Random) -> None:
    """A config that is none; the old one stays."""
    await stage.reload(stage.plain | {"tiers": [{"name": "fast"}]}, 400)
    await stage.reload(stage.plain, 200)


FAULTS: dict[str, Fault] = {
    "kill": kill,
    "kill, restart at once": kill_and_restart_at_once,
    "restart": restart,
    "freeze": freeze,
    "freeze, then kill": freeze_and_kill,
    "stutter": stutter,
    "slow": slow,
    "drain": drain,
    "remove": remove,
    "join, then drain": grow,
    "reload": reload,
    "reload, bad file": reload_badly,
}
# Those that hurt no engine of the fleet.
ELSEWHERE = ("join, then drain", "reload", "reload, bad file")


async def trouble(stage: Stage, seed: int, every_s: float, until: float) -> None:
    """Inject faults, on average one in `every_s`, until the loop's clock says `until`; then wait for the last ones."""
    random = Random(f"{seed} faults")
    deck: list[str] = []
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        while True:
            await asyncio.sleep(random.expovariate(1 / every_s))
            if loop.time() >= until:
                break
            if not deck:  # every kind comes before any comes again
                deck = random.sample(sorted(FAULTS), len(FAULTS))
            name, victim, own = deck.pop(), random.choice(stage.engines), Random(random.random())
            if name in ELSEWHERE:
                victim = stage.spare
            elif len(stage.hurt) >= MOST_HURT:
                deck.insert(0, name)
                continue
            if victim.name not in stage.hurt:
                group.create_task(_inject(stage, name, victim, own))
            else:
                deck.insert(0, name)


async def _inject(stage: Stage, name: str, engine: EngineProcess, random: Random) -> None:
    stage.hurt.add(engine.name)
    stage.injected[name] += 1
    try:
        await FAULTS[name](stage, engine, random)
        await stage.reaches(lambda states: states.get(engine.name, "ready") in ("ready", "resting"), DRAIN_PATIENCE_S)
    except (aiohttp.ClientError, OSError) as error:
        stage.problems.append(f"{name} of {engine.name}: {type(error).__name__}: {error}")
    finally:
        stage.hurt.discard(engine.name)
