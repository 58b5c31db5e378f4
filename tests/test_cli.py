"""The command line: what it prints, and that whatever a user gets wrong is one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polyserve.cli import main

SMALL = ["--trace", "uniform:200/20", "--instances", "2", "--rate", "10", "--duration", "4", "--warm-up", "1"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def simulate(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    return run(capsys, "simulate", *SMALL, *args)


BAD = [
    (["--policy", "magic"], "unknown policy 'magic'; there are: polyserve, polyserve-paper, random, round-robin"),
    (["--profile", "abacus"], "unknown profile 'abacus'; there are: a100-llama-3-8b"),
    (["--trace", "nowhere"], "unknown trace 'nowhere'; there are: aibrix-ramp"),
    (["--trace", "uniform:0/5"], "whole P and D of at least 1"),
    (["--set", "colour=red"], "unknown setting 'colour'; there are: autoscaler"),
    (["--set", "placement=left"], "setting 'placement' is one of auto, fill, spread"),
    (["--set", "guest_reserve=much"], "setting 'guest_reserve' is a number, not 'much'"),
    (["--set", "placement"], "--set: KEY=VALUE, not 'placement'"),
    (["--rate", "0"], "rate is a positive number, not 0"),
    (["--rate", "-3"], "rate is a positive number, not -3"),
    (["--rate", "nan"], "rate is a positive number"),
    (["--rate", "many"], "--rate: requests per second (100) or a share of the optimum (90%), not 'many'"),
    (["--rate", "0%"], "rate is a positive share of the optimum, not 0"),
    (["--rate", ""], "want a rate"),
    (["--instances", "0"], "instances: from 1 to 100000, not 0"),
    (["--instances", "x"], "'--instances'"),
    (["--duration", "-1"], "duration is a positive number of seconds, not -1"),
    (["--warm-up", "-1"], "warm-up is not negative, not -1"),
    (["--tpot", "20:.1,20:.9"], "20 ms is there twice"),
    (["--tpot", "20:-1"], "MS:SHARE, both positive"),
    (["--tpot", "0.001:1"], "is feasible at TPOT 0.001 ms"),
    (["--ttft", "soon"], "a positive number of ms"),
    (["--arrivals", "monthly"], "there are poisson, gamma:CV and recorded"),
    (["--arrivals", "recorded"], "has no arrival times"),
    (["--best-effort", "1.5"], "best-effort share"),
    (["--chunk", "fixed:0"], "--chunk: dynamic or fixed:N"),
    (["--sight", "second"], "'second' is not one of 'gateway', 'perfect'"),
    (["--jitter", "-0.1"], "jitter is not negative"),
    (["--bias", "-1"], "bias is above -1"),
    (["--leaving", "2"], "leaving is a share from 0 to 1"),
    (["--lose", "3"], "of 2 instances 3 cannot be lost"),
    (["--max-instances", "1"], "max-instances 1 is less than the 2 instances at the start"),
    (["--max-instances", "4", "--min-instances", "5"], "min-instances 5 is more than max-instances 4"),
    (["--pd", "some"], "--pd: auto, or how many instances compute prompts (6), not 'some'"),
    (["--pd", "2"], "pd: auto, or 1 to 1 of the 2 instances, not 2"),
    (["--pd", "auto", "--instances", "1"], "pd: wants at least 2 instances, one of each role, not 1"),
    (["--pd", "1", "--policy", "minimal", "--max-instances", "4"], "pd: autoscaler 'queue' cannot say which role"),
    (["--set", "disaggregated=true"], "disaggregated is not set by itself: say pd"),
    (["--pd", "1", "--set", "kv_bandwidth=0"], "setting 'kv_bandwidth' is above 0"),
    (["--plot", "load.jpg"], "a file that ends in .png"),
    (["--json", "/no/such/folder/x.json"], "--json: there is no folder '/no/such/folder'"),
    (["--journal", "/no/such/folder/x"], "--journal: there is no folder"),
    (["--colour", "red"], "No such option: --colour"),
]


@pytest.mark.parametrize(("args", "complaint"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_a_bad_option_is_one_clear_line(capsys: pytest.CaptureFixture[str], args: list[str], complaint: str) -> None:
    code, out, err = simulate(capsys, *args)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.startswith("polyserve: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prompt_tokens\n5\n", "no column of output tokens"),
        ("prompt_tokens,output_tokens\n5,-1\n", "row 1: '-1' is not a count of tokens"),
        ("", "holds no requests"),
    ],
)
def test_a_bad_trace_file_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "trace.csv").write_text(text)
    code, _, err = simulate(capsys, "--trace", str(tmp_path / "trace.csv"))
    assert (code, err.count("\n")) == (2, 1)
    assert complaint in err
    assert str(tmp_path / "trace.csv") in err


def test_a_bad_profile_file_is_one_clear_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"name": "mine", "speed": 3}')
    code, _, err = simulate(capsys, "--profile", str(tmp_path / "mine.json"))
    assert (code, err.count("\n")) == (2, 1)
    assert "mine.json: unknown field 'speed'" in err


def test_a_simulation_prints_a_table_per_tier(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = simulate(capsys)
    assert code == 0
    assert "polyserve, 2 x a100-llama-3-8b, uniform:200/20" in out
    for tier in ("20", "30", "50", "100", "all"):
        assert f"│ {tier:>7} │" in out
    assert "of optimal" in out


def test_json_on_stdout_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = simulate(capsys, "--json", "-", "--set", "head_walk=2", "--seed", "5")
    assert code == 0
    plain = json.loads(out)
    assert set(plain["attainment"]["tiers"]) == {"20", "30", "50", "100"}
    assert set(plain["ttft_s"]["20"]) == {"p50", "p90", "p99"}
    assert (plain["policy"], plain["seed"], plain["settings"]) == ("polyserve", 5, {"head_walk": "2"})
    assert plain["requests"] == sum(tier["requests"] for tier in plain["by_tier"].values()) > 0
    assert plain["instance_seconds"] == pytest.approx(2 * 4.0)
    assert "all" in err


def test_journal_json_and_plot_are_written_and_the_journal_replays(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    journal, plain, plot = tmp_path / "j.jsonl.gz", tmp_path / "r.json", tmp_path / "p.png"
    code, _, _ = simulate(capsys, "--journal", str(journal), "--json", str(plain), "--plot", str(plot))
    assert code == 0
    assert json.loads(plain.read_text())["attainment"]["overall"] is not None
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "replay-journal", str(journal))
    assert code == 0
    assert "every decision the same" in out


def test_the_same_seed_gives_the_same_journal_byte_for_byte(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["--jitter", "0.1", "--lose", "1", "--leaving", "0.2", "--policy", "random", "--seed", "7"]
    for name in ("a", "b"):
        assert simulate(capsys, *args, "--journal", str(tmp_path / name))[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_journal_that_decides_otherwise_ends_with_code_1_and_names_the_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert simulate(capsys, "--journal", str(tmp_path / "j"))[0] == 0
    lines = (tmp_path / "j").read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"Dispatch"' in line)
    lines[at] = lines[at].replace('"resume_from":0', '"resume_from":1')
    (tmp_path / "j").write_text("".join(lines))
    code, out, _ = run(capsys, "replay-journal", str(tmp_path / "j"))
    assert code == 1
    assert f"line {at + 1}," in out


def test_a_file_that_is_no_journal_is_one_clear_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "j").write_text("hello\n")
    for path in (tmp_path / "j", tmp_path / "none"):
        code, _, err = run(capsys, "replay-journal", str(path))
        assert (code, err.count("\n")) == (2, 1)
        assert str(path) in err


def test_a_share_of_the_optimum_is_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = simulate(capsys, "--rate", "30%", "--duration", "20", "--json", "-")
    assert code == 0
    plain = json.loads(out)
    assert plain["offered_rate"] / plain["optimal_rate"] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("command", ["policies", "profiles", "traces"])
def test_the_lists_list(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command)
    assert code == 0
    assert {"policies": "round-robin", "profiles": "h200-llama-3-70b-tp4-mixed", "traces": "azure-conv"}[command] in out


def test_a_policy_lists_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "policies", "polyserve-paper")
    assert code == 0
    assert "lengths = average" in out
    assert run(capsys, "policies", "magic")[0] == 2


def test_help_is_quick_since_it_loads_nothing_it_does_not_need() -> None:
    code = "import sys; sys.argv = ['polyserve', '--help']\n"
    code += "try:\n    from polyserve.cli import main; main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'numpy', 'numba', 'aiohttp', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert "simulate" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
