"""The benchmarks' own workings, on jobs of a second: what they time must be what they say."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest

from polyserve.core.controller import Controller

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_job_becomes_a_mooncake_trace_whose_requests_share_nothing(tmp_path: Path) -> None:
    dynosim = benchmark("dynosim")
    job = tmp_path / "job.csv"
    job.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.024457,374,44\n0.5,1025,7\n", encoding="utf-8")
    lines = [json.loads(line) for line in dynosim.mooncake(dynosim.read_job(job)).splitlines()]
    assert lines == [
        {"timestamp": 24.457, "input_length": 374, "output_length": 44, "hash_ids": [0]},
        {"timestamp": 500.0, "input_length": 1025, "output_length": 7, "hash_ids": [1, 2, 3]},
    ]


def test_decisions_are_timed_in_the_window_alone_and_the_controller_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decisions = benchmark("decisions")
    monkeypatch.setattr(decisions, "WARM_UP_S", 1.0)
    before = Controller.step
    result = decisions.measure(2, 0.5, trace="uniform:200/20", measured_s=0.5)
    assert Controller.step is before
    arrived = result["step_us"]["Arrived"]
    assert arrived["steps"] > 5
    assert 0 < arrived["p50"] <= arrived["p99"]
    assert result["residents"] > 0


def test_the_common_job_is_the_published_one() -> None:
    sys.modules["decisions"], sys.modules["dynosim"] = benchmark("decisions"), benchmark("dynosim")
    rows = benchmark("bench").common_rows()
    assert len(rows) == 10_000
    assert rows[:3] == [(0.024457, 374, 44), (0.034677, 396, 109), (0.100458, 879, 55)]
    assert max(prompt for _, prompt, _ in rows) == 3584
    assert max(prompt + output for _, prompt, output in rows) == 4096
    assert sum(output for _, _, output in rows) == 2_183_388


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return benchmark("gateway_rig")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_every_chunk_that_the_engine_of_c_sends_is_counted_by_the_client_of_c(rig: ModuleType, tmp_path: Path) -> None:
    engine, client = rig.compiled("upstream", tmp_path), rig.compiled("streams", tmp_path)
    ports = rig.free_ports(2)
    core = rig.cores()[0]
    with rig.process([str(engine), str(ports[0]), "2"], core, tmp_path / "engine.log") as child:
        rig.answers(ports[1], child, 5.0)
        before = json.loads(rig.fetched(ports[0], "/stats"))
        command = [str(client), str(ports[1]), rig.PATH, "8", "0", "0.3"]
        told = json.loads(
            subprocess.run(command, input=rig.body(3, 0.002), capture_output=True, check=True).stdout.splitlines()[-1]
        )
        rig.fetched(ports[0], "/end")
        after = json.loads(rig.fetched(ports[0], "/stats"))
        assert rig.cpu_s(child.pid) > 0
        assert rig.resident(child.pid) > 100_000
    assert told["errors"] == 0
    assert told["open"] == 8
    assert told["requests"] > 8
    assert 0 < told["chunk_p50_us"] <= told["chunk_p99_us"]
    # At the end up to three chunks of each stream are still on their way.
    assert 0 <= after["chunks"] - before["chunks"] - told["chunks"] <= 3 * 8
    assert after["open"] == 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_bare_relay_passes_a_stream_on_byte_for_byte(rig: ModuleType, tmp_path: Path) -> None:
    peers = sys.modules["gateway_peers"]
    engine = rig.compiled("upstream", tmp_path)
    ports = rig.free_ports(2)
    bare = next(peer for peer in peers.PEERS if peer.name == "bare")
    command = bare.prepare(ports[0], ports[1:], tmp_path)
    core = rig.cores()[0]
    with (
        rig.process([str(engine), str(ports[1]), "1"], core, tmp_path / "engine.log"),
        rig.process(command, core, tmp_path / "bare.log") as child,
    ):
        rig.answers(ports[0], child, 30.0)
        ask = urllib.request.Request(f"http://127.0.0.1:{ports[0]}{rig.PATH}", rig.body(3, 0.001))
        with urllib.request.urlopen(ask, timeout=10.0) as answer:
            events = answer.read().decode().split("\n\n")
    assert [event.startswith('data: {"id"') for event in events[:3]] == [True] * 3
    assert events[3:] == ["data: [DONE]", ""]


def test_what_wrk_says_is_read(rig: ModuleType) -> None:
    gateway = benchmark("gateway")
    told = """Running 2s test @ http://127.0.0.1:20000/v1/chat/completions
  1 threads and 64 connections
  2410 requests in 2.00s, 1.16MB read
  Socket errors: connect 0, read 1, write 0, timeout 2
  Non-2xx or 3xx responses: 4
Requests/sec:   1204.53
Transfer/sec:    594.13KB
"""
    assert gateway.requests_of(told) == (2410, 1204.53)
    assert gateway.failures_of(told) == 7
    assert gateway.failures_of("2410 requests in 2.00s, 1.16MB read") == 0


def test_a_row_says_what_a_relay_costs_beside_the_bare_one(rig: ModuleType) -> None:
    gateway = benchmark("gateway")
    bare = {"requests_per_s": 2500.0, "request_cpu_us": 400.0, "failed": 0}
    lines = gateway.table({"bare": bare, "gateway": bare | {"request_cpu_us": 600.0, "decision_us": 55.0}}).splitlines()
    assert lines[1].split() == ["bare", "2,500", "400", "2,500", "1.00x", "0", "-"]
    assert lines[2].split() == ["gateway", "2,500", "600", "1,667", "1.50x", "0", "55"]
    chunks = {"50": {"cpu_us": 30.0, "in_time": 1.0}, "100": {}}  # of the second job nothing came
    assert gateway.table({"slow": {"chunks": chunks}}).splitlines()[4].split() == [
        "slow",
        "30.0",
        "-",
        "100%",
        "-",
        "-",
    ]


def test_a_peer_that_is_not_installed_is_said_to_be_missing_in_a_line(
    rig: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peers = sys.modules["gateway_peers"]
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    haproxy = next(peer for peer in peers.PEERS if peer.name == "haproxy")
    with pytest.raises(peers.UnavailableError, match="haproxy is not installed"):
        haproxy.prepare(1, range(2, 3), tmp_path)
