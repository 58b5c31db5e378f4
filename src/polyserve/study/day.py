"""A day with its rise and fall: what a fleet that changes costs when every tier is in time, and a fixed one.

Every way of scaling has one knob that buys attainment with instance-seconds: the requests that a queue-length
autoscaler wants per instance, the size of a fixed fleet, the load that a policy's own scaler plans for. A track finds
the cheapest value with which every tier attains `TARGET` over the whole day.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from polyserve.core.settings import Settings
from polyserve.study.ground import Case
from polyserve.study.run import Job, job
from polyserve.study.search import cheapest
from polyserve.study.settings import Entry, Pairs
from polyserve.study.store import Record
from polyserve.study.track import Effort, Known, Tuned, point, tuned
from polyserve.study.tuning import Choice

TARGET = 0.99
# Load of the fleet's full size in the busiest ten minutes.
PEAK_LOAD = 0.8
# An elastic fleet may grow to so many times that size, and a fixed one is tried up to it.
ROOM = 2
# Requests per instance that a queue-length autoscaler is tried with, cheapest first: a quarter apart.
TARGETS = tuple(round(512.0 * 0.8**n, 2) for n in range(26))
# The load that a policy's own scaler plans for, cheapest first, where it lets one say so.
PLANNED_LOADS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclass(frozen=True, slots=True)
class Knob:
    """What buys attainment: values from the cheapest to the dearest."""

    name: str
    values: tuple[float | int | None, ...]
    first: int  # index of the value that is tried first


@dataclass(slots=True)
class Bought:
    """What a track has shown so far."""

    tuned: Tuned
    knob: Knob
    runs: dict[int, Record] = field(default_factory=dict)  # by index of the knob's value
    jobs: dict[int, Job] = field(default_factory=dict)
    cheapest: int | None = None


@dataclass(frozen=True, slots=True)
class DayTrack:
    """One way of scaling under one policy, through one day."""

    case: Case
    entry: Entry
    effort: Effort

    def follow(self, known: Known) -> tuple[Bought, list[Job]]:
        """What the known runs show, and the runs that can be made now; none when the track is at its end."""
        steady = replace(self.case, world=replace(self.case.world, day="", start_up_s=0.0))
        tuning = replace(self.entry, values=tuple(v for v in self.entry.values if v[0] != "autoscaler"))
        seed = self.effort.seeds[0]
        choices, wanted = tuned(steady, tuning, self.effort.quick, seed, known)
        found = Bought(choices, knob(self.case, self.entry))
        while not wanted:
            holds = {n: point(0.0, record).worst_tier >= TARGET for n, record in found.runs.items()}
            found.cheapest, following = cheapest(holds, len(found.knob.values), found.knob.first)
            if following is None:
                break
            asked = self._asked(found.knob, following, choices.choice, seed)
            record = known(asked)
            if record is None:
                wanted = [asked]
            else:
                found.runs[following], found.jobs[following] = record, asked
        return found, wanted

    def _asked(self, turned: Knob, index: int, choice: Choice, seed: int) -> Job:
        value = turned.values[index]
        if self.entry.scaler == "static":
            assert isinstance(value, int)
            # A fixed fleet starts nobody, so that its runs serve all start-up times.
            case = replace(self.case, world=replace(self.case.world, start_up_s=0.0))
            return job(case, self.entry.policy, self.load, seed, choice.chunk, choice.values, instances=value)
        most = ROOM * self.case.fleet.instances
        extra: Pairs = (("max_instances", most), ("min_instances", 1))
        if self.entry.scaler == "queue":
            extra += (("autoscaler", "queue"),)
        if value is not None:
            extra += ((turned.name, value),)
        start = min(max(math.ceil(self.load * self.case.curve[0] * self.case.fleet.instances * 1.2), 1), most)
        values = (*choice.values, *extra)
        return job(self.case, self.entry.policy, self.load, seed, choice.chunk, values, instances=start)

    @property
    def load(self) -> float:
        """The day's mean load of the fleet at its full size."""
        return PEAK_LOAD / max(self.case.curve)


def knob(case: Case, entry: Entry) -> Knob:
    """What buys attainment for this way of scaling."""
    if entry.scaler == "static":
        full = case.fleet.instances
        return Knob("instances", tuple(range(1, ROOM * full + 1)), full - 1)
    if entry.scaler == "queue":
        return Knob("target_requests", TARGETS, 15)
    if "planned_load" in Settings.__dataclass_fields__ and entry.policy != "polyserve-paper":
        return Knob("planned_load", PLANNED_LOADS, 2)
    return Knob("own", (None,), 0)


def outcome(found: Bought) -> tuple[int, Record] | None:
    """The run that counts: the cheapest that holds, else the one that attains most in its worst tier."""
    if found.cheapest is not None:
        return found.cheapest, found.runs[found.cheapest]
    runs: Mapping[int, Record] = found.runs
    return max(runs.items(), key=lambda item: (point(0.0, item[1]).worst_tier, -item[0]), default=None)
