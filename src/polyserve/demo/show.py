"""The demo itself: the same requests through a live emulated fleet and through the simulator."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from polyserve.report import Outcome, Percentiles, Score, score
from polyserve.serve.replay import ClientLag, Endpoint, Prompts, Replayed, lag_note, replay, window
from polyserve.sim.world import SimulationSpec, simulate
from polyserve.traces import Trace, read_trace

TRACE = "azure-conv"
TPOTS, TTFTS = parse_tpot("20:.1,30:.2,50:.3,100:.4"), parse_ttft("300,500,1000")
OF_OPTIMAL = 0.8
CHUNKS = (256, 512, 2048)  # tokens per iteration that the baseline may choose from
SAY_EVERY_S = 15.0
# Beyond these the live row tells more of this machine than of the fleet. With them it was within a point of the
# simulation on two busy cores; at three times as much it lost half of its attainment.
GATEWAY_LAG_S, LATE_SHARE = 0.05, 0.06
LEGEND = """\
live: what the client saw. simulated: the same requests, decided by the same code, in virtual time.
round-robin: simulated over stock engines, at the best of the fixed chunks 256, 512 and 2048.
attained: every token came by its deadline. promoted: served on a tighter tier's instance."""
BEHIND = """\
THIS MACHINE COULD NOT KEEP REAL TIME, so live is worse than such a fleet would be.
Four engines, a gateway and a client want two cores of their own."""
HOP_S = 0.002  # from gateway to engine or back, on one machine
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
    looks_took_s: list[float] = field(default_factory=list)
    over: int = 0
    engines: list[dict[str, Any]] = field(default_factory=list)  # what each said of itself at the end

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
    fleet = Fleet.start(config, run / "demo", console.print)  # apart from the one that `make up` left
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
    plan = configs.load(config, launch=True).sole
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
    # A part of a recording is not as busy as the whole, and its optimum is its own: so the rate is searched for.
    low, high = trace.recorded_rate / 100, trace.recorded_rate * 100
    while high / low > 1.002:
        workload = draw(rate=math.sqrt(low * high))
        optimal = bound.optimal_rate(profile, instances, workload.mixes())
        if workload.rate < OF_OPTIMAL * optimal:
            low = math.sqrt(low * high)
        else:
            high = math.sqrt(low * high)
    return Stage(trace, workload, profile, plan.configured, instances, plan.name, optimal, seed)


# -------------------------------------------------------------------------------------------------------------- live


async def replay_live(stage: Stage, url: str, live: Live, show: Callable[[], None]) -> Replayed:
    """Send everything; meanwhile look at the fleet's tiers, and show how far it is."""
    endpoint = Endpoint(url, stage.model, max_tokens="none")
    prompts = Prompts(stage.trace, stage.workload, stage.seed)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
        watcher = asyncio.create_task(watch(session, url, live, show))
        try:
            replayed = await replay(stage.workload, prompts, endpoint, live.count, live.outcomes)
        finally:
            watcher.cancel()
        for instance in await instances(session, url):
            async with session.get(f"{instance['url']}/polyserve/info") as response:
                live.engines.append(await response.json())
    return replayed


async def instances(session: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    """The fleet as the gateway shows it."""
    async with session.get(f"{url}/admin/fleet") as response:
        shown: list[dict[str, Any]] = (await response.json())["instances"]
        return shown


async def watch(session: aiohttp.ClientSession, url: str, live: Live, show: Callable[[], None]) -> None:
    """Note the tier of every instance now and then."""
    began = time.monotonic()
    while True:
        with suppress(aiohttp.ClientError, TimeoutError):  # one look missed: the next is soon
            asked_at = time.monotonic()
            tiers = {i["id"]: i["tier"] for i in await instances(session, url)}
            now = time.monotonic()
            live.looks.append(Seen(now - began, tiers))
            live.looks_took_s.append(now - asked_at)
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
    own = twin(stage.workload, stage.configured, stage.profile)
    plain = replace(own, settings=policy("round-robin"), instances=stage.instances, order="fcfs")
    baselines = [_scored(stage, replace(plain, chunk=ChunkRule("fixed", chunk))) for chunk in CHUNKS]
    best = max(baselines, key=lambda each: each.overall.share.attained)
    return {"simulated": _scored(stage, own), "round-robin": best}


def twin(workload: Workload, configured: Configured, profile: Profile) -> SimulationSpec:
    """The simulation of what `polyserve up` does with emulated engines of `profile`, none of which runs yet."""
    return SimulationSpec(
        requests=list(workload),
        tiers=configured.tiers,
        settings=Settings(**configured.settings),  # type: ignore[arg-type]
        profile=profile,
        instances=0,  # the controller starts them
        sight="perfect",  # emulated engines tell their iterations
        lag_s=HOP_S,
        network_s=HOP_S,
        seed=configured.seed,
    )


def _scored(stage: Stage, spec: SimulationSpec) -> Score:
    return score(simulate(spec).outcomes, (0.0, stage.workload.duration_s), stage.paces_s)


# -------------------------------------------------------------------------------------------------------------- told


def tell(console: Console, stage: Stage, replayed: Replayed, live: Live, simulated: dict[str, Score]) -> None:
    """Print it all."""
    seen = score(replayed.outcomes, window(stage.workload, replayed), stage.paces_s)
    console.print(comparison({"live": seen, **simulated}, stage.configured.tiers))
    console.print(LEGEND)
    console.print("\nwhich tier each instance served, live:")
    for row in timeline(live.looks, [tier.name for tier in stage.configured.tiers], stage.workload.duration_s):
        console.print(row)
    console.print()
    if failed := Counter(outcome.code for outcome in replayed.outcomes if outcome.ending == "failed"):
        console.print(f"FAILED: {', '.join(f'{count} x {code}' for code, count in failed.items())}", style="bold")
    notes, kept_up = lags(replayed.lag, live)
    console.print(notes)
    if not kept_up:
        console.print(BEHIND, style="bold")


def lags(client: ClientLag, live: Live) -> tuple[str, bool]:
    """How well client, gateway and engines kept time, a line each, and whether well enough to believe the live row."""
    iterations = max(1, sum(engine["iterations"] for engine in live.engines))
    late = sum(engine["late_iterations"] for engine in live.engines) / iterations
    worst_s = max((engine["worst_lag_s"] for engine in live.engines), default=0.0)
    gateway_s = Percentiles.of(live.looks_took_s).p90 or 0.0
    notes = (
        f"{lag_note(client)}\n"
        f"gateway lag p90: {gateway_s * 1e3:.0f} ms to say what its fleet does\n"
        f"engine lag: {late:.1%} of {iterations} iterations ended over 5 ms late, the worst {worst_s * 1e3:.0f} ms"
    )
    return notes, client.kept_up and gateway_s <= GATEWAY_LAG_S and late <= LATE_SHARE
