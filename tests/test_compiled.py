"""Compiled code is not kept beyond a change of any file that it was made from."""

from __future__ import annotations

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
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    kept = tmp_path / "sim" / "__pycache__" / "turns.advance-1.py311.nbi"
    kept.parent.mkdir()
    kept.write_text("code")
    assert forget_stale(tmp_path)
    assert not kept.exists(), "nobody knows what it was made from"
    kept.write_text("code")
    assert not forget_stale(tmp_path)
    assert kept.exists()
    (tmp_path / "core" / "kernels.py").write_text("22")
    assert forget_stale(tmp_path)
    assert not kept.exists()
