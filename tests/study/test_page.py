"""The report of a study stands on its own, shows every policy, and says under each figure what made it."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polyserve.cli import main
from polyserve.study.page.document import page
from polyserve.study.page.drawing import styles
from polyserve.study.settings import SETTINGS, Setting, World, fleet

Json = dict[str, Any]
ONE = fleet("a100-llama-3-8b-mixed", 2)
SMALL = Setting("small", "is <b>it</b> small & true?", (ONE,), (), (), (), overload=False)
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a browser would make of a page, as far as the tests ask."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.figures: list[str] = []  # the words of each
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag == "figure":
            self.figures.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            data = data.replace("\N{NO-BREAK SPACE}", " ")
            self.words.append(data)
            if "figure" in self.open:
                self.figures[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def alts(self) -> list[str]:
        return [attributes["aria-label"] for tag, attributes in self.elements if attributes.get("role") == "img"]


def studied(setting: Setting, folder: Path, *args: str) -> tuple[Json, str]:
    """Result and report of a real study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "small", setting)
        with pytest.raises(SystemExit) as ended:
            main(["study", "--setting", "small", "--quick", "--workloads", "uniform:6000/4", "--requests", "1",
                  "--jobs", "1", "--out", str(folder), *args])  # fmt: skip
    assert ended.value.code == 0
    return json.loads((folder / "results.json").read_text()), (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Json, str]:
    return studied(SMALL, tmp_path_factory.mktemp("small"), "--policies", "polyserve,minimal,random@512")


def one_sheet(html: str) -> Page:
    """The page, once it is sure that it refers to nothing outside itself and that no name is given twice."""
    told = Page(html)
    assert "http" not in html
    assert "@import" not in html
    assert not {tag for tag, _ in told.elements} & {"script", "link", "iframe", "object", "embed", "base"}
    targets = [v for _, a in told.elements for k, v in a.items() if k in ("src", "href", "xlink:href", "srcset")]
    targets += re.findall(r"url\(([^)]*)\)", html)
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    ids = [attributes["id"] for _, attributes in told.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in targets if target.startswith("#")} <= set(ids)
    return told


def test_the_report_stands_on_its_own(small: tuple[Json, str]) -> None:
    result, html = small
    assert one_sheet(html).text.count(result["asks"]) == 2, "title and heading: words, not markup"


def test_the_report_comes_from_the_result_alone_and_always_the_same(small: tuple[Json, str]) -> None:
    result, html = small
    assert page(result) == html


def test_every_figure_says_what_made_it(small: tuple[Json, str]) -> None:
    result, html = small
    told = one_sheet(html)
    assert [re.match(r"Figure \d+\. (.*?)(?: against| over|:)", words)[1] for words in told.figures] == [  # type: ignore[index]
        "Goodput",
        "Attainment",
        "Cost",
        "The fleet",
    ]
    (shown,) = result["cases"][0]["showcase"]
    for words, command in zip(told.figures, [result["command"]] * 3 + [shown["command"]], strict=True):
        assert f"Made by {command}, seed 0." in words
    for entry in result["cases"][0]["entries"]:
        for run in entry["runs"]:
            assert run["command"] in told.figures[1]


def test_every_policy_is_in_the_table_and_in_the_pictures(small: tuple[Json, str]) -> None:
    result, html = small
    told = one_sheet(html)
    overall = next(alt for alt in told.alts if alt.startswith("Overall"))
    for entry in result["cases"][0]["entries"]:
        assert f"{100 * entry['goodput']['G90']['load']:.1f} %" in told.text
        assert any(alt.startswith("G90:") and entry["label"] in alt for alt in told.alts)
        first = min(entry["runs"], key=lambda run: run["load"])
        share = f"{100 * first['attainment']['overall']:.4g}"
        assert f"{entry['label']} from {share} at {100 * first['load']:g} " in overall


def test_every_tier_has_its_picture_and_every_picture_words(small: tuple[Json, str]) -> None:
    result, html = small
    told = one_sheet(html)
    for pace, _ in result["cases"][0]["paces"]:
        assert any(alt.startswith(f"Tier {1e3 * pace:g} ms: attained") for alt in told.alts)
    drawn = [attributes for tag, attributes in told.elements if tag == "svg" and "aria-hidden" not in attributes]
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 40 for attributes in drawn)


def test_the_optimum_and_the_ceiling_are_marked(small: tuple[Json, str]) -> None:
    result, html = small
    ceiling = result["cases"][0]["bounds"]["ceiling"]
    assert f"mark: all at the tightest pace (ceiling {ceiling:.2f}x) at {100 / ceiling:.4g}" in html


