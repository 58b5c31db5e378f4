"""Fair turns: who waits beside a crowd waits no longer than its own share asks, and one tenant changes nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.controller import Controller
from polyserve.core.fairness import Turns
from polyserve.core.fleet import Job
from polyserve.core.pending import Queue
from polyserve.core.settings import Settings
from polyserve.core.types import (
    Action,
    Arrived,
    Configured,
    Dispatch,
    Event,
    Finished,
    FirstToken,
    Instance,
    Joined,
    Ready,
    Reconfigured,
    Refuse,
    Request,
    Slo,
    Tenant,
    Tier,
)
from polyserve.profiles.store import load

PROFILE = load("a100-llama-3-8b")


def job(name: str, tenant: str = "", due_at: float = 1.0, prompt_tokens: int = 100) -> Job:
    request = Request(name, 0.0, prompt_tokens, Slo(due_at, 0.1), tenant=tenant)
    return Job(request, "slow", request.slo, prompt_tokens, 0)


def drawn(queue: Queue, count: int) -> list[Job]:
    """The next jobs in turn, each served."""
    found = []
    for _ in range(min(count, len(queue))):
        (one,) = queue.head(1)
        assert queue.job(0) is one
        queue.served(one)
        queue.remove(one)
        found.append(one)
    return found


JOBS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50), st.integers(10, 500)), min_size=1, max_size=30)


@given(JOBS)
def test_inside_a_tenant_deadlines_decide(drawn_jobs: list[tuple[str, int, int]]) -> None:
    queue = Queue(Turns({}, 256))
    for n, (tenant, due, prompt) in enumerate(drawn_jobs):
        queue.push(job(f"r{n}", tenant, due / 10, prompt))
    order = drawn(queue, 100)
    assert len(order) == len(drawn_jobs)
    for tenant in "ab":
        dues = [one.due_at for one in order if one.request.tenant == tenant]
        assert dues == sorted(dues)


@given(JOBS)
def test_one_tenant_with_turns_is_a_queue_without(drawn_jobs: list[tuple[str, int, int]]) -> None:
    plain, fair = Queue(), Queue(Turns({}, 256))
    for n, (_, due, prompt) in enumerate(drawn_jobs):
        for queue in (plain, fair):
            queue.push(job(f"r{n}", "a", due / 10, prompt))
    new = job("new", "a", 2.5)
    assert (fair.before(new), fair.before_tokens(new)) == (plain.before(new), plain.before_tokens(new))
    assert np.array_equal(fair.rows, plain.rows)
    assert [one.id for one in drawn(fair, 100)] == [one.id for one in drawn(plain, 100)]


@given(JOBS)
def test_rows_are_in_the_order_of_jobs(drawn_jobs: list[tuple[str, int, int]]) -> None:
    queue = Queue(Turns({"a": 3.0}, 256))
    for n, (tenant, due, prompt) in enumerate(drawn_jobs):
        queue.push(job(f"r{n}", tenant, due / 10, prompt))
    while len(queue):
        assert np.array_equal(queue.rows, np.array([one.row() for one in queue.head(100)]))
        assert len(queue.late) == len(queue)
        drawn(queue, 1)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(10, 400))
def test_while_both_wait_each_gets_its_share(share_a: int, share_b: int, prompt_tokens: int) -> None:
    queue = Queue(Turns({"a": float(share_a), "b": float(share_b)}, 256))
    for n in range(60):
        queue.push(job(f"a{n}", "a", 1.0 + n / 100, prompt_tokens))
        queue.push(job(f"b{n}", "b", 9.0 + n / 100, prompt_tokens))  # b is always due later
    count = Counter(one.request.tenant for one in drawn(queue, 60))
    assert abs(count["a"] / share_a - count["b"] / share_b) <= 1 / share_a + 1 / share_b


def test_who_comes_to_a_crowd_goes_before_it_but_saves_no_turns_up() -> None:
    queue = Queue(Turns({}, 256))
    for n in range(20):
        queue.push(job(f"a{n}", "a", 1.0 + n / 100))
    drawn(queue, 10)
    newcomer = job("b0", "b", 5.0)
    assert queue.before(newcomer) <= 1
    for n in range(10):
        queue.push(job(f"b{n}", "b", 5.0))
    order = [one.request.tenant for one in drawn(queue, 12)]
    assert 5 <= order.count("b") <= 7


@given(JOBS, st.sampled_from("abc"), st.integers(1, 50))
def test_how_many_go_before_is_where_one_comes_in(
    drawn_jobs: list[tuple[str, int, int]], tenant: str, due: int
) -> None:
    queue = Queue(Turns({"b": 2.0}, 256))
    for n, (other, their_due, prompt) in enumerate(drawn_jobs):
        queue.push(job(f"r{n}", other, their_due / 10, prompt))
    drawn(queue, 3)
    new = job("new", tenant, due / 10 + 0.05)
    before, tokens = queue.before(new), queue.before_tokens(new)
    queue.push(new)
    order = queue.head(100)
    at = order.index(new)
    assert (before, tokens) == (at, sum(one.prompt_tokens for one in order[:at]))


# -------------------------------------------------------------------------------------------------- the controller


class Crowd:
    """A controller over one instance that serves one request at a time."""

    def __init__(self, *tenants: Tenant, **settings: object) -> None:
        self.controller = Controller()
        self.now = 0.0
        tiers = (Tier("slow", 0.1, 1.0),)
        values = Settings(on_late="never").replaced(settings).to_dict()
        self.step(Configured(0.0, values, tiers, {PROFILE.name: PROFILE.to_dict()}, tenants=tenants))
        self.step(Joined(0.0, Instance("i", PROFILE.name, max_num_seqs=1)))
        self.step(Ready(0.0, "i"))

    def step(self, event: Event) -> list[Action]:
        return self.controller.step(self.now, event)

    def ask(self, name: str, tenant: str, ttft_s: float = 5.0) -> list[Action]:
        return self.step(Arrived(self.now, Request(name, self.now, 100, Slo(ttft_s, 0.1), tenant=tenant)))

    def serve(self, first: str, count: int) -> list[str]:
        """Requests in the order in which they are served, `first` being served already."""
        order = [first]
        while len(order) < count:
            self.now += 0.1
            actions = self.step(FirstToken(self.now, order[-1], "i"))
            actions += self.step(Finished(self.now, order[-1], "i", 10))
            order += [action.request for action in actions if isinstance(action, Dispatch)]
        return order


def test_a_crowd_of_one_tenant_does_not_keep_another_waiting() -> None:
    crowd = Crowd(Tenant("a"), Tenant("b"))
    for n in range(20):
        crowd.ask(f"a{n}", "a")
    for n in range(5):
        crowd.ask(f"b{n}", "b", ttft_s=50.0)
    order = crowd.serve("a0", 12)
    assert sum(name.startswith("b") for name in order) >= 5


def test_without_tenants_the_earliest_deadline_goes_first() -> None:
    crowd = Crowd()
    for n in range(20):
        crowd.ask(f"a{n}", "a")
    for n in range(5):
        crowd.ask(f"b{n}", "b", ttft_s=50.0)
    assert crowd.serve("a0", 20) == [f"a{n}" for n in range(20)]


def test_a_full_queue_gives_up_who_has_more_than_its_share_of_it() -> None:
    crowd = Crowd(Tenant("a"), Tenant("b"), queue_limit=10)
    for n in range(11):
        crowd.ask(f"a{n}", "a")
    assert [action.request for action in crowd.ask("a11", "a") if isinstance(action, Refuse)] == ["a11"]
    refused: list[Refuse] = []
    for n in range(8):
        refused += [action for action in crowd.ask(f"b{n}", "b") if isinstance(action, Refuse)]
    assert [action.request for action in refused] == ["a10", "a9", "a8", "a7", "a6", "b5", "b6", "b7"]
    assert {action.code for action in refused} == {"queue_full"}
    assert len(crowd.controller.pending) == 10


def test_best_effort_that_waits_is_bounded_too() -> None:
    crowd = Crowd(queue_limit=3, best_effort_headroom=0.0)
    for n in range(6):
        request = Request(f"r{n}", 0.0, 100, None)
        actions = crowd.step(Arrived(0.0, request))
        refused = [action.code for action in actions if isinstance(action, Refuse)]
        assert refused == (["queue_full"] if n >= 4 else [])


def test_other_shares_hold_from_the_moment_they_are_told() -> None:
    crowd = Crowd(Tenant("a"))
    for n in range(20):
        crowd.ask(f"a{n}", "a")
        if n < 10:
            crowd.ask(f"b{n}", "b", ttft_s=50.0)
    crowd.step(Reconfigured(0.0, (Tier("slow", 0.1, 1.0),), {}, (Tenant("a"), Tenant("b", share=3.0))))
    order = crowd.serve("a0", 9)
    assert sum(name.startswith("b") for name in order[1:]) == 6
