"""The controller, rule by rule: each where it shows."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from body import CRAMPED, Body, Fate, Life
from scenes import STEADY, TIERS

from polyserve.core.controller import Controller
from polyserve.core.profile import Profile
from polyserve.core.settings import policy
from polyserve.core.types import (
    Action,
    Assign,
    Broken,
    Corrected,
    Dispatch,
    Drain,
    Evict,
    Finished,
    FirstToken,
    Preempted,
    Progressed,
    Reported,
    SetPace,
    Slo,
    Start,
    Stop,
    Tick,
    Tier,
)


def fixed(ready: int = 1, tiers: tuple[Tier, ...] = TIERS, profile: Profile = STEADY, **values: object) -> Body:
    return Body(policy("polyserve", {"look_s": 0.5, **values}), tiers, profile, ready)


def elastic(ready: int = 0, **values: object) -> Body:
    return fixed(ready, **{"max_instances": 4, **values})  # type: ignore[arg-type]


def refusal(body: Body, id: str) -> str | None:
    refused = body.streams[id].refusal
    return refused.code if refused else None


def dispatches(actions: list[Action]) -> list[tuple[str, str]]:
    return [(action.request, action.instance) for action in actions if isinstance(action, Dispatch)]


def fill(body: Body, id: str = "big", tpot_s: float = 0.1) -> None:
    """A resident that takes nearly all memory of one instance."""
    body.arrive(id, Slo(100.0, tpot_s), prompt=99_000, most=200)
    assert body.streams[id].fate is Fate.RUNS


# ---- binning


@pytest.mark.parametrize(
    ("tpot_s", "tier"),
    [(0.02, "tight"), (0.049, "tight"), (0.05, "middle"), (0.0999, "middle"), (0.1, "loose"), (9.0, "loose")],
)
def test_a_request_falls_into_the_loosest_tier_that_is_no_looser(tpot_s: float, tier: str) -> None:
    body = fixed()
    body.arrive("r", Slo(1.0, tpot_s))
    [dispatch] = body.streams["r"].dispatches
    assert (dispatch.tier, dispatch.host, dispatch.slo) == (tier, tier, Slo(1.0, tpot_s))


def test_a_pace_that_no_tier_has_is_refused() -> None:
    body = fixed()
    body.arrive("r", Slo(1.0, 0.0199))
    assert refusal(body, "r") == "slo_infeasible"


def test_a_first_token_that_even_an_idle_instance_would_bring_late_is_refused() -> None:
    """400 tokens take 50 ms."""
    body = fixed()
    for id, ttft_s in (("hopeless", 0.049), ("just", 0.0505)):
        body.arrive(id, Slo(ttft_s, 0.1), prompt=400)
    assert refusal(body, "hopeless") == "slo_infeasible"
    assert body.streams["just"].fate is Fate.RUNS


@pytest.mark.parametrize("values", [{"infeasible": "best_possible"}, {"on_late": "never"}])
def test_or_it_gets_the_best_there_is(values: dict[str, object]) -> None:
    body = fixed(**values)  # type: ignore[arg-type]
    body.arrive("r", Slo(0.01, 0.001), prompt=400)
    [dispatch] = body.streams["r"].dispatches
    assert dispatch.slo is not None
    assert dispatch.slo.ttft_s == pytest.approx(0.05)
    assert (dispatch.slo.tpot_s, dispatch.tier) == (0.02, "tight")


def test_prompt_and_answer_must_fit_the_context_and_the_memory() -> None:
    short = dataclasses.replace(STEADY, limits=dataclasses.replace(STEADY.limits, context_tokens=1000))
    for body, most in ((fixed(profile=short), 1000), (fixed(), 100_000)):
        body.arrive("fits", Slo(100.0, 0.1), prompt=most - 50, most=50)
        body.arrive("exceeds", Slo(100.0, 0.1), prompt=most - 50, most=51)
        body.arrive("too long", None, prompt=most, most=None)
        assert refusal(body, "fits") is None
        assert refusal(body, "exceeds") == refusal(body, "too long") == "context_length_exceeded"


def test_an_instance_with_less_memory_than_its_profile_says_counts_as_it_is() -> None:
    body = fixed(ready=0)
    body.join("small", kv_tokens=500)
    body.ready("small")
    body.arrive("r", Slo(1.0, 0.1), prompt=600, most=50)
    assert refusal(body, "r") == "context_length_exceeded"


def test_a_dispatch_says_when_the_first_token_is_expected() -> None:
    body = fixed()
    body.wait(3.0)
    body.arrive("r", Slo(1.0, 0.1), prompt=400)
    [dispatch] = body.streams["r"].dispatches
    assert dispatch.predicted_ttft_s == pytest.approx(0.05, abs=0.002)


# ---- waiting


def test_a_request_waits_for_room_and_gets_it() -> None:
    body = fixed()
    fill(body)
    body.arrive("r", Slo(9.0, 0.1), prompt=2000)
    assert body.streams["r"].fate is Fate.WAITS
    assert dispatches(body.finish("big")) == [("r", "m0")]


def test_a_client_that_goes_leaves_its_room() -> None:
    body = fixed()
    fill(body)
    body.arrive("r", Slo(9.0, 0.1), prompt=2000)
    body.arrive("s", Slo(9.0, 0.1), prompt=2000)
    assert body.leave("r") == []
    assert dispatches(body.leave("big")) == [("s", "m0")]


def test_who_waits_beyond_hope_is_refused_on_the_spot() -> None:
    """2000 tokens take 240 ms: at 760 ms it is over."""
    body = fixed()
    fill(body)
    body.arrive("r", Slo(1.0, 0.1), prompt=2000)
    body.wait(0.755)
    assert body.streams["r"].fate is Fate.WAITS
    body.wait(0.01)
    assert refusal(body, "r") == "overloaded"


@pytest.mark.parametrize("rule", ["serve_late", "never"])
def test_or_it_is_served_late(rule: str) -> None:
    body = fixed(on_late=rule)
    fill(body)
    body.arrive("r", Slo(1.0, 0.1), prompt=2000)
    body.wait(30.0)
    assert body.streams["r"].fate is Fate.WAITS
    assert dispatches(body.finish("big")) == [("r", "m0")]


@pytest.mark.parametrize("rule", ["serve_late", "never"])
def test_an_idle_instance_serves_who_is_late_though_nothing_happens_on_it(rule: str) -> None:
    """Asked for while nobody knew how fast instances are; by then it cannot be in time, and later it is just late."""
    body = elastic(on_late=rule, sizing="pending", head_walk=0)
    body.arrive("r", Slo(0.01, 0.1), prompt=400)
    for id in ("m0", "m1"):
        body.join(id)
        body.ready(id)
    body.arrive("other", Slo(0.01, 0.02), prompt=400)
    body.wait(3.0)
    assert {stream.fate for stream in body.streams.values()} == {Fate.RUNS}


def test_a_tier_may_have_a_rule_of_its_own() -> None:
    tiers = (*TIERS[:2], dataclasses.replace(TIERS[2], on_late="serve_late"))
    body = fixed(tiers=tiers)
    fill(body)
    body.arrive("loose", Slo(1.0, 0.1), prompt=2000)
    body.arrive("middle", Slo(1.0, 0.06), prompt=2000)
    body.wait(5.0)
    assert body.streams["loose"].fate is Fate.WAITS
    assert refusal(body, "middle") == "overloaded"


def test_a_queue_may_have_a_bound() -> None:
    body = fixed(queue_limit=2)
    fill(body)
    for id in "abc":
        body.arrive(id, Slo(9.0, 0.1), prompt=2000)
    assert [refusal(body, id) for id in "abc"] == [None, None, "queue_full"]


def test_a_wait_may_have_a_bound() -> None:
    body = fixed(queue_timeout_s=2.0)
    fill(body)
    body.arrive("r", Slo(9.0, 0.1), prompt=2000)
    body.arrive("free", None, prompt=2000)
    body.wait(1.9)
    assert len(body.of(Fate.WAITS)) == 2
    body.wait(1.0)
    assert refusal(body, "r") == refusal(body, "free") == "queue_timeout"


def test_an_arrival_behind_a_queue_that_drains_too_slowly_is_refused_early() -> None:
    body = fixed(profile=CRAMPED)
    for n in range(30):
        body.arrive(f"r{n}", Slo(4.0, 0.1), prompt=200)
    waiting = len(body.of(Fate.WAITS))
    assert waiting > 20, "nothing is known of the drain yet"
    for _ in range(3):
        body.wait(0.5)
        body.finish(body.of(Fate.RUNS)[0].id)
    body.arrive("late", Slo(4.0, 0.1), prompt=200)
    body.arrive("patient", Slo(400.0, 0.1), prompt=200)
    assert refusal(body, "late") == "overloaded"
    assert body.streams["late"].refusal is not None
    assert (body.streams["late"].refusal.retry_after_s or 0) > 1.0
    assert refusal(body, "patient") is None


def test_the_surer_a_refusal_has_to_be_the_later_it_comes() -> None:
    refused = []
    for confidence in (0.0, 0.6, 0.8, 0.95, 1.0):
        body = fixed(profile=CRAMPED, confidence=confidence)
        for n in range(20):
            body.arrive(f"r{n}", Slo(9.0, 0.1), prompt=200)
        body.wait(1.0)
        body.finish(body.of(Fate.RUNS)[0].id)
        for n in range(60):
            body.arrive(f"s{n}", Slo(4.0 + n, 0.1), prompt=200)
        refused.append(len(body.of(Fate.REFUSED)))
    assert refused == sorted(refused, reverse=True)
    assert len(set(refused)) >= 4


def test_nobody_overtakes_a_queue_of_earlier_deadlines() -> None:
    body = fixed(head_walk=0)
    fill(body)
    body.arrive("long", Slo(5.0, 0.1), prompt=2000)
    body.arrive("short", Slo(6.0, 0.1), prompt=10)
    assert [stream.id for stream in body.of(Fate.WAITS)] == ["long", "short"]


def test_a_corrected_prompt_is_judged_by_the_correction() -> None:
    body = fixed()
    fill(body)
    body.arrive("r", Slo(9.0, 0.1), prompt=2000)
    body.send(Corrected(body.now, "r", 10))
    job = body.controller.pending.get("r")
    assert job is not None
    assert job.latest_at > 9.0 - 0.1, "a short prompt may start late"
    assert dispatches(body.wait(1.0) + body.progress("m0")) == [("r", "m0")]


# ---- instances


def test_without_instances_a_fixed_fleet_refuses_and_an_elastic_one_starts_some() -> None:
    body = fixed(ready=0)
    body.arrive("r")
    assert refusal(body, "r") == "no_instances"
    body = elastic()
    started = [a for a in body.arrive("r", Slo(9.0, 0.1)) + body.wait(1.0) if isinstance(a, Start)]
    assert started == [Start("i1")]
    body.join("i1")
    assert dispatches(body.ready("i1")) == [("r", "i1")]


def test_an_instance_that_drains_gets_nobody_and_ends_no_stream() -> None:
    body = fixed(ready=2)
    body.arrive("r")
    [dispatch] = body.streams["r"].dispatches
    assert body.drain(dispatch.instance) == [Drain(dispatch.instance)]
    body.arrive("s")
    assert body.streams["s"].instance not in (None, dispatch.instance)
    assert body.lives[dispatch.instance] is Life.DRAINING
    assert body.drain(dispatch.instance) == [], "it was told already"
    assert Stop(dispatch.instance) in body.finish("r")


def test_an_empty_instance_that_is_drained_stops_at_once_and_only_once() -> None:
    body = fixed(ready=2)
    assert body.drain("m0") == [Drain("m0"), Stop("m0")]
    assert body.drain("m0") == []


def test_starts_that_fail_are_tried_again_at_growing_distance() -> None:
    body = elastic(look_s=0.1)
    body.arrive("r", Slo(500.0, 0.1))
    started: list[float] = []
    while len(started) < 6:
        for action in body.wait(0.1):
            if isinstance(action, Start):
                started.append(body.now)
                body.fail(action.instance)
    gaps = [round(b - a) for a, b in pairwise(started)]
    assert gaps == [2, 4, 8, 16, 32]


def test_a_start_that_works_ends_the_distance() -> None:
    body = elastic(look_s=0.1, sizing="pending")
    body.arrive("r", Slo(500.0, 0.1), prompt=90_000)
    body.fail(next(a.instance for a in body.wait(0.1) if isinstance(a, Start)))
    [start] = [a for a in body.wait(3.0) if isinstance(a, Start)]
    body.join(start.instance)
    body.ready(start.instance)
    body.lose(start.instance)
    again = next(a.instance for a in body.wait(0.2) if isinstance(a, Start))
    body.fail(again)
    assert [a for a in body.wait(1.8) if isinstance(a, Start)] == []
    assert [a for a in body.wait(0.3) if isinstance(a, Start)] != []


def test_a_start_that_never_ends_is_given_up() -> None:
    body = elastic(start_timeout_s=5.0)
    body.arrive("r", Slo(500.0, 0.1))
    [start] = [a for a in body.wait(1.0) if isinstance(a, Start)]
    assert Stop(start.instance) in body.wait(6.0)
    [start] = [a for a in body.wait(4.0) if isinstance(a, Start)]
    body.join(start.instance)
    assert Stop(start.instance) in body.wait(6.0), "one that joined and never got ready, too"


def test_an_idle_fleet_gives_its_instances_back_and_sleeps() -> None:
    body = elastic(ready=2, keep_warm_s=3.0)
    body.arrive("r")
    body.finish("r")
    body.wait(300.0)
    assert body.lives == {}
    assert body.controller.wake_at is None


def test_who_was_on_a_lost_instance_goes_on_elsewhere() -> None:
    body = fixed(ready=2)
    for id in "ab":
        body.arrive(id)
    instance = body.streams["a"].instance
    assert instance == body.streams["b"].instance
    assert instance is not None
    body.first_token("a")
    body.progress(instance, 6)
    actions = body.lose(instance)
    assert [(a.request, a.resume_from) for a in actions if isinstance(a, Dispatch)] == [("a", 7), ("b", 6)]


def test_a_broken_stream_goes_on_elsewhere() -> None:
    body = fixed(ready=2)
    body.arrive("r")
    instance = body.streams["r"].instance
    [dispatch] = [a for a in body.break_off("r", 3) if isinstance(a, Dispatch)]
    assert dispatch.instance != instance
    assert dispatch.resume_from == 3


@pytest.mark.parametrize(("tokens", "fate"), [(0, Fate.REFUSED), (3, Fate.RUNS)])
def test_where_there_is_no_elsewhere_only_a_stream_that_has_begun_comes_back(tokens: int, fate: Fate) -> None:
    body = fixed()
    body.arrive("r")
    body.break_off("r", tokens)
    assert body.streams["r"].fate is fate
    assert refusal(body, "r") == (None if tokens else "no_instances")


def test_a_stream_that_has_begun_is_never_refused_however_late() -> None:
    body = fixed(ready=2, queue_timeout_s=5.0)
    body.arrive("r", Slo(1.0, 0.02))
    body.break_off("r", 3)
    body.drain("m0")
    body.lose("m1")
    body.wait(60.0)
    assert body.streams["r"].fate is Fate.WAITS
    body.join("new")
    assert dispatches(body.ready("new")) == [("r", "new")]


def test_a_stream_that_waited_once_is_not_refused_for_that_wait_later() -> None:
    body = fixed()
    fill(body)
    body.arrive("r", Slo(1.0, 0.1), prompt=2000)  # beyond hope at 0.76, were it waiting then
    body.finish("big")
    body.first_token("r")
    body.drain("m0")
    body.join("m1")
    body.break_off("r")
    body.wait(5.0)
    assert body.streams["r"].fate is Fate.WAITS
    assert dispatches(body.ready("m1")) == [("r", "m1")]


def test_what_is_said_of_strangers_is_ignored() -> None:
    body = fixed()
    for event in (
        FirstToken(0.0, "ghost", "m0"), FirstToken(0.0, "ghost", "nowhere"), Finished(0.0, "ghost", "m0", 3),
        Broken(0.0, "ghost", "m0"), Broken(0.0, "ghost", "nowhere"), Preempted(0.0, "ghost", "m0"),
        Preempted(0.0, "ghost", "nowhere"), Progressed(0.0, "m0", {"ghost": 2}, {"other": 3}),
        Progressed(0.0, "nowhere"), Corrected(0.0, "ghost", 4), Reported(0.0, "nowhere", 1, 1),
    ):  # fmt: skip
        assert body.send(event) == [], event


# ---- pace and labels


def test_an_instance_runs_at_the_tightest_pace_that_anybody_on_it_needs() -> None:
    body = fixed()
    assert SetPace("m0", 0.05) in body.arrive("r", Slo(1.0, 0.05))
    assert body.controller.fleet.books["m0"].tier == "middle"
    body.arrive("guest", Slo(1.0, 0.1))
    assert body.streams["guest"].dispatches[0].promoted
    assert body.paces["m0"] == 0.05


def test_an_instance_whose_hosts_have_gone_takes_the_tier_of_its_tightest_guest() -> None:
    body = fixed(sizing="pending")
    body.arrive("host", Slo(1.0, 0.02))
    body.arrive("guest", Slo(1.0, 0.1))
    body.arrive("tighter guest", Slo(1.0, 0.05))
    actions = body.finish("host")
    assert Assign("m0", "middle") in actions
    assert SetPace("m0", 0.05) in actions


def test_who_is_left_on_a_draining_instance_is_not_held_to_the_pace_of_who_has_gone() -> None:
    body = fixed(ready=2, tight_on_loose=True, promotion="off")
    fill(body, tpot_s=0.02)
    body.arrive("loose", Slo(1.0, 0.1))
    assert SetPace("m1", 0.02) in body.arrive("tight", Slo(9.0, 0.02), prompt=2000)
    body.drain("m1")
    assert body.finish("tight") == [SetPace("m1", 0.1)]


def test_baselines_leave_labels_and_paces_alone() -> None:
    body = Body(policy("round-robin"), ready=2)
    actions = body.arrive("a", Slo(0.01, 0.02)) + body.arrive("b", None) + body.wait(5.0)
    assert [type(action) for action in actions] == [Dispatch, Dispatch]


# ---- best effort


def test_best_effort_waits_its_turn_and_grows_old() -> None:
    body = fixed(best_effort_max_age_s=10.0)
    fill(body)
    body.arrive("free", None, prompt=2000)
    body.wait(9.0)
    assert "free" in body.controller.pending.best_effort
    body.wait(2.0)
    assert [job.id for job in body.controller.pending.queues["loose"]] == ["free"]
    [dispatch] = [a for a in body.finish("big") if isinstance(a, Dispatch)]
    assert (dispatch.tier, dispatch.host) == ("loose", "loose")
    assert dispatch.slo is not None
    assert 11.0 <= dispatch.slo.ttft_s <= 12.0, "the tier's own second counts from when it aged"


def test_best_effort_gives_way_and_comes_back_with_its_tokens() -> None:
    body = fixed()
    body.arrive("free", None, prompt=40_000)
    body.first_token("free")
    body.progress("m0", 4)
    actions = body.arrive("bound", Slo(100.0, 0.1), prompt=70_000)
    assert Evict("free", "m0") in actions
    assert dispatches(actions) == [("bound", "m0")]
    [dispatch] = [a for a in body.finish("bound") if isinstance(a, Dispatch)]
    assert (dispatch.request, dispatch.resume_from, dispatch.slo) == ("free", 5, None)


def test_without_best_effort_a_request_without_an_slo_gets_the_loosest_tier() -> None:
    body = fixed(best_effort=False)
    body.arrive("r", None)
    assert body.streams["r"].dispatches[0].tier == "loose"


# ---- looking in


def test_explanations_say_why_each_instance_was_not_chosen() -> None:
    body = fixed(explain=True)
    fill(body)
    body.arrive("r", Slo(9.0, 0.1), prompt=2000)
    first, second = body.controller.explanations
    assert (first.request, first.chosen, first.considered) == ("big", "m0", ())
    assert (second.request, second.chosen) == ("r", None)
    [refused] = second.considered
    assert (refused.instance, refused.forecast.lacks) == ("m0", "memory")
    assert refused.forecast.margins().keys() >= {"memory", "pace", "prefill", "token1"}


def test_time_runs_one_way_and_configuration_comes_first() -> None:
    with pytest.raises(AssertionError, match="first event"):
        Controller().step(0.0, Tick(0.0))
    body = fixed()
    body.wait(1.0)
    with pytest.raises(AssertionError, match="one way"):
        body.controller.step(0.5, Tick(0.5))


def test_looking_all_the_time_lets_time_pass() -> None:
    body = fixed(look_s=0.0)
    fill(body)
    body.arrive("r", Slo(9.0, 0.1), prompt=2000)
    body.wait(0.1)
    assert (body.controller.wake_at or 0.0) > body.now


def test_nothing_to_do_is_nothing_to_wake_for() -> None:
    body = fixed(ready=0)
    assert body.controller.wake_at is None
    body.join("m0")
    assert body.controller.wake_at is not None


def test_an_elastic_fleet_wakes_to_start_its_minimum_though_nothing_has_happened() -> None:
    body = elastic(min_instances=2)
    assert body.controller.wake_at is not None
    started = [a for a in body.wait(1.0) if isinstance(a, Start)]
    assert len(started) == 2


def test_a_fleet_that_is_all_gone_says_so_rather_than_that_it_is_busy() -> None:
    body = fixed(ready=0)
    body.join("m0")
    body.arrive("r", Slo(1.0, 0.1))
    body.wait(2.0)
    assert refusal(body, "r") == "no_instances"
