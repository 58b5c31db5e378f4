"""A day's track: the cheapest value of its knob with which every tier is in time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.study.day import PEAK_LOAD, TARGETS, Bought, DayTrack, outcome
from polyserve.study.ground import DAY_PIECES, Case, day_of
from polyserve.study.run import Job
from polyserve.study.search import cheapest
from polyserve.study.settings import StudyError, World, fleet, scaled_entry
from polyserve.study.store import Record
from polyserve.study.track import Effort

CASE = Case(fleet("a100-llama-3-8b-mixed", 6), "uniform:2000/8", World(day="small", start_up_s=30.0))
QUICK = Effort(True, 0.02, (0,), ())


def record(job: Job, worst: float, cost: float) -> Record:
    attainment = {"overall": worst, "worst_tier": worst}
    return {"key": job.key, "result": {"attainment": attainment, "cost_per_attained_s": cost}}


def followed(label: str, needs: float) -> tuple[Bought, list[Job]]:
    """A fleet that holds with so many instances, or with so few requests on each."""

    def run(job: Job) -> Record:
        target = dict(job.values).get("target_requests")
        size = job.instances or job.case.fleet.instances
        able = size >= needs if target is None else float(str(target)) <= needs
        return record(job, 0.995 if able else 0.9, 1.0)

    known: dict[str, Record] = {}
    made: list[Job] = []
    track = DayTrack(CASE, scaled_entry(label), QUICK)
    while True:
        found, wanted = track.follow(lambda job: known.get(job.key))
        if not wanted:
            return found, made
        for job in wanted:
            known[job.key] = run(job)
            made.append(job)


@pytest.mark.parametrize("needs", [1, 5, 6, 7, 12])
def test_the_smallest_fixed_fleet_that_holds_is_found(needs: int) -> None:
    found, made = followed("polyserve, static fleet", needs)
    assert found.cheapest is not None
    assert found.knob.values[found.cheapest] == needs
    assert all(job.case.world.start_up_s == 0 for job in made), "nobody starts in a fixed fleet"
    assert all("max_instances" not in dict(job.values) for job in made)


def test_a_fleet_that_never_holds_says_so_and_shows_its_best() -> None:
    found, _ = followed("polyserve, static fleet", 13)
    assert found.cheapest is None
    counted = outcome(found)
    assert counted is not None


@pytest.mark.parametrize("needs", [3.0, 30.0, 300.0])
def test_a_queue_scaler_is_tuned_to_as_many_requests_per_instance_as_hold(needs: float) -> None:
    found, made = followed("minimal + queue scaler", needs)
    assert found.cheapest is not None
    assert TARGETS[found.cheapest] <= needs < TARGETS[found.cheapest - 1]
    tuning = [job for job in made if not job.case.world.day]
    assert len(tuning) == len(found.tuned.tried) == 2
    for job in made[len(tuning) :]:
        assert dict(job.values)["autoscaler"] == "queue"
        assert dict(job.values)["max_instances"] == 12


@given(st.integers(1, 40), st.data())
def test_the_cheapest_of_options_that_rise_is_found(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    true = data.draw(st.integers(0, count))
    holds: dict[int, bool] = {}
    while True:
        answer, following = cheapest(holds, count, first)
        if following is None:
            break
        assert following not in holds
        holds[following] = following >= true
    assert answer == (true if true < count else None)
    assert len(holds) <= 14


def test_a_day_keeps_its_mean_and_its_shape() -> None:
    day = day_of("small")
    assert len(day) == DAY_PIECES
    assert sum(day) / len(day) == pytest.approx(1.0)
    assert max(day) / min(day) == pytest.approx(1833.63 / 391.27, rel=1e-3)


def test_the_busiest_ten_minutes_fill_the_fleet_as_far_as_said() -> None:
    track = DayTrack(CASE, scaled_entry("polyserve"), QUICK)
    job = Job(CASE, "polyserve", track.load, 0)
    per_day = (
        job.rate * (CASE.warm_up_s + CASE.window_s) / sum(CASE.curve) * max(CASE.curve) / (CASE.window_s / DAY_PIECES)
    )
    assert per_day == pytest.approx(PEAK_LOAD * CASE.optimal_rate, rel=1e-3)
    assert job.command is None, "`polyserve simulate` knows no days"


def test_every_way_of_scaling_has_its_label() -> None:
    assert scaled_entry("polyserve").scaler == "own"
    assert scaled_entry("minimal@512 + queue scaler").chunk == 512
    assert scaled_entry("minimal, static fleet").scaler == "static"
    with pytest.raises(StudyError, match="unknown policy 'magic'"):
        scaled_entry("magic + queue scaler")
