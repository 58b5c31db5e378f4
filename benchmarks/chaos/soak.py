"""The same fleet without faults, for long: what the gateway holds must not grow.

    make soak MINUTES=60

Memory, open files, tasks of the event loop and metric series are sampled while clients of every manner come and go at
half of what the engines hold. The verdict goes by the slope over the second half of the run: by then everything that
is learned or kept for good is there. Exit 1 when anything grows, or when a request breaks the law of the chaos run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from chaos.account import Account
from chaos.asks import optimum
from chaos.client import session
from chaos.faults import Stage
from chaos.run import Options, StageError, admin_session, staged, under_load, warmed_up

SAMPLES = 240
SHOWN = 12
# What each may grow in an hour: allocators settle for long, connections that are kept come and go; leaks do not stop
MOST_PER_HOUR = {"memory_mib": 16.0, "files": 30.0, "tasks": 15.0, "series": 4.0}


@dataclass(frozen=True)
class Sample:
    """What the gateway holds at one time."""

    at_s: float
    memory_mib: float
    files: int
    tasks: int
    series: int
    open_requests: int


async def sampled(stage: Stage, began_at: float) -> Sample:
    """Look at the gateway from outside."""
    async with stage.http.get(f"{stage.url}/metrics") as answer:
        lines = [line for line in (await answer.text()).splitlines() if line and not line.startswith("#")]
    values = {line.split("{")[0].split(" ")[0]: line.rpartition(" ")[2] for line in lines}
    return Sample(
        at_s=round(time.monotonic() - began_at, 1),
        memory_mib=round(stage.gateway.memory_bytes() / 2**20, 2),
        files=stage.gateway.files(),
        tasks=int(float(values.get("polyserve_tasks", 0))),
        series=len(lines),
        open_requests=int(float(values.get("polyserve_open_requests", 0))),
    )


def per_hour(samples: list[Sample], name: str) -> float:
    """By how much a figure grows in an hour, over the second half of the samples, by least squares.

    Files and tasks come with each open request and go with it: what they are is counted without them.
    """
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        return 0.0
    each = {"files": 2, "tasks": 2}.get(name, 0)
    values = [getattr(sample, name) - each * sample.open_requests for sample in late]
    slope, _ = np.polyfit([sample.at_s for sample in late], values, 1)
    return float(slope) * 3600.0


async def soak(minutes: float, seed: int, load: float) -> tuple[list[Sample], Account]:
    """Run it; raises `StageError`."""
    rate, began_at = load * optimum(), time.monotonic()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="polyserve-soak-") as scratch:
        async with admin_session() as http, staged(Path(scratch), http) as stage, session() as clients:
            await warmed_up(stage, clients)

            async def look() -> None:
                while True:
                    samples.append(await sampled(stage, began_at))
                    await asyncio.sleep(minutes * 60 / SAMPLES)

            looking = asyncio.create_task(look())
            seen = await under_load(stage, clients, Options(minutes, seed, load, every_s=0.0), rate)
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            account = Account(seed, minutes, rate, stage.injected)
            account.take(seen)
            account.left_over += [f"the gateway's log: {line}" for line in stage.gateway.complaints()[:5]]
    return samples, account


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--load", type=float, default=0.5, help="share of what the engines hold")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    try:
        samples, account = asyncio.run(soak(args.minutes, seed, args.load))
    except StageError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    growth = {name: round(per_hour(samples, name), 2) for name in MOST_PER_HOUR}
    grows = [name for name, most in MOST_PER_HOUR.items() if growth[name] > most]
    flat = not grows and account.lawful
    if args.json:
        plain = {"samples": [asdict(sample) for sample in samples], "per_hour": growth, "flat": flat}
        print(json.dumps(plain | {"account": account.plain()}, indent=1))
    else:
        print(f"soak: seed {seed}, {args.minutes:g} minutes, {args.load:.0%} load")
        for sample in samples[:: max(1, len(samples) // SHOWN)]:
            print("  ".join(f"{name} {value:g}" for name, value in asdict(sample).items()))
        print(account.table())
        told = [f"{name} {growth[name]:+g} (at most {most:g})" for name, most in MOST_PER_HOUR.items()]
        print(f"growth per hour: {', '.join(told)}")
        print("flat" if flat else f"NOT FLAT: {', '.join(grows) or 'the law is broken'}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
