"""The demo itself: the same requests through a live emulated fleet and through the simulator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from polyserve import config as configs
from polyserve.core import bound
from polyserve.core.profile import Profile
from polyserve.core.settings import Settings, policy
from polyserve.core.types import ChunkRule, Configured
from polyserve.demand import Arrivals, Workload, draw_requests, parse_tpot, parse_ttft
from polyserve.demo.fleet import Fleet, instances_of
from polyserve.demo.story import Seen, comparison, timeline
from polyserve.profiles.store import load
from polyserve.report import Outcome, Score, score
from polyserve.serve.replay import Endpoint, Prompts, Replayed, lag_note, replay, window
from polyserve.sim.world import SimulationSpec, simulate
from polyserve.traces import Trace, read_trace

TRACE = "azure-conv"
TPOTS, TTFTS = parse_tpot("20:.1,30:.2,50:.3,100:.4"), parse_ttft("300,500,1000")
OF_OPTIMAL = 0.8
CHUNKS = (512, 2048)  # fixed budgets that the baseline may choose from
SAY_EVERY_S = 15.0
LOOK_S = 0.5


@dataclass(frozen=True)
class Stage:
    """What is played, and on what."""

    trace: Trace
    workload: Workload
    profile: Profile
    configured: Configured
    instances: int
    model: str
    optimal_rate: float
    seed: int

    @property
    def paces_s(self) -> list[float]:
        return [tier.tpot_s for tier in self.configured.tiers]


@dataclass
class Live:
    """The replay while it runs."""

    total: int
    outcomes: list[Outcome] = field(default_factory=list)  # of the requests sent so far
    looks: list[Seen] = field(default_factory=list)
    over: int = 0

    def count(self, over: int) -> None:
        self.over = over

    def __str__(self) -> str:
        refused = sum(outcome.ending == "refused" for outcome in self.outcomes)
        return f"{len(self.outcomes)} of {self.total} sent, {self.over - refused} answered, {refused} refused"


def run_demo(console: Console, config: Path, run: Path, seconds: float, seed: int, patience_s: float) -> None:
    """Replay, simulate, print; nothing is left running. Raises `ConfigError` or `FleetError`."""
    stage = prepare(config, seconds, seed)
    load_said = f"{stage.workload.rate:.1f}/s, {stage.workload.rate / stage.optimal_rate:.0%} of the best possible"
    console.print(
        f"{len(stage.workload)} requests of the trace {TRACE} in {seconds:g} s ({load_said}) "
        f"for {stage.instances} emulated instances of {stage.profile.name}"
    )
    fleet = Fleet.start(config, run, console.print)
    try:
        with console.status("starting the engines and the gateway"):
            fleet.wait_ready(stage.instances, patience_s)
        live = Live(len(stage.workload))
        with progress(console, live) as show:
            replayed = uvloop.run(replay_live(stage, fleet.url, live, show))
    finally:
        fleet.stop()
    with console.status("simulating the same requests"):
        simulated = simulate_all(stage)
    tell(console, stage, replayed, live, simulated)


def prepare(config: Path, seconds: float, seed: int) -> Stage:
    """Draw the requests that load the config's fleet to `OF_OPTIMAL` of what it can do at best."""
    plan = configs.load(config, launch=True)
    assert plan.launcher is not None, "the demo's config launches its engines"
    instances = instances_of(plan.configured)
    profile, trace = load(plan.launcher.profile), read_trace(TRACE)
    draw = partial(
        draw_requests,
        trace,
        duration_s=seconds,
        tpots=TPOTS,
        ttfts=TTFTS,
        feasible=partial(bound.feasible, profile, ChunkRule()),
        arrivals=Arrivals("recorded"),
        seed=seed,
    )
    # A part of a recording is not as busy as the whole, and its optimum is its own: a few rounds settle the rate.
    rate = trace.recorded_rate
    for _ in range(4):
        workload = draw(rate=rate)
        optimal = bound.optimal_rate(profile, instances, workload.mixes())
        rate *= OF_OPTIMAL * optimal / workload.rate
    return Stage(trace, workload, profile, plan.configured, instances, plan.model, optimal, seed)


# -------------------------------------------------------------------------------------------------------------- live


async def replay_live(stage: Stage, url: str, live: Live, show: Callable[[], None]) -> Replayed:
    """Send everything; meanwhile look at the fleet's tiers, and show how far it is."""
    endpoint = Endpoint(url, stage.model, max_tokens="none")
    watcher = asyncio.create_task(watch(url, live, show))
    try:
        prompts = Prompts(stage.trace, stage.workload, stage.seed)
        return await replay(stage.workload, prompts, endpoint, live.count, live.outcomes)
    finally:
        watcher.cancel()


async def watch(url: str, live: Live, show: Callable[[], None]) -> None:
    """Note the tier of every instance now and then."""
    began = time.monotonic()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):  # one look missed: the next is soon
                async with session.get(f"{url}/admin/fleet") as response:
                    instances = (await response.json())["instances"]
                live.looks.append(Seen(time.monotonic() - began, {i["id"]: i["tier"] for i in instances}))
            show()
            await asyncio.sleep(LOOK_S)


@contextmanager
def progress(console: Console, live: Live) -> Iterator[Callable[[], None]]:
    """Shows how far the replay is whenever called: a bar on a terminal, else a line now and then."""
    if console.is_terminal:
        columns = (TextColumn("replaying"), BarColumn(), TextColumn("{task.fields[live]}"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=live.total, live=str(live))
            yield lambda: bar.update(task, completed=live.over, live=str(live))
        return
    began = said_at = time.monotonic()

    def say() -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= SAY_EVERY_S:
            said_at = time.monotonic()
            console.print(f"{said_at - began:3.0f} s: {live}")

    yield say


# --------------------------------------------------------------------------------------------------------- simulated


def simulate_all(stage: Stage) -> dict[str, Score]:
    """Scores of the very same requests under the gateway's own policy, and under round-robin at its best chunk."""
    own = Settings(**stage.configured.settings)  # type: ignore[arg-type]
    plain = policy("round-robin")
    baselines = {
        f"simulated, round-robin (chunk {chunk})": _simulated(stage, plain, ChunkRule("fixed", chunk))
        for chunk in CHUNKS
    }
    best = max(baselines, key=lambda name: baselines[name].overall.share.attained)
    return {"simulated": _simulated(stage, own, ChunkRule()), best: baselines[best]}


def _simulated(stage: Stage, settings: Settings, chunk: ChunkRule) -> Score:
    spec = SimulationSpec(
        requests=list(stage.workload),
        tiers=stage.configured.tiers,
        settings=settings,
        profile=stage.profile,
        instances=stage.instances,
        chunk=chunk,
        order="deadline" if chunk.kind == "dynamic" else "fcfs",
        seed=stage.seed,
    )
    return score(simulate(spec).outcomes, (0.0, stage.workload.duration_s), stage.paces_s)


# -------------------------------------------------------------------------------------------------------------- told


def tell(console: Console, stage: Stage, replayed: Replayed, live: Live, simulated: dict[str, Score]) -> None:
    seen = score(replayed.outcomes, window(stage.workload, replayed), stage.paces_s)
    console.print(comparison({"live": seen, **simulated}))
    console.print("\nwhich tier each instance served:")
    for row in timeline(live.looks, [tier.name for tier in stage.configured.tiers], stage.workload.duration_s):
        console.print(row)
    console.print(f"\n{lag_note(replayed.lag)}")
