"""Who rests, for how long, and how an instance comes back."""

from __future__ import annotations

import pytest
from body import Body, Fate

from polyserve.core.fleet import State
from polyserve.core.settings import policy
from polyserve.core.types import Action, Broken, Evict, Iteration, Progressed, Resume, Slo, Suspend

EASY = Slo(100.0, 0.1)


def fleet(ready: int = 4, **values: object) -> Body:
    return Body(policy("polyserve", values), ready=ready)


def failing(body: Body, instance: str, times: int) -> list[Action]:
    """So many requests in a row that the instance breaks; each is then finished elsewhere."""
    actions: list[Action] = []
    others = [books for books in body.controller.fleet if books.id != instance]
    for n in range(times):
        name, states = f"{instance} {len(body.streams)} {n}", [books.state for books in others]
        for books in others:
            books.state = State.RESTING  # so that it goes where it is to fail
        body.arrive(name, EASY)
        for books, state in zip(others, states, strict=True):
            books.state = state
        assert body.streams[name].instance == instance
        actions += body.break_off(name)
        if body.streams[name].fate is Fate.RUNS:
            body.finish(name)
    return actions


def rests(actions: list[Action]) -> list[str]:
    return [action.instance for action in actions if isinstance(action, Suspend)]


def state(body: Body, instance: str) -> State:
    return body.controller.fleet.books[instance].state


def test_an_instance_that_fails_time_and_again_gets_no_new_requests() -> None:
    body = fleet()
    assert rests(failing(body, "m0", 3)) == []
    assert rests(failing(body, "m0", 1)) == ["m0"]
    for n in range(12):
        body.arrive(f"r{n}", EASY)
    assert not body.on("m0")
    assert len(body.of(Fate.RUNS)) == 12


def test_a_single_failure_among_successes_is_forgiven() -> None:
    body = fleet(2)
    for n in range(20):
        assert rests(failing(body, "m0", 1)) == []
        for name in (f"a{n}", f"b{n}", f"c{n}"):
            body.arrive(name, EASY)
            body.finish(name)


def test_after_a_rest_one_request_tries_it_and_its_first_token_ends_the_trial() -> None:
    body = fleet(2)
    failing(body, "m0", 4)
    body.wait(2.5)
    for n in range(6):
        body.arrive(f"r{n}", EASY)
    assert len(body.on("m0")) == 1
    [trial] = body.on("m0")
    assert Resume("m0") in body.first_token(trial.id)
    assert state(body, "m0") is State.READY


def test_a_trial_that_fails_makes_the_rest_longer() -> None:
    body = fleet(2)
    failing(body, "m0", 4)
    waits = []
    for n in range(4):
        began = body.now
        for _ in range(100):
            body.wait(0.5)
            body.arrive(f"r{n} {body.now}", EASY)
            if body.on("m0"):
                break
        waits.append(body.now - began)
        [trial] = body.on("m0")
        body.break_off(trial.id)
        for stream in body.of(Fate.RUNS):
            body.finish(stream.id)
    assert waits == sorted(waits)
    assert waits[-1] > 3 * waits[0]


def test_a_trial_whose_client_leaves_is_no_verdict() -> None:
    body = fleet(2)
    failing(body, "m0", 4)
    body.wait(2.5)
    for n in range(4):
        body.arrive(f"r{n}", EASY)
    [trial] = body.on("m0")
    body.leave(trial.id)
    assert state(body, "m0") is State.READY
    for n in range(4, 12):
        body.arrive(f"r{n}", EASY)
    assert len(body.on("m0")) == 1


def test_half_of_the_fleet_serves_on_however_bad_it_is() -> None:
    body = fleet(4)
    rested = [name for instance in ("m0", "m1", "m2", "m3") for name in rests(failing(body, instance, 4))]
    assert rested == ["m0", "m1"]


def test_what_is_none_of_its_faults_is_not_held_against_it() -> None:
    body = fleet(2)
    for n in range(9):
        body.arrive(f"r{n}", EASY)
        stream = body.streams[f"r{n}"]
        instance, stream.fate, stream.instance = stream.instance, Fate.WAITS, None
        assert instance is not None
        assert rests(body.send(Broken(body.now, f"r{n}", instance, 0, fault=False))) == []


def test_everybody_leaves_an_instance_that_hangs() -> None:
    body = fleet(2)
    for n in range(6):
        body.arrive(f"r{n}", EASY)
    there = [stream.id for stream in body.on("m0")]
    body.wait(4.0)
    assert body.silent("m0", 0.0) == []
    body.wait(2.0)
    actions = body.silent("m0", 0.0)
    assert [action.request for action in actions if isinstance(action, Evict)] == there
    assert rests(actions) == ["m0"]
    assert len(body.on("m1")) == 6


def test_who_was_given_up_before_is_waited_for_longer() -> None:
    body = fleet(1)
    body.arrive("r", EASY)
    patience = []
    for _ in range(4):
        for _ in range(200):
            if body.on("m0"):
                break
            body.wait(0.5)
        began = body.now
        for _ in range(200):
            if rests(body.silent("m0", began)):
                break
            body.wait(0.5)
        patience.append(body.now - began)
    assert patience == sorted(patience)
    assert patience[-1] >= 4 * patience[0]


def test_a_prompt_that_takes_long_is_no_hang() -> None:
    body = fleet(2)
    body.arrive("long", EASY, prompt=90_000, most=10)
    [instance] = [stream.instance for stream in body.of(Fate.RUNS)]
    assert instance is not None
    body.wait(15.0)
    assert rests(body.silent(instance, 0.0)) == []


def test_an_instance_that_is_slow_beside_its_peers_rests_and_a_slow_fleet_does_not() -> None:
    def iterate(body: Body, slow: int) -> list[Action]:
        actions: list[Action] = []
        for n in range(3):
            body.arrive(f"r{n}", EASY)
        for stream in body.of(Fate.RUNS):
            body.first_token(stream.id)
        for _ in range(80):
            body.now = round(body.now + 0.05, 6)
            for n in range(3):
                iteration = Iteration(body.now, 0.05 if n < slow else 0.01, 0, 1, 100)
                actions += body.send(Progressed(body.now, f"m{n}", {}, {}, iteration))
        return actions + body.wait(2.0)

    assert set(rests(iterate(fleet(3), slow=1))) == {"m0"}
    assert rests(iterate(fleet(3), slow=3)) == []


def test_a_restart_loses_what_was_there_and_a_loop_of_them_rests() -> None:
    body = fleet(2)
    for n in range(4):
        body.arrive(f"r{n}", EASY)
    body.controller.fleet.books["m0"].correction.observe(4.0, 1.0)
    assert rests(body.restart("m0")) == []
    assert body.controller.fleet.books["m0"].correction.ratio == 1.0
    assert len(body.of(Fate.RUNS)) == 4
    body.wait(1.0)
    assert rests(body.restart("m0")) == ["m0"]
    assert len(body.on("m1")) == 4


def test_an_instance_that_was_lost_twice_rests_when_it_is_back() -> None:
    body = fleet(2)
    for expected in ([], ["m0"]):
        body.lose("m0")
        body.join("m0")
        assert rests(body.ready("m0")) == expected


@pytest.mark.parametrize("name", ["breaker_s", "hang_iterations"])
def test_it_can_be_switched_off(name: str) -> None:
    body = fleet(2, **{name: 0})
    body.arrive("r", EASY)
    body.wait(100.0)
    assert body.silent("m0", 0.0) == body.silent("m1", 0.0) == []
