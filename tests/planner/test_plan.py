"""Plans of small fleets: what is found holds, one less does not, and more demand never needs fewer."""

from __future__ import annotations

import dataclasses

import pytest
from plan_scenes import PROFILE, TPOTS, small

from polyserve.planner.ask import Load, PlanError, Rival, Shift
from polyserve.planner.bench import Bench
from polyserve.planner.plan import Plan, confirmed, make_plan, size
from polyserve.planner.search import smallest
from polyserve.planner.trial import Fleet, Tally, Trial

KINDS = (PROFILE, "h200-llama-3-8b")
FLEET = Fleet(PROFILE, 0, "polyserve")


@pytest.fixture(scope="module")
def plan() -> Plan:
    shifts = (Shift("prompts x1.5", prompts_by=1.5), Shift("30 ms x1.5", (("30", 1.5),)))
    return make_plan(small(shifts=shifts, compare=(Rival("minimal"),), prices={PROFILE: 2.0}))


def test_the_planned_fleet_attains_the_target_and_one_less_does_not(plan: Plan) -> None:
    (kind,) = plan.kinds
    assert kind.planned is not None
    assert kind.smaller is not None
    assert kind.planned.trial.attains(0.9)
    assert not kind.smaller.attains(0.9)
    assert kind.planned.trial.seeds == kind.smaller.seeds == (0, 1)
    assert kind.planned.fleet.instances >= kind.planned.bound * 0.8
    assert kind.planned.worst_seed.worst[1] <= kind.planned.trial.worst[1]


def test_the_headroom_is_a_rate_that_the_planned_fleet_bears(plan: Plan) -> None:
    (kind,) = plan.kinds
    assert kind.planned is not None
    assert kind.headroom is not None
    assert 1.0 <= kind.headroom.factor <= 4.0
    ask = plan.ask
    fleet = kind.planned.fleet
    more = dataclasses.replace(ask.load, rate_by=kind.headroom.factor)
    assert kind.headroom.factor == 1.0 or Bench(ask).holds(fleet, more)
    assert kind.headroom.breaks in ("30", "100")


def test_longer_prompts_need_more_instances_and_hurt_the_planned_fleet(plan: Plan) -> None:
    (kind,) = plan.kinds
    longer, tighter = kind.shifts
    assert kind.planned is not None
    assert longer.instances is not None
    assert longer.planned is not None
    assert longer.instances > kind.planned.fleet.instances
    assert longer.bound > kind.planned.bound
    assert not longer.planned.attains(0.9)
    assert [round(share, 3) for _, share in tighter.load.tpots] == [0.75, 0.25]


def test_a_rival_is_planned_for_at_its_best_chunk(plan: Plan) -> None:
    (kind,) = plan.kinds
    (rival,) = kind.compared
    assert rival.policy == "minimal"
    assert rival.chunk is not None
    assert rival.chunk.tokens in (256, 512, 2048)
    assert rival.instances is None or rival.best.worst[1] >= 0.9 - 0.05  # its verdict may rest on one seed


def test_the_only_kind_is_the_best_and_costs_its_price(plan: Plan) -> None:
    assert plan.best is plan.kinds[0]
    assert plan.kinds[0].planned is not None
    assert plan.per_hour(plan.best.planned) == 2.0 * plan.kinds[0].planned.fleet.instances


def test_more_load_never_needs_fewer_instances() -> None:
    bench = Bench(small(seeds=1))
    counts = [size(bench, FLEET, Load(TPOTS, rate_by=by)).fleet.instances for by in (0.5, 2.0)]
    assert counts[0] < counts[1]


def test_a_lower_target_never_needs_more_instances() -> None:
    counts = []
    for target in (0.5, 0.9):
        sized = size(Bench(small(target=target, seeds=1)), FLEET, Load(TPOTS))
        assert sized.trial.attains(target)
        counts.append(sized.fleet.instances)
    assert counts == sorted(counts)


def test_the_same_question_has_the_same_answer_in_one_process_or_two() -> None:
    ask = small(seeds=1)
    assert make_plan(ask).kinds == make_plan(ask, jobs=2).kinds


def test_the_cheapest_kind_is_the_best_where_there_are_prices(plan: Plan) -> None:
    (kind,) = plan.kinds
    assert kind.planned is not None
    fleet = dataclasses.replace(kind.planned.fleet, profile=KINDS[1])
    other = dataclasses.replace(kind, profile=KINDS[1], sized=dataclasses.replace(kind.planned, fleet=fleet))
    for prices, best in (({KINDS[0]: 9.0, KINDS[1]: 0.1}, other), ({KINDS[0]: 0.1, KINDS[1]: 9.0}, kind), ({}, None)):
        ask = dataclasses.replace(plan.ask, profiles=KINDS, prices=prices)
        assert Plan(ask, [kind, other], 0.0).best is best


def test_a_target_that_no_size_attains_gives_the_best_found() -> None:
    plan = make_plan(small(max_instances=1, rate=12.0))
    (kind,) = plan.kinds
    assert kind.planned is None
    assert plan.best is None
    assert kind.sized is not None
    assert (kind.sized.fleet.instances, kind.sized.most) == (1, 1)
    assert kind.headroom is None
    assert kind.shifts == []


def test_a_kind_that_cannot_hold_a_pace_is_left_out_and_says_so() -> None:
    plan = make_plan(small(tpots=((0.009, 1.0),), profiles=KINDS, rate=2.0, trace="uniform:200/20", seeds=1))
    able = {kind.profile: kind.problem for kind in plan.kinds}
    assert able["h200-llama-3-8b"] is None
    assert "can hold TPOT 9 ms" in str(able[PROFILE])
    with pytest.raises(PlanError, match="can hold TPOT 9 ms"):
        make_plan(small(tpots=((0.009, 1.0),)))


def test_a_shift_that_nobody_can_serve_says_so_and_spoils_nothing_else() -> None:
    plan = make_plan(small(shifts=(Shift("prompts x9", prompts_by=9.0),), seeds=1))
    (shifted,) = plan.kinds[0].shifts
    assert plan.kinds[0].planned is not None
    assert "an idle instance would be late" in str(shifted.problem)
    assert shifted.instances is None


def test_confirming_goes_up_and_down_to_where_the_law_changes() -> None:
    def over(count: int) -> Trial:
        return Trial((0,), {"20": Tally(100, 100 if count >= 7 else 50)}, {}, 0.0, 1.0, 1, 100, 0)

    assert confirmed(over, 4, 20, 0.99) == confirmed(over, 7, 20, 0.99) == confirmed(over, 12, 20, 0.99) == 7
    assert confirmed(over, 4, 6, 0.99) is None
    assert smallest(lambda count: over(count).attains(0.99), 4, 20) == 7


def test_tiers_are_those_of_the_question(plan: Plan) -> None:
    assert plan.kinds[0].planned is not None
    assert set(plan.kinds[0].planned.trial.tiers) == {f"{tpot_s * 1e3:g}" for tpot_s, _ in TPOTS}
