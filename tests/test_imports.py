"""Imports point down: the floors of the house, the order inside core, and what core may know of the world."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import polyserve

ROOT = Path(polyserve.__file__).parent

# From the ground up; names side by side never import each other.
FLOORS = (
    ("core",),
    ("traces", "progress", "journal", "report"),
    ("demand", "plot"),
    ("profiles",),
    ("sim", "serve"),
    ("engines",),
    ("config_access",),
    ("config",),
    ("study", "planner"),
    ("commands",),
    ("cli", "demo"),
    ("__main__",),
)
# Inside core each file uses only those before it.
CORE = (
    ("types",),
    ("settings", "kernels"),
    ("arena", "correction", "quota", "fairness"),
    ("profile",),
    ("chunking",),
    ("plain", "bound", "lengths"),
    ("fleet",),
    ("pending", "breaker"),
    ("forecast", "admission", "scaling", "retiering"),
    ("routing", "autoscaling", "latency"),
    ("baselines",),
    ("observing",),
    ("disaggregation",),
    ("controller",),
)
# What has a clock, dice, a network or a log of its own is none of core's business.
WORLDLY = {
    "asyncio", "concurrent", "datetime", "http", "io", "logging", "multiprocessing", "os", "pathlib", "secrets",
    "signal", "socket", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
}  # fmt: skip


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name below `polyserve`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses(name: str) -> set[str]:
    """Modules of ours that a module imports."""
    ours = set()
    for full in imported(modules()[name]):
        parts = full.split(".")[1:] if full.split(".")[0] == "polyserve" else []
        if parts:
            ours.add(next((m for m in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if m in modules()), ""))
    return ours - {"", "__init__", name}


def floor(part: str, floors: tuple[tuple[str, ...], ...]) -> int:
    return next(n for n, names in enumerate(floors) if part in names)


NAMES = [name for name in modules() if name != "__init__"]


def test_every_part_of_the_house_has_its_floor() -> None:
    assert {name.split(".")[0] for name in NAMES} == {name for names in FLOORS for name in names}
    assert {name.split(".")[1] for name in NAMES if name.startswith("core.")} == {
        name for names in CORE for name in names
    }


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_down(name: str) -> None:
    own = name.split(".")[0]
    for used in uses(name):
        part = used.split(".")[0]
        assert part == own or floor(part, FLOORS) < floor(own, FLOORS), f"{name} imports {used}"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("core.")])
def test_inside_core_each_file_uses_only_those_before_it(name: str) -> None:
    own = name.split(".")[1]
    for used in uses(name) - {"core"}:
        part = used.split(".")[1]
        assert part == own or floor(part, CORE) < floor(own, CORE), f"{name} imports {used}"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("core.")])
def test_core_knows_nothing_of_the_world(name: str) -> None:
    for full in imported(modules()[name]):
        package = full.split(".")[0]
        assert package in sys.stdlib_module_names | {"numpy", "numba", "polyserve"}, f"{name} imports {full}"
        assert package not in WORLDLY, f"{name} imports {full}"


def test_engines_share_the_physics_of_the_simulator_and_nothing_else() -> None:
    for name in NAMES:
        if name.startswith("engines."):
            assert {used for used in uses(name) if used.startswith(("sim.", "serve."))} <= {"sim.engine"}, name


def test_nothing_in_the_product_rests_on_the_plain_twins() -> None:
    assert [name for name in NAMES if "core.plain" in uses(name)] == []
