"""Watching changes nothing: requests go where the incumbent alone would have sent them."""

from __future__ import annotations

import pytest
from body import Body, Fate
from scenes import TIERS

from polyserve.core.observing import Observed
from polyserve.core.settings import policy
from polyserve.core.types import Slo

SLO = Slo(1.0, TIERS[0].tpot_s)


def watched(rule: str, instances: int = 2) -> tuple[Body, Observed]:
    scene = Body(policy(f"polyserve.core.observing:{rule}"), ready=instances)
    shadow = scene.controller.router
    assert isinstance(shadow, Observed)
    return scene, shadow


@pytest.mark.parametrize(
    ("rule", "incumbent"), [("OverRoundRobin", "round-robin"), ("OverLeastRequests", "least-requests")]
)
def test_requests_go_where_the_incumbent_sends_them(rule: str, incumbent: str) -> None:
    routes = []
    for name in (f"polyserve.core.observing:{rule}", incumbent):
        scene = Body(policy(name), ready=3)
        for n in range(40):
            scene.arrive(f"r{n}", Slo(0.2 + 0.1 * (n % 7), TIERS[n % 3].tpot_s), prompt=50 + 97 * (n % 11))
            scene.wait(0.01)
            if n % 3 == 2:
                scene.first_token(f"r{n - 2}")
                scene.finish(f"r{n - 2}", 3)
        assert not scene.of(Fate.REFUSED, Fate.WAITS)
        assert not scene.paces
        routes.append([stream.dispatches[0].instance for stream in scene.streams.values()])
    assert routes[0] == routes[1]


def test_it_agrees_where_there_is_no_choice_to_make() -> None:
    scene, shadow = watched("OverLeastRequests", 1)
    scene.arrive("a", SLO)
    tally = shadow.tallies["tight"]
    assert (tally.requests, tally.agreed, tally.in_time) == (1, 1, 1)
    assert not shadow.disagreements


def test_it_names_the_instance_that_would_have_been_in_time() -> None:
    scene, shadow = watched("OverRoundRobin")
    scene.arrive("long", Slo(9.0, 0.1), prompt=4000)
    scene.arrive("short", Slo(9.0, 0.1), prompt=10)
    scene.finish("short", 1)
    scene.arrive("urgent", Slo(0.05, TIERS[0].tpot_s), prompt=10)  # its turn is where the long one is
    (one,) = [d for d in shadow.disagreements if d.request == "urgent"]
    assert (one.went_to, one.own) == ("m0", "m1")
    assert not one.forecast.admits
    assert shadow.tallies["tight"].elsewhere == 1


def test_who_would_have_waited_in_vain_counts_as_refused() -> None:
    scene, shadow = watched("OverRoundRobin", 1)
    scene.arrive("long", Slo(9.0, 0.1), prompt=8000)
    scene.arrive("urgent", Slo(0.05, TIERS[0].tpot_s), prompt=10)
    assert shadow.tallies["tight"].waited == 1
    scene.wait(0.5)
    scene.arrive("later", Slo(9.0, 0.1), prompt=10)
    assert shadow.tallies["tight"].refused == 1
    assert scene.streams["urgent"].fate is Fate.RUNS
