"""A study: its cases and tracks, and the loop that makes the runs they want on every core there is."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace

from polyserve.study.day import Bought, DayTrack
from polyserve.study.ground import Case
from polyserve.study.run import Job, made
from polyserve.study.settings import Entry, Setting, StudyError, entry, known_entries, scaled_down, scaled_entry
from polyserve.study.store import Record, Store
from polyserve.study.track import Effort, Found, Track

FULL_SEEDS = 5
RESOLUTION = {"quick": 0.02, "full": 0.01}


@dataclass(frozen=True, slots=True)
class Study:
    """What is run, all of it known beforehand but the loads."""

    setting: Setting
    quick: bool
    seed: int
    tracks: tuple[Track | DayTrack, ...]
    missing: tuple[str, ...]  # entries whose policy does not exist here
    left_out: tuple[str, ...]  # entries of the full study that a quick one goes without

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(track.case for track in self.tracks))


def planned(
    setting: Setting,
    *,
    quick: bool = False,
    policies: Sequence[str] = (),
    workloads: Sequence[str] = (),
    seed: int = 0,
    requests: int | None = None,
) -> Study:
    """The study of a setting, with other policies or workloads where they are given; raises `StudyError`."""
    whole = setting
    if quick:
        setting = scaled_down(setting)
    if workloads:
        setting = replace(setting, workloads=tuple(dict.fromkeys(workloads)))
    named = scaled_entry if any(world.day for world in setting.worlds) else entry
    missing: list[str] = []
    if policies:
        entries = [named(label) for label in dict.fromkeys(policies)]
    else:
        entries, missing = known_entries(setting.entries, named)
    effort = Effort(
        quick=quick,
        resolution=RESOLUTION["quick" if quick else "full"],
        seeds=tuple(range(seed, seed + (1 if quick else FULL_SEEDS))),
        measures=setting.measures,
        loads=setting.loads,
        overload=setting.overload,
    )
    least = setting.least_requests[0 if quick else 1] if requests is None else requests
    if least < 1:
        raise StudyError(f"--requests: at least 1, not {least}")
    if seed < 0:
        raise StudyError(f"--seed: 0 or more, not {seed}")
    cases = [
        Case(fleet, workload, world, least_requests=least)
        for fleet in setting.fleets
        for workload in setting.workloads
        for world in setting.worlds
    ]
    for case in cases:
        case.optimal_rate  # noqa: B018 - what cannot be served at all is said now
    tracks = tuple(_track(case, each, effort) for case in cases for each in entries)
    left_out = () if policies else tuple(label for label in whole.entries if label not in setting.entries)
    return Study(setting, quick, seed, tracks, tuple(missing), left_out)


def _track(case: Case, each: Entry, effort: Effort) -> Track | DayTrack:
    if each.scaler is not None:
        return DayTrack(case, each, effort)
    # Baselines as the paper had them are there for the paper's own measure alone.
    if each.role == "untuned" and "G90" in effort.measures:
        effort = replace(effort, measures=("G90",), overload=False)
    return Track(case, each, effort, show=each.label == "polyserve")


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a study is."""

    runs: int  # that were made now
    kept: int  # of the file that were used again
    tracks: int
    ended: int
    last: Job | None = None
    running: tuple[Job, ...] = ()


def carry_out(
    study: Study,
    store: Store,
    jobs: int,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> list[Found | Bought]:
    """Make every run that is not in the store; what each track found, in order."""
    if jobs < 1:
        raise StudyError(f"--jobs: at least 1, not {jobs}")
    found: dict[int, Found | Bought] = {}
    before = set(store.runs)
    used: set[str] = set()

    def known(asked: Job) -> Record | None:
        record = store.runs.get(asked.key)
        if record is not None and asked.key in before:
            used.add(asked.key)
        return record

    def told(last: Job | None) -> Progress:
        return Progress(
            len(store.runs) - len(before), len(used), len(study.tracks), len(found), last, tuple(running.values())
        )

    running: dict[Future[Record], Job] = {}
    with workers(jobs) as pool:
        while True:
            for asked in _wanted(study.tracks, known, found):
                if len(running) >= jobs:
                    break
                if asked.key not in {job.key for job in running.values()}:
                    running[pool.submit(made, asked)] = asked
            if not running:
                break
            on_progress(told(None))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                asked = running.pop(future)
                store.add(future.result())
                on_progress(told(asked))
    on_progress(told(None))
    return [found[number] for number in range(len(study.tracks))]


def _wanted(
    tracks: Sequence[Track | DayTrack], known: Callable[[Job], Record | None], found: dict[int, Found | Bought]
) -> Iterator[Job]:
    """Runs that can be made now, track by track; notes what tracks at their end have found."""
    for number, track in enumerate(tracks):
        if number in found:
            continue
        shown, wanted = track.follow(known)
        if not wanted:
            found[number] = shown
        yield from wanted


@contextmanager
def workers(jobs: int) -> Iterator[Executor]:
    """So many processes that run what is submitted; for one, this very process. An error ends them at once."""
    if jobs == 1:
        yield Inline()
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context)
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: an interruption is the parent's to answer
    try:
        for _ in range(jobs):
            pool.submit(os.getpid)
    finally:
        signal.signal(signal.SIGINT, held)
    # Told to end, nobody else ends the workers, who would go on for minutes with runs that nobody waits for.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield pool
    except BrokenProcessPool:
        raise StudyError("a worker process died, perhaps for want of memory: try again with fewer --jobs") from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    pool.shutdown()


class Inline(Executor):
    """Runs what is submitted at once."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        future: Future[object] = Future()
        future.set_result(fn(*args, **kwargs))
        return future
