"""PD by hand: who computes, who answers, what is kept for whom, and who changes role."""

from __future__ import annotations

import dataclasses

import pytest
from body import Body
from scenes import STEADY

from polyserve.core.fleet import SplitFleet
from polyserve.core.kernels import R_LESS
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import policy
from polyserve.core.types import Action, Dispatch, HandOver, Refuse, Role, SetRole, Slo, Start

# A hand-over takes 2 ms and 0.1 ms a token.
PROFILE = dataclasses.replace(STEADY, kv_bytes_per_token=100)
LINK = {"kv_latency_s": 0.002, "kv_bandwidth": 1e6}


def fleet(
    prefill: int = 1, decode: int = 1, profile: Profile = PROFILE, name: str = "polyserve", **values: object
) -> Body:
    body = Body(policy(name, {"disaggregated": True, "follow_split": False, **LINK, **values}), profile=profile)
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for n in range(count):
            body.join(f"{role}{n}", role=role)
            body.ready(f"{role}{n}")
    return body


def one(kind: type, actions: list[Action]) -> Action:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


def test_a_prompt_goes_to_one_instance_and_its_answer_to_another() -> None:
    body = fleet()
    sent = one(Dispatch, body.arrive("a"))
    assert isinstance(sent, Dispatch)
    assert (sent.instance, sent.host) == ("prefill0", None)
    body.now = 0.02
    moved = one(HandOver, body.first_token("a"))
    assert isinstance(moved, HandOver)
    assert (moved.source, moved.instance, moved.host) == ("prefill0", "decode0", "loose")
    body.receive("a")
    body.progress("decode0", 5)
    body.finish("a")
    assert not body.controller.fleet.get("prefill0").jobs  # type: ignore[union-attr]


def test_a_place_for_the_answer_is_kept_from_the_dispatch_on() -> None:
    cramped = dataclasses.replace(PROFILE, limits=Limits(3000, 1, 512, block_size=16, context_tokens=2500))
    body = fleet(profile=cramped)
    body.arrive("a")
    assert not body.arrive("b", Slo(5.0, 0.1)), "the one seat is promised"
    body.first_token("a")
    body.receive("a")
    assert one(Dispatch, body.finish("a"))


def test_without_a_promise_the_prompt_is_computed_first() -> None:
    cramped = dataclasses.replace(PROFILE, limits=Limits(3000, 1, 512, block_size=16, context_tokens=2500))
    body = fleet(profile=cramped, promise=False)
    body.arrive("a")
    body.first_token("a")
    assert one(Dispatch, body.arrive("b", Slo(5.0, 0.1)))


def test_a_prompt_has_to_be_done_in_time_for_its_second_token() -> None:
    """Token 1 is due 20 ms after token 0; the hand-over takes 12 ms, and an iteration alone 10.1 ms."""
    body = fleet()
    body.arrive("a", Slo(0.1, 0.02))
    books = body.controller.fleet.get("prefill0")
    assert books is not None
    assert books.rows[0, R_LESS] == pytest.approx(0.012 + 0.0101 - 0.02)
    body.arrive("b", Slo(0.1, 0.02))
    assert books.rows[1, R_LESS] == pytest.approx(0.012 + 2 * 0.0102 - 0.02), "it may have to wait for another one"


def test_what_no_idle_pair_could_do_is_refused_at_once() -> None:
    """500 prompt tokens take 60 ms and 52 ms to hand over, and 10 ms make token 1."""
    body = fleet()
    refused = one(Refuse, body.arrive("a", Slo(0.09, 0.02), 500))
    assert isinstance(refused, Refuse)
    assert refused.code == "slo_infeasible"
    assert one(Dispatch, body.arrive("b", Slo(0.11, 0.02), 500))


def test_who_loses_its_answering_instance_on_the_way_goes_to_another_with_its_kv() -> None:
    body = fleet(decode=2)
    body.arrive("a")
    moved = one(HandOver, body.first_token("a"))
    assert isinstance(moved, HandOver)
    again = one(HandOver, body.lose(moved.instance))
    assert isinstance(again, HandOver)
    assert again.source == "prefill0"
    assert again.instance != moved.instance


def test_kv_that_is_lost_on_the_way_is_computed_again() -> None:
    body = fleet(prefill=2)
    sent = one(Dispatch, body.arrive("a"))
    assert isinstance(sent, Dispatch)
    body.first_token("a")
    again = one(Dispatch, body.lose(sent.instance))
    assert isinstance(again, Dispatch)
    assert again.resume_from == 1
    assert again.instance != sent.instance


def test_a_role_that_has_died_out_gets_an_instance_of_the_other() -> None:
    body = fleet(prefill=2, decode=1)
    body.arrive("a")
    body.lose("decode0")
    changed = one(SetRole, body.wait(3.0))
    assert isinstance(changed, SetRole)
    assert changed.role is Role.DECODE


def test_the_split_follows_the_load() -> None:
    """Long prompts with short answers want more instances for prompts, the reverse more for answers."""
    body = fleet(4, 4, follow_split=True, length_prior_tokens=4)
    for n in range(300):
        body.now = n / 100
        body.arrive(f"p{n}", Slo(1.0, 0.1), 450, 2)
        body.wait(0.0)
    split = body.controller.fleet
    assert isinstance(split, SplitFleet)
    assert len(split.prefill) > 4


def test_an_elastic_fleet_starts_one_of_each() -> None:
    body = Body(policy("polyserve", {"disaggregated": True, "max_instances": 4}), profile=PROFILE)
    started = [action.instance for action in body.wait(2.0) if isinstance(action, Start)]
    for instance in started:
        body.join(instance)
        body.ready(instance)
    assert sorted(body.roles.values()) == [Role.DECODE, Role.PREFILL]


@pytest.mark.parametrize("name", ["random", "minimal", "least-headroom", "static", "single-slo"])
def test_a_baseline_chooses_by_its_rule_in_each_role(name: str) -> None:
    body = fleet(2, 2, name=name)
    for n in range(6):
        body.arrive(f"r{n}", Slo(5.0, 0.1))
    for n in range(6):
        moved = one(HandOver, body.first_token(f"r{n}"))
        assert isinstance(moved, HandOver)
        body.receive(f"r{n}")
    if name == "minimal":
        assert {len(body.on(f"decode{n}")) for n in range(2)} == {3}
