"""Many engines in one compiled loop, held to plain engines that take turns by a heap of Python's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random
from typing import Literal, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from plain_engine import PlainEngine
from test_engine import Workload, machines, paces, pressed, workloads

from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance
from polyserve.sim.bank import Bank
from polyserve.sim.engine import Engine, Job
from polyserve.sim.turns import BLIND, FINISHED, FIRST_TOKEN, GATEWAY, PERFECT, PREEMPTED

KINDS = {FIRST_TOKEN: "first", PREEMPTED: "preempted", FINISHED: "finished"}
# At a time, of a kind, on an engine, a request, and of an end the tokens, worst lateness and first token's time.
Line = tuple[float, str, int, str, tuple[float, ...]]


class Told(NamedTuple):
    """A line of what a bank tells."""

    at: float
    kind: int
    row: int
    slot: int
    output_tokens: int
    worst_lateness_s: float
    first_token_at: float


def read(raw: list[list[float]]) -> list[Told]:
    return [Told(at, int(kind), int(row), int(slot), int(made), *rest) for at, kind, row, slot, made, *rest in raw]


@dataclass(frozen=True)
class Deed:
    """What the world does to an engine at one time."""

    at: float
    engine: int
    kind: Literal["submit", "cancel", "pace"]
    what: Job | str | float


@dataclass(frozen=True)
class Plan:
    """Some engines and everything that is done to them, in order."""

    machines: tuple[tuple[Instance, Profile, Settings], ...]
    deeds: tuple[Deed, ...]
    jitter: float
    seed: int

    def stretch(self, engine: int) -> Callable[[], float]:
        noise = Random(f"{self.seed} {engine}")
        return lambda: max(0.5, 1.0 + self.jitter * noise.gauss()) if self.jitter else 1.0


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Engines of different rules, so alike that their iterations often end at the same microsecond."""
    fleet: list[tuple[Instance, Profile, Settings]] = []
    deeds: list[Deed] = []
    for number in range(draw(st.integers(1, 4))):
        alike = draw(st.booleans())
        instance, profile, policy = fleet[0] if alike and fleet else draw(machines())
        fleet.append((instance, profile, policy.replaced({"correction": False})))
        load: Workload = draw(workloads() | pressed())
        deeds += [Deed(job.arrived_at, number, "submit", job) for job in load.jobs]
        deeds += [Deed(at, number, "cancel", id) for at, id in load.cancels]
        deeds += [Deed(draw(st.sampled_from([0.0, 0.02, 0.06])), number, "pace", draw(paces))]
    jitter = draw(st.sampled_from([0.0, 0.1]))
    return Plan(tuple(fleet), tuple(sorted(deeds, key=lambda d: d.at)), jitter, draw(st.integers(0, 3)))


@dataclass
class PlainFleet:
    """Plain engines and one heap."""

    plan: Plan
    now: float = 0.0
    told: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.plan
        self.engines = [PlainEngine(*machine, plan.stretch(n)) for n, machine in enumerate(plan.machines)]
        self.idle = [True] * len(self.engines)
        self.woken: list[int] = []
        self.ends: list[tuple[float, int, int]] = []
        self.begun = 0

    def run(self) -> PlainFleet:
        for deed in self.plan.deeds:
            if deed.at > self.now:
                self.begin_woken()
            self.pass_time(deed.at)
            self.now = deed.at
            engine = self.engines[deed.engine]
            if isinstance(deed.what, Job):
                engine.submit(deed.what)
                if self.idle[deed.engine] and deed.engine not in self.woken:
                    self.woken.append(deed.engine)
            elif isinstance(deed.what, str):
                engine.cancel(deed.what)
            else:
                engine.pace_s = deed.what
        self.begin_woken()
        self.pass_time(math.inf)
        return self

    def begin_woken(self) -> None:
        for number in self.woken:
            self.begin(number, self.now)
        self.woken.clear()

    def begin(self, number: int, now: float) -> None:
        end = self.engines[number].begin(now)
        self.idle[number] = end is None
        if end is not None:
            heappush(self.ends, (end, self.begun, number))
            self.begun += 1

    def pass_time(self, until: float) -> None:
        while self.ends and self.ends[0][0] <= until:
            at, _, number = heappop(self.ends)
            outcome = self.engines[number].end(at)
            self.told += [(at, "first", number, id, ()) for id in outcome.first]
            self.told += [(at, "preempted", number, id, ()) for id in outcome.preempted]
            self.told += [(at, "finished", number, done.id, done[1:4]) for done in outcome.finished]
            self.begin(number, at)


