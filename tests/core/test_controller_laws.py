"""The controller under anything that a body may send: whatever happens, it keeps its contract (`body.py`)."""

from __future__ import annotations

import sys
from typing import ClassVar

from body import CRAMPED, Body, Fate, Life, Stream
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from polyserve.core.settings import POLICIES, policy
from polyserve.core.types import (
    ChunkRule,
    Corrected,
    Finished,
    FirstToken,
    Iteration,
    Preempted,
    Progressed,
    Received,
    Reported,
    Role,
    Slo,
    Tick,
)

picks = st.integers(0, 10**6)
slos = st.none() | st.builds(
    Slo, st.sampled_from([0.005, 0.05, 0.3, 1.0, 5.0]), st.sampled_from([0.005, 0.02, 0.06, 0.3])
)
switches = st.fixed_dictionaries(
    {},
    optional={
        "promotion": st.sampled_from(["off", "lazy", "eager"]),
        "promotion_order": st.sampled_from(["nearest", "tightest"]),
        "placement": st.sampled_from(["auto", "fill", "spread"]),
        "tight_on_loose": st.booleans(),
        "relabel": st.booleans(),
        "sizing": st.sampled_from(["demand", "pending"]),
        "on_late": st.sampled_from(["refuse", "serve_late", "never"]),
        "infeasible": st.sampled_from(["refuse", "best_possible"]),
        "shortage": st.sampled_from(["demand", "weight", "cost"]),
        "queue_limit": st.sampled_from([0, 2]),
        "queue_timeout_s": st.sampled_from([0.0, 2.0]),
        "best_effort": st.booleans(),
        "best_effort_max_age_s": st.sampled_from([1.0, 60.0]),
        "max_instances": st.sampled_from([0, 3, 5]),
        "min_instances": st.sampled_from([0, 1]),
        "autoscaler": st.sampled_from(["own", "queue", "off"]),
        "target_requests": st.sampled_from([1.5, 64.0]),
        "scale_down_s": st.sampled_from([0.0, 2.0]),
        "static_sizes": st.sampled_from(["", "1,1,1", "0,2,1"]),
        "balance": st.sampled_from(["least-requests", "round-robin"]),
        "slo_buffer": st.sampled_from([0.7, 1.0]),
        "keep_warm_s": st.sampled_from([0.0, 2.0]),
        "start_timeout_s": st.sampled_from([5.0, 600.0]),
        "predictive": st.booleans(),
        "head_walk": st.sampled_from([0, 6]),
        "test_memory": st.booleans(),
        "explain": st.booleans(),
        "promise": st.booleans(),
        "follow_split": st.booleans(),
    },
)


