import io
import re

from rich.console import Console

from polyserve.core.types import Slo, Tier
from polyserve.demo.story import Seen, comparison, timeline
from polyserve.report import Outcome, Score, score

PACES = [0.02, 0.05]
TIERS = [Tier("tight", 0.02, 0.3), Tier("loose", 0.05, 0.3)]


def finished(name: str, tpot_s: float, late_s: float) -> Outcome:
    return Outcome(name, 0.0, 10, Slo(0.3, tpot_s), "finished", None, 0.1, 0.5, 21, late_s)


def refused(name: str, tpot_s: float) -> Outcome:
    return Outcome(name, 0.0, 10, Slo(0.3, tpot_s), "refused", "overloaded")


def scored(*outcomes: Outcome) -> Score:
    return score(outcomes, (0.0, 1.0), PACES)


def printed(scores: dict[str, Score]) -> list[list[str]]:
    """The cells of the table, row by row, on a terminal of usual width."""
    out = io.StringIO()
    Console(file=out, width=100).print(comparison(scores, TIERS))
    assert "…" not in out.getvalue()
    _, *rows = (line for line in out.getvalue().splitlines() if line.strip(" ─"))
    return [re.split(r"  +", row.strip()) for row in rows]


def test_each_tier_shows_what_everybody_says_of_the_same_requests() -> None:
    live = scored(finished("a", 0.02, -0.1), refused("b", 0.02), finished("c", 0.05, 0.1))
    simulated = scored(finished("a", 0.02, -0.1), finished("b", 0.02, -0.1), finished("c", 0.05, -0.1))
    rows = printed({"live": live, "simulated": simulated})
    assert [row[:4] for row in rows[::2]] == [
        ["tight 20 ms", "2", "live", "50.0 %"],
        ["loose 50 ms", "1", "live", "0.0 %"],
        ["all", "3", "live", "33.3 %"],
    ]
    assert [row[:2] for row in rows[1::2]] == [["simulated", "100.0 %"]] * 3
    assert rows[0][4:] == ["100", "100", "20.0", "20.0", "0", "1"]


def test_a_tier_without_requests_has_no_figures() -> None:
    rows = printed({"live": scored(finished("a", 0.02, -0.1))})
    assert rows[1] == ["loose 50 ms", "0", "live", "-", "-", "-", "-", "-", "0", "0"]


def test_the_timeline_shows_who_served_what_when() -> None:
    looks = [
        Seen(0.5, {"i0": "tight", "i1": None}),
        Seen(1.5, {"i0": "loose", "i1": "tight"}),
        Seen(2.5, {"i0": "loose"}),
    ]
    i0, i1, scale, legend = (row.plain for row in timeline(looks, ["tight", "loose"], 4.0, columns=4))
    assert i0 == "  i0 abbb"
    assert i1 == "  i1 ·a  "
    assert scale == "     |0 s"
    assert legend == "  a tight   b loose   · in the pool"


def test_before_the_first_look_nothing_is_said() -> None:
    rows = timeline([Seen(3.5, {"i0": "a"})], ["a"], 4.0, columns=4)
    assert rows[0].plain == "  i0    a"
