"""What a run comes to: faults, fates, what the journal says of them, and what was left over."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from chaos.client import Seen
from chaos.processes import EngineProcess, GatewayProcess
from chaos.verdict import Verdict, judge
from polyserve.core.types import Dispatch, RequestId
from polyserve.journal import read_journal

# Beyond what a process that has served this much keeps for good: buffers, learned lengths, series.
MORE_MEMORY_BYTES = 64 * 1024 * 1024
MORE_FILES = 8
# An answer that takes longer than this is late; the law does not mind.
LATE_S = 30.0
SHOWN = 20
# An engine that has just suffered may be given a rest; that it lives is enough.
UP = ("ready", "resting")


@dataclass
class Account:
    """Everything a run is judged by."""

    seed: int
    minutes: float
    rate: float
    faults: Counter[str]
    verdicts: dict[RequestId, Verdict] = field(default_factory=dict)
    broken: dict[RequestId, str] = field(default_factory=dict)  # what came, for those that break the law
    continued: int = 0  # answers that went on at another instance after their first byte
    moved: int = 0  # requests that were dispatched again before it
    late: int = 0
    slowest_s: float = 0.0
    left_over: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def fates(self) -> Counter[str]:
        return Counter(verdict.fate for verdict in self.verdicts.values())

    @property
    def refusals(self) -> Counter[str]:
        return Counter(verdict.why for verdict in self.verdicts.values() if verdict.fate == "refused")

    @property
    def lawful(self) -> bool:
        """Whether nothing was lost, and nothing left over; a run without a completed request shows nothing."""
        return not self.broken and not self.left_over and self.fates["completed"] > 0

    def take(self, clients: list[Seen]) -> None:
        """Judge what every client saw."""
        for seen in clients:
            verdict = self.verdicts[seen.ask.id] = judge(seen)
            if verdict.fate == "broken":
                self.broken[seen.ask.id] = f"{verdict.why} [{seen.ask.path}, {seen.ask.manner}, {seen.took_s:.1f} s]"
            self.late += seen.took_s > LATE_S
            self.slowest_s = max(self.slowest_s, seen.took_s)

    def read(self, journal: Path) -> None:
        """Count in the journal who was sent more than once."""
        dispatches: Counter[RequestId] = Counter()
        continued: set[RequestId] = set()
        for step in read_journal(journal):
            for action in step.actions:
                if isinstance(action, Dispatch):
                    dispatches[action.request] += 1
                    if action.resume_from:
                        continued.add(action.request)
        completed = {id for id, verdict in self.verdicts.items() if verdict.fate == "completed"}
        self.continued = len(continued & completed)
        self.moved = sum(1 for id in completed - continued if dispatches[id] > 1)

    def plain(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {
            "seed": self.seed,
            "minutes": self.minutes,
            "requests_per_s": round(self.rate, 2),
            "faults": dict(sorted(self.faults.items())),
            "requests": len(self.verdicts),
            **{
                fate.replace(" ", "_"): self.fates[fate]
                for fate in ("completed", "refused", "error event", "abandoned")
            },
            "continued": self.continued,
            "moved": self.moved,
            "refusals": dict(sorted(self.refusals.items())),
            "lost": len(self.broken),
            "broken": self.broken,
            "late": self.late,
            "slowest_s": round(self.slowest_s, 1),
            "left_over": self.left_over,
            "figures": self.figures,
            "lawful": self.lawful,
        }

    def table(self) -> str:
        """All of it as people read it."""
        lines = [f"faults injected ({sum(self.faults.values())}):"]
        lines += [f"  {name:24}{count:6}" for name, count in sorted(self.faults.items())]
        fates, refusals = self.fates, ", ".join(f"{code} {count}" for code, count in sorted(self.refusals.items()))
        lines += [
            f"requests{len(self.verdicts):24}   at {self.rate:.1f} a second",
            f"  completed{fates['completed']:21}   each with exactly the tokens of a fault-free run",
            f"    continued elsewhere{self.continued:9}   after their first byte",
            f"    sent again{self.moved:18}   before it",
            f"  refused{fates['refused']:23}   {refusals}",
            f"  ended by an error event{fates['error event']:7}   where continuing cannot be exact",
            f"  left by their client{fates['abandoned']:10}",
            f"  lost, doubled or cut{fates['broken']:10}",
            f"slowest answer {self.slowest_s:.1f} s, {self.late} over {LATE_S:.0f} s (late is not lost)",
            "  ".join(f"{name} {value:g}" for name, value in self.figures.items()),
        ]
        lines += [f"LEFT OVER: {line}" for line in self.left_over]
        lines += [f"BROKEN: {id}: {why}" for id, why in list(self.broken.items())[:SHOWN]]
        if len(self.broken) > SHOWN:
            lines.append(f"BROKEN: and {len(self.broken) - SHOWN} more; --json has them all")
        return "\n".join(lines)


async def held(http: aiohttp.ClientSession, url: str) -> list[str]:
    """What the gateway still has in its books."""
    found = []
    async with http.get(f"{url}/admin/fleet") as answer:
        for one in (await answer.json())["instances"]:
            if one["requests"]:
                found.append(f"the gateway holds {one['requests']} requests on {one['id']}")
            if one["state"] not in UP:
                found.append(f"instance {one['id']} is {one['state']}")
    async with http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    for name, labels, value in re.findall(r"^polyserve_(open_requests|queue_size)(\{.*\})? (\S+)$", text, re.M):
        if float(value):
            found.append(f"polyserve_{name}{labels} is {value}")
    return found


async def held_by(http: aiohttp.ClientSession, engine: EngineProcess) -> list[str]:
    """What an engine still works on."""
    async with http.get(f"{engine.place.url}/metrics") as answer:
        text = await answer.text()
    found = re.findall(r"^vllm:num_requests_(running|waiting)\{.*\} (\S+)$", text, re.M)
    return [f"engine {engine.name} has {value} requests {state}" for state, value in found if float(value)]


def grown(gateway: GatewayProcess, memory_bytes: int, files: int) -> list[str]:
    """What the gateway has taken since it had so much."""
    found = []
    if (memory := gateway.memory_bytes() - memory_bytes) > MORE_MEMORY_BYTES:
        found.append(f"the gateway has grown by {memory / 2**20:.0f} MiB")
    if (more := gateway.files() - files) > MORE_FILES:
        found.append(f"the gateway holds {more} files more than at the start")
    return found
