"""`polyserve replay` from the command line, against an emulated engine."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyserve.cli import main

POLYSERVE = [sys.executable, "-m", "polyserve"]


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    command = [*POLYSERVE, "engine", "--profile", "a100-llama-3-8b", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = re.search(r"http://\S+", process.stdout.readline())
        assert url is not None, "it says where it listens"
        yield url[0]
    finally:
        process.terminate()
        process.communicate()


def replayed(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*POLYSERVE, "replay", *args], capture_output=True, text=True, timeout=120)


@pytest.mark.live
def test_it_writes_the_report_and_what_became_of_each_request(engine: str, tmp_path: Path) -> None:
    out, each = tmp_path / "report.json", tmp_path / "requests.jsonl"
    options = ("--rate", "4", "--duration", "3", "--profile", "a100-llama-3-8b", "--max-tokens", "none")
    done = replayed("--url", engine, *options, "--json", str(out), "--requests", str(each))
    assert done.returncode == 0, done.stderr
    assert f"live at {engine}" in done.stdout
    assert "client lag p99" in done.stdout
    report = json.loads(out.read_text())
    rows = [json.loads(line) for line in each.read_text().splitlines()]
    assert report["requests"] == len(rows) > 0
    assert report["attainment"]["overall"] == sum(row["attained"] for row in rows) / len(rows)
    assert all(row["ending"] == "finished" for row in rows)


@pytest.mark.live
def test_json_alone_goes_to_standard_output(engine: str) -> None:
    drawn = ("--trace", "uniform:50/5", "--arrivals", "poisson", "--rate", "5", "--duration", "1")
    done = replayed("--url", engine, *drawn, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trace"] == "uniform:50/5"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--url", "http://127.0.0.1:1"), "does not answer"),
        (("--url", "127.0.0.1:1"), "url is http://HOST:PORT, with /v1 or without, not '127.0.0.1:1'"),
        (("--url", "http://127.0.0.1:1", "--trace", "nowhere"), "unknown trace 'nowhere'; there are: aibrix-ramp"),
        (("--url", "http://127.0.0.1:1", "--profile", "none"), "unknown profile 'none'"),
        (("--url", "http://127.0.0.1:1", "--rate", "0"), "rate"),
        (("--url", "http://127.0.0.1:1", "--duration", "0"), "duration"),
        (("--url", "http://127.0.0.1:1", "--tpot", "x"), "tpot"),
        (("--url", "http://127.0.0.1:1", "--json", "/nowhere/x"), "no folder"),
        (("--url", "http://127.0.0.1:1", "--trace", "uniform:5/5"), "no arrival times"),
        ((), "--url"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["replay", *args])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert said in err
    assert len(err.splitlines()) == 1, err
    assert out == ""
