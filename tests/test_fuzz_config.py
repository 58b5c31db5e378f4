"""Configs that nobody should write: one clear line or more, never a traceback."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from polyserve.config import ConfigError, load

GOOD: dict[str, Any] = {
    "model": "tiny",
    "profile": "a100-llama-3-8b",
    "tiers": [{"name": "fast", "tpot_ms": 20, "ttft_ms": 500}, {"name": "slow", "tpot_ms": 100, "ttft_ms": 2000}],
    "instances": [{"id": "a", "url": "http://127.0.0.1:9000"}],
    "listen": {"host": "127.0.0.1", "port": 8000},
    "limits": {"probe_s": 1.0, "attempts": 3},
    "service_tiers": {"flex": "slow"},
    "default_tier": "slow",
    "settings": {"on_late": "refuse"},
    "admin": "off",
    "journal": "j.jsonl",
    "seed": 1,
}  # fmt: skip
odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.dates(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, 0, -0.0, "\U0001f600", "a\x00b", "/", "~"]),
    st.recursive(st.none() | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=4) | st.integers() | st.none(), inner, max_size=3), max_leaves=8),
)  # fmt: skip
places = st.sampled_from(
    [(key,) for key in GOOD]
    + [(key, inner) for key, value in GOOD.items() if isinstance(value, dict) for inner in value]
    + [(key, 0, inner) for key in ("tiers", "instances") for inner in GOOD[key][0]]
    + [("tiers", 0), ("instances", 0), ("extra",), ("tiers", 0, "extra"), ("settings", "look_s"), ("policy",),
       ("launcher",),
       ("tiers", 0, "weight"), ("instances", 0, "kv_tokens"), ("instances", 0, "chunk"), ("limits", "silence_s")]
)  # fmt: skip


def said(folder: Path, text: str | bytes) -> str:
    """What is said against a config; nothing when it will do."""
    file = folder / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        load(file)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith(str(file)) for line in lines), lines
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def test_the_config_they_start_from_is_good(folder: Path) -> None:
    assert said(folder, yaml.safe_dump(GOOD)) == ""


@hypothesis_settings(max_examples=150)
@given(changes=st.lists(st.tuples(places, odd), min_size=1, max_size=3))
def test_any_value_in_any_place_is_taken_or_refused_in_lines(
    folder: Path, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    plain = yaml.safe_load(yaml.safe_dump(GOOD))
    for (*path, last), value in changes:
        where: Any = plain
        try:
            for part in path:
                where = where[part]
            where[last] = value
        except (TypeError, KeyError, IndexError):  # an earlier change took the place away
            continue
    said(folder, yaml.safe_dump(plain, allow_unicode=True))


@hypothesis_settings(max_examples=150)
@given(text=st.text(max_size=80) | st.binary(max_size=80) | st.text("{}[]:-,&*!|>'\"%@`#? \n\tab1.~", max_size=60))
@example(text="[" * 5_000)
@example(text="a: " * 500)
@example(text="{a: " * 3_000)
@example(text="? [1, 2]\n: 3\n")
@example(text="? {a: 1}\n: 3\n")
@example(text="1: 2\nnull: 3\n")
@example(text="a: &a [*a]\n")
@example(text="a: &x [1]\n<<: [*x]\n")
@example(text="<<: 5\n")
@example(text="model: !!python/object/apply:os.system [x]\n")
@example(text="seed: 0o777777777777777777777777\n")
@example(text="model: 2001-99-99\n")
@example(text="model: 2026-13-45 10:10:10\n")
@example(text="seed: " + "9" * 5_000 + "\n")
@example(text="model: tiny\nmodel: other\n")
@example(text="".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9) if n else 1}]\n" for n in range(9)))
def test_any_text_is_a_config_or_refused_in_lines(folder: Path, text: str | bytes) -> None:
    said(folder, text)


def test_the_command_says_it_in_one_line_and_with_code_2(folder: Path) -> None:
    file = folder / "bad.yaml"
    file.write_text("model: tiny\ntiers: [{name: fast, tpot_ms: .nan, ttft_ms: 1}]\n")
    done = subprocess.run(
        [sys.executable, "-m", "polyserve", "serve", str(file)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "tpot_ms" in line
