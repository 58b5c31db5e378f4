"""A fleet in virtual time: laws over generated workloads, fleets, policies and faults, and what the core may see."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyserve.core import baselines
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import POLICIES, policy
from polyserve.core.types import (
    Arrived,
    Cancel,
    ChunkRule,
    Dispatch,
    Drain,
    Failed,
    Finished,
    FirstToken,
    Instance,
    Joined,
    Lost,
    Progressed,
    Refuse,
    Request,
    Role,
    SetPace,
    Slo,
    Start,
    Stop,
    Tier,
)
from polyserve.journal import JournalWriter, Step, read_journal, replay
from polyserve.progress import REPORT_EVERY_S, ProgressCollector
from polyserve.sim.bank import Bank
from polyserve.sim.engine import Engine, Job
from polyserve.sim.sight import SIGHTS
from polyserve.sim.sight import report as read_report
from polyserve.sim.spec import Faults, Group, Run, SimulationSpec
from polyserve.sim.turns import FINISHED, T_KIND, T_SLOT
from polyserve.sim.world import simulate

PROFILE = Profile("small", (0, 64, 512), (0.004, 0.005, 0.02), 2e-5, 1e-6, 1e-8, Limits(4096, 16, 256))
TIERS = (Tier("10", 0.01, 0.3), Tier("30", 0.03, 0.3))


def spec(
    requests: list[tuple[Request, int]], instances: int = 2, name: str = "polyserve", **values: object
) -> SimulationSpec:
    return SimulationSpec(requests, TIERS, policy(name, values), PROFILE, instances, samples=10)


def steady(
    count: int, every_s: float = 0.02, prompt: int = 60, output: int = 20, tpot_s: float = 0.03
) -> list[tuple[Request, int]]:
    """One request after the other, all alike."""
    return [(Request(f"r{n}", n * every_s, prompt, Slo(0.3, tpot_s)), output) for n in range(count)]


def journalled(what: SimulationSpec) -> tuple[Run, list[Step], bytes]:
    """The run, its steps as a journal tells them, and the journal itself."""
    file = BytesIO()
    run = simulate(what, JournalWriter(file))
    path = Path(PATHS[0]) / "journal.jsonl"
    path.write_bytes(file.getvalue())
    return run, list(read_journal(path)), file.getvalue()


PATHS: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    PATHS.append(str(tmp_path_factory.mktemp("journals")))


# --------------------------------------------------------------------------------------------------- laws


@st.composite
def worlds(draw: st.DrawFn) -> SimulationSpec:
    """A busy little fleet in which anything may go wrong."""
    gaps = draw(st.lists(st.integers(0, 60), min_size=1, max_size=25))
    slos = st.none() | st.builds(Slo, st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([0.005, 0.01, 0.02, 0.03]))
    requests, at = [], 0
    for n, gap in enumerate(gaps):
        at += gap
        prompt, output = draw(st.integers(1, 700)), draw(st.integers(1, 60))
        asked = draw(st.none() | st.just(output + 5))
        requests.append((Request(f"r{n}", at / 1000, prompt, draw(slos), asked), output))
    instances = draw(st.integers(1, 4))
    leaving = draw(st.dictionaries(st.sampled_from([r.id for r, _ in requests]), st.integers(0, 500).map(float)))
    lost = draw(st.lists(st.tuples(st.integers(0, 1500), st.sampled_from(["i0", "i1", "i3"])), max_size=2))
    values: dict[str, object] = {}
    if draw(st.booleans()):
        values |= {"max_instances": 4, "min_instances": draw(st.integers(0, 1)), "keep_warm_s": 0.2, "look_s": 0.1}
    chunk = draw(st.sampled_from([ChunkRule(), ChunkRule("fixed", 128), ChunkRule("unknown")]))
    sight: Literal["gateway", "perfect"] = draw(st.sampled_from(["gateway", "perfect"]))
    return SimulationSpec(
        requests=requests,
        tiers=TIERS,
        settings=policy(draw(st.sampled_from(sorted(POLICIES))), values),
        profile=PROFILE.slowed(draw(st.sampled_from([1.0, 1.2]))),
        believed=PROFILE,
        instances=instances,
        chunk=chunk,
        order=draw(st.sampled_from(["deadline", "fcfs"])),
        seed=draw(st.integers(0, 9)),
        jitter=draw(st.sampled_from([0.0, 0.1])),
        sight=sight,
        lag_s=draw(st.sampled_from([0.0, 0.003])),
        network_s=draw(st.sampled_from([0.0, 0.002])),
        start_up_s=draw(st.sampled_from([0.0, 0.25])),
        faults=Faults(
            losses=tuple(sorted((at / 1000, instance) for at, instance in lost)),
            leaving={request: ms / 1000 for request, ms in leaving.items()},
            failing_starts=draw(st.sampled_from([0.0, 0.5])),
        ),
        drain_s=20.0,
        samples=5,
    )


@settings(max_examples=60)
@given(worlds())
def test_every_request_is_answered_exactly_once_whatever_breaks(what: SimulationSpec) -> None:
    run, steps, _ = journalled(what)
    assert [o.request for o in run.outcomes] == [r.id for r, _ in what.requests]
    answers = Counter[str]()
    for step in steps:
        answers.update(a.request for a in step.actions if isinstance(a, Refuse))
        if isinstance(step.event, Finished):
            answers[step.event.request] += 1
    wanted = {r.id: output for r, output in what.requests}
    for outcome in run.outcomes:
        assert outcome.ending in ("finished", "refused", "cancelled", "unfinished")
        if outcome.ending == "finished":
            assert outcome.output_tokens == wanted[outcome.request]
        if outcome.ending == "refused":
            assert outcome.code is not None
            assert answers[outcome.request] == 1
        assert answers[outcome.request] <= 1


@settings(max_examples=60)
@given(worlds())
def test_causes_come_before_effects(what: SimulationSpec) -> None:
    run, steps, _ = journalled(what)
    dispatched: dict[str, float] = {}
    for step in steps:
        assert step.event.at <= step.now
        for action in step.actions:
            if isinstance(action, Dispatch):
                dispatched.setdefault(action.request, step.now)
    for outcome in run.outcomes:
        if outcome.first_at is None:
            assert outcome.output_tokens == 0
            continue
        sent_at = dispatched[outcome.request]
        assert outcome.arrived_at <= sent_at <= sent_at + what.network_s <= outcome.first_at
        if outcome.last_at is not None:
            assert outcome.first_at <= outcome.last_at


@settings(max_examples=40)
@given(worlds(), st.sampled_from(["round-robin", "least-requests", "power-of-two"]))
def test_what_nobody_listens_to_changes_nothing(what: SimulationSpec, name: str) -> None:
    """Policies without use for reports get none, and hear of the rest when engines have gone on: all is as before."""
    what = replace(what, settings=policy(name), faults=replace(what.faults, losses=()))
    run, steps, _ = journalled(what)
    assert not any(isinstance(s.event, Progressed) for s in steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines.OnePool, "wants_progress", True)
        told, all_steps, _ = journalled(what)
    assert [s for s in all_steps if not isinstance(s.event, Progressed)] == steps
    assert told.outcomes == run.outcomes
    assert (told.looks, told.lives, told.iterations, told.ended_at) == (
        run.looks,
        run.lives,
        run.iterations,
        run.ended_at,
    )


@settings(max_examples=25)
@given(worlds())
def test_the_same_spec_gives_the_same_journal_and_a_replay_the_same_decisions(what: SimulationSpec) -> None:
    _, _, once = journalled(what)
    _, _, again = journalled(what)
    assert once == again
    path = Path(PATHS[0]) / "once.jsonl"
    path.write_bytes(once)
    assert replay(path).mismatch is None


def test_another_seed_gives_another_journal_where_there_is_chance() -> None:
    one = replace(spec(steady(30), name="random"), seed=1)
    assert journalled(one)[2] != journalled(replace(one, seed=2))[2]


# --------------------------------------------------------------------------------------------- what happens to whom


def test_an_idle_fleet_serves_a_request_as_fast_as_its_profile_says() -> None:
    (outcome,) = simulate(spec(steady(1, prompt=60, output=3))).outcomes
    first = PROFILE.iteration_s(60, 0, 0, 60 * 30)
    assert outcome.first_at == pytest.approx(first, abs=1e-6)
    last = first + PROFILE.iteration_s(0, 1, 61) + PROFILE.iteration_s(0, 1, 62)
    assert outcome.last_at == pytest.approx(last, abs=3e-6)
    assert outcome.late_s == pytest.approx(max(first - 0.3, last - 0.3 - 0.06), abs=3e-6)
    assert outcome.attained


def test_a_dispatch_takes_the_network_and_sight_its_lag() -> None:
    what = replace(spec(steady(1, output=3)), network_s=0.004, lag_s=0.007)
    run, steps, _ = journalled(what)
    (outcome,) = run.outcomes
    assert outcome.first_at == pytest.approx(0.004 + PROFILE.iteration_s(60, 0, 0, 60 * 30), abs=1e-6)
    (seen,) = [s for s in steps if isinstance(s.event, FirstToken)]
    assert seen.event.at == outcome.first_at
    assert seen.now == pytest.approx(seen.event.at + 0.007, abs=1e-6)


def test_a_lost_instance_takes_nobody_with_it() -> None:
    what = replace(spec(steady(12), instances=2, on_late="serve_late"), faults=Faults(losses=((0.15, "i0"),)))
    run, steps, _ = journalled(what)
    (loss,) = [n for n, s in enumerate(steps) if isinstance(s.event, Lost)]
    moved = {a.request for s in steps[loss:] for a in s.actions if isinstance(a, Dispatch)}
    before = {a.request for s in steps[:loss] for a in s.actions if isinstance(a, Dispatch)}
    assert moved & before, "nobody was on the lost instance: the test shows nothing"
    assert [(o.ending, o.output_tokens) for o in run.outcomes] == [("finished", 20)] * 12


def test_tokens_a_client_has_got_from_a_lost_instance_are_not_made_again() -> None:
    what = replace(spec(steady(1, output=40), on_late="serve_late"), faults=Faults(losses=((0.1, "i0"), (0.1, "i1"))))
    what = replace(what, instances=3)
    run, steps, _ = journalled(what)
    (outcome,) = run.outcomes
    assert outcome.ending == "finished"
    assert outcome.output_tokens == 40
    first = next(s for s in steps if isinstance(s.event, FirstToken))
    assert outcome.first_at == first.event.at, "the first token is the one from before the loss"


def test_a_client_that_leaves_frees_its_engine() -> None:
    what = replace(spec(steady(2, output=2000), instances=1), faults=Faults(leaving={"r0": 0.1, "r1": 0.1}))
    run, steps, _ = journalled(what)
    assert [o.ending for o in run.outcomes] == ["cancelled", "cancelled"]
    assert all(0 < o.output_tokens < 2000 for o in run.outcomes)
    assert sum(isinstance(a, Cancel) for s in steps for a in s.actions) == 2
    assert run.iterations < 100, "the engine went on for nobody"


def test_what_does_not_end_in_time_is_unfinished() -> None:
    what = replace(spec(steady(1, output=3000), instances=1), drain_s=1.0)
    run = simulate(what)
    assert [o.ending for o in run.outcomes] == ["unfinished"]
    assert 0 < run.outcomes[0].output_tokens < 3000
    assert run.ended_at <= 1.0


def test_no_requests_make_an_empty_run() -> None:
    run = simulate(spec([]))
    assert (run.outcomes, run.ended_at) == ([], 0.0)


# --------------------------------------------------------------------------------------------------- the fleet


def burst(seconds: float, rate: float, then_quiet_s: float) -> list[tuple[Request, int]]:
    """Load, then a trickle that keeps the clock running."""
    requests = steady(int(seconds * rate), every_s=1 / rate)
    quiet = [(Request(f"q{n}", seconds + n * 0.5, 30, Slo(0.3, 0.03)), 3) for n in range(1, int(then_quiet_s / 0.5))]
    return requests + quiet


def elastic(start_up_s: float = 0.2) -> SimulationSpec:
    what = spec(burst(3.0, 120, 6.0), 1, max_instances=4, keep_warm_s=0.5, look_s=0.2, start_up_s=start_up_s)
    return replace(what, start_up_s=start_up_s)


def test_an_elastic_fleet_grows_under_load_and_gives_back_afterwards() -> None:
    run, steps, _ = journalled(elastic())
    actions = [a for s in steps for a in s.actions]
    assert any(isinstance(a, Start) for a in actions)
    assert any(isinstance(a, Stop) for a in actions)
    together = max(
        sum(life.joined_at <= at < (life.gone_at or math.inf) for life in run.lives)
        for at in [life.joined_at for life in run.lives]
    )
    assert 1 < together <= 4
    assert run.instance_seconds(0.0, run.ended_at) < 4 * run.ended_at


def test_draining_ends_no_stream() -> None:
    run, steps, _ = journalled(elastic())
    drained = [a.instance for s in steps for a in s.actions if isinstance(a, Drain)]
    assert drained
    served = {o.instance for o in run.outcomes if o.ending == "finished"}
    assert set(drained) & served
    assert all(o.ending in ("finished", "refused") for o in run.outcomes)


def test_starts_that_fail_are_told_and_cost_until_they_do() -> None:
    run, steps, _ = journalled(replace(elastic(start_up_s=0.3), faults=Faults(failing_starts=1.0)))
    failed = [s.event.instance for s in steps if isinstance(s.event, Failed)]
    assert failed
    lives = {life.instance: life for life in run.lives}
    for instance in failed:
        life = lives[instance]
        assert life.gone_at is not None
        assert life.gone_at - life.joined_at == pytest.approx(0.3)


def test_instance_seconds_are_those_between_joining_and_going() -> None:
    what = replace(spec(steady(50), instances=3), faults=Faults(losses=((0.4, "i2"),)))
    run = simulate(what)
    assert run.instance_seconds(0.0, 1.0) == pytest.approx(2 * 1.0 + 0.4)
    assert run.instance_seconds(0.2, 0.3) == pytest.approx(0.3)
    assert run.instance_seconds(0.5, 0.9) == pytest.approx(0.8)


def test_looks_show_labels_and_loads() -> None:
    run = simulate(spec(steady(100, every_s=0.01), instances=2))
    assert {look.instance for look in run.looks} == {"i0", "i1"}
    assert {look.tier for look in run.looks} & {"10", "30"}
    assert any(0 < look.load <= 1 for look in run.looks)
    assert {instance for _, instance, _ in run.labels} <= {"i0", "i1"}


def test_a_mixed_fleet_has_each_group_with_its_own_profile_and_rule() -> None:
    fast = replace(PROFILE, name="fast", knot_s=(0.002, 0.0025, 0.01))
    others = (Group(fast, 2, chunk=ChunkRule("fixed", 64), order="fcfs"), Group(PROFILE, 1, role=Role.DECODE))
    what = replace(spec(steady(90), instances=1, name="round-robin"), others=others)
    run, steps, _ = journalled(what)
    joined = [s.event.instance for s in steps if isinstance(s.event, Joined)]
    assert joined == [
        Instance("i0", "small"),
        Instance("i1", "fast", ChunkRule("fixed", 64), "fcfs"),
        Instance("i2", "fast", ChunkRule("fixed", 64), "fcfs"),
        Instance("i3", "small", role=Role.DECODE),
    ]
    tpots: dict[str, list[float]] = {}
    for outcome in run.outcomes:
        assert outcome.instance is not None
        assert outcome.tpot_s is not None
        tpots.setdefault(outcome.instance, []).append(outcome.tpot_s)
    assert max(tpots["i1"]) < min(tpots["i0"]), "each runs by its own profile"


def test_profiles_of_one_name_are_the_same() -> None:
    what = replace(spec(steady(1)), others=(Group(replace(PROFILE, knot_s=(0.002, 0.0025, 0.01)), 1),))
    with pytest.raises(AssertionError, match="same name"):
        simulate(what)


# ------------------------------------------------------------------------------------------------- what is seen


def reports(what: SimulationSpec) -> list[Progressed]:
    return [s.event for s in journalled(what)[1] if isinstance(s.event, Progressed)]


def test_a_gateway_sees_no_prompts_no_memory_and_every_instance_at_most_every_50_ms() -> None:
    seen = reports(spec(steady(60)))
    assert seen
    for report in seen:
        assert (report.prefilling, report.kv_tokens) == ({}, None)
        if report.iteration is not None:
            assert report.iteration.inferred
            assert (report.iteration.prefill_tokens, report.iteration.kv_tokens) == (None, None)
    for instance in ("i0", "i1"):
        times = [r.at for r in seen if r.instance == instance]
        assert all(b - a >= REPORT_EVERY_S for a, b in pairwise(times))


def test_perfect_sight_sees_every_iteration_prompts_included() -> None:
    what = replace(spec(steady(60, prompt=300)), sight="perfect")
    seen = reports(what)
    assert len(seen) == simulate(what).iterations
    assert any(r.prefilling for r in seen)
    assert all(r.iteration is not None and not r.iteration.inferred and r.kv_tokens is not None for r in seen)


jobs = st.builds(
    lambda n, prompt, output: Job(f"r{n}", prompt, output, Slo(0.3, 0.03), 0.0),
    st.integers(0, 10**9),
    st.integers(1, 300),
    st.integers(1, 30),
)


@given(st.lists(st.tuples(st.integers(0, 10), jobs), min_size=1, max_size=12, unique_by=lambda j: j[1].id))
def test_a_gateway_sees_what_the_live_gateway_would_gather_from_the_same_streams(
    planned: list[tuple[int, Job]],
) -> None:
    bank = Bank()
    alone = Engine(Instance("i0", "small"), PROFILE, PROFILE, settings=policy("polyserve"))
    engine = Engine(alone.instance, PROFILE, PROFILE, settings=policy("polyserve"), bank=bank)
    collector = ProgressCollector("i0")
    waiting, now, iterations = sorted(planned, key=lambda p: p[0]), 0.0, 0

    def submit(job: Job) -> None:
        for one in (alone, engine):
            one.submit(now, job)
        bank.wake(engine.row)

    while waiting or engine.residents:
        if not engine.residents:
            submit(waiting.pop(0)[1])
        end = alone.begin(now)
        assert end is not None
        bank.advance(now, now, inclusive=False, wake=True, quiet_until=now, sight=SIGHTS["gateway"])
        while waiting and waiting[0][0] <= iterations:  # in the middle of the iteration
            submit(waiting.pop(0)[1])
        told = bank.advance(now, end, inclusive=True, wake=False, quiet_until=-math.inf, sight=SIGHTS["gateway"])
        now = end
        result = alone.end(now)
        iterations += 1
        collector.tokens(now, [r for r in result.tokens if r not in result.first], result.first)
        for done in result.finished:
            collector.drop(done.id)
        gathered = collector.report(now) if result.tokens else None
        assert (read_report(bank, engine, SIGHTS["gateway"]) if bank.reported >= 0 else None) == gathered
        for line in told:
            if line[T_KIND] == FINISHED:
                engine.forget(int(line[T_SLOT]))


def test_engines_are_told_the_pace_of_their_tier() -> None:
    _, steps, _ = journalled(spec(steady(5, tpot_s=0.01)))
    paces = {a.pace_s for s in steps for a in s.actions if isinstance(a, SetPace)}
    assert 0.01 in paces


def test_the_core_hears_of_arrivals_when_they_arrive() -> None:
    _, steps, _ = journalled(spec(steady(5)))
    arrivals = [s for s in steps if isinstance(s.event, Arrived)]
    assert [s.now for s in arrivals] == [s.event.at for s in arrivals] == [n * 0.02 for n in range(5)]
