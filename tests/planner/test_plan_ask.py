"""What people write becomes a question, or one line that says what would do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.types import ChunkRule
from polyserve.planner.ask import (
    MOST_OF_ALL,
    Ask,
    Load,
    PlanError,
    Rival,
    Shift,
    check_shares,
    parse_prices,
    parse_rival,
    parse_shift,
    parse_target,
    plain_ms,
    usual_shifts,
)

TPOTS = ((0.02, 0.1), (0.03, 0.2), (0.05, 0.3), (0.1, 0.4))


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("20ms:10,30ms:90", "20:10,30:90"),
        ("300ms,500 ms,1s", "300,500,1000"),
        ("0.5s:.5,20:.5", "500:.5,20:.5"),
        ("20:.1,30:.9", "20:.1,30:.9"),
        ("7.5ms", "7.5"),
        ("10us", "10us"),
    ],
)
def test_durations_may_have_a_unit(written: str, plain: str) -> None:
    assert plain_ms(written) == plain


@pytest.mark.parametrize("text", ["20:10,30:90", "20:.1,30:.9", "20,30,50", "20:.33,30:.33,50:.33", "30"])
def test_shares_that_sum_are_fine(text: str) -> None:
    check_shares(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("20:10,30:20", "the shares sum to 30; they want 1, or 100"),
        ("20:.5,30:.6", "the shares sum to 1.1"),
        ("20:.5,30", "30 ms has no share"),
    ],
)
def test_shares_that_do_not_sum_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        check_shares(text)


def test_a_target_is_a_percentage() -> None:
    assert parse_target("99") == parse_target("99 %".replace(" ", "")) == pytest.approx(0.99)
    with pytest.raises(PlanError, match="target"):
        parse_target("high")


def test_a_price_needs_no_name_where_there_is_one_profile() -> None:
    assert parse_prices("2.5", ["a"]) == {"a": 2.5}
    assert parse_prices("a=2.5, b=4", ["a", "b"]) == {"a": 2.5, "b": 4.0}
    assert parse_prices("", ["a", "b"]) == {}
    with pytest.raises(PlanError, match="expected PROFILE=PER_HOUR"):
        parse_prices("2.5", ["a", "b"])
    with pytest.raises(PlanError, match="a positive number, not 'cheap'"):
        parse_prices("a=cheap", ["a"])


def test_a_rival_may_name_its_chunk() -> None:
    assert parse_rival("minimal") == Rival("minimal")
    assert parse_rival("minimal@512") == Rival("minimal", ChunkRule("fixed", 512))
    for bad in ("minimal@", "minimal@0", "minimal@many"):
        with pytest.raises(PlanError, match="POLICY@TOKENS"):
            parse_rival(bad)


def test_a_shift_names_tiers_lengths_and_the_rate() -> None:
    shift = parse_shift("20ms=2, prompts=1.2,rate=1.1", TPOTS)
    assert shift == Shift("20 ms x2, prompts x1.2, rate x1.1", (("20", 2.0),), rate_by=1.1, prompts_by=1.2)
    load = shift.of(Load(TPOTS))
    assert (load.rate_by, load.prompts_by, load.outputs_by) == (1.1, 1.2, 1.0)
    assert [round(share, 4) for _, share in load.tpots] == [0.2, 0.1778, 0.2667, 0.3556]


@pytest.mark.parametrize("text", ["25=2", "20", "prompts", "=2", "20=0", "20=-1", "20=x", "answers=2"])
def test_a_shift_of_nothing_known_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="shift"):
        parse_shift(text, TPOTS)


@given(
    shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    which=st.integers(0, 5),
    factor=st.floats(0.1, 20),
)
def test_a_shift_gives_its_tier_that_much_more_and_takes_it_from_the_others_in_proportion(
    shares: list[float], which: int, factor: float
) -> None:
    which %= len(shares)
    tpots = tuple((0.01 * (n + 1), share / sum(shares)) for n, share in enumerate(shares))
    grown = Shift("", ((f"{10 * (which + 1)}", factor),)).of(Load(tpots)).tpots
    assert sum(share for _, share in grown) == pytest.approx(1)
    before = tpots[which][1]
    assert grown[which][1] == pytest.approx(min(before * factor, MOST_OF_ALL))
    scales = [new / old for n, ((_, new), (_, old)) in enumerate(zip(grown, tpots, strict=True)) if n != which]
    assert scales == pytest.approx([scales[0]] * len(scales))


def test_usually_each_tier_grows_by_half_then_prompts_then_outputs() -> None:
    names = [shift.name for shift in usual_shifts(TPOTS)]
    assert names == ["20 ms x1.5", "30 ms x1.5", "50 ms x1.5", "100 ms x1.5", "prompts x1.5", "outputs x1.5"]
    assert [shift.name for shift in usual_shifts(((0.05, 1.0),))] == ["prompts x1.5", "outputs x1.5"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"target": 1.0}, "below 100, not 100: no number of instances promises"),
        ({"target": 1.5}, "below 100, not 150"),
        ({"rate": -1.0}, "rate"),
        ({"profiles": ()}, "profiles: at least one"),
        ({"profiles": ("a", "a")}, "a is there twice"),
        ({"prices": {"c": 1.0}}, "c is not among the profiles"),
        ({"prices": {"a": 1.0}}, "b has none"),
        ({"seeds": 0}, "seeds"),
        ({"requests": 5}, "requests: at least 100"),
        ({"max_instances": 0}, "max-instances"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(values: dict[str, Any], complaint: str) -> None:
    usual: dict[str, Any] = {"tpots": TPOTS, "ttfts": (0.5,), "target": 0.99, "profiles": ("a", "b"), "rate": 1.0}
    with pytest.raises(PlanError, match=complaint):
        Ask(**{**usual, **values})
