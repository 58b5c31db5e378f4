"""The study from end to end, by its command: small fleets, few requests, real runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyserve.cli import main
from polyserve.study.settings import SETTINGS, Setting, StudyError, World, fleet
from polyserve.study.study import workers

# Long prompts and short answers: few requests fill the instances, and windows are short.
TINY = ["study", "--setting", "few", "--quick", "--workloads", "uniform:6000/4", "--requests", "1", "--jobs", "1"]
ONE = fleet("a100-llama-3-8b-mixed", 2)
SMALL = Setting("small", "is it small?", (ONE,), (), (), (), overload=False)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "small", SMALL)


def study(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*TINY, *args])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what depends on the machine's speed."""
    text = json.dumps({**result, "simulated_s": 0}, sort_keys=True)
    plain: dict[str, Any] = json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "wall_s"})
    return plain


def test_a_study_is_found_kept_and_found_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    policies = ["--setting", "small", "--policies", "polyserve,minimal,random@512", "--out", str(tmp_path)]
    code, out, err = study(capsys, *policies)
    assert code == 0, err
    assert "small: is it small?" in out
    assert "minimal" in out
    first = json.loads((tmp_path / "results.json").read_text())
    lines = (tmp_path / "runs.jsonl").read_text().count("\n")

    code, _, _ = study(capsys, *policies)
    again = json.loads((tmp_path / "results.json").read_text())
    assert code == 0
    assert again == first, "a finished study is read from its runs"
    assert (tmp_path / "runs.jsonl").read_text().count("\n") == lines

    (case,) = first["cases"]
    ours, minimal, untuned = case["entries"]
    assert list(ours["goodput"]) == ["G90", "G90t", "G99t"]
    assert list(untuned["goodput"]) == ["G90"]
    assert ours["goodput"]["G99t"]["load"] <= ours["goodput"]["G90t"]["load"] <= ours["goodput"]["G90"]["load"]
    assert ours["goodput"]["G90"]["over"]["best_baseline"]["label"] == "minimal"
    assert ours["goodput"]["G90"]["over"]["best_untuned"]["label"] == "random@512"
    assert minimal["chunk"] in {tuned["chunk"] for tuned in minimal["tuning"]}
    assert case["showcase"][0]["instances_per_tier"][0]["tier"] == "20"


def test_the_command_beside_a_run_makes_that_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import shlex

    study(capsys, "--setting", "small", "--policies", "minimal", "--out", str(tmp_path))
    result = json.loads((tmp_path / "results.json").read_text())
    run = result["cases"][0]["entries"][0]["runs"][0]
    words = shlex.split(run["command"])
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--json", "-"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    for name in ("attainment", "requests", "offered_rate", "refused", "instance_seconds"):
        assert told[name] == run[name], name


def alive(group: int) -> list[str]:
    """Processes of a group; those that are dead, but that nobody has asked about, are none."""
    fields = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields.append(stat.read_text().rpartition(")")[2].split())
    return [state for state, _, of, *_ in fields if int(of) == group and state != "Z"]


@pytest.mark.parametrize("by", ["the terminal", "a supervisor"])
def test_what_was_interrupted_goes_on_to_the_same_result(
    by: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policies = ["--policies", "random@512"]
    study(capsys, *policies, "--out", str(tmp_path / "whole"))
    runs = tmp_path / "cut" / "runs.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "polyserve", *TINY, *policies, "--out", str(runs.parent), "--jobs", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 240  # compiling, where no cache is
    while not (runs.exists() and runs.read_text().count("\n")) and time.monotonic() < until:
        time.sleep(0.02)
    if by == "the terminal":
        os.killpg(process.pid, signal.SIGINT)  # to the workers too
    else:
        process.terminate()
    out, err = process.communicate(timeout=30)
    for _ in range(500):
        if not (left := alive(process.pid)):
            break
        time.sleep(0.02)
    assert not left, "workers go on"
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == f"polyserve: stopped; {runs} keeps every run: the same command goes on from there"
    assert "Traceback" not in err

    kept = runs.read_text().count("\n")
    whole = (tmp_path / "whole" / "runs.jsonl").read_text().count("\n")
    assert 1 <= kept < whole
    runs.write_bytes(runs.read_bytes()[:-7])  # and the machine went down in the middle of a line
    study(capsys, *policies, "--out", str(runs.parent))
    assert runs.read_text().count("\n") == whole
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")]
    assert without_times(results[0]) == without_times(results[1])


def test_json_on_stdout_is_json_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = study(
        capsys, "--setting", "small", "--policies", "random@2048", "--json", "-", "--out", str(tmp_path)
    )
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "results.json").read_text())
    assert "random@2048" in err


