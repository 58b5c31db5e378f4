"""`polyserve plan` from end to end: what it prints and draws, the JSON that docs/planning.md describes, bad input."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from polyserve.cli import main
from polyserve.planner.tell import percent

SMALL = (
    *("--trace", "uniform:6000/10", "--rate", "4", "--tpot", "30ms:50,100ms:50", "--ttft", "1s,2000ms"),
    *("--target", "90", "--seeds", "2", "--requests", "100", "--max-instances", "6"),
)
DOCS = Path(__file__).parents[2] / "docs" / "planning.md"


def plan(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *args])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


@dataclass(frozen=True)
class Told:
    """What one small plan said, wrote and drew."""

    out: str
    err: str
    json: dict[str, Any]
    png: Path


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder, out, err = tmp_path_factory.mktemp("plan"), StringIO(), StringIO()
    args = [*SMALL, "--price", "2.5", "--shift", "30=1.2,prompts=1.1", "--compare", "minimal@512", "--quick"]
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(["plan", *args, "--json", str(folder / "plan.json"), "--out", str(folder / "plan.png")])
    assert ended.value.code == 0
    plain = json.loads((folder / "plan.json").read_text())
    return Told(out.getvalue(), err.getvalue(), plain, folder / "plan.png")


def keys(value: Any, path: str = "") -> set[str]:
    """Every key of a JSON value by its path; members of lists, and of objects whose keys are data, are alike."""
    if isinstance(value, list):
        return {key for each in value for key in keys(each, f"{path}[]")}
    if not isinstance(value, dict):
        return set()
    data = {"tpot_ms", "settings", "prices_per_instance_hour", "other_bounds", "tiers", "attainment"}
    found = set()
    for key, each in value.items():
        below = f"{path}.*" if path.split(".")[-1] in data else f"{path}.{key}".removeprefix(".")
        found |= {below} | keys(each, below)
    return found


def test_the_json_has_the_keys_that_the_docs_list(told: Told) -> None:
    documented = set(re.findall(r"^\| `([^`]+)` \|", DOCS.read_text().split("## The JSON")[1], re.MULTILINE))
    assert keys(told.json) == documented


def test_the_json_answers_the_question(told: Told) -> None:
    answer = told.json
    assert answer["schema"] == "polyserve.plan/1"
    assert answer["best"] == "a100-llama-3-8b"
    assert answer["question"]["tpot_ms"] == {"30": 0.5, "100": 0.5}
    (kind,) = answer["kinds"]
    assert kind["instances"] == kind["best_instances"] >= 1
    assert kind["cost"]["per_hour"] == 2.5 * kind["instances"]
    assert kind["worst"]["attainment"] >= 0.9
    assert sum(tier["instances"]["mean"] for tier in kind["tiers"].values()) + kind["unassigned_instances"][
        "mean"
    ] == pytest.approx(kind["instances"])
    assert kind["instances"] in [size["instances"] for size in kind["sizes"]]
    assert kind["shifts"][0]["tpot_ms"] == {"30": 0.6, "100": 0.4}
    assert kind["compared"][0]["chunk"] == {"kind": "fixed", "tokens": 512}


def test_the_command_it_gives_simulates_the_first_seed_of_the_plan(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    (kind,) = told.json["kinds"]
    with pytest.raises(SystemExit):
        main([*kind["command"].split()[1:], "--json", "-"])
    simulated = json.loads(capsys.readouterr().out)
    assert simulated["instances"] == kind["instances"]
    worst = kind["worst_seed"]
    if worst["seed"] == 0:
        assert simulated["attainment"]["worst_tier"] == pytest.approx(worst["attainment"])
    else:
        assert simulated["attainment"]["worst_tier"] >= worst["attainment"]


def test_the_picture_is_a_png(told: Told) -> None:
    assert told.png.read_bytes().startswith(b"\x89PNG")


def test_people_get_tables_and_progress_goes_to_stderr(told: Told) -> None:
    assert "uniform:6000/10 at 4 requests/s, 90 % of every tier in time, polyserve" in told.out
    assert re.search(r"│ a100-llama-3-8b +│ +\d+ │", told.out)
    assert "again: polyserve simulate --trace uniform:6000/10" in told.out
    assert "a100-llama-3-8b: if demand shifts" in told.out
    assert "a100-llama-3-8b: the same with other policies" in told.out
    assert [line.split("]")[0] for line in told.err.splitlines() if line.startswith("[") and "headroom" in line] == [
        "[2/4"
    ]


def test_a_target_that_no_size_attains_ends_with_code_1_and_the_best_found(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, *SMALL, "--rate", "12", "--max-instances", "1", "--seeds", "1", "--json", "-")
    assert code == 1
    (kind,) = json.loads(out)["kinds"]
    assert kind["instances"] is None
    assert kind["best_instances"] == 1
    assert "no fleet of up to 1 instance has every tier at 90 %" in kind["problem"]
    assert "refused" in kind["problem"]
    assert kind["problem"] in " ".join(err.split())


BAD = [
    (["--profiles", "abacus"], "unknown profile 'abacus'; there are: a100-llama-3-8b"),
    (["--profiles", ""], "profiles: at least one"),
    (["--trace", "/no/such.csv"], "unknown trace '/no/such.csv'"),
    (["--rate", "fast"], "rate: a positive number of requests per second, or recorded, not 'fast'"),
    (["--rate", "recorded"], "has no arrival times; give requests per second"),
    (["--tpot", "5ms:50,100ms:50"], "so no instance of this kind can hold TPOT 5 ms"),
    (["--tpot", "20:10,30:20"], "the shares sum to 30; they want 1, or 100"),
    (["--ttft", "1ms"], "TTFT up to 1 ms: an idle instance would be late"),
    (["--ttft", "soon"], "a positive number of ms"),
    (["--target", "100"], "target: a percentage above 0 and below 100, not 100"),
    (["--target", "most"], "target: expected a positive number, not 'most'"),
    (["--price", "h200-llama-3-8b=4"], "h200-llama-3-8b is not among the profiles"),
    (["--shift", "25=2"], "WHAT one of 30, 100, prompts, outputs, rate"),
    (["--compare", "magic"], "unknown policy 'magic'"),
    (["--policy", "magic"], "unknown policy 'magic'"),
    (["--set", "colour=red"], "unknown setting 'colour'"),
    (["--set", "colour"], "set: KEY=VALUE, not 'colour'"),
    (["--arrivals", "monthly"], "there are poisson, gamma:CV and recorded"),
    (["--seeds", "0"], "seeds: from 1 to 100, not 0"),
    (["--requests", "0"], "requests: at least 100 in a run, not 0"),
    (["--jobs", "0"], "jobs: at least 1, not 0"),
    (["--out", "plan.jpg"], "out: a file that ends in .png"),
    (["--json", "/no/such/folder/x.json"], "json: there is no folder"),
]


@pytest.mark.parametrize(("args", "complaint"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_a_bad_option_is_one_clear_line(capsys: pytest.CaptureFixture[str], args: list[str], complaint: str) -> None:
    code, out, err = plan(capsys, *SMALL, *args)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.startswith("polyserve: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [(0.99, 2, "99 %"), (0.98765, 2, "98.77 %"), (0.99999, 2, "99.99 %"), (1.0, 2, "100 %"), (0.5, 0, "50 %")],
)
def test_a_percentage_is_never_rounded_up_to_all(share: float, digits: int, text: str) -> None:
    assert percent(share, digits) == text
