"""One policy in one case, from tuning to intervals: which runs it still wants, and what they show.

A track is replayed from the runs that are known, in the order in which it would have asked for them. So what it finds
depends on its own runs alone, not on what else lies in the store or on who finished first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from polyserve.study.ground import Case
from polyserve.study.run import Job, job
from polyserve.study.search import FIRST_LOAD, MEASURES, Crossing, Point, crossing, next_load
from polyserve.study.settings import Entry
from polyserve.study.store import Record
from polyserve.study.tuning import Choice, stages, tried

# Load at which baselines are tuned: near the bound, where chunks differ, but not so near that baselines have collapsed
# (at 0.9 on A100 all chunks of `minimal` lose the tightest tier, and the one that loses least has not the best G90t;
# at 0.8 it has). A search starts there too.
TUNED_AT = FIRST_LOAD
OVERLOAD = 1.5
# Load of the run whose fleet is shown over time: busy, with room enough for a gradient to be seen.
SHOWN_AT = 0.8


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is run."""

    quick: bool
    resolution: float
    seeds: tuple[int, ...]  # the first one tunes and searches; all give the interval
    measures: tuple[str, ...]
    loads: tuple[float, ...] = ()  # run in any case, with the first seed
    overload: bool = True


@dataclass(slots=True)
class Tuned:
    """How an entry is run, and what was tried at `TUNED_AT` to find that out."""

    choice: Choice
    tried: dict[Choice, Record] = field(default_factory=dict)


@dataclass(slots=True)
class Found:
    """What a track has shown so far."""

    tuned: Tuned
    runs: dict[int, dict[float, Record]] = field(default_factory=dict)  # by seed and load
    crossings: dict[str, dict[int, Crossing]] = field(default_factory=dict)  # by measure and seed
    shown: Record | None = None
    shown_job: Job | None = None
    jobs: dict[tuple[int, float], Job] = field(default_factory=dict)  # by seed and load


Known = Callable[[Job], Record | None]


@dataclass(frozen=True, slots=True)
class Track:
    """One entry of a setting in one case."""

    case: Case
    entry: Entry
    effort: Effort
    show: bool = False  # keep how its fleet looked over time

    def follow(self, known: Known) -> tuple[Found, list[Job]]:
        """What the known runs show, and the runs that can be made now; none when the track is at its end."""
        replay = _Replay(self, known)
        replay.follow()
        return replay.found, replay.wanted


class _Replay:
    """Walks a track through known runs, and notes those that are missing."""

    def __init__(self, track: Track, known: Known) -> None:
        self._track, self._known = track, known
        self.found = Found(Tuned(Choice(track.entry.chunk, track.entry.values)))
        self.wanted: list[Job] = []

    def follow(self) -> None:
        effort = self._track.effort
        first, *others = effort.seeds
        self.found.tuned, self.wanted = tuned(self._track.case, self._track.entry, effort.quick, first, self._known)
        if self.wanted:
            return
        searched = self._searched(first, None)
        for load in effort.loads:
            self._run(load, first)
        if self._track.show:
            self._show(first)
        for seed in effort.seeds if effort.overload else ():
            self._run(OVERLOAD, seed)
        if searched:
            hints = {name: by_seed[first].load for name, by_seed in self.found.crossings.items()}
            for seed in others if effort.measures else ():
                self._searched(seed, hints)

    def _searched(self, seed: int, hints: Mapping[str, float] | None) -> bool:
        """Follow the search of one seed as far as runs are known; whether it is at its end."""
        effort = self._track.effort
        measures = [MEASURES[name] for name in effort.measures]
        points: list[Point] = []
        while (load := next_load(points, measures, effort.resolution, hints)) is not None:
            record = self._run(load, seed)
            if record is None:
                return False
            points.append(point(load, record))
        for measure in measures:
            self.found.crossings.setdefault(measure.name, {})[seed] = crossing(points, measure)
        return True

    def _show(self, seed: int) -> None:
        asked = job(self._track.case, self._track.entry.policy, SHOWN_AT, seed, *self.found.tuned.choice, show=True)
        self.found.shown, self.found.shown_job = self._asked(asked), asked

    def _run(self, load: float, seed: int) -> Record | None:
        asked = job(self._track.case, self._track.entry.policy, load, seed, *self.found.tuned.choice)
        record = self._asked(asked)
        if record is not None:
            self.found.runs.setdefault(seed, {})[load] = record
            self.found.jobs[seed, load] = asked
        return record

    def _asked(self, asked: Job) -> Record | None:
        record = self._known(asked)
        if record is None:
            self.wanted.append(asked)
        return record


def tuned(case: Case, entry: Entry, quick: bool, seed: int, known: Known) -> tuple[Tuned, list[Job]]:
    """Tune one knob after the other as far as runs are known; the runs that are missing."""
    found = Tuned(Choice(entry.chunk, entry.values))
    for knob, values in stages(case, entry, quick):
        choices = [tried(found.choice, knob, value) for value in values]
        jobs = {choice: job(case, entry.policy, TUNED_AT, seed, *choice) for choice in choices}
        records = {choice: record for choice in choices if (record := known(jobs[choice])) is not None}
        found.tried.update(records)
        if len(records) < len(choices):
            return found, [asked for choice, asked in jobs.items() if choice not in records]
        found.choice = max(choices, key=lambda choice: merit(records[choice]))
    return found, []


def point(load: float, record: Record) -> Point:
    attainment = record["result"]["attainment"]
    return Point(load, attainment["overall"] or 0.0, attainment["worst_tier"] or 0.0)


def merit(record: Record) -> tuple[float, float]:
    """What a tuned value is chosen by: attainment of the worst tier, then overall."""
    shown = point(TUNED_AT, record)
    return shown.worst_tier, shown.overall
