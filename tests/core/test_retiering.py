"""Tiers that come, go and change while requests wait and run."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
from body import CRAMPED, Body, Fate
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from scenes import TIERS
from test_controller_laws import Anything

from polyserve.core.kernels import R_BAND
from polyserve.core.lengths import BANDS, LengthModel
from polyserve.core.retiering import heirs
from polyserve.core.settings import Settings, policy
from polyserve.core.types import Assign, Dispatch, Refuse, SetPace, Slo, Tier

TIGHT, MIDDLE, LOOSE = TIERS
SLO = {tier.name: Slo(tier.ttft_s, tier.tpot_s) for tier in TIERS}


def body(instances: int = 1, **values: object) -> Body:
    return Body(policy("polyserve", values), ready=instances)


def test_heirs_are_namesakes_then_the_nearest_tighter_then_the_tightest() -> None:
    assert heirs(TIERS, (TIGHT, LOOSE)) == [0, 0, 1]
    assert heirs(TIERS, (MIDDLE, LOOSE)) == [0, 0, 1]
    assert heirs(TIERS, (Tier("loose", 0.01, 1.0), TIGHT)) == [1, 1, 0]


def test_a_request_of_a_tier_that_goes_is_served_under_the_nearest_tighter_one() -> None:
    scene = body()
    scene.arrive("runs", SLO["loose"])
    scene.retier(TIGHT, MIDDLE)
    books = scene.controller.fleet.books["m0"]
    assert books.tier == "middle"
    assert books.pace_s == MIDDLE.tpot_s
    assert books.jobs["runs"].slo == SLO["loose"], "its deadlines are those it came with"
    scene.first_token("runs")
    scene.finish("runs", 5)
    assert scene.streams["runs"].fate is Fate.FINISHED


def test_a_request_whose_tier_was_the_tightest_keeps_its_pace_to_its_end() -> None:
    scene = body()
    scene.arrive("runs", SLO["tight"])
    scene.retier(MIDDLE, LOOSE)
    assert scene.paces["m0"] == TIGHT.tpot_s
    actions = scene.finish("runs", 5)
    assert SetPace("m0", MIDDLE.tpot_s) in actions


def test_who_waits_waits_on_in_the_queue_of_the_new_tier() -> None:
    scene = Body(Settings(on_late="never"), profile=CRAMPED)
    scene.join("m0")  # not ready yet
    for name in ("a", "b"):
        scene.arrive(name, SLO["middle"])
    scene.now = 0.4
    scene.retier(TIGHT, LOOSE)
    queue = scene.controller.pending.queues["tight"]
    assert [job.id for job in queue] == ["a", "b"]
    assert {job.pending_since for job in queue} == {0.0}
    scene.ready("m0")
    assert {scene.streams[name].fate for name in ("a", "b")} == {Fate.RUNS}


def test_a_new_tier_takes_the_requests_that_ask_for_it_at_once() -> None:
    scene = body(2)
    scene.retier(*TIERS, Tier("batch", 0.5, 5.0))
    (dispatch,) = [a for a in scene.arrive("new", Slo(5.0, 0.5)) if isinstance(a, Dispatch)]
    assert dispatch.tier == "batch"
    assert isinstance(scene.arrive("no", Slo(5.0, 0.01))[0], Refuse)


def test_an_empty_instance_of_a_tier_that_goes_is_anybodys() -> None:
    scene = body()
    scene.arrive("runs", SLO["loose"])
    scene.finish("runs", 1)
    assert Assign("m0", None) in scene.retier(TIGHT, MIDDLE)


def test_a_tier_that_gets_tighter_leaves_its_requests_their_own_pace() -> None:
    scene = body()
    scene.arrive("runs", SLO["loose"])
    scene.retier(TIGHT, MIDDLE, Tier("loose", 0.08, 1.0))
    (job,) = scene.controller.fleet.books["m0"].jobs.values()
    assert (job.tier, job.slo) == ("loose", SLO["loose"])
    scene.retier(TIGHT, MIDDLE, Tier("loose", 0.3, 1.0))
    assert job.tier == "middle", "the looser one would be late for it"


def test_what_was_learned_of_lengths_goes_to_the_heir() -> None:
    lengths = LengthModel(3, 100)
    for _ in range(200):
        lengths.ended(lengths.row(1, 10), 1000)
    lengths.regroup(heirs(TIERS, (TIGHT, LOOSE)), 2)
    lengths.refresh(())
    assert lengths.table.shape[0] == 3 * BANDS
    assert lengths.expected(lengths.row(0, 10)) > 800
    assert lengths.expected(lengths.row(1, 10)) == pytest.approx(lengths.expected(lengths.row(None, 10)), rel=0.01)


def test_residents_are_forecast_by_the_row_of_their_new_tier() -> None:
    scene = body()
    scene.arrive("runs", SLO["loose"])
    scene.retier(LOOSE)
    books = scene.controller.fleet.books["m0"]
    assert books.rows[0, R_BAND] == books.jobs["runs"].length_row == 0
    assert math.isfinite(books.load)


def test_a_policy_that_counts_learns_when_to_give_up() -> None:
    scene = Body(policy("least-requests"), profile=CRAMPED)
    scene.join("m0")
    scene.arrive("a", SLO["loose"])
    scene.retier(Tier("loose", 0.1, 1.0, on_late="refuse"))
    scene.wait(1.0)
    assert scene.streams["a"].fate is Fate.REFUSED


class Retiered(Anything):
    """Any event in any order, and tiers that change between them."""

    given: ClassVar[dict[str, object]] = {"static_sizes": ""}

    @rule(
        tpots=st.lists(st.sampled_from([0.02, 0.03, 0.05, 0.1, 0.2]), min_size=1, max_size=4, unique=True),
        names=st.permutations(["tight", "middle", "loose", "other"]),
        on_late=st.sampled_from([None, "refuse", "serve_late", "never"]),
        least=st.integers(0, 1),
    )
    def retier(self, tpots: list[float], names: list[str], on_late: str | None, least: int) -> None:
        waiting = self.body.of(Fate.WAITS)
        tiers = [Tier(name, tpot, 1.0, least, 1.0, on_late) for name, tpot in zip(names, tpots, strict=False)]  # type: ignore[arg-type]
        actions = self.body.retier(*tiers)
        assert not any(isinstance(action, Refuse) for action in actions) or waiting


class RetieredInTwoRoles(Retiered):
    """The same where prompts are computed on some instances and answered on others."""

    given: ClassVar[dict[str, object]] = {"static_sizes": "", "disaggregated": True, "autoscaler": "own"}


TestRetiered = Retiered.TestCase
TestRetiered.settings = hypothesis_settings(max_examples=25, stateful_step_count=30)
TestRetieredInTwoRoles = RetieredInTwoRoles.TestCase
TestRetieredInTwoRoles.settings = hypothesis_settings(max_examples=15, stateful_step_count=30)
