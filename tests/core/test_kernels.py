"""The compiled loops of the forecast against their plain twins, over generated profiles, residents and queues.

Those of the profile and of the chunk rule are held to theirs beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polyserve.core import chunking, kernels, plain
from polyserve.core.arena import Arena
from polyserve.core.chunking import ChunkLaw, Prefill
from polyserve.core.fleet import Books, Fleet, Job, State
from polyserve.core.kernels import (
    DYNAMIC,
    F_COLUMNS,
    F_DECODES,
    F_FIRST,
    F_MEMORY,
    F_PACE,
    F_PEAK,
    F_PREFILL,
    F_QUEUED,
    F_SEQS,
    F_TOKEN1,
    FIXED,
    G_ROWS,
    I_BEGAN,
    I_BLOCK,
    I_COLUMNS,
    I_COUNT,
    I_ENDS,
    I_FLOOR,
    I_FREE,
    I_KIND,
    I_KV,
    I_PACE,
    I_PROFILE,
    I_RANK,
    I_ROLLED,
    I_SCALE,
    I_SEQS,
    I_SIGMA,
    I_SPEND,
    I_TIER,
    I_TOKENS,
    I_WAITS,
    PROMISED,
    R_BAND,
    R_BASE,
    R_CAP,
    R_COLUMNS,
    R_DUE,
    R_FROM,
    R_KEY,
    R_LEFT,
    R_LESS,
    R_MADE,
    R_PROMPT,
    R_SEEN,
    R_SOLO,
    R_TPOT,
    Matrix,
    Vector,
)
from polyserve.core.lengths import BANDS, EDGES, GRID, LengthModel
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, Request, Slo

NOW = 100.0
TIERS = 2
EDGE_LIST, GRID_LIST = EDGES.tolist(), GRID.tolist()


def learned(estimator: str) -> Matrix:
    """The table of a model that has seen short answers in one tier and long ones in the other."""
    model = LengthModel(TIERS, 64, "average" if estimator == "average" else "survival")
    for n in range(60):
        model.ended(model.row(0, 100), 1 + n % 30)
        model.ended(model.row(1, 100), 20 + 7 * n)
    model.refresh([(model.row(1, 100), 500)])
    return model.table


TABLES = {estimator: learned(estimator) for estimator in ("survival", "average")}

milliseconds = st.integers(0, 20_000).map(lambda us: us / 1e6)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    rises = draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    values = np.cumsum([draw(st.integers(1, 9)), *rises]) / 1e3
    return Profile(
        "drawn",
        (0.0, 16.0, 64.0, 256.0),
        tuple(values.tolist()),
        per_decode_s=draw(st.sampled_from([0.0, 2e-5, 5e-4])),
        per_kv_token_s=draw(st.sampled_from([0.0, 1e-6, 1e-5])),
        per_attention_s=draw(st.sampled_from([0.0, 1e-8, 1e-6])),
        mixed_kv_factor=draw(st.sampled_from([1.0, 1.7])),
        mixed_per_decode_s=draw(st.sampled_from([0.0, 1e-4])),
        host_overhead_s=draw(st.sampled_from([0.0, 1e-3])),
        limits=Limits(4096, 64, 256),
    )


@st.composite
def prompts(draw: st.DrawFn) -> Prefill:
    return Prefill(draw(st.integers(1, 150)), draw(st.integers(0, 200)))


def columns(queue: list[Prefill]) -> tuple[Vector, Vector, Vector]:
    return (
        np.array([float(p.remaining) for p in queue]),
        np.array([float(p.past) for p in queue]),
        np.full(len(queue), 9.0),
    )


@given(
    profiles(), st.floats(0, 0.1) | st.just(math.inf), st.integers(-3, 300), st.integers(0, 60), st.integers(0, 20_000),
    st.lists(prompts(), max_size=5),
)  # fmt: skip
def test_chunks_are_fitted_as_by_search(
    profile: Profile, bound: float, budget: int, decodes: int, kv: int, queue: list[Prefill]
) -> None:
    remaining, past, out = columns(queue)
    total = kernels.fit_chunks(profile.packed, bound, budget, decodes, kv, remaining, past, len(queue), out)
    wanted = chunking.fit_chunks(profile, bound, budget, decodes, kv, queue)
    assert (out.tolist(), total) == (wanted, sum(wanted))


@st.composite
def laws(draw: st.DrawFn) -> ChunkLaw:
    kind = draw(st.sampled_from([DYNAMIC, DYNAMIC, FIXED]))
    return ChunkLaw(
        kind, draw(st.sampled_from([4, 20, 100, 256])), draw(st.booleans()), draw(st.sampled_from([1, 16, 64]))
    )


# --------------------------------------------------------------------------------------------- whole instances


class Side(NamedTuple):
    """One instance as the plain twins see it."""

    station: plain.Station
    residents: list[plain.Resident]
    candidate: plain.Resident


@dataclass
class Case:
    """One instance, its residents and a candidate, in both languages."""

    profile: Profile
    inst: Vector
    rows: Matrix
    candidate: Vector
    estimator: str
    grow: bool

    @property
    def table(self) -> Matrix:
        return TABLES[self.estimator]

    @property
    def count(self) -> int:
        return len(self.rows)

    def gauged(self) -> Matrix:
        out = np.full((G_ROWS, len(GRID)), 9.0)
        kernels.gauge(self.rows, self.count, self.table, EDGES, GRID, out)
        return out

    def plainly(self) -> Side:
        residents = [plain.Resident.of(row) for row in self.rows.tolist()]
        return Side(plain.Station.of(self.inst.tolist()), residents, plain.Resident.of(self.candidate.tolist()))

    def plain_table(self) -> plain.Table:
        table: plain.Table = self.table.tolist()
        return table


@st.composite
def rows(draw: st.DrawFn, candidate: bool = False) -> list[float]:
    row = [0.0] * R_COLUMNS
    row[R_PROMPT] = draw(st.integers(1, 200))
    queued = candidate or draw(st.booleans())
    row[R_LEFT] = row[R_PROMPT] if candidate else draw(st.integers(1, int(row[R_PROMPT]))) if queued else 0
    row[R_MADE] = 0 if queued else draw(st.integers(1, 80))
    row[R_CAP] = draw(st.sampled_from([math.inf, row[R_MADE] + 1, row[R_MADE] + 40]))
    row[R_BAND] = draw(st.integers(0, (TIERS + 1) * BANDS - 1))
    bound = draw(st.integers(0, 4)) > 0
    row[R_TPOT] = draw(st.sampled_from([0.005, 0.01, 0.03])) if bound else 0.0
    row[R_DUE] = NOW + draw(st.integers(-50, 250)) / 1e3 - row[R_MADE] * row[R_TPOT] if bound else math.inf
    row[R_KEY] = draw(st.sampled_from([row[R_DUE], NOW]))
    if draw(st.integers(0, 3)) == 0:  # of a fleet in PD
        row[R_LESS] = draw(st.sampled_from([0.0, 0.03]))
        if row[R_LEFT] == 0.0:
            row[R_LEFT] = PROMISED
        elif candidate:
            row[R_LEFT], row[R_MADE], row[R_FROM] = 0.0, 1.0, NOW + draw(milliseconds)
            row[R_SOLO], row[R_CAP] = draw(milliseconds), row[R_CAP] + 1.0
        else:
            row[R_CAP] = 1.0
    return row


@st.composite
def cases(draw: st.DrawFn) -> Case:
    inst = np.zeros(I_COLUMNS)
    law = draw(laws())
    inst[I_KIND], inst[I_TOKENS], inst[I_SPEND], inst[I_FLOOR] = law.kind, law.tokens, law.spend, law.floor
    inst[I_PACE] = draw(st.sampled_from([0.01, 0.02, 0.05, math.inf]))
    inst[I_KV], inst[I_SEQS] = draw(st.sampled_from([500, 10**6, 10**6])), draw(st.sampled_from([3, 64, 64]))
    inst[I_BLOCK], inst[I_SIGMA] = draw(st.sampled_from([1, 16])), draw(st.sampled_from([0.0, 1.0]))
    inst[I_SCALE], inst[I_FREE] = draw(st.sampled_from([1.0, 1.2])), NOW + draw(milliseconds)
    residents = np.array(draw(st.lists(rows(), max_size=6)), float).reshape(-1, R_COLUMNS)
    return Case(
        draw(profiles()), inst, residents, np.array(draw(rows(candidate=True))),
        draw(st.sampled_from(sorted(TABLES))), draw(st.booleans()),
    )  # fmt: skip


def near(wanted: object) -> object:
    """Equal but for the order in which a sum was taken."""
    return pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(cases())
def test_a_gauge_is_the_sum_over_residents(case: Case) -> None:
    side = case.plainly()
    wanted = plain.gauge(side.residents, case.plain_table(), EDGE_LIST, GRID_LIST)
    gauged = case.gauged()
    lines = (wanted.batch, wanted.kv, wanted.variance, wanted.most, wanted.decodes, wanted.decode_kv)
    for line, twin in zip(gauged, lines, strict=True):
        assert line.tolist() == near(twin)
    peak_s = kernels.peak_s(case.profile.packed, gauged, len(GRID), 1.2)
    assert peak_s[0] == near(plain.peak_s(case.profile, wanted, 1.2))


@given(cases())
def test_residents_are_tallied(case: Case) -> None:
    assert kernels.tally(case.rows, case.count) == near(plain.tally(case.plainly().residents))


@given(cases(), st.data())
def test_reported_tokens_are_taken_in(case: Case, data: st.DataObject) -> None:
    case.rows[:, R_BASE] = 2.0
    side, reported = case.plainly(), data.draw(st.lists(st.integers(0, max(case.count - 1, 0)), unique=True))
    at = reported if case.count else []
    counts = [float(data.draw(st.integers(0, 90))) for _ in at]
    plain.take_in([(side.residents[i], count) for i, count in zip(at, counts, strict=True)])
    kernels.take_in(case.rows, np.array(at, np.int64), np.array(counts))
    for column, wanted in (
        (R_LEFT, [r.left for r in side.residents]),
        (R_MADE, [r.made for r in side.residents]),
        (R_SEEN, [r.seen for r in side.residents]),
    ):
        assert case.rows[:, column].tolist() == wanted


@given(st.floats(0, 200_000))
def test_the_bin_of_a_length_is_found(made: float) -> None:
    low = kernels.bin_of(EDGES, made)
    assert low == plain.bin_of(EDGE_LIST, made)
    assert EDGE_LIST[low] <= made
    assert low == len(EDGES) - 1 or made < EDGE_LIST[low + 1]


@given(st.lists(st.floats(0, 1e4), min_size=len(GRID), max_size=len(GRID)), st.floats(0, 10_000))
def test_a_line_is_read_between_its_points(line: list[float], ahead: float) -> None:
    wanted = plain.at_iteration(line, GRID_LIST, ahead)
    assert kernels.at_iteration(np.array(line), GRID, ahead) == wanted
    assert min(line) - 1e-9 <= wanted <= max(line) + 1e-9


@settings(max_examples=80)
@given(cases(), st.booleans(), st.sampled_from([math.inf, NOW + 0.05]))
def test_a_queue_is_followed_as_by_the_plain_rule(case: Case, joins: bool, until: float) -> None:
    assume(case.candidate[R_LEFT] > 0.0)  # nobody else queues
    finish = np.full(case.count + 1, 9.0)
    first, second, slack = kernels.run_queue(
        case.profile.packed, case.inst, case.rows, case.count, case.gauged(), GRID, case.candidate, joins, case.grow,
        NOW, until, finish,
    )  # fmt: skip
    side = case.plainly()
    candidate = side.candidate if joins else None
    gauged = plain.gauge(side.residents, case.plain_table(), EDGE_LIST, GRID_LIST)
    outlook = plain.run_queue(
        case.profile, side.station, side.residents, gauged, GRID_LIST, candidate, case.grow, NOW, until
    )
    twin = [outlook.finish.get(r, math.inf) for r in (*side.residents, side.candidate)]
    assert (first, second, slack) == pytest.approx((outlook.first_at, outlook.second_at, outlook.slack))
    assert finish.tolist() == near(twin)


def forecast(case: Case, *, waive: bool, whole: bool) -> Vector:
    out = np.full(F_COLUMNS, 9.0)
    kernels.forecast(
        case.profile.packed, case.inst, case.rows, case.count, case.gauged(), case.table, EDGES, GRID, case.candidate,
        case.grow, kernels.ALL_TESTS, waive, whole, NOW, out,
    )  # fmt: skip
    return out


@settings(max_examples=80)
@given(cases(), st.booleans())
def test_every_margin_is_the_plain_forecasts(case: Case, late: bool) -> None:
    waive = late or math.isinf(case.candidate[R_DUE])
    out = forecast(case, waive=waive, whole=True)
    side = case.plainly()
    wanted = plain.forecast(
        case.profile, side.station, side.residents, case.plain_table(), EDGE_LIST, GRID_LIST, side.candidate,
        grow=case.grow, waive=waive, now=NOW,
    )  # fmt: skip
    named = {
        F_MEMORY: wanted.memory,
        F_SEQS: wanted.seqs,
        F_PACE: wanted.pace,
        F_PREFILL: wanted.prefill,
        F_TOKEN1: wanted.token1,
        F_QUEUED: wanted.queued,
        F_DECODES: wanted.decodes,
        F_FIRST: wanted.first_at,
        F_PEAK: wanted.peak,
    }
    assert out.tolist() == near([named[column] for column in range(F_COLUMNS)])


TESTS = (F_MEMORY, F_SEQS, F_PACE, F_PREFILL, F_TOKEN1, F_QUEUED, F_DECODES)


def admits(out: Vector) -> bool:
    return all(not out[test] < 0.0 for test in TESTS)


@settings(max_examples=200)
@given(cases(), st.booleans())
def test_a_forecast_that_stops_early_gives_the_same_verdict(case: Case, late: bool) -> None:
    waive = late or math.isinf(case.candidate[R_DUE])
    hasty, whole = (forecast(case, waive=waive, whole=whole) for whole in (False, True))
    assert admits(hasty) == admits(whole)
    if admits(whole):
        assert hasty.tolist() == near(whole.tolist())


def test_who_waits_behind_an_urgent_candidate_is_followed_beyond_its_deadline() -> None:
    steady = Profile("steady", (0.0, 256.0), (0.01, 0.01), 0.0, 0.0, 0.0, Limits(10**6, 64, 100))
    inst = np.zeros(I_COLUMNS)
    inst[I_KIND], inst[I_TOKENS], inst[I_PACE], inst[I_KV], inst[I_SEQS] = DYNAMIC, 100, 0.05, 10**6, 64
    inst[I_SCALE], inst[I_FREE] = 1.0, NOW
    urgent, patient = np.zeros((2, R_COLUMNS))
    for row, tokens, due in ((urgent, 100, 0.025), (patient, 490, 0.2)):
        row[R_PROMPT] = row[R_LEFT] = tokens
        row[R_DUE] = row[R_KEY] = NOW + due
        row[R_CAP], row[R_TPOT] = math.inf, 0.05
    case = Case(steady, inst, patient[None, :], urgent, "survival", True)
    for whole in (False, True):
        assert forecast(case, waive=False, whole=whole)[F_QUEUED] == near(0.2 - 0.06)


@settings(max_examples=80)
@given(cases(), st.integers(0, 80).map(lambda ms: ms / 1e3), st.booleans())
def test_books_roll_on_as_by_the_plain_rule(case: Case, elapsed: float, running: bool) -> None:
    case.inst[I_BEGAN] = NOW - 0.01
    side = case.plainly()
    ends_at = NOW + 0.004 if running else -1.0
    wanted = plain.roll(case.profile, side.station, side.residents, ends_at, NOW + elapsed)
    rolled = case.rows.copy()
    ends = kernels.roll(case.profile.packed, case.inst, rolled, case.count, ends_at, NOW + elapsed)
    assert ends == pytest.approx(wanted)
    assert rolled[:, R_MADE].tolist() == [r.made for r in side.residents]
    assert rolled[:, R_LEFT].tolist() == [r.left for r in side.residents]


# ------------------------------------------------------------------------------------------------ whole fleets


@settings(max_examples=60)
@given(st.lists(cases(), min_size=1, max_size=4), st.integers(0, 30).map(lambda ms: ms / 1e3))
def test_what_comes_next_is_seen_of_many_as_of_each(instances: list[Case], elapsed: float) -> None:
    now, arena = NOW + elapsed, Arena(len(GRID), len(instances))
    wanted = []
    for at, case in enumerate(instances):
        case.inst[I_COUNT], case.inst[I_PROFILE] = case.count, arena.profile(case.profile.packed)
        case.inst[I_BEGAN], case.inst[I_ENDS], case.inst[I_ROLLED] = NOW - 0.01, NOW + 0.004, NOW
        arena.insts[at], arena.rows[at, : case.count] = case.inst, case.rows
        side = case.plainly()
        if elapsed >= 0.004 and case.count:
            plain.roll(case.profile, side.station, side.residents, NOW + 0.004, now)
        decoding = [r for r in side.residents if r.left == 0.0]
        left = sum(r.left for r in side.residents if r.left > 0.0)
        chunk = min(left, max(side.station.tokens - len(decoding), 0.0))
        kv = sum(r.prompt + r.made for r in decoding)
        wanted.append((case.profile.iteration_s(chunk, len(decoding), kv, chunk * chunk / 2), left))
    seconds, left_tokens = np.empty(len(instances)), np.empty(len(instances))
    slots = np.arange(len(instances))
    kernels.look(arena.profiles, arena.insts, arena.rows, slots, now, seconds, left_tokens)
    assert seconds.tolist() == near([second for second, _ in wanted])
    assert left_tokens.tolist() == [left for _, left in wanted]


@settings(max_examples=60)
@given(
    st.lists(cases(), min_size=1, max_size=4),
    st.lists(st.sampled_from([0.0, 1.0, kernels.POOL]), min_size=4, max_size=4),
    st.permutations(range(4)),
    st.lists(st.sampled_from([(0.0, 0.0), (1.0, 0.1), (kernels.POOL, 0.0)]), min_size=1, max_size=3, unique=True),
    st.booleans(),
    st.integers(0, 30).map(lambda ms: ms / 1e3),
)
def test_a_fleet_is_walked_as_by_the_plain_rule(
    instances: list[Case],
    tiers: list[float],
    ranks: list[int],
    hosts: list[tuple[float, float]],
    least_first: bool,
    elapsed: float,
) -> None:
    first, now, pace = instances[0], NOW + elapsed, 0.03
    arena = Arena(len(GRID), len(instances))
    places = []
    for at, case in enumerate(instances):
        case.inst[I_TIER], case.inst[I_RANK], case.inst[I_COUNT] = tiers[at], ranks[at], case.count
        case.inst[I_PROFILE] = arena.profile(case.profile.packed)
        case.inst[I_ENDS], case.inst[I_WAITS], case.inst[I_ROLLED] = NOW + 0.004, 1.0, NOW
        arena.insts[at], arena.rows[at, : case.count] = case.inst, case.rows
        side = case.plainly()
        places.append(plain.Place(case.profile, side.station, side.residents, tiers[at], ranks[at], NOW + 0.004))
    waive = math.isinf(first.candidate[R_DUE])
    asked = plain.walk(
        places, first.plain_table(), EDGE_LIST, GRID_LIST, hosts, pace, plain.Resident.of(first.candidate.tolist()),
        least_first=least_first, grow=first.grow, waive=waive, now=now,
    )  # fmt: skip
    tried, out = np.zeros(len(instances), np.int64), np.zeros((len(instances), F_COLUMNS))

    def walked(whole: bool) -> tuple[bool, int]:
        arena.insts[:, kernels.I_GAUGED] = -1.0
        codes, reserves = (np.array(column) for column in zip(*hosts, strict=True))
        admits, count = kernels.walk(
            arena.profiles, arena.insts, arena.rows, arena.gauges, first.table, EDGES, GRID, 1.0,
            np.zeros(len(instances), np.bool_), codes, reserves, pace, first.candidate, least_first, first.grow,
            kernels.ALL_TESTS, waive, whole, now, tried, out,
        )  # fmt: skip
        return admits, count

    admits, count = walked(True)
    assert admits == (bool(asked) and asked[-1][1].admit)
    assert [places[at] for at in tried[:count]] == [place for place, _ in asked]
    peaks = [margins.peak for _, margins in asked]
    assert out[:count, F_PEAK].tolist() == near(peaks)
    hasty, count = walked(False)
    assert hasty == admits
    if admits:
        assert places[tried[count - 1]] is asked[-1][0]


@settings(max_examples=80)
@given(cases(), st.lists(rows(candidate=True), min_size=1, max_size=6), st.data())
def test_a_queue_is_picked_from_as_by_the_plain_rule(
    case: Case, waiting: list[list[float]], data: st.DataObject
) -> None:
    queue = np.array(waiting)
    queue[:, R_KEY] = queue[:, R_DUE]
    late = np.array([data.draw(st.booleans()) for _ in waiting])
    late |= queue[:, R_DUE] == math.inf
    most = data.draw(st.integers(0, 4))
    case.inst[I_COUNT], case.inst[I_ENDS], case.inst[I_WAITS], case.inst[I_ROLLED] = case.count, NOW + 0.004, 1.0, NOW
    case.inst[kernels.I_GAUGED] = -1.0
    side = case.plainly()
    place = plain.Place(case.profile, side.station, side.residents, 0.0, 0.0, NOW + 0.004)
    wanted = plain.pick(
        place, case.plain_table(), EDGE_LIST, GRID_LIST,
        [(plain.Resident.of(row), bool(gone)) for row, gone in zip(queue.tolist(), late, strict=True)], most,
        grow=case.grow, now=NOW,
    )  # fmt: skip
    own = np.zeros((max(case.count, 1), R_COLUMNS))
    own[: case.count] = case.rows
    at, _ = kernels.pick(
        case.profile.packed, case.inst, own, np.zeros((G_ROWS, len(GRID))), case.table, EDGES, GRID, 1.0, queue,
        late, 0, len(queue), 0, most, case.inst[I_PACE], case.grow, kernels.ALL_TESTS, NOW, np.zeros(F_COLUMNS),
    )  # fmt: skip
    assert at == wanted


def test_an_arena_keeps_its_books_when_it_grows() -> None:
    steady = Profile("steady", (0.0, 256.0), (0.01, 0.01), 0.0, 0.0, 0.0, Limits(10**6, 512, 600))
    fleet, lengths = Fleet(["t"]), LengthModel(1, 64)
    for n in range(5):
        books = Books(Instance(f"i{n}", "steady"), steady, Settings(), lengths)
        books.state, books.tier, books.pace_s = State.READY, "t", 0.01 * (n + 1)
        fleet.add(books)
        for at in range(20 * n):
            books.add(Job(Request(f"{n}/{at}", 0.0, 8 + at, Slo(1.0, 0.1)), "t", Slo(1.0, 0.1), 8 + at), 0.0)
    fleet.remove("i1")
    for n in (0, 2, 3, 4):
        books = fleet.books[f"i{n}"]
        assert books.pace_s == 0.01 * (n + 1)
        assert sorted(books.rows[:, R_PROMPT]) == [8 + at for at in range(20 * n)]
        assert np.shares_memory(books.numbers[1], fleet.arena.rows)
