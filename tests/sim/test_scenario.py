"""Scenarios: what changes within a run, and what every policy has in common."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polyserve.core.types import Slo
from polyserve.demand import Arrivals, DemandError
from polyserve.profiles.store import load
from polyserve.sim.scenario import Scenario, draw, evaluate, prepare

PLAIN = Scenario(trace="azure-code", instances=2, rate=20.0, duration_s=100.0, warm_up_s=20.0)
SWAPPED = ((0.02, 0.4), (0.03, 0.3), (0.05, 0.2), (0.1, 0.1))


def requests(scenario: Scenario) -> list[tuple[float, int, Slo | None, int]]:
    drawn = draw(scenario, [load(scenario.profile)], scenario.warm_up_s or 0.0)
    return [(r.arrived_at, r.prompt_tokens, r.slo, output) for r, output in drawn]


def test_shares_change_in_the_middle_of_the_window_and_nothing_else_does() -> None:
    before, burst = requests(PLAIN), requests(replace(PLAIN, later=SWAPPED))
    after = requests(replace(PLAIN, tpots=SWAPPED))
    middle = 70.0
    assert [r for r in burst if r[0] < middle] == [r for r in before if r[0] < middle]
    assert [r for r in burst if r[0] >= middle] == [r for r in after if r[0] >= middle]
    assert [r[0] for r in burst] == [r[0] for r in before]


def test_arrivals_follow_a_curve_and_are_as_many() -> None:
    steady, curved = requests(PLAIN), requests(replace(PLAIN, curve=(1.0, 3.0, 0.0, 2.0)))
    assert [r[1:] for r in curved] == [r[1:] for r in steady]
    at = np.array([r[0] for r in curved])
    assert list(at) == sorted(at)
    share = np.histogram(at, bins=4, range=(0.0, 120.0))[0] / len(at)
    assert share == pytest.approx([1 / 6, 3 / 6, 0.0, 2 / 6], abs=0.03)


def test_a_flat_curve_changes_nothing() -> None:
    flat = requests(replace(PLAIN, curve=(2.0, 2.0, 2.0)))
    assert [r[0] for r in flat] == pytest.approx([r[0] for r in requests(PLAIN)], abs=2e-6)


def test_every_policy_gets_the_same_requests_and_its_own_engines() -> None:
    ours = prepare(replace(PLAIN, policy="polyserve"))
    random = prepare(replace(PLAIN, policy="random"))
    assert ours.spec.requests == random.spec.requests
    assert (ours.spec.chunk.kind, ours.spec.order) == ("dynamic", "deadline")
    assert (random.spec.chunk.kind, random.spec.order) == ("fixed", "fcfs")


def test_what_a_slower_machine_cannot_do_is_not_asked_of_it() -> None:
    prompt = 8000
    true = replace(PLAIN, trace=f"uniform:{prompt}/5", ttfts=(0.6,))
    assert prepare(true).spec.requests
    with pytest.raises(DemandError, match="an idle instance would be late"):
        prepare(replace(true, bias=0.5))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"later": ((0.02, 1.0),)}, "the later shares are of the same paces"),
        ({"later": SWAPPED, "arrivals": Arrivals("recorded")}, "shares cannot change in a recorded trace"),
        ({"curve": (0.0, 0.0)}, "the rates of a curve are not negative, and some are positive"),
        ({"curve": (1.0, -1.0)}, "the rates of a curve are not negative"),
    ],
)
def test_a_change_that_cannot_be_is_one_clear_line(changed: dict[str, object], complaint: str) -> None:
    with pytest.raises(DemandError, match=complaint):
        prepare(replace(PLAIN, **changed))  # type: ignore[arg-type]


def test_in_pd_a_split_is_a_setting_and_the_bound_another() -> None:
    split = replace(PLAIN, instances=4, pd=1, policy="minimal")
    prepared = prepare(split)
    assert prepared.spec.settings.prefill_instances == 1
    assert prepared.spec.settings.disaggregated
    assert prepared.facts.optimal_rate is not None
    assert prepared.facts.optimal_rate != prepare(replace(split, pd=None)).facts.optimal_rate


def test_in_pd_a_policy_that_keeps_its_split_gets_the_best_one() -> None:
    """Prompts are most of the work of `uniform:4000/10`, and little of `uniform:100/500`."""
    sizes = [
        prepare(replace(PLAIN, instances=8, pd="auto", policy="minimal", trace=trace)).spec.settings.prefill_instances
        for trace in ("uniform:4000/10", "uniform:100/500")
    ]
    assert sizes[0] > 4 > sizes[1] > 0
    assert prepare(replace(PLAIN, instances=8, pd="auto")).spec.settings.prefill_instances == 0


def test_in_pd_every_request_is_served_by_two_instances() -> None:
    result = evaluate(replace(PLAIN, instances=4, pd="auto", trace="uniform:500/20", rate=20.0))
    assert result.score.overall.share.attained == result.score.overall.share.requests > 0
