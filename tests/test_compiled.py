"""Compiled code is not kept beyond a change of any file that it was made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polyserve
from polyserve import COMPILED, forget_stale

ROOT = Path(polyserve.__file__).parent


def test_every_file_with_compiled_loops_is_known() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if "@njit" in path.read_text()}
    assert found <= set(COMPILED)
    assert all((ROOT / name).is_file() for name in COMPILED)


def test_a_change_in_one_file_forgets_what_was_compiled_from_all(tmp_path: Path) -> None:
    for name in COMPILED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    kept = tmp_path / "sim" / "__pycache__" / "turns.advance-1.py311.nbi"
    kept.parent.mkdir()
    kept.write_text("code")
    assert forget_stale(tmp_path)
    assert not kept.exists(), "nobody knows what it was made from"
    kept.write_text("code")
    assert not forget_stale(tmp_path)
    assert kept.exists()
    (tmp_path / "core" / "kernels" / "laws.py").write_text("22")
    assert forget_stale(tmp_path)
    assert not kept.exists()


def test_all_that_a_gateway_decides_by_is_compiled_before_the_first_request() -> None:
    """Otherwise the first request that waits would hold the gateway up for as long as compiling takes."""
    script = """
from polyserve.core import kernels
from polyserve.core.controller import Controller
from polyserve.core.profile import Limits, Profile
from polyserve.core.types import *
from polyserve.serve.gateway import _warm_up
from polyserve.serve.plan import ModelPlan

def compiled():
    return {name: len(each.signatures) for name, each in vars(kernels).items() if hasattr(each, "signatures")}

limits = Limits(kv_tokens=400, max_num_seqs=2, max_num_batched_tokens=64)
profile = Profile("p", (0.0, 64.0), (0.02, 0.04), 0.001, 1e-6, 1e-9, limits)
configured = Configured(0.0, {}, (Tier("a", 0.05, 1.0), Tier("b", 0.2, 2.0)), {"p": profile.to_dict()})
_warm_up(ModelPlan("m", configured, "b", {}, ()))
before = compiled()
brain = Controller()
brain.step(0.0, configured)
for name in ("x", "y"):
    brain.step(0.0, Joined(0.0, Instance(name, "p")))
    brain.step(0.0, Ready(0.0, name))
for n in range(60):
    at = n / 8
    slo = (None, Slo(1.0, 0.05), Slo(2.0, 0.2))[n % 3]
    for action in brain.step(at, Arrived(at, Request(str(n), at, 40, slo))):
        if isinstance(action, Dispatch):
            brain.step(at, FirstToken(at, action.request, action.instance))
            brain.step(at, Progressed(at, action.instance, {action.request: 1}, {}, Iteration(at, 0.03, 10, 1, 50)))
            if n % 4 == 0:
                brain.step(at, Finished(at, action.request, action.instance, 20))
    brain.step(at, Tick(at))
brain.step(at, Lost(at, "x"))
assert "pick" in {name for name, count in compiled().items() if count}, "nobody waited"
print({name: count for name, count in compiled().items() if count != before.get(name)})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{}", done.stderr or done.stdout
