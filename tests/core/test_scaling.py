"""Tier sizes: what demand needs, how it is split and rounded, and what a look asks of the fleet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import STEADY, TIERS, Crew

from polyserve.core.bound import instance_rate
from polyserve.core.fleet import State
from polyserve.core.scaling import HYSTERESIS, MEMORY_S, MOST_GROWTH, Demand, Plan, Scaler, shares, sizes
from polyserve.core.types import Tier

TIGHT, MIDDLE, LOOSE = TIERS


# --------------------------------------------------------------------------------------------------- demand


def steady(demand: Demand, tier: Tier, per_second: int, seconds: int, prompt: int = 100, output: int = 50) -> float:
    """Arrivals and ends at an even rate, looked at every second; returns when they end."""
    for second in range(seconds):
        for n in range(per_second):
            demand.arrived(second + n / per_second, tier.name, prompt)
            demand.ended(tier.name, prompt, output)
        demand.fade(second + 1.0)
    return float(seconds)


@pytest.mark.parametrize("seconds", [5, 30, 200])
def test_the_rate_is_that_of_the_arrivals_early_and_late(seconds: int) -> None:
    demand = Demand(TIERS, 256)
    now = steady(demand, TIGHT, 10, seconds)
    assert demand.rate(now, "tight") == pytest.approx(10, rel=0.05)
    assert demand.rate(now, "loose") == 0.0


def test_the_rate_follows_a_change() -> None:
    demand = Demand(TIERS, 256)
    now = steady(demand, TIGHT, 10, 100)
    demand.fade(now + 60.0)
    assert demand.rate(now + 60.0, "tight") < 2.0


def test_nothing_arrived_needs_nothing() -> None:
    demand = Demand(TIERS, 256)
    assert demand.rate(5.0, "tight") == 0.0
    assert demand.need(5.0, TIGHT, demand.seconds_per_request(TIGHT, STEADY)) == 0.0
    assert demand.seconds_per_request(TIGHT, STEADY) == 0.0
    assert demand.admitted_share("tight") == 1.0


def test_the_need_is_the_rate_over_what_an_instance_serves_at_best() -> None:
    demand = Demand(TIERS, 50)
    now = steady(demand, TIGHT, 10, 200)
    served = instance_rate(STEADY, 100, 50, 100 + 25.5, 0.5 * 100 * 100, TIGHT.tpot_s)
    assert demand.need(now, TIGHT, demand.seconds_per_request(TIGHT, STEADY)) == pytest.approx(10 / served, rel=0.05)


def test_a_tighter_pace_needs_more() -> None:
    demand = Demand(TIERS, 50)
    for tier in TIERS:
        steady(demand, tier, 10, 60)
    needs = [demand.need(60.0, tier, demand.seconds_per_request(tier, STEADY)) for tier in TIERS]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > needs[2]


def test_the_admitted_share_is_admitted_over_arrived() -> None:
    demand = Demand(TIERS, 50)
    for n in range(8):
        demand.arrived(0.0, "loose", 10)
        if n % 4 == 0:
            demand.admitted("loose")
    assert demand.admitted_share("loose") == pytest.approx(0.25)


# ---------------------------------------------------------------------------------------------------- shares

needs = st.lists(st.floats(0, 20), min_size=3, max_size=3)
weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 4.0]), min_size=3, max_size=3)
rules = st.sampled_from(["demand", "weight", "cost"])


def split(needs: list[float], weights: list[float], total: float, rule: str) -> list[float]:
    tiers = [dataclasses.replace(tier, weight=weight) for tier, weight in zip(TIERS, weights, strict=True)]
    return shares(needs, tiers, [3.0, 1.0, 2.0], total, rule)  # type: ignore[arg-type]


@given(needs, weights, st.floats(0, 30), rules)
def test_no_more_is_given_than_there_is(needs: list[float], weights: list[float], total: float, rule: str) -> None:
    given_ = split(needs, weights, total, rule)
    assert all(part >= 0.0 for part in given_)
    assert sum(given_) <= total + 1e-6
    if total < sum(needs):
        assert all(part <= need + 1e-6 for part, need in zip(given_, needs, strict=True))
        if rule != "weight":
            assert sum(given_) == pytest.approx(total, abs=1e-6), "none is left over while somebody is short"


def test_plenty_is_spread_in_proportion_to_need() -> None:
    for rule in ("demand", "weight", "cost"):
        assert split([1.0, 2.0, 1.0], [1.0, 1.0, 1.0], 8.0, rule) == [2.0, 4.0, 2.0]


def test_by_demand_everybody_is_short_by_the_same_part() -> None:
    assert split([4.0, 2.0, 2.0], [1.0, 9.0, 1.0], 4.0, "demand") == [2.0, 1.0, 1.0]


def test_by_cost_the_cheapest_requests_are_served_first() -> None:
    assert split([4.0, 2.0, 2.0], [1.0, 1.0, 1.0], 5.0, "cost") == [1.0, 2.0, 2.0]
    assert split([4.0, 2.0, 2.0], [1.0, 1.0, 1.0], 3.0, "cost") == [0.0, 2.0, 1.0]


def test_by_weight_the_heavier_get_the_larger_part_of_their_need_and_never_more() -> None:
    assert split([4.0, 4.0, 4.0], [2.0, 1.0, 1.0], 4.0, "weight") == pytest.approx([2.0, 1.0, 1.0])
    assert split([4.0, 4.0, 4.0], [8.0, 1.0, 1.0], 6.0, "weight") == pytest.approx([4.0, 1.0, 1.0])
    assert split([4.0, 4.0, 4.0], [1.0, 0.0, 1.0], 4.0, "weight") == pytest.approx([2.0, 0.0, 2.0])


# ----------------------------------------------------------------------------------------------------- sizes

counts = st.lists(st.integers(0, 6), min_size=3, max_size=3)


@given(needs, st.integers(0, 20), counts, counts)
def test_sizes_never_exceed_the_total(exact: list[float], total: int, now: list[int], floors: list[int]) -> None:
    sized = sizes(exact, total, now, floors)
    assert all(size >= 0 for size in sized)
    assert sum(sized) <= total
    if sum(floors) <= total and sum(sized) < total:
        assert all(size >= floor for size, floor in zip(sized, floors, strict=True))


@given(needs, st.integers(0, 80))
def test_each_boundary_is_rounded_up_from_the_tightest(exact: list[float], total: int) -> None:
    """From far away, where no size is kept: any number of the tightest tiers together have what they need."""
    sized = sizes(exact, total, [1000, 0, 0], [0, 0, 0])
    for size, boundary in zip(accumulate(sized), accumulate(exact), strict=True):
        assert size == min(math.ceil(boundary - 1e-9), total)


@given(needs, st.integers(0, 20), counts)
def test_sizes_that_were_taken_stay_while_nothing_changes(exact: list[float], total: int, now: list[int]) -> None:
    none = [0, 0, 0]
    settled = sizes(exact, total, now, none)
    for _ in range(3):
        settled = sizes(exact, total, settled, none)
    assert sizes(exact, total, settled, none) == settled


def test_a_boundary_moves_only_once_it_is_clearly_elsewhere() -> None:
    above, beyond = 3.0 + 0.9 * HYSTERESIS, 3.0 + 1.1 * HYSTERESIS
    for exact, size in ((1.7, 2), (2.0, 3), (2.1, 3), (3.0, 3), (above, 3), (beyond, 4)):
        assert sizes([exact], 9, [3], [0]) == [size], exact


def test_what_nobody_needs_is_not_kept() -> None:
    assert sizes([0.0, 0.5, 0.0], 9, [1, 1, 1], [0, 0, 0]) == [0, 1, 0]
    assert sizes([2.1, 0.0, 0.0], 9, [2, 0, 0], [0, 0, 0]) == [2, 0, 0]


def test_floors_are_kept_tightest_first() -> None:
    assert sizes([0.0, 0.0, 5.0], 5, [0, 0, 5], [2, 1, 1]) == [2, 1, 2]
    assert sizes([0.0, 0.0, 0.0], 3, [0, 0, 0], [2, 2, 2]) == [2, 1, 0]


# ----------------------------------------------------------------------------------------------------- looks


def scaler(crew: Crew) -> Scaler:
    return Scaler(crew.settings, crew.tiers, crew.fleet, crew.demand)


def busy(crew: Crew, tier: str, instances: float) -> None:
    """Arrivals that fill so many instances of a tier as planned."""
    crew.demand.arrived(0.0, tier, 100)
    cost_s = crew.demand.seconds_per_request(crew.tier(tier), STEADY)
    one = crew.demand.need(0.0, crew.tier(tier), cost_s) / crew.settings.planned_load
    for _ in range(int(instances / one) - 1):
        crew.demand.arrived(0.0, tier, 100)


def moves(plan: Plan) -> list[tuple[str, str | None]]:
    return [(books.id, tier) for books, tier in plan.assign]


def elastic(*tiers: Tier, **switches: object) -> Crew:
    return Crew(tiers or TIERS, switches={"max_instances": 8, **switches})


def test_a_fixed_fleet_is_split_by_demand() -> None:
    crew = Crew()
    for n in range(6):
        crew.instance(f"i{n}")
    look = scaler(crew)
    for tier, amount in (("tight", 1.0), ("middle", 1.0), ("loose", 1.0)):
        busy(crew, tier, amount)
    plan = look.look(0.0, [], 0)
    names = ("tight", "tight", "middle", "middle", "loose", "loose")
    assert moves(plan) == [(f"i{n}", tier) for n, tier in enumerate(names)]
    assert look.wanted == {"tight": 2, "middle": 2, "loose": 2}
    assert (plan.start, plan.stop) == (0, [])


def test_without_demand_nothing_moves() -> None:
    crew = Crew()
    crew.instance("i0", "tight")
    crew.instance("i1")
    assert moves(scaler(crew).look(0.0, [], 0)) == []


def test_the_least_loaded_instance_of_the_tier_with_most_to_spare_changes_tier() -> None:
    crew = Crew()
    for n, residents in enumerate((3, 1, 2)):
        crew.instance(f"i{n}", "loose", residents)
    crew.instance("i3", "middle", 1)
    busy(crew, "tight", 1.0)
    busy(crew, "middle", 1.0)
    assert moves(scaler(crew).look(0.0, [], 0)) == [("i1", "tight"), ("i2", "tight"), ("i0", "middle")]


def test_without_relabelling_only_the_pool_gives() -> None:
    crew = Crew(switches={"relabel": False})
    crew.instance("i0", "loose")
    crew.instance("i1", "loose")
    busy(crew, "tight", 2.0)
    assert moves(scaler(crew).look(0.0, [], 0)) == []


def test_a_waiting_tier_starts_one_each_within_the_budget() -> None:
    cases: list[tuple[dict[str, object], list[str], int, int]] = [
        ({}, ["tight"], 0, 1),
        ({}, ["tight", "loose"], 0, 2),
        ({}, ["tight", "loose"], 1, 1),  # one is on its way
        ({}, [], 0, 0),
        ({"max_instances": 2}, ["tight", "loose"], 0, 1),
        ({"start_step": 1}, ["tight", "loose"], 0, 1),
        ({"start_step": 1}, ["tight", "loose"], 1, 0),
        ({"min_instances": 3}, [], 0, 2),
    ]
    for switches, waiting, starting, start in cases:
        crew = elastic(sizing="pending", **switches)
        crew.instance("i0", "middle", 1)
        assert scaler(crew).look(0.0, waiting, starting).start == start, (switches, waiting, starting)


def test_a_waiting_tier_starts_nothing_while_the_pool_has_one() -> None:
    crew = elastic(sizing="pending")
    crew.instance("i0")
    assert scaler(crew).look(0.0, ["tight"], 0).start == 0


def test_an_instance_that_drains_is_still_paid_for() -> None:
    crew = elastic(sizing="pending", max_instances=2)
    crew.instance("i0", "tight", 1)
    crew.instance("i1", "tight", 1).state = State.DRAINING
    assert scaler(crew).look(0.0, ["tight"], 0).start == 0


def test_instances_are_started_for_the_demand_that_is_coming() -> None:
    for predictive, start in ((True, 3), (False, 0)):
        crew = elastic(predictive=predictive)
        crew.instance("i0", "tight", 1)
        busy(crew, "tight", 3.5)
        assert scaler(crew).look(0.0, [], 0).start == start


def test_minimum_counts_of_tiers_are_started() -> None:
    tiers = (dataclasses.replace(TIGHT, min_instances=2), MIDDLE, dataclasses.replace(LOOSE, min_instances=1))
    assert scaler(elastic(*tiers, sizing="pending")).look(0.0, [], 0).start == 3


def looked(crew: Crew, times: int) -> list[list[tuple[str, str | None]]]:
    """What so many looks move; each move is carried out."""
    look, seen = scaler(crew), []
    for n in range(times):
        plan = look.look(float(n), [], 0)
        seen.append(moves(plan))
        for books, tier in plan.assign:
            books.tier, books.empty_looks = tier, 0
    return seen


def test_a_tail_empty_at_two_looks_goes_to_the_pool() -> None:
    crew = elastic(sizing="pending")
    crew.instance("i0", "tight", 1)
    crew.instance("i1", "tight")
    assert looked(crew, 2) == [[], [("i1", None)]]


def test_a_tail_that_was_used_between_two_looks_stays() -> None:
    crew = elastic(sizing="pending")
    books = crew.instance("i0", "tight")
    look = scaler(crew)
    look.look(0.0, [], 0)
    crew.resident(books, "r", "tight")
    look.look(1.0, [], 0)
    books.remove("r")
    assert moves(look.look(2.0, [], 0)) == []


def test_best_effort_alone_does_not_keep_an_instance_in_its_tier() -> None:
    crew = elastic(sizing="pending")
    crew.resident(crew.instance("i0", "tight"), "free", None)
    assert looked(crew, 2) == [[], [("i0", None)]]


def test_a_tail_stays_where_a_minimum_asks_for_it() -> None:
    crew = elastic(dataclasses.replace(TIGHT, min_instances=1), MIDDLE, LOOSE, sizing="pending")
    crew.instance("i0", "tight")
    crew.instance("i1", "tight")
    assert looked(crew, 3) == [[], [("i0", None)], []]


def stops(now: float, waiting: tuple[str, ...] = (), starting: int = 0, **switches: object) -> list[str]:
    """Whom one look stops: i0 serves, i1 is in the pool since 0, i2 too but for a best-effort resident."""
    crew = elastic(**{"sizing": "pending", "keep_warm_s": 10.0, **switches})
    crew.instance("i0", "tight", 1)
    crew.instance("i1")
    crew.resident(crew.instance("i2"), "free", None)
    return [books.id for books in scaler(crew).look(now, waiting, starting).stop]


def test_an_idle_instance_is_stopped_after_its_warm_time() -> None:
    assert stops(9.9) == []
    assert stops(10.0) == ["i1"]


@pytest.mark.parametrize("reason", [{"waiting": ("loose",)}, {"starting": 1}, {"min_instances": 3}])
def test_nothing_is_stopped_while_it_may_be_wanted(reason: Mapping[str, object]) -> None:
    assert stops(99.0, **reason) == []  # type: ignore[arg-type]


def test_a_fixed_fleet_neither_starts_nor_stops() -> None:
    crew = Crew(switches={"sizing": "pending", "keep_warm_s": 0.0})
    crew.instance("i0")
    plan = scaler(crew).look(99.0, ["tight"], 0)
    assert (plan.start, plan.stop) == (0, [])


def test_a_fleet_without_requests_shrinks_to_its_minimum() -> None:
    for least in (0, 1):
        crew = elastic(keep_warm_s=5.0, min_instances=least)
        for n in range(3):
            crew.instance(f"i{n}", "tight" if n else "loose")
        busy(crew, "tight", 2.0)
        busy(crew, "loose", 0.5)
        look, now = scaler(crew), 0.0
        while now < 1000.0 and crew.fleet.ready():
            now += 1.0
            plan = look.look(now, [], 0)
            for books, tier in plan.assign:
                books.tier, books.since, books.empty_looks = tier, now, 0
            for books in plan.stop:
                crew.fleet.remove(books.id)
        assert len(crew.fleet.ready()) == least


# -------------------------------------------------------------------------------------------------- what is coming


def ramp(rate_at: Callable[[int], float], seconds: int) -> Demand:
    """Arrivals evenly within each second, at the rate of that second."""
    demand = Demand(TIERS, 100)
    for second in range(seconds):
        count = round(rate_at(second))
        for n in range(count):
            demand.arrived(second + n / count, TIERS[n % len(TIERS)].name, 100)
        demand.fade(second + 1.0)
    return demand


def test_a_ramp_is_foreseen_for_when_an_instance_would_be_ready() -> None:
    demand = ramp(lambda second: 1.0 * second, 240)
    known = sum(demand.rate(240.0, tier.name) for tier in TIERS)
    for ahead_s in (0.0, 30.0):
        assert known * demand.growth(240.0, ahead_s) == pytest.approx(240.0 + ahead_s, rel=0.06)


def test_steady_or_falling_traffic_is_not_expected_to_grow() -> None:
    assert ramp(lambda second: 50.0, 120).growth(120.0, 60.0) == 1.0
    assert ramp(lambda second: 200.0 - second, 120).growth(120.0, 60.0) == 1.0


def test_a_burst_is_expected_to_double_at_most() -> None:
    assert ramp(lambda second: 10.0 if second < 110 else 200.0, 120).growth(120.0, 120.0) == MOST_GROWTH


def test_a_long_silence_is_survived() -> None:
    demand = ramp(lambda second: 50.0, 10)
    demand.arrived(1e6, TIERS[0].name, 100)
    assert demand.rate(1e6, TIERS[0].name) == pytest.approx(1.0 / MEMORY_S)
