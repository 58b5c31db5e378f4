"""A track: from tuning to intervals, replayed from known runs."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from polyserve.study.ground import Case
from polyserve.study.run import Job
from polyserve.study.settings import Entry, entry, fleet
from polyserve.study.store import Record
from polyserve.study.track import OVERLOAD, TUNED_AT, Effort, Found, Track

CASE = Case(fleet("a100-llama-3-8b-mixed", 4), "uniform:2000/8")
QUICK = Effort(True, 0.02, (0,), ("G90", "G90t", "G99t"))
FULL = Effort(False, 0.01, (0, 1, 2, 3, 4), ("G90", "G90t", "G99t"))


def record(job: Job, overall: float, worst: float) -> Record:
    attainment = {"overall": overall, "worst_tier": worst, "tiers": {"20": worst, "100": overall}}
    return {"key": job.key, "load": job.load, "seed": job.seed, "result": {"attainment": attainment}}


def cliff(job: Job) -> Record:
    """Holds 90 % to 0.85, a little more for chunk 1024 and with the seed."""
    at = 0.85 + 0.004 * job.seed + (0.05 if job.chunk == 1024 else 0.0)
    return record(job, min(1.0, 0.92 - (job.load - at)), min(1.0, 0.90 - (job.load - at)))


def followed(track: Track, run: Callable[[Job], Record], at_once: int = 1) -> tuple[Found, list[Job]]:
    """Make wanted runs until the track is at its end."""
    known: dict[str, Record] = {}
    made: list[Job] = []
    while True:
        found, wanted = track.follow(lambda job: known.get(job.key))
        if not wanted:
            return found, made
        for job in wanted[-at_once:]:
            known[job.key] = run(job)
            made.append(job)


def test_a_quick_track_finds_goodput_with_one_seed() -> None:
    found, made = followed(Track(CASE, entry("polyserve"), QUICK), cliff)
    assert {name: by_seed[0].load for name, by_seed in found.crossings.items()} == {
        "G90": pytest.approx(0.87),
        "G90t": pytest.approx(0.85),
        "G99t": pytest.approx(0.76),
    }
    assert {job.seed for job in made} == {0}
    assert OVERLOAD in found.runs[0]
    assert len(made) == len({job.key for job in made}), "no run is made twice"


def test_a_baseline_is_tuned_first_and_searched_with_the_best() -> None:
    found, made = followed(Track(CASE, entry("minimal"), FULL), cliff)
    assert [choice.chunk for choice in found.tuned.tried] == [256, 512, 1024, 2048]
    assert found.tuned.choice.chunk == 1024
    assert {job.chunk for job in made[4:]} == {1024}
    assert {(job.load, job.seed) for job in made[:4]} == {(TUNED_AT, 0)}


def test_one_knob_is_tuned_at_the_best_of_the_one_before() -> None:
    def run(job: Job) -> Record:
        values = dict(job.values)
        good = (values.get("static_sizes", "") != "") + (values.get("balance") == "round-robin")
        return record(job, 0.5 + good / 10, 0.5 + good / 10)

    found, _ = followed(Track(CASE, entry("static"), QUICK), run)
    assert dict(found.tuned.choice.values)["balance"] == "round-robin"
    assert dict(found.tuned.choice.values)["static_sizes"] != ""


def test_every_seed_of_a_full_track_has_its_own_goodput() -> None:
    found, made = followed(Track(CASE, entry("polyserve"), FULL), cliff)
    for seed in range(5):
        assert found.crossings["G90t"][seed].load == pytest.approx(0.85 + 0.004 * seed, abs=0.001)
        assert OVERLOAD in found.runs[seed]
    first = [job for job in made if job.seed == 0]
    later = [job for job in made if job.seed == 4]
    assert len(later) < len(first)


@pytest.mark.parametrize("label", ["polyserve", "minimal", "static"])
def test_what_is_found_does_not_hang_on_the_order_or_on_other_runs(label: str) -> None:
    track = Track(CASE, entry(label), FULL)
    one, made = followed(track, cliff)
    all_at_once, _ = followed(track, cliff, at_once=99)
    stored = {job.key: cliff(job) for job in made}
    for step in range(30):  # a finer search left its runs here as well
        other = Job(CASE, "polyserve", 0.7 + 0.01 * step, 0)
        stored[other.key] = cliff(other)
    again, wanted = track.follow(lambda job: stored.get(job.key))
    assert wanted == []
    assert told(one) == told(all_at_once) == told(again)


def told(found: Found) -> str:
    return json.dumps(
        [str(found.tuned.choice), {k: {s: c.load for s, c in v.items()} for k, v in found.crossings.items()}]
    )


def test_a_sweep_runs_its_loads_and_nothing_else() -> None:
    sweep = Effort(True, 0.02, (0,), (), loads=(0.5, 1.0, 1.5))
    found, made = followed(Track(CASE, Entry("polyserve", "polyserve"), sweep), cliff)
    assert sorted(job.load for job in made) == [0.5, 1.0, 1.5]
    assert found.crossings == {}


def test_the_fleet_of_a_showcase_is_kept() -> None:
    found, made = followed(Track(CASE, entry("polyserve"), QUICK, show=True), cliff)
    assert found.shown is not None
    assert [job.load for job in made if job.show] == [0.8]


def test_two_seeds_loads_policies_chunks_or_settings_are_never_one_run() -> None:
    jobs = [
        Job(CASE, "polyserve", 0.9, 0),
        Job(CASE, "polyserve", 0.9, 1),
        Job(CASE, "polyserve", 0.8, 0),
        Job(CASE, "polyserve", 0.9, 0, 512),
        Job(CASE, "polyserve-paper", 0.9, 0),
        Job(CASE, "polyserve", 0.9, 0, None, (("promotion", "off"),)),
        Job(CASE, "polyserve", 0.9, 0, show=True),
        Job(Case(CASE.fleet, "uniform:2000/9"), "polyserve", 0.9, 0),
        Job(Case(fleet("a100-llama-3-8b", 4), CASE.workload), "polyserve", 0.9, 0),
    ]
    assert len({job.key for job in jobs}) == len(jobs)
    assert Job(CASE, "polyserve", 0.9, 0, None, (("promotion", "lazy"),)).key == jobs[0].key
