"""`profile compose`, `profile show` and `validate` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyserve.cli import main
from polyserve.profiles.describe import CONTEXTS, largest_batch
from polyserve.profiles.store import load

DATA = Path(__file__).parent.parent / "data" / "rtxpro6000"
RUN = str(DATA / "rtxpro6000_llama-3.1-8b_tp1_vllm_requests.csv.gz")
TABLES = sorted(str(file) for file in DATA.glob("*_tp1_*") if "vllm" not in file.name)
ENGINE = ["--max-batched-tokens", "2048", "--max-seqs", "128"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("composed") / "rtx.json")
    with pytest.raises(SystemExit) as ended:
        main(["profile", "compose", *TABLES, "--model", "llama-3-8b", "--out", out])
    assert ended.value.code == 0
    return out


def test_kernel_tables_become_a_profile_that_predicts_a_run(capsys: pytest.CaptureFixture[str], profile: str) -> None:
    code, out, err = run(capsys, "validate", "--requests", RUN, "--profile", profile, *ENGINE, "--json", "-")
    assert code == 0
    result = json.loads(out)
    assert {"ttft", "tpot", "latency", "host_overhead_s", "without_host_overhead", "requests"} <= set(result)
    assert abs(result["tpot"]["mean_error"]) < 0.02
    assert result["without_host_overhead"]["ttft"]["mean_error"] < result["ttft"]["mean_error"]
    assert {"mean_error", "p50_error", "p90_error", "p99_error"} <= set(result["latency"])
    assert "H200" in result["host_overhead_source"]
    assert "without host overhead" in err  # the table goes where it does not spoil the JSON


def test_the_table_names_recorded_and_predicted(capsys: pytest.CaptureFixture[str], profile: str) -> None:
    code, out, _ = run(capsys, "validate", "--requests", RUN, "--profile", profile, *ENGINE)
    assert code == 0
    assert "recorded" in out
    assert out.count("TTFT") == 2
    assert "300 requests" in out


def test_what_lies_outside_the_measured_is_said(capsys: pytest.CaptureFixture[str], profile: str) -> None:
    wide = ["--max-batched-tokens", "8192", "--max-seqs", "512"]
    assert (
        "outside what the profile was measured on"
        in run(capsys, "validate", "--requests", RUN, "--profile", profile, *wide)[1]
    )


def test_a_profile_says_what_it_costs_and_what_each_pace_holds(
    capsys: pytest.CaptureFixture[str], profile: str, tmp_path: Path
) -> None:
    picture = tmp_path / "rtx.png"
    code, out, _ = run(capsys, "profile", "show", profile, "--plot", str(picture))
    assert code == 0
    for line in ("floor", "beside a chunk", "host overhead", "20 ms", "licence: MIT"):
        assert line in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "profile", "show", profile, "--json", "-")
    assert json.loads(out)["profile"]["name"] == "rtx"


@pytest.mark.parametrize("name", ["h200-llama-3-8b", "a100-llama-3-8b-mixed"])
def test_the_largest_batch_keeps_the_pace_and_one_more_does_not(name: str) -> None:
    profile = load(name)
    for context in CONTEXTS:
        most = largest_batch(profile, 0.02, context)
        assert profile.iteration_s(0, most, most * context) <= 0.02
        limits = profile.limits
        bound = min(limits.max_num_seqs, limits.kv_tokens // context)
        assert most == bound or profile.iteration_s(0, most + 1, (most + 1) * context) > 0.02


def test_options_of_compose_reach_the_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    options = ["--kv-tokens", "100000", "--max-seqs", "64", "--max-batched-tokens", "1024", "--name", "mine"]
    overhead = ["--host-overhead", "0.001", "--host-overhead-source", "measured by us"]
    tables = [*TABLES, "--model", "llama-3.1-8b", "--out", str(out)]
    code, said, _ = run(capsys, "profile", "compose", *tables, *options, *overhead)
    assert code == 0
    made = load(out)
    assert (made.limits.kv_tokens, made.limits.max_num_seqs, made.limits.max_num_batched_tokens) == (100000, 64, 1024)
    assert made.host_overhead_s == 0.001
    assert made.notes["host_overhead"] == "1 ms an iteration: measured by us"
    assert "measured by us" in said


BAD = [
    (["compose", *TABLES, "--model", "gpt", "--out", "x.json"], "unknown model 'gpt'; there are: llama-3-8b"),
    (["compose", *TABLES, "--model", "llama-3-70b", "--out", "x.json"], "of meta-llama/Llama-3.1-8B, not of"),
    (["compose", RUN, "--model", "llama-3-8b", "--out", "x.json"], "no kernel table that is known"),
    (["compose", *TABLES, "--model", "llama-3-8b", "--out", "/nowhere/x.json"], "/nowhere/x.json: cannot be written"),
    (["compose", *TABLES, "--model", "llama-3-8b", "--out", "x.json", "--host-overhead", "2"], "seconds from 0 to 1"),
    (
        ["compose", *TABLES, "--model", "llama-3-8b", "--out", "x.json", "--host-overhead", "0.001"],
        "--host-overhead-so",
    ),
    (["compose", *TABLES, "--model", "llama-3-8b", "--out", "x.json", "--tp", "2"], "wants an all-reduce table"),
    (["compose", *TABLES, "--model", "llama-3-8b", "--out", "x.json", "--assume-mixed"], "have mixed batches measured"),
    (["show", "abacus"], "unknown profile 'abacus'"),
    (["show", "h200-llama-3-8b", "--plot", "/nowhere/x.png"], "/nowhere/x.png"),
    (["show", "h200-llama-3-8b", "--json", "/nowhere/x.json"], "/nowhere/x.json"),
]


@pytest.mark.parametrize(("args", "said"), BAD)
def test_what_the_user_got_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, args: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "profile", *args)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_log_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "validate", "--requests", TABLES[0], "--profile", "h200-llama-3-8b", *ENGINE)
    assert code == 2
    assert "column 'request_id' is missing" in err
    assert len(err.splitlines()) == 1
    code, _, err = run(
        capsys, "validate", "--requests", RUN, "--profile", "h200-llama-3-8b", *ENGINE, "--kv-tokens", "9"
    )
    assert code == 2
    assert "--kv-tokens" in err
