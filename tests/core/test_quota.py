"""Quotas: over any stretch of time nobody gets more than the rate and one burst, and who keeps to it never waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.controller import Controller
from polyserve.core.quota import Bucket, Quotas
from polyserve.core.settings import Settings
from polyserve.core.types import (
    Action,
    Arrived,
    Cancelled,
    Configured,
    Dispatch,
    Finished,
    Instance,
    Joined,
    Ready,
    Refuse,
    Request,
    Slo,
    Tenant,
    Tier,
)
from polyserve.profiles.store import load

PROFILE = load("a100-llama-3-8b")


def request(name: str, tenant: str = "a", at: float = 0.0, prompt_tokens: int = 100, n: int = 1) -> Request:
    return Request(name, at, prompt_tokens, Slo(10.0, 0.1), tenant=tenant, n=n)


class Brain:
    """A controller over one instance, with tenants."""

    def __init__(self, *tenants: Tenant) -> None:
        self.controller = Controller()
        tiers = (Tier("slow", 0.1, 1.0),)
        profiles = {PROFILE.name: PROFILE.to_dict()}
        self.step(0.0, Configured(0.0, Settings().to_dict(), tiers, profiles, tenants=tenants))
        self.step(0.0, Joined(0.0, Instance("i", PROFILE.name)))
        self.step(0.0, Ready(0.0, "i"))

    def step(self, now: float, event: object) -> list[Action]:
        return self.controller.step(now, event)  # type: ignore[arg-type]

    def asks(self, name: str, tenant: str = "a", at: float = 0.0, **values: int) -> Refuse | None:
        """What a request is refused with, if it is."""
        actions = self.step(at, Arrived(at, request(name, tenant, at, **values)))
        refused = [action for action in actions if isinstance(action, Refuse)]
        assert refused or any(isinstance(action, Dispatch) for action in actions)
        return refused[0] if refused else None


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 50)), max_size=60), st.floats(0.1, 20), st.floats(1, 40))
def test_a_bucket_gives_no_more_than_its_rate_and_what_it_holds(
    steps: list[tuple[float, float]], rate: float, size: float
) -> None:
    bucket = Bucket(rate, size, 0.0)
    now = taken = 0.0
    for after, amount in steps:
        now += after
        if bucket.wait_s(now, 1.0) == 0.0:
            taken += amount
            bucket.take(now, amount)
            assert taken <= size + rate * now + amount + 1e-6


@given(st.floats(0.1, 100), st.floats(1, 50), st.floats(0, 200), st.floats(0, 60))
def test_after_the_wait_that_a_bucket_names_it_has_what_was_asked(
    rate: float, size: float, amount: float, at: float
) -> None:
    bucket = Bucket(rate, size, 0.0)
    bucket.take(at, amount)
    wait_s = bucket.wait_s(at, 1.0)
    assert bucket.wait_s(at + wait_s, 1.0) == pytest.approx(0.0, abs=1e-6)
    assert wait_s == 0.0 or bucket.wait_s(at + 0.9 * wait_s, 1.0) > 0.0


def test_requests_over_the_rate_are_refused_with_the_time_to_come_back() -> None:
    brain = Brain(Tenant("a", requests_per_s=2.0, burst_s=1.0))
    assert [brain.asks(f"r{n}") for n in range(2)] == [None, None]
    refused = brain.asks("r2")
    assert refused == Refuse("r2", "rate_limit_exceeded", None, 0.5, "requests")
    assert brain.asks("r3", at=0.5) is None
    assert brain.asks("r4", at=0.5) is not None


def test_one_tenants_bound_is_nobody_elses() -> None:
    brain = Brain(Tenant("a", requests_per_s=1.0, burst_s=1.0), Tenant("b", requests_per_s=1.0, burst_s=1.0))
    assert brain.asks("r0") is None
    assert brain.asks("r1") is not None
    assert brain.asks("r2", "b") is None
    assert [brain.asks(f"x{n}", "nobody with a quota") for n in range(5)] == [None] * 5


def test_an_answers_tokens_count_when_they_are_known() -> None:
    brain = Brain(Tenant("a", tokens_per_s=100.0, burst_s=2.0))
    assert brain.asks("r0", prompt_tokens=100) is None
    assert brain.asks("r1", prompt_tokens=10) is None
    brain.step(0.0, Finished(0.0, "r0", "i", 290))
    refused = brain.asks("r2")
    assert refused is not None
    # 200 there were, 110 went into prompts and 290 into the answer; one has to be there.
    assert refused.limit == "tokens"
    assert refused.retry_after_s == pytest.approx(2.01)
    assert brain.asks("r3", at=2.02) is None


def test_every_choice_of_an_answer_counts() -> None:
    brain = Brain(Tenant("a", tokens_per_s=100.0, burst_s=2.0))
    assert brain.asks("r0", prompt_tokens=50, n=4) is None
    brain.step(0.0, Finished(0.0, "r0", "i", 50))
    refused = brain.asks("r1")
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(0.51)


def test_a_request_larger_than_a_burst_is_let_in_and_paid_for_later() -> None:
    brain = Brain(Tenant("a", tokens_per_s=10.0, burst_s=1.0))
    assert brain.asks("r0", prompt_tokens=1000) is None
    refused = brain.asks("r1", prompt_tokens=1)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(99.1)


@pytest.mark.parametrize("ending", [Finished(1.0, "r0", "i", 5), Cancelled(1.0, "r0")])
def test_requests_at_once_are_bounded_until_one_ends(ending: object) -> None:
    brain = Brain(Tenant("a", concurrency=2))
    assert [brain.asks(f"r{n}") for n in range(2)] == [None, None]
    refused = brain.asks("r2", at=0.5)
    assert refused is not None
    assert refused.limit == "concurrency"
    brain.step(1.0, ending)
    brain.step(1.0, ending)  # told twice, it has still ended once
    assert brain.asks("r3", at=1.0) is None
    assert brain.asks("r4", at=1.0) is not None


def test_a_request_that_is_refused_for_something_else_is_no_longer_open() -> None:
    brain = Brain(Tenant("a", concurrency=1))
    refused = brain.asks("r0", prompt_tokens=10**9)
    assert refused is not None
    assert refused.code == "context_length_exceeded"
    assert brain.asks("r1") is None


def test_a_client_that_leaves_pays_for_what_was_made_for_it() -> None:
    quotas = Quotas([Tenant("a", tokens_per_s=10.0, burst_s=1.0)], 0.0)
    assert quotas.admit(0.0, request("r0", prompt_tokens=5)) is None
    quotas.ended(0.0, "r0", 15)
    excess = quotas.admit(0.0, request("r1"))
    assert excess is not None
    assert excess.retry_after_s == pytest.approx(1.1)


def test_tenants_without_bounds_cost_no_look_up() -> None:
    assert not Quotas([Tenant("a", share=2.0)], 0.0)