def compiled(plan: Plan, sight: int = BLIND, quiet: bool = False) -> tuple[Bank, list[Engine], list[Line]]:
    """What a bank of engines tells of the same plan; `quiet`: all that is told before a deed at once."""
    bank, told = Bank(1), list[Line]()
    engines = [
        Engine(
            instance, profile, profile, settings=policy, noise=Random(f"{plan.seed} {n}"), jitter=plan.jitter, bank=bank
        )
        for n, (instance, profile, policy) in enumerate(plan.machines)
    ]
    now = 0.0

    def pass_time(until: float, wake: bool) -> None:
        wakes = wake
        while True:
            quiet_until = until if quiet else -math.inf
            lines = read(bank.advance(now, until, inclusive=True, wake=wakes, quiet_until=quiet_until, sight=sight))
            wakes = False
            assert quiet or len({line.at for line in lines}) <= 1, "one end at a time, where somebody listens"
            for line in lines:
                engine = engines[line.row]
                id = engine.forget(line.slot) if line.kind == FINISHED else engine.name(line.slot)
                end = (line.output_tokens, line.worst_lateness_s, line.first_token_at)
                told.append((line.at, KINDS[line.kind], line.row, id, end if line.kind == FINISHED else ()))
            if not lines and bank.reported < 0:
                return

    for deed in plan.deeds:
        pass_time(deed.at, deed.at > now)
        now = deed.at
        engine = engines[deed.engine]
        if isinstance(deed.what, Job):
            engine.submit(now, deed.what)
            bank.wake(engine.row)
        elif isinstance(deed.what, str):
            engine.cancel(now, deed.what)
        else:
            engine.set_pace(deed.what)
    pass_time(math.inf, True)
    return bank, engines, told


@settings(max_examples=150)
@given(plans(), st.sampled_from([BLIND, GATEWAY, PERFECT]), st.booleans())
def test_a_bank_of_engines_does_what_plain_engines_do_in_the_same_order(plan: Plan, sight: int, quiet: bool) -> None:
    plain = PlainFleet(plan).run()
    bank, engines, told = compiled(plan, sight, quiet and sight == BLIND)
    assert told == plain.told
    assert bank.next_at == math.inf
    for engine, twin in zip(engines, plain.engines, strict=True):
        assert (engine.residents, engine.kv_allocated, engine.busy) == (0, 0, False)
        assert engine.forced_chunks == twin.forced_chunks


def test_an_engine_that_goes_ends_no_iteration_and_its_row_serves_another() -> None:
    bank = Bank(2)
    instance, profile, policy = Instance("i", "small"), SMALL, Settings()
    first, second = (Engine(instance, profile, profile, settings=policy, bank=bank) for _ in range(2))
    for n, engine in enumerate((first, second)):
        engine.submit(0.0, Job(f"r{n}", 20, 5 + n, None, 0.0))
        bank.wake(engine.row)
    assert bank.advance(0.0, 0.001, inclusive=True, wake=True, quiet_until=-math.inf, sight=BLIND) == []
    bank.give_back(first.row)
    third = Engine(instance, profile, profile, settings=policy, bank=bank)
    assert third.row == first.row
    assert (third.residents, third.iterations, third.busy) == (0, 0, False)
    lines = read(bank.advance(0.001, 9.0, inclusive=True, wake=True, quiet_until=9.0, sight=BLIND))
    assert [(line.kind, line.row) for line in lines] == [(FIRST_TOKEN, second.row), (FINISHED, second.row)]


def test_a_bank_grows_with_its_engines_and_their_residents() -> None:
    bank = Bank(1)
    engines = [Engine(Instance(f"i{n}", "small"), SMALL, SMALL, settings=Settings(), bank=bank) for n in range(5)]
    for n in range(1000):
        engine = engines[n % 5]
        engine.submit(0.0, Job(f"r{n}", 5 + n % 7, 1 + n % 11, None, 0.0))
        bank.wake(engine.row)
    finished = set()
    wake = True
    while lines := read(bank.advance(0.0, math.inf, inclusive=True, wake=wake, quiet_until=math.inf, sight=BLIND)):
        wake = False
        finished |= {engines[line.row].forget(line.slot) for line in lines if line.kind == FINISHED}
    assert finished == {f"r{n}" for n in range(1000)}


def test_iterations_too_short_for_the_list_of_lengths_are_seen_all_the_same() -> None:
    """A report every 50 ms of iterations of 40 microseconds has 1,250 lengths to take the median of."""
    quick = SMALL.slowed(0.01)
    bank = Bank(1)
    engine = Engine(Instance("i", "small"), quick, quick, settings=Settings(), bank=bank)
    engine.submit(0.0, Job("r", 20, 4000, None, 0.0))
    bank.wake(engine.row)
    lengths, wake = [], True
    while engine.residents:
        told = read(bank.advance(0.0, math.inf, inclusive=True, wake=wake, quiet_until=-math.inf, sight=GATEWAY))
        wake = False
        if bank.reported >= 0:
            lengths.append(bank.seconds)
        if told and told[-1].kind == FINISHED:
            engine.forget(told[-1].slot)
    alone = engine.iterations
    assert alone == 4000
    assert len(lengths) > 2
    assert all(0.00004 <= length <= 0.0001 for length in lengths[1:])


SMALL = Profile(
    "small",
    (0, 64, 512),
    (0.004, 0.005, 0.02),
    2e-5,
    1e-6,
    1e-8,
    Limits(8192, 16, 256),
)
