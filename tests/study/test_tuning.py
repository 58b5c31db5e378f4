"""What is tuned, and among which values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.study.ground import Case
from polyserve.study.settings import ALL, SWAPPED, World, entry, fleet
from polyserve.study.tuning import Choice, needed, stages, tight_up, tried

OLD = Case(fleet("a100-llama-3-8b-mixed", 20), "azure-code")
BIG = Case(fleet("h200-llama-3-70b-tp4-mixed", 20), "azure-code")
needs = st.lists(st.floats(0.0, 30.0), min_size=1, max_size=6).filter(lambda values: round(sum(values)) >= 1)


@pytest.mark.parametrize("label", ALL)
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("case", [OLD, BIG, Case(OLD.fleet, "azure-code", World(later=SWAPPED))])
def test_at_most_six_values_are_tried_per_workload(label: str, quick: bool, case: Case) -> None:
    knobs = stages(case, entry(label), quick)
    # The first value of a later knob is what the earlier ones were tuned with, so it costs no run.
    assert sum(len(values) - (n > 0) for n, (_, values) in enumerate(knobs)) <= 6


def test_chunks_stay_within_the_engine() -> None:
    assert stages(OLD, entry("minimal"), quick=False) == [("chunk", [256, 512, 1024, 2048])]
    assert stages(BIG, entry("minimal"), quick=False) == [("chunk", [256, 512, 1024, 2048, 4096, 8192])]


def test_our_own_policies_are_not_tuned() -> None:
    assert stages(OLD, entry("polyserve"), quick=False) == []
    assert stages(OLD, entry("polyserve-paper"), quick=False) == []


def test_a_chunk_asked_for_is_not_tuned() -> None:
    assert entry("random@512").chunk == 512
    assert stages(OLD, entry("random@512"), quick=False) == []


def test_a_knob_turns_only_itself() -> None:
    first = tried(Choice(None, (("balance", "round-robin"),)), "static_sizes", "1,2")
    assert first == Choice(None, (("balance", "round-robin"), ("static_sizes", "1,2")))
    assert tried(first, "static_sizes", "2,1").values == (("balance", "round-robin"), ("static_sizes", "2,1"))
    assert tried(first, "chunk", 512) == Choice(512, first.values)


@given(needs)
def test_a_partition_uses_every_instance_and_tight_tiers_get_what_they_need(needs: list[float]) -> None:
    sizes = tight_up(needs)
    assert sum(sizes) == round(sum(needs))
    assert min(sizes) >= 0
    for n in range(len(needs) - 1):
        assert sum(sizes[: n + 1]) >= min(sum(needs[: n + 1]) - 1e-6, sum(sizes))


def test_the_tightest_tier_is_rounded_up() -> None:
    assert tight_up([2.1, 3.1, 5.1, 9.7]) == [3, 3, 5, 9]


def test_what_is_needed_is_the_fleet() -> None:
    assert sum(needed(OLD)) == pytest.approx(20)
    assert needed(OLD) == sorted(needed(OLD))
