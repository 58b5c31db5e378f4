"""What is learned of output lengths, against what was drawn; and what a forecast may rest on."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.lengths import BANDS, EDGES, GRID, LengthModel, prompt_band


def share_beyond(model: LengthModel, row: int, made: int, ahead: int) -> float:
    """Chance that a resident with `made` tokens is there `ahead` iterations on, as the table has it."""
    low = int(np.searchsorted(EDGES, made, side="right")) - 1
    return float(model.table[row, low, GRID.tolist().index(ahead)])


def taught(lengths: list[int], prior: int = 256, row: int = 0) -> LengthModel:
    model = LengthModel(1, prior)
    for tokens in lengths:
        model.ended(row, tokens)
    model.refresh(())
    return model


def empirical(lengths: list[int], made: int, ahead: int) -> float:
    """Share of those longer than `made` that are longer than `made + ahead`."""
    there = [tokens for tokens in lengths if tokens > made]
    return sum(tokens > made + ahead for tokens in there) / len(there)


def test_before_anything_is_seen_the_prior_mean_rules() -> None:
    """Geometric: with mean 100, half are gone after 69 tokens, whatever was made before."""
    model = LengthModel(2, 100)
    for made in (0, 16, 256):
        assert share_beyond(model, 0, made, 64) == pytest.approx(np.exp(-0.64), rel=0.01)


@pytest.mark.parametrize("draw", ["exponential", "uniform", "two kinds"])
def test_many_answers_teach_their_survival(draw: str) -> None:
    random = Random(1)
    lengths = {
        "exponential": [1 + int(random.expovariate(1 / 150)) for _ in range(1500)],
        "uniform": [random.randint(1, 400) for _ in range(1500)],
        "two kinds": [random.choice([random.randint(5, 20), random.randint(300, 500)]) for _ in range(1500)],
    }[draw]
    model = taught(lengths)
    for made in (0, 32, 128):
        for ahead in (16, 64, 192):
            assert share_beyond(model, 0, made, ahead) == pytest.approx(empirical(lengths, made, ahead), abs=0.08)


def test_a_few_answers_lean_on_the_prior() -> None:
    before, after = LengthModel(1, 256), taught([10] * 4)
    fresh, four = (share_beyond(model, 0, 0, 64) for model in (before, after))
    assert 0.5 * fresh < four < fresh


def test_a_band_without_answers_leans_on_its_tier_and_a_tier_on_all() -> None:
    model = LengthModel(2, 256)
    for _ in range(500):
        model.ended(model.row(0, 10), 20)
    model.refresh(())
    prior = share_beyond(LengthModel(2, 256), 0, 0, 64)
    short, other_band, other_tier = (model.row(*at) for at in ((0, 10), (0, 5000), (1, 10)))
    assert share_beyond(model, short, 0, 64) < 0.05
    assert share_beyond(model, short, 0, 64) <= share_beyond(model, other_band, 0, 64) < 0.3 * prior
    assert share_beyond(model, other_tier, 0, 64) < 0.3 * prior


def test_tiers_that_differ_are_learned_apart() -> None:
    model = LengthModel(2, 256)
    for _ in range(500):
        model.ended(model.row(0, 10), 20)
        model.ended(model.row(1, 10), 400)
    model.refresh(())
    assert share_beyond(model, model.row(0, 10), 0, 64) < 0.05
    assert share_beyond(model, model.row(1, 10), 0, 64) > 0.95


def test_those_still_running_are_not_forgotten() -> None:
    """Short answers end first: who counts only ends believes that all answers are short."""
    ends = [20] * 100
    finished_alone = taught(ends)
    model = LengthModel(1, 256)
    for tokens in ends:
        model.ended(0, tokens)
    model.refresh([(0, 1000)] * 100)
    naive, censored = (share_beyond(m, 0, 0, 64) for m in (finished_alone, model))
    assert naive < 0.2
    assert censored == pytest.approx(0.5, abs=0.1), "as many run on as have ended"


def test_a_resident_in_its_first_bin_has_not_been_at_risk_yet() -> None:
    """Many that have just begun say nothing about when answers end."""
    quiet, crowded = taught([50] * 200), LengthModel(1, 256)
    for _ in range(200):
        crowded.ended(0, 50)
    crowded.refresh([(0, 0)] * 500)
    assert crowded.table == pytest.approx(quiet.table)


def test_the_past_fades() -> None:
    model = taught([20] * 4000)
    model.refresh(())
    for _ in range(8000):
        model.ended(0, 400)
    model.refresh(())
    model.refresh(())
    assert share_beyond(model, 0, 0, 64) > 0.75


def test_nothing_is_learned_before_a_refresh() -> None:
    model = LengthModel(1, 256)
    before = model.table
    model.ended(0, 10)
    assert model.unlearned == 1
    assert model.table is before
    model.refresh(())
    assert model.unlearned == 0
    assert model.table is not before


@given(
    st.lists(st.tuples(st.integers(0, 3 * BANDS - 1), st.integers(0, 9000)), max_size=60),
    st.lists(st.tuples(st.integers(0, 3 * BANDS - 1), st.integers(0, 9000)), max_size=30),
    st.sampled_from(["survival", "average"]),
)
def test_the_table_is_a_chance_that_never_rises(
    ended: list[tuple[int, int]], running: list[tuple[int, int]], estimator: str
) -> None:
    model = LengthModel(2, 64, "average" if estimator == "average" else "survival")
    for row, tokens in ended:
        model.ended(row, tokens)
    model.refresh(running)
    assert model.table.shape == (3 * BANDS, len(EDGES), len(GRID))
    assert np.isfinite(model.table).all()
    assert (model.table >= 0.0).all()
    assert (model.table[:, :, 0] == 1.0).all(), "who is there now is there now"
    assert (np.diff(model.table, axis=2) <= 0.0).all()


def test_the_papers_estimator_gives_everybody_the_average_of_its_tier() -> None:
    model = LengthModel(2, 64, "average")
    for tokens in (50, 150) * 100:
        model.ended(model.row(0, 10), tokens)
    model.refresh(())
    row = model.row(0, 5000)
    assert model.mean[0] == pytest.approx(100, rel=0.01)
    assert share_beyond(model, row, 0, 64) == 1.0
    assert share_beyond(model, row, 0, 128) == 0.0
    assert share_beyond(model, row, 64, 64) == 0.0
    assert share_beyond(model, row, 4096, 0) == 1.0, "beyond the average it makes one token more"
    assert share_beyond(model, row, 4096, 1) == 0.0
    assert model.mean[1] == pytest.approx(100, rel=0.05), "a tier that has ended nothing leans on all"


def test_prompts_fall_into_bands() -> None:
    assert [prompt_band(tokens) for tokens in (1, 511, 512, 2047, 2048, 100_000)] == [0, 0, 1, 1, 2, 2]


def test_best_effort_has_rows_of_its_own() -> None:
    model = LengthModel(2, 64)
    rows = {model.row(tier, prompt) for tier in (0, 1, None) for prompt in (1, 1000, 9000)}
    assert rows == set(range(3 * BANDS))
