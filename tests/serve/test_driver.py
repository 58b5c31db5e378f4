"""The door to the brain in real time: order, alarms, bounds, and what happens when the brain breaks."""

from __future__ import annotations

import asyncio
import io

import pytest
from live import make_plan, until

from polyserve.core.types import Action, Arrived, Cancelled, Configured, Event, Refuse, Request, Tick
from polyserve.serve.driver import LONGEST_INBOX, STEPS_PER_TURN, Driver

CONFIGURED: Configured = make_plan(["http://127.0.0.1:1"]).sole.configured


class Script:
    """A brain that notes what it is told, refuses every arrival and wants to be woken when it is told to."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, Event]] = []
        self.wake_at: float | None = None
        self.breaks = False

    def step(self, now: float, event: Event) -> list[Action]:
        if self.breaks:
            raise AssertionError("a broken invariant")
        self.steps.append((now, event))
        match event:
            case Arrived():
                return [Refuse(event.request.id, "overloaded")]
            case Tick():
                self.wake_at = None
        return []


class Watched:
    """A driver with everything that leaves it."""

    def __init__(self, journal: io.BytesIO | None = None) -> None:
        self.brain = Script()
        self.acted: list[Action] = []
        self.driver = Driver(self.brain, CONFIGURED, self.acted.append, lambda *_: None, journal)


def arrival(driver: Driver, name: str) -> Arrived:
    return Arrived(driver.now(), Request(name, driver.now(), 1, None))


async def test_events_are_stepped_in_order_and_actions_leave_in_order() -> None:
    watched = Watched()
    watched.driver.start()
    for n in range(100):
        assert watched.driver.offer(arrival(watched.driver, f"r{n}"))
    assert not watched.acted, "a step never runs inside a call of another task"
    await until(lambda: len(watched.acted) == 100)
    assert [action.request for action in watched.acted if isinstance(action, Refuse)] == [f"r{n}" for n in range(100)]
    times = [now for now, _ in watched.brain.steps]
    assert times == sorted(times)
    assert all(event.at <= now for now, event in watched.brain.steps)
    assert watched.brain.steps[0][1] == CONFIGURED


async def test_many_arrivals_do_not_keep_the_loop_from_its_streams() -> None:
    watched = Watched()
    watched.driver.start()
    for n in range(10 * STEPS_PER_TURN):
        watched.driver.offer(arrival(watched.driver, f"r{n}"))
    turns = 0
    while len(watched.acted) < 10 * STEPS_PER_TURN:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 10


async def test_more_arrivals_than_can_be_decided_in_time_are_not_taken_in() -> None:
    watched = Watched()
    taken = [watched.driver.offer(arrival(watched.driver, f"r{n}")) for n in range(LONGEST_INBOX + 5)]
    assert taken.count(False) == 5
    watched.driver.post(Cancelled(watched.driver.now(), "r0"))
    await until(lambda: len(watched.acted) == LONGEST_INBOX)
    assert watched.driver.offer(arrival(watched.driver, "later"))


async def test_the_brain_is_woken_when_it_wants_and_not_before() -> None:
    watched = Watched()
    watched.brain.wake_at = 0.05
    watched.driver.start()
    await until(lambda: len(watched.brain.steps) == 2)
    now, event = watched.brain.steps[1]
    assert isinstance(event, Tick)
    assert now >= 0.05
    watched.driver.close()


async def test_a_changed_wish_moves_the_alarm() -> None:
    watched = Watched()
    watched.brain.wake_at = 100.0
    watched.driver.start()
    watched.brain.wake_at = 0.02
    watched.driver.post(Cancelled(watched.driver.now(), "x"))
    await until(lambda: isinstance(watched.brain.steps[-1][1], Tick))
    watched.driver.close()


async def test_every_step_is_in_the_journal() -> None:
    journal = io.BytesIO()
    watched = Watched(journal)
    watched.driver.start()
    watched.driver.offer(arrival(watched.driver, "a"))
    await until(lambda: watched.acted)
    watched.driver.close()
    lines = journal.getvalue().splitlines()
    assert len(lines) == 2
    assert b"Configured" in lines[0]
    assert b"Refuse" in lines[1]


async def test_a_brain_that_breaks_is_stepped_no_more_and_its_owner_is_told(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    watched.driver.start()
    watched.brain.breaks = True
    watched.driver.offer(arrival(watched.driver, "a"))
    error = await watched.driver.failed
    assert isinstance(error, AssertionError)
    assert "the controller failed" in caplog.text
    assert not watched.driver.offer(arrival(watched.driver, "b"))
