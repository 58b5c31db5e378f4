"""Waiting requests: who is next, who is ahead, and who is beyond hope."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import job, request

from polyserve.core.fleet import Job
from polyserve.core.pending import Pending, Queue


def waiting(id: str, ttft_s: float = 1.0, prompt: int = 100, tier: str | None = "t", at: float = 0.0) -> Job:
    return job(request(id, prompt, ttft_s, at=at), tier)


def test_a_queue_is_in_order_of_due_times() -> None:
    queue = Queue()
    for id, ttft_s in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        queue.push(waiting(id, ttft_s))
    assert [job.id for job in queue] == ["a", "b", "c"]
    assert [job.id for job in queue.head(2)] == ["a", "b"]


def test_who_is_due_at_the_same_time_keeps_its_order_of_entry() -> None:
    queue = Queue()
    for id in ("z", "a", "m"):
        queue.push(waiting(id))
    assert [job.id for job in queue] == ["z", "a", "m"]


def test_a_job_that_resumes_is_due_with_its_next_token() -> None:
    queue = Queue()
    resumed = waiting("resumed", ttft_s=0.5)
    resumed.made = 10  # at 0.1 s each: due at 1.5
    for entry in (resumed, waiting("fresh", ttft_s=1.0)):
        queue.push(entry)
    assert [job.id for job in queue] == ["fresh", "resumed"]


def test_jobs_ahead_are_those_due_before() -> None:
    queue = Queue()
    for n in range(5):
        queue.push(waiting(f"r{n}", ttft_s=float(n), prompt=10 + n))
    assert queue.ahead_tokens(2.0) == (2, 21)
    assert queue.ahead_tokens(99.0) == (5, 60)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 50)), max_size=40))
def test_a_queue_keeps_count_of_whom_it_holds(moves: list[tuple[bool, int, int]]) -> None:
    """Against a plain sorted list."""
    queue = Queue()
    held: list[Job] = []
    for n, (enters, which, prompt) in enumerate(moves):
        if enters or not held:
            held.append(waiting(f"r{n}", ttft_s=float(which), prompt=prompt))
            queue.push(held[-1])
        else:
            queue.remove(held.pop(which % len(held)))
        assert list(queue) == sorted(held, key=lambda job: job.due_at)
        assert len(queue) == len(held)


def test_each_tier_has_its_queue_and_best_effort_its_order_of_arrival() -> None:
    pending = Pending(["t", "u"])
    for entry in (waiting("b", tier=None, at=2.0), waiting("a", tier=None), waiting("c"), waiting("d", tier="u")):
        pending.push(entry, 0.0)
    assert list(pending.best_effort) == ["b", "a"]
    assert {name: [job.id for job in queue] for name, queue in pending.queues.items()} == {"t": ["c"], "u": ["d"]}
    assert len(pending) == 4
    assert pending.remove("a").id == "a"
    assert pending.remove("d").id == "d"
    assert "a" not in pending
    assert pending.get("d") is None
    assert len(pending) == 2


def test_one_beyond_hope_is_named_once_when_its_time_has_come() -> None:
    pending = Pending(["t"])
    for id, latest_at in (("late", 1.0), ("later", 2.0)):
        entry = waiting(id)
        entry.latest_at = latest_at
        pending.push(entry, 0.0)
    assert pending.next_beyond_at == 1.0
    assert pending.beyond_hope(0.999) == []
    assert [job.id for job in pending.beyond_hope(1.0)] == ["late"]
    assert pending.beyond_hope(1.5) == []
    assert pending.next_beyond_at == 2.0


def test_one_that_has_left_is_never_beyond_hope() -> None:
    pending = Pending(["t"])
    entry = waiting("gone")
    entry.latest_at = 1.0
    pending.push(entry, 0.0)
    pending.remove("gone")
    assert pending.next_beyond_at is None
    assert pending.beyond_hope(5.0) == []


@pytest.mark.parametrize("change", [{"late": True}, {"tier": None}])
def test_late_ones_and_best_effort_are_never_beyond_hope(change: dict[str, object]) -> None:
    pending = Pending(["t"])
    entry = waiting("r")
    entry.latest_at = 1.0
    pending.push(dataclasses.replace(entry, **change), 0.0)  # type: ignore[arg-type]
    assert pending.next_beyond_at is None
    assert pending.beyond_hope(5.0) == []


def test_one_that_waits_again_with_more_time_is_beyond_hope_at_the_new_time_only() -> None:
    pending = Pending(["t"])
    entry = waiting("r")
    entry.latest_at = 1.0
    pending.push(entry, 0.0)
    pending.remove("r")
    entry.latest_at = 3.0
    pending.push(entry, 0.5)
    assert pending.beyond_hope(2.0) == []
    assert [job.id for job in pending.beyond_hope(3.0)] == ["r"]
    assert pending.beyond_hope(4.0) == []


def test_one_that_waits_again_is_named_once() -> None:
    pending = Pending(["t"])
    entry = waiting("r")
    entry.latest_at = 1.0
    for _ in range(2):
        pending.push(entry, 0.0)
        pending.remove("r")
    pending.push(entry, 0.0)
    assert [job.id for job in pending.beyond_hope(1.0)] == ["r"]


def test_who_went_behind_comes_after_everybody_else() -> None:
    queue = Queue()
    behind = waiting("behind", ttft_s=0.1)
    behind.behind = True
    for entry in (behind, waiting("a", ttft_s=5.0), waiting("b", ttft_s=1.0)):
        queue.push(entry)
    assert [job.id for job in queue] == ["b", "a", "behind"]
    assert queue.ahead_tokens(3.0) == (1, 100)
    queue.remove(behind)
    assert [job.id for job in queue] == ["b", "a"]


def test_waiting_counts_from_the_last_entry() -> None:
    pending = Pending(["t"])
    entry = waiting("r")
    pending.push(entry, 1.0)
    pending.remove("r")
    pending.push(entry, 4.0)
    assert entry.pending_since == 4.0