def test_a_worker_that_dies_is_one_clear_line() -> None:
    with pytest.raises(StudyError, match="a worker process died"), workers(2) as pool:
        pool.submit(os._exit, 1).result()


BAD = [
    (["--setting", "paper-xx"], "--setting: unknown setting 'paper-xx'; there are: paper-co, paper-pd, big, old"),
    (["--policies", "magic"], "--policies: unknown policy 'magic'"),
    (["--policies", "minimal@0"], "--policies: a fixed chunk is at least 1 token, not 'minimal@0'"),
    (["--workloads", "nowhere"], "unknown trace 'nowhere'; there are: aibrix-ramp"),
    (["--workloads", "uniform:60000/5"], "workload uniform:60000/5: no request is feasible on a100-llama-3-8b-mixed"),
    (["--jobs", "-1"], "--jobs: 0 for one per core, or a number of processes, not -1"),
    (["--requests", "0"], "--requests: at least 1, not 0"),
    (["--seed", "-1"], "--seed: 0 or more, not -1"),
    (["--json", "/no/such/folder/x.json"], "--json: there is no folder '/no/such/folder'"),
    (["--colour", "red"], "No such option: --colour"),
]


@pytest.mark.parametrize(("args", "complaint"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_a_bad_option_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], complaint: str
) -> None:
    code, out, err = study(capsys, "--out", str(tmp_path / "new"), *args)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.startswith("polyserve: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_runs_file_of_something_else_is_one_clear_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text("{}\n")
    code, _, err = study(capsys, "--out", str(tmp_path))
    assert code == 2
    assert "runs.jsonl: line 1 is no run of a study" in err


def test_a_day_says_what_a_request_costs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    day = replace(SMALL, measures=(), worlds=(World(day="small", day_s=60.0, start_up_s=2.0),))
    monkeypatch.setitem(SETTINGS, "small", day)
    options = ["--setting", "small", "--workloads", "uniform:6000/4", "--policies", "polyserve"]
    code, out, err = study(capsys, *options, "--out", str(tmp_path))
    assert code == 0, err
    assert "instance-seconds" in out
    ((entry,),) = (case["entries"] for case in json.loads((tmp_path / "results.json").read_text())["cases"])
    told = entry["day"]
    assert told["scaler"] == "own"
    assert told["instance_seconds"] == pytest.approx(told["mean_instances"] * 60)
    assert told["holds"] == (told["worst_tier"] >= 0.99)


def test_a_sweep_says_how_overload_is_borne(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(SETTINGS, "small", replace(SMALL, measures=(), loads=(0.5, 1.5)))
    code, out, err = study(capsys, "--setting", "small", "--policies", "polyserve", "--out", str(tmp_path))
    assert code == 0, err
    assert "at 150 %" in out
    ((entry,),) = (case["entries"] for case in json.loads((tmp_path / "results.json").read_text())["cases"])
    shares = dict(map(tuple, entry["sweep"]["attained"]))
    assert entry["sweep"]["peak"] == max(shares.values())
    assert entry["sweep"]["at_150_over_peak"] == pytest.approx(shares[1.5] / max(shares.values()))


def test_every_setting_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["study"])
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == list(SETTINGS)
