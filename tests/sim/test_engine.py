"""The simulated engine: its laws over generated workloads, and its compiled loops against their plain twin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_engine import PlainEngine

from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import ChunkRule, Instance, Slo, to_microsecond
from polyserve.sim.engine import Done, Engine, IterationResult, Job

MICROSECOND = 1.000001e-6  # what rounding to whole microseconds may cost, and float's own


def profile(kv_tokens: int = 4096, seqs: int = 16, tokens: int = 256, block: int = 16) -> Profile:
    return Profile(
        name="small",
        knots=(0, 64, 512),
        knot_s=(0.004, 0.005, 0.02),
        per_decode_s=2e-5,
        per_kv_token_s=1e-6,
        per_attention_s=1e-8,
        limits=Limits(kv_tokens, seqs, tokens, block),
        mixed_kv_factor=1.7,
        mixed_per_decode_s=1e-5,
    )


def engine(instance: Instance | None = None, true: Profile | None = None, **policy: object) -> Engine:
    true = true or profile()
    return Engine(instance or Instance("i", "small"), true, true, settings=Settings().replaced(policy))


@dataclass(frozen=True)
class Workload:
    """Jobs as they arrive, and who is cancelled when: everything an engine may be asked."""

    jobs: tuple[Job, ...]
    cancels: tuple[tuple[float, str], ...] = ()
    pace_s: float = math.inf


milliseconds = st.integers(1, 300).map(lambda ms: ms / 1000)
paces = st.sampled_from([0.0045, 0.0055, 0.01, 0.03])  # an iteration takes 4 ms at least
slos = st.none() | st.builds(Slo, st.sampled_from([0.006, 0.012, 0.03, 0.3]), paces)


@st.composite
def workloads(draw: st.DrawFn, prompt: int = 300, output: int = 30, cancels: bool = True) -> Workload:
    jobs = []
    for n in range(draw(st.integers(1, 14))):
        made = draw(st.integers(1, output))
        resumed = draw(st.integers(0, made - 1)) if draw(st.booleans()) else 0
        at = draw(st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.1]))
        brings = resumed > 0 and draw(st.booleans())
        jobs.append(Job(f"r{n}", draw(st.integers(1, prompt)), made, draw(slos), at, resumed, brings))
    gone = st.tuples(milliseconds, st.sampled_from([job.id for job in jobs]))
    ends = draw(st.lists(gone, max_size=3)) if cancels else []
    return Workload(tuple(sorted(jobs, key=lambda j: j.arrived_at)), tuple(sorted(ends)), draw(paces))


@st.composite
def pressed(draw: st.DrawFn) -> Workload:
    """Residents without much slack, and long prompts that are due soon: nothing fits, and chunks are forced."""
    tight = Slo(0.006, 0.0045)
    jobs = [Job(f"d{n}", draw(st.integers(1, 40)), 60, tight, 0.0) for n in range(draw(st.integers(1, 6)))]
    for n in range(draw(st.integers(1, 4))):
        slo = draw(st.none() | st.builds(Slo, st.sampled_from([0.006, 0.012, 0.03]), paces))
        at = draw(st.sampled_from([0.02, 0.03, 0.05]))
        jobs.append(Job(f"p{n}", draw(st.integers(65, 300)), draw(st.integers(1, 9)), slo, at))
    return Workload(tuple(sorted(jobs, key=lambda j: j.arrived_at)), (), draw(paces))


@st.composite
def machines(draw: st.DrawFn) -> tuple[Instance, Profile, Settings]:
    """Engines of every rule; some so short of memory that residents throw each other out."""
    chunk = draw(st.sampled_from([ChunkRule(), ChunkRule("fixed", 32), ChunkRule("fixed", 100), ChunkRule("unknown")]))
    order: Literal["deadline", "fcfs"] = draw(st.sampled_from(["deadline", "fcfs"]))
    kv = draw(st.sampled_from([336, 500, 4096]))
    true = profile(kv, draw(st.sampled_from([1, 3, 16])), block=draw(st.sampled_from([1, 4, 16])))
    policy: dict[str, object] = {
        "chunk_bound": draw(st.sampled_from(["pace", "slack", "need"])),
        "chunk_floor_tokens": draw(st.sampled_from([1, 16, 64])),
        "relegate": draw(st.booleans()),
    }
    return Instance("i", "small", chunk, order), true, Settings().replaced(policy)


@dataclass
class Step:
    began_at: float
    ended_at: float
    forced: bool
    due_before: dict[str, float]
    result: IterationResult
    tokens: list[str]


def run(subject: Engine, load: Workload, check: bool = True) -> list[Step]:
    """Feed a workload to an engine in virtual time until all is done."""
    inputs: list[tuple[float, int, Job | str]] = sorted(
        [(job.arrived_at, 0, job) for job in load.jobs] + [(at, 1, id) for at, id in load.cancels],
        key=lambda entry: entry[:2],
    )
    subject.set_pace(load.pace_s)
    steps: list[Step] = []
    now = 0.0
    while inputs or subject.residents:
        forced = subject.forced_chunks
        while (inputs and not subject.residents) or (inputs and inputs[0][0] <= now):
            now = max(now, inputs[0][0])
            feed(subject, now, inputs.pop(0)[2])
        ends_at = subject.begin(now)
        if ends_at is None:
            continue
        due = subject_dues(subject, load)
        while inputs and inputs[0][0] < ends_at:
            feed(subject, inputs[0][0], inputs.pop(0)[2])
        result = subject.end(ends_at)
        steps.append(Step(now, ends_at, subject.forced_chunks > forced, due, result, result.tokens))
        assert 0 <= subject.kv_tokens <= subject.kv_allocated <= subject.kv_capacity
        now = ends_at
        assert len(steps) < 20_000, "an engine that never comes to an end"
    return steps


def feed(subject: Engine, at: float, entry: Job | str) -> None:
    if isinstance(entry, Job):
        subject.submit(at, entry)
    else:
        subject.cancel(at, entry)


def subject_dues(subject: Engine, load: Workload) -> dict[str, float]:
    """When the next token of each decode is due."""
    slo = {job.id: job for job in load.jobs if job.slo}
    return {
        id: job.slo.due_at(job.arrived_at, count)
        for id, count in subject.token_counts().items()
        if (job := slo.get(id)) and job.slo
    }


@given(machines(), workloads())
def test_every_job_finishes_exactly_once_with_exactly_its_tokens(
    machine: tuple[Instance, Profile, Settings], load: Workload
) -> None:
    instance, true, policy = machine
    subject = Engine(instance, true, true, settings=policy)
    steps = run(subject, load)
    made: dict[str, int] = {}
    for step in steps:
        for id in step.tokens:
            made[id] = made.get(id, 0) + 1
    done = {d.id: d for step in steps for d in step.result.finished}
    assert sum(len(step.result.finished) for step in steps) == len(done)
    cancelled = {id for _, id in load.cancels}
    for job in load.jobs:
        if job.id in done:
            assert done[job.id].output_tokens == job.output_tokens
            assert made[job.id] == job.output_tokens - job.resume_from
        else:
            assert job.id in cancelled
    assert (subject.kv_allocated, subject.kv_tokens, subject.residents, subject.waiting) == (0, 0, 0, 0)


@given(machines(), workloads())
def test_an_iteration_takes_every_decode_once_and_no_more_than_the_engine_allows(
    machine: tuple[Instance, Profile, Settings], load: Workload
) -> None:
    instance, true, policy = machine
    subject = Engine(instance, true, true, settings=policy)
    for step in run(subject, load):
        shape = step.result.iteration
        assert shape.prefill_tokens is not None
        assert shape.decodes is not None
        assert len(set(step.tokens)) == len(step.tokens)
        assert shape.decodes <= subject.max_num_seqs
        limit = instance.chunk.tokens if instance.chunk.kind == "fixed" else true.limits.max_num_batched_tokens
        assert 0 < shape.prefill_tokens + shape.decodes <= limit
        assert step.ended_at > step.began_at


@given(machines(), workloads())
def test_nothing_happens_before_its_cause(machine: tuple[Instance, Profile, Settings], load: Workload) -> None:
    instance, true, policy = machine
    arrived = {job.id: job.arrived_at for job in load.jobs}
    first: dict[str, float] = {}
    for step in run(Engine(instance, true, true, settings=policy), load):
        for id in step.result.first:
            assert step.began_at >= arrived[id]
            assert first.setdefault(id, step.ended_at) == step.ended_at
        for done in step.result.finished:
            began_at = first.get(done.id, done.first_token_at)
            assert arrived[done.id] < done.first_token_at == began_at <= done.last_token_at == step.ended_at


@settings(max_examples=150)
@given(machines(), workloads() | pressed())
def test_the_compiled_engine_does_what_its_plain_twin_does(
    machine: tuple[Instance, Profile, Settings], load: Workload
) -> None:
    instance, true, policy = machine
    fast, plain = Engine(instance, true, true, settings=policy), PlainEngine(instance, true, policy)
    fast.set_pace(load.pace_s)
    plain.pace_s = load.pace_s
    jobs, cancels, now = list(load.jobs), list(load.cancels), 0.0
    while jobs or fast.residents:
        if not fast.residents:
            now = max(now, jobs[0].arrived_at)
        while jobs and jobs[0].arrived_at <= now:
            fast.submit(now, jobs[0])
            plain.submit(jobs.pop(0))
        ends_at = fast.begin(now)
        assert plain.begin(now) == ends_at
        assert ends_at is not None
        while cancels and cancels[0][0] < ends_at:  # in the middle of the iteration
            fast.cancel(now, cancels[0][1])
            plain.cancel(cancels.pop(0)[1])
        result, expected = fast.end(ends_at), plain.end(ends_at)
        shape = result.iteration
        assert (shape.prefill_tokens, shape.decodes, shape.kv_tokens) == expected.shape
        assert result.tokens == expected.tokens
        assert result.first == expected.first
        assert result.finished == expected.finished
        assert result.preempted == expected.preempted
        now = ends_at
    assert fast.forced_chunks == plain.forced_chunks


@given(machines(), workloads(), st.integers(0, 3))
def test_the_same_seed_gives_the_same_run(
    machine: tuple[Instance, Profile, Settings], load: Workload, seed: int
) -> None:
    instance, true, policy = machine

    def once() -> list[tuple[float, list[str], list[Done]]]:
        subject = Engine(instance, true, true, settings=policy, noise=Random(seed), jitter=0.1)
        return [(s.ended_at, s.tokens, s.result.finished) for s in run(subject, load)]

    assert once() == once()


@settings(max_examples=150)
@given(
    workloads(cancels=False) | pressed(),
    st.sampled_from(["pace", "slack", "need"]),
    st.sampled_from([1, 16, 64]),
)
def test_a_chunk_makes_no_resident_late_who_would_be_on_time_without_it(load: Workload, bound: str, floor: int) -> None:
    true = profile(kv_tokens=8192)
    subject = engine(true=true, chunk_bound=bound, chunk_floor_tokens=floor)
    for step in run(subject, load):
        shape = step.result.iteration
        if step.forced or not shape.prefill_tokens or not shape.decodes or not shape.kv_tokens:
            continue
        alone_at = step.began_at + true.iteration_s(0, shape.decodes, shape.kv_tokens)
        for id in step.tokens[: shape.decodes]:
            due_at = step.due_before.get(id, math.inf)
            assert step.ended_at <= due_at + MICROSECOND or alone_at > due_at, f"{id} is late by {step}"


def test_lateness_is_that_of_the_worst_token() -> None:
    subject = engine()
    slo = Slo(0.1, 0.001)  # no iteration is that short
    subject.submit(0.0, Job("a", 10, 5, slo, 0.0))
    ends, done = [], []
    now = 0.0
    while (at := subject.begin(now)) is not None:
        now = at
        ends.append(at)
        done += subject.end(at).finished
    worst = max(end - slo.due_at(0.0, i) for i, end in enumerate(ends))
    assert done == [Done("a", 5, worst, ends[0], ends[-1])]


def test_a_one_token_answer_ends_with_its_prefill() -> None:
    subject = engine()
    subject.submit(0.0, Job("a", 20, 1, None, 0.0))
    at = subject.begin(0.0)
    assert at == to_microsecond(profile().iteration_s(20, 0, 0, 200))
    result = subject.end(at)
    assert result.tokens == result.first == ["a"]
    assert [d.id for d in result.finished] == ["a"]
    assert subject.begin(at) is None


def test_tokens_delivered_elsewhere_are_computed_like_a_prompt_and_not_made_again() -> None:
    subject = engine()
    subject.submit(0.0, Job("a", 20, 7, None, 0.0, resume_from=5))
    assert subject.prefilling() == {"a": 25}
    at = subject.begin(0.0)
    assert at is not None
    assert subject.end(at).tokens == ["a"]
    assert subject.token_counts() == {"a": 6}
    at = subject.begin(at)
    assert at is not None
    assert [d.output_tokens for d in subject.end(at).finished] == [7]


def test_a_request_that_brings_its_kv_decodes_at_once_and_has_no_first_token_here() -> None:
    subject = engine()
    subject.submit(0.0, Job("a", 20, 3, None, 0.0, resume_from=1, brings_kv=True))
    assert subject.prefilling() == {}
    at = subject.begin(0.0)
    assert at == to_microsecond(profile().iteration_s(0, 1, 21))
    result = subject.end(at)
    assert (result.tokens, result.first, result.decodes) == (["a"], [], 1)
    assert (subject.kv_tokens, subject.kv_allocated) == (21, 32)
    second_at = subject.begin(at)
    assert second_at is not None
    assert subject.end(second_at).finished == [Done("a", 3, -math.inf, at, second_at)]
    assert (subject.kv_tokens, subject.kv_allocated) == (0, 0)


def test_a_request_that_brings_its_kv_waits_for_its_blocks_behind_whoever_came_before() -> None:
    subject = engine(Instance("i", "small", order="fcfs", kv_tokens=96))
    subject.submit(0.0, Job("holds", 60, 6, None, 0.0))
    at = subject.begin(0.0)
    assert at is not None
    subject.end(at)
    subject.submit(at, Job("prompt", 40, 2, None, 0.0))
    subject.submit(at, Job("brings", 20, 3, None, 0.0, resume_from=1, brings_kv=True))
    assert subject.prefilling() == {"prompt": 40}
    ends = []
    while (end := subject.begin(at)) is not None:
        at = end
        ends += [done.id for done in subject.end(at).finished]
        if "holds" not in ends:
            assert subject.waiting == 2, "there was no room for the first in the queue, so nobody joins"
    assert ends == ["holds", "prompt", "brings"]
    assert subject.preemptions == 0


def test_a_request_that_brings_its_kv_has_had_its_first_token() -> None:
    with pytest.raises(ValueError, match="resume_from is at least 1"):
        engine().submit(0.0, Job("a", 20, 3, None, 0.0, brings_kv=True))


def test_the_earliest_deadline_is_computed_first_and_best_effort_last() -> None:
    subject = engine(Instance("i", "small", ChunkRule("fixed", 100)))
    subject.submit(0.0, Job("free", 100, 2, None, 0.0))
    subject.submit(0.0, Job("late", 100, 2, Slo(9.0, 1.0), 0.0))
    subject.submit(0.0, Job("soon", 100, 2, Slo(1.0, 1.0), 0.0))
    assert list(subject.prefilling()) == ["soon", "late", "free"]
    assert order_of_first_tokens(subject) == ["soon", "late", "free"]


@pytest.mark.parametrize(("relegate", "order"), [(False, ["lost", "kept"]), (True, ["kept", "lost"])])
def test_a_prompt_that_is_late_anyway_goes_behind_those_in_time_when_relegated(
    relegate: bool, order: list[str]
) -> None:
    subject = engine(Instance("i", "small", ChunkRule("fixed", 100)), relegate=relegate)
    subject.submit(0.0, Job("lost", 100, 2, Slo(0.001, 1.0), 0.0))
    subject.submit(0.0, Job("kept", 100, 2, Slo(5.0, 1.0), 0.0))
    assert order_of_first_tokens(subject) == order


def test_nothing_is_forced_for_a_relegated_prompt() -> None:
    """Beside a decode that has no slack for a chunk the lost prompt waits until the decode has ended."""
    forced = {}
    for relegate in (False, True):
        subject = engine(relegate=relegate)
        subject.submit(0.0, Job("tight", 20, 40, Slo(0.006, 0.0045), 0.0))
        at = subject.begin(0.0)
        assert at is not None
        subject.end(at)
        subject.submit(at, Job("lost", 200, 1, Slo(0.001, 1.0), 0.0))
        while (at := subject.begin(at)) is not None:
            subject.end(at)
        forced[relegate] = subject.forced_chunks
    assert forced[False] > forced[True] == 0


def test_first_come_first_served_ignores_deadlines() -> None:
    subject = engine(Instance("i", "small", ChunkRule("fixed", 100), order="fcfs"))
    subject.submit(0.0, Job("free", 100, 2, None, 0.0))
    subject.submit(0.0, Job("soon", 100, 2, Slo(1.0, 1.0), 0.0))
    assert order_of_first_tokens(subject) == ["free", "soon"]


def order_of_first_tokens(subject: Engine) -> list[str]:
    now, first = 0.0, []
    while (at := subject.begin(now)) is not None:
        now = at
        first += subject.end(at).first
    return first


@pytest.mark.parametrize(("order", "victim"), [("fcfs", "last"), ("deadline", "free")])
def test_who_matters_least_is_thrown_out_when_memory_ends(order: str, victim: str) -> None:
    subject = engine(Instance("i", "small", order=order, kv_tokens=96))  # type: ignore[arg-type]
    subject.submit(0.0, Job("free", 31, 60, None, 0.0))
    subject.submit(0.0, Job("soon", 31, 60, Slo(1.0, 0.1), 0.0))
    now, preempted = 0.0, []
    submitted = False
    while (at := subject.begin(now)) is not None:
        now = at
        preempted += subject.end(at).preempted
        if not submitted:
            subject.submit(now, Job("last", 31, 60, Slo(2.0, 0.1), 0.0))
            submitted = True
    assert preempted[0] == victim
    assert subject.preemptions == len(preempted)


def test_a_half_computed_prompt_whose_room_was_taken_waits_and_goes_on() -> None:
    subject = engine(Instance("i", "small", ChunkRule("fixed", 40), kv_tokens=128), profile(block=1))
    subject.submit(0.0, Job("first", 110, 2, Slo(9.0, 1.0), 0.0))
    at = subject.begin(0.0)
    assert at is not None
    subject.end(at)
    subject.submit(at, Job("urgent", 80, 9, Slo(1.0, 1.0), 0.0))
    left, now = [], at
    while (at := subject.begin(now)) is not None:
        now = at
        subject.end(at)
        left.append(subject.prefilling().get("first", 0))
    assert left == [70] * 10 + [30, 0, 0]
    assert subject.preemptions == 0


def test_a_request_that_can_never_fit_is_an_error_and_leaves_nothing_behind() -> None:
    subject = engine(true=profile(kv_tokens=100))  # six blocks of 16
    with pytest.raises(ValueError, match="60 prompt and 38 output tokens never fit into the 96 KV tokens"):
        subject.submit(0.0, Job("big", 60, 38, None, 0.0))
    with pytest.raises(ValueError, match="at least one token"):
        subject.submit(0.0, Job("none", 60, 0, None, 0.0))
    assert subject.begin(0.0) is None
    subject.submit(0.0, Job("just", 60, 37, None, 0.0))
    assert order_of_first_tokens(subject) == ["just"]


def test_the_pace_bounds_iterations_that_have_decodes() -> None:
    def longest(pace_s: float) -> float:
        subject = engine(true=profile(kv_tokens=8192))
        load = [Job("a", 10, 100, None, 0.0)] + [Job(f"p{n}", 700, 5, None, 0.0) for n in range(3)]
        steps = run(subject, Workload(tuple(load), pace_s=pace_s))
        return max(s.ended_at - s.began_at for s in steps if s.result.iteration.decodes)

    assert longest(0.009) <= 0.009 < longest(0.012) <= 0.012


def test_an_engine_slower_than_believed_learns_it_and_keeps_its_pace() -> None:
    believed = profile(kv_tokens=65536, seqs=64)
    subject = Engine(Instance("i", "small"), believed.slowed(1.3), believed, settings=Settings())
    subject.set_pace(0.012)
    load = [Job("a", 10, 400, None, 0.0)] + [Job(f"p{n}", 700, 5, None, 0.0) for n in range(30)]
    for job in load:
        subject.submit(0.0, job)
    now, lengths = 0.0, []
    while (at := subject.begin(now)) is not None:
        shape = subject.end(at).iteration
        now = at
        if shape.decodes and shape.prefill_tokens:
            lengths.append(shape.seconds)
    assert lengths[0] > 0.0125
    assert max(lengths[60:80]) < 0.0125


def test_tokens_of_an_iteration_cannot_be_read_once_the_engine_has_moved_on() -> None:
    subject = engine()
    subject.submit(0.0, Job("a", 20, 3, None, 0.0))
    at = subject.begin(0.0)
    assert at is not None
    result = subject.end(at)
    subject.submit(at, Job("b", 20, 3, None, 0.0))
    with pytest.raises(AssertionError, match="moved on"):
        _ = result.tokens


def test_slots_grow_with_the_residents() -> None:
    subject = engine(true=profile(kv_tokens=65536, seqs=128))
    jobs = tuple(Job(f"r{n}", 5 + n % 7, 1 + n % 11, None, 0.0) for n in range(300))
    steps = run(subject, Workload(jobs))
    assert sorted(d.id for s in steps for d in s.result.finished) == sorted(job.id for job in jobs)