def test_a_study_that_only_prints_writes_its_report_again(
    small: tuple[Json, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = studied(SMALL, tmp_path, "--policies", "random@512")
    (tmp_path / "report.html").unlink()
    assert studied(SMALL, tmp_path, "--policies", "random@512") == first
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out


def test_a_day_shows_what_each_way_of_scaling_pays(tmp_path: Path) -> None:
    day = replace(SMALL, measures=(), worlds=(World(day="small", day_s=60.0, start_up_s=2.0),))
    result, html = studied(day, tmp_path, "--policies", "polyserve,polyserve + queue scaler")
    told = one_sheet(html)
    (words,) = told.figures
    assert words.startswith("Figure 1. Instance-seconds")
    assert f"Made by {result['command']}, seed 0." in words
    for entry in result["cases"][0]["entries"]:
        assert f"{entry['day']['instance_seconds']:,.0f}" in told.text
        assert f"{entry['label']} {entry['day']['cost_per_attained_s']:.4g}" in told.alts[0]
    assert "2 s" in told.text, "how long an instance takes to start"


def test_an_ablation_shows_what_each_mechanism_adds(tmp_path: Path) -> None:
    only = replace(SMALL, measures=("G90t",))
    result, html = studied(only, tmp_path, "--policies", "polyserve,never refuse,no wait-time test")
    told = one_sheet(html)
    assert f"Made by {result['command']}, seed 0." in told.figures[1]
    base, *variants = (entry["goodput"]["G90t"]["load"] for entry in result["cases"][0]["entries"])
    drawn = next(alt for alt in told.alts if "more or less than polyserve" in alt)
    for label, load in zip(("never refuse", "no wait-time test"), variants, strict=True):
        assert f"{label} {100 * (load - base):+.1f}" in drawn
    assert not any(words.startswith("Figure 2. Attainment") for words in told.figures)


def test_fleets_of_several_sizes_are_compared_by_instance(tmp_path: Path) -> None:
    sizes = replace(SMALL, fleets=(ONE, fleet("a100-llama-3-8b-mixed", 4)), quick_fleets=(), measures=("G90",))
    sizes = replace(sizes, quick_fleets=sizes.fleets)
    result, html = studied(sizes, tmp_path, "--policies", "random@512")
    told = one_sheet(html)
    assert told.figures[0].startswith("Figure 1. Goodput per instance over the size of the fleet")
    assert f"Made by {result['command']}, seed 0." in told.figures[0]
    few, many = (case["entries"][0]["goodput"]["G90"]["rate"] for case in result["cases"])
    assert f"random@512 from {few / 2:.4g} at 2 to {many / 4:.4g} at 4" in told.alts[0]
    assert [a["href"] for tag, a in told.elements if tag == "a"] == ["#case-1", "#case-2"]
    assert "Mean over the cases" in told.text


def test_overload_shows_the_attained_rate(tmp_path: Path) -> None:
    result, html = studied(replace(SMALL, measures=(), loads=(0.5, 1.5)), tmp_path, "--policies", "random@512")
    told = one_sheet(html)
    (entry,) = result["cases"][0]["entries"]
    (low, _), (high, _) = entry["sweep"]["attained"]
    drawn = next(alt for alt in told.alts if alt.startswith("Attained rate"))
    assert f"at {100 * low:g} to" in drawn
    assert drawn.endswith(f"at {100 * high:g}")


def test_intervals_open_ends_and_runs_that_no_command_makes_are_told(small: tuple[Json, str]) -> None:
    result = copy.deepcopy(small[0])
    held = result["cases"][0]["entries"][0]["goodput"]["G90"]
    held["interval"], held["at_least"] = [held["load"] - 0.02, held["load"] + 0.02], True
    result["seeds"] = [0, 1, 2, 3, 4]
    for run in result["cases"][0]["entries"][0]["runs"]:
        run["command"] = None  # as where shares change in mid-run
    result["cases"][0]["showcase"][0]["command"] = None
    result["cases"][0]["bounds"]["ceiling"] = None
    told = one_sheet(page(result))
    assert f"≥ {100 * held['load']:.1f} ± 2.0 %" in told.text
    assert f"Made by {result['command']}, seeds 0, 1, 2, 3, 4." in told.figures[0]
    assert f"Made by {result['command']}, seed 0." in told.figures[-1]
    assert "None" not in told.text


@pytest.mark.parametrize("policies", [13, 21])
def test_many_policies_have_lines_of_their_own(policies: int) -> None:
    looks = styles([f"p{n}" for n in range(policies)])
    assert len({(look.hue, look.dash) for look in looks.values()}) == policies
