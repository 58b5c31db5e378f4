"""PolyServe: multi-SLO scheduling for LLM serving."""

import contextlib
from pathlib import Path

__version__ = "0.1.0"

# Compiled loops, and what they are laid out by. Numba keeps the code of a function with the file that it is in,
# though it took in what other files say: once one of them has changed, the code that is kept for all is stale.
COMPILED = (
    "core/kernels/books.py",
    "core/kernels/laws.py",
    "core/kernels/layout.py",
    "core/kernels/outlook.py",
    "core/kernels/search.py",
    "core/latency.py",
    "progress.py",
    "sim/decoding.py",
    "sim/kernels.py",
    "sim/layout.py",
    "sim/queueing.py",
    "sim/turns.py",
)


def forget_stale(root: Path) -> bool:
    """Remove the kept code where one of `COMPILED` below `root` has changed since; whether one had."""
    states = [(name, (root / name).stat()) for name in COMPILED]
    stamp = "\n".join(f"{name} {state.st_mtime_ns} {state.st_size}" for name, state in states)
    kept = root / "__pycache__" / "compiled.txt"
    if kept.is_file() and kept.read_text() == stamp:
        return False
    for index in root.rglob("__pycache__/*.nbi"):
        index.unlink(missing_ok=True)
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(stamp)
    return True


with contextlib.suppress(OSError):  # installed where nothing can be written, so nothing is kept there
    forget_stale(Path(__file__).parent)
