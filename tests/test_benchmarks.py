"""The benchmarks' own workings, on jobs of a second: what they time must be what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
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
