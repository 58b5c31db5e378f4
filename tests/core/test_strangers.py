"""Load that somebody else sent, as an engine's own metrics tell of it."""

from __future__ import annotations

from body import Body, Fate

from polyserve.core.settings import policy
from polyserve.core.types import Reported, Slo

EASY = Slo(100.0, 0.1)


def fleet(ready: int = 1) -> Body:
    """With one resident each: an empty instance is as good as it gets, whatever its metrics say."""
    body = Body(policy("polyserve"), ready=ready)
    body.arrive("own", EASY)
    body.first_token("own")
    return body


def fate(body: Body, name: str) -> Fate:
    return body.streams[name].fate


def report(body: Body, running: int, kv_tokens: int, times: int = 2) -> None:
    for _ in range(times):
        body.wait(1.0)
        body.send(Reported(body.now, "m0", running, 0, kv_tokens))


def test_their_seats_and_memory_are_taken() -> None:
    body = fleet()
    report(body, 61, 80_000)
    for n in range(6):
        body.arrive(f"r{n}", EASY)
    assert len(body.on("m0")) == 4  # of 64 seats, and 60 strangers on them
    body = fleet()
    report(body, 3, 80_000)
    body.arrive("big", EASY, prompt=30_000)
    assert fate(body, "big") is Fate.WAITS
    body.arrive("small", EASY, prompt=10_000)
    assert fate(body, "small") is Fate.RUNS


def test_a_single_report_of_more_than_was_sent_may_be_a_matter_of_time() -> None:
    body = fleet()
    report(body, 61, 80_000, times=1)
    assert body.controller.fleet.books["m0"].foreign == 0
    report(body, 61, 80_000, times=1)
    assert body.controller.fleet.books["m0"].foreign == 60


def test_when_they_have_gone_or_nobody_tells_of_them_any_more_there_is_room_again() -> None:
    for gone in (True, False):
        body = fleet()
        report(body, 64, 99_000)
        body.arrive("r", EASY, prompt=50_000)
        assert fate(body, "r") is Fate.WAITS
        if gone:
            report(body, 0, 0, times=1)
        body.wait(8.0)
        assert fate(body, "r") is Fate.RUNS