class Anything(RuleBasedStateMachine):
    """Any event that a body may send, in any order; `Body` holds the answers to the contract."""

    body: Body
    given: ClassVar[dict[str, object]] = {}
    others = 0  # instances that somebody else started

    @initialize(
        name=st.sampled_from([*POLICIES, *3 * ["polyserve"]]),
        values=switches,
        ready=st.integers(0, 4),
        seed=st.integers(0, 3),
    )
    def configure(self, name: str, values: dict[str, object], ready: int, seed: int) -> None:
        self.body = Body(policy(name, values | self.given), profile=CRAMPED, ready=ready, seed=seed)

    def pick(self, which: int, *fates: Fate) -> Stream:
        among = self.body.of(*fates)
        return among[which % len(among)]

    def some(self, which: int, *lives: Life) -> str:
        among = [id for id, life in self.body.lives.items() if not lives or life in lives]
        return among[which % len(among)]

    def alive(self, *lives: Life) -> int:
        return sum(life in lives for life in self.body.lives.values())

    def running(self) -> bool:
        return bool(self.body.of(Fate.RUNS))

    # ---------------------------------------------------------------------------------------------- requests

    @rule(
        slo=slos,
        prompt=st.sampled_from([1, 60, 60, 400, 400, 1500, 2600]),
        most=st.sampled_from([None, 1, 40, 900]),
        count=st.integers(1, 8),
    )
    def arrive(self, slo: Slo | None, prompt: int, most: int | None, count: int) -> None:
        for _ in range(count):
            self.body.arrive(f"r{len(self.body.streams)}", slo, prompt, most)

    @precondition(running)
    @rule(which=picks)
    def first_token(self, which: int) -> None:
        stream = self.pick(which, Fate.RUNS)
        if stream.told == stream.base and not self.body.ends_at_once(stream):
            self.body.first_token(stream.id)

    @precondition(running)
    @rule(which=picks)
    def receive(self, which: int) -> None:
        stream = self.pick(which, Fate.RUNS)
        if stream.source is not None:
            self.body.receive(stream.id)

    @precondition(running)
    @rule(which=picks, tokens=st.integers(1, 40))
    def progress(self, which: int, tokens: int) -> None:
        instance = self.pick(which, Fate.RUNS).instance
        assert instance is not None
        self.body.progress(instance, tokens)

    @precondition(running)
    @rule(which=picks, measured=st.booleans())
    def report_an_iteration(self, which: int, measured: bool) -> None:
        body, instance = self.body, self.pick(which, Fate.RUNS).instance
        assert instance is not None
        prefilling = {s.id: 7 for s in body.on(instance) if s.told == s.base and measured}
        iteration = Iteration(body.now, 0.013, 0 if measured else None, 2, 500 if measured else None, not measured)
        body.send(Progressed(body.now, instance, {}, prefilling, iteration))

    @precondition(running)
    @rule(which=picks, tokens=st.integers(1, 5))
    def finish(self, which: int, tokens: int) -> None:
        self.body.finish(self.pick(which, Fate.RUNS).id, tokens)

    @precondition(running)
    @rule(which=picks, tokens=st.sampled_from([0, 0, 3]))
    def break_off(self, which: int, tokens: int) -> None:
        self.body.break_off(self.pick(which, Fate.RUNS).id, tokens)

    @precondition(lambda self: self.body.of(Fate.RUNS, Fate.WAITS))
    @rule(which=picks)
    def leave(self, which: int) -> None:
        self.body.leave(self.pick(which, Fate.RUNS, Fate.WAITS).id)

    @precondition(lambda self: self.body.of(Fate.RUNS, Fate.WAITS))
    @rule(which=picks, tokens=st.sampled_from([1, 90, 700]))
    def correct(self, which: int, tokens: int) -> None:
        self.body.send(Corrected(self.body.now, self.pick(which, Fate.RUNS, Fate.WAITS).id, tokens))

    @precondition(running)
    @rule(which=picks)
    def preempt(self, which: int) -> None:
        stream = self.pick(which, Fate.RUNS)
        assert stream.instance is not None
        self.body.send(Preempted(self.body.now, stream.id, stream.instance))

    @precondition(lambda self: self.body.streams and self.body.lives)
    @rule(which=picks, where=picks, kind=st.sampled_from([FirstToken, Preempted, Received]))
    def something_stale(
        self, which: int, where: int, kind: type[FirstToken] | type[Preempted] | type[Received]
    ) -> None:
        """News of a request that has left the instance, which was on its way meanwhile."""
        body, instance = self.body, self.some(where)
        stream = list(body.streams.values())[which % len(body.streams)]
        if stream.instance != instance and stream.source is None and not promised(body, stream):
            body.send(kind(body.now, stream.id, instance))
            body.send(Finished(body.now, stream.id, instance, 5))
            body.send(Progressed(body.now, instance, {stream.id: 5}))

    # --------------------------------------------------------------------------------------------- instances

    @precondition(lambda self: self.alive(Life.ASKED) > 0)
    @rule(which=picks)
    def asked_joins(self, which: int) -> None:
        self.body.join(self.some(which, Life.ASKED))

    @precondition(lambda self: self.alive(Life.JOINED) > 0)
    @rule(which=picks)
    def get_ready(self, which: int) -> None:
        self.body.ready(self.some(which, Life.JOINED))

    @precondition(lambda self: self.alive(Life.ASKED, Life.JOINED) > 0)
    @rule(which=picks)
    def fail(self, which: int) -> None:
        self.body.fail(self.some(which, Life.ASKED, Life.JOINED))

    @precondition(lambda self: len(self.body.lives) < 5)
    @rule(fixed=st.booleans(), seats=st.sampled_from([2, 6]), role=st.sampled_from(Role))
    def another_joins(self, fixed: bool, seats: int, role: Role) -> None:
        """One that somebody else started."""
        rule = ChunkRule("fixed", 64) if fixed else ChunkRule()
        self.others += 1
        self.body.join(f"x{self.others}", rule, role if self.body.split else Role.MIXED, max_num_seqs=seats)

    @precondition(lambda self: self.alive(Life.READY) > 1)
    @rule(which=picks)
    def lose(self, which: int) -> None:
        self.body.lose(self.some(which, Life.JOINED, Life.READY, Life.DRAINING))

    @precondition(lambda self: self.alive(Life.READY) > 1)
    @rule(which=picks)
    def drain(self, which: int) -> None:
        self.body.drain(self.some(which, Life.JOINED, Life.READY, Life.DRAINING))

    @precondition(lambda self: self.body.lives and not self.body.split)
    @rule(which=picks, seconds=st.sampled_from([0.1, 4.0, 20.0, 600.0]))
    def fall_silent(self, which: int, seconds: float) -> None:
        self.body.silent(self.some(which), max(self.body.now - seconds, 0.0))

    @precondition(lambda self: self.alive(Life.READY, Life.DRAINING) > 0 and not self.body.split)
    @rule(which=picks)
    def restart(self, which: int) -> None:
        self.body.restart(self.some(which, Life.READY, Life.DRAINING))

    @precondition(lambda self: self.body.lives)
    @rule(which=picks, running=st.integers(0, 9))
    def report(self, which: int, running: int) -> None:
        self.body.send(Reported(self.body.now, self.some(which), running, 1, 77))

    # -------------------------------------------------------------------------------------------------- time

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.2, 1.0, 7.0]))
    def wait(self, seconds: float) -> None:
        self.body.wait(seconds)

    @rule()
    def tick_too_early(self) -> None:
        self.body.send(Tick(self.body.now))

    def teardown(self) -> None:
        """Left in peace with instances enough, the controller has an answer for everybody."""
        if not hasattr(self, "body") or sys.exc_info()[0]:
            return
        body = self.body
        for n in range(3):
            body.join(f"rescue{n}")
            body.ready(f"rescue{n}")
        for _ in range(200):
            for stream in body.of(Fate.RUNS):
                if stream.fate is Fate.RUNS:
                    body.finish(stream.id)
            if not body.of(Fate.WAITS):
                return
            body.wait(1.0)
        raise AssertionError(f"for ever without an answer: {body.of(Fate.WAITS)}")


def promised(body: Body, stream: Stream) -> bool:
    """Whether a place is kept for it somewhere."""
    return any(job.id == stream.id and job.partner for books in body.controller.fleet for job in books.jobs.values())


class AnythingInTwoRoles(Anything):
    """The same where prompts are computed on some instances and answered on others."""

    given: ClassVar[dict[str, object]] = {"disaggregated": True, "autoscaler": "own"}


TestAnything = Anything.TestCase
TestAnything.settings = hypothesis_settings(max_examples=100, stateful_step_count=40)
TestAnythingInTwoRoles = AnythingInTwoRoles.TestCase
TestAnythingInTwoRoles.settings = hypothesis_settings(max_examples=100, stateful_step_count=40)
