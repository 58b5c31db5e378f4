"""Policies from outside: the worked example through the command line, and every mistake in one line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyserve.cli import main
from polyserve.core.baselines import POOLS
from polyserve.core.settings import BASELINES, ENGINES, POLICIES, ROUTERS, SettingError, engine_wish, policy
from polyserve.core.types import Arrived, Configured, Dispatch
from polyserve.journal import read_journal

ROOT = Path(__file__).parent.parent
EXAMPLE = "examples.policies.long_lane:LongLane"
SMALL = ["--instances", "4", "--rate", "12", "--duration", "8", "--warm-up", "2"]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a user works: in a folder of theirs, with nothing imported from it yet."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part not in ("", str(ROOT))])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("examples", "mine"):
            del sys.modules[name]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_example_keeps_long_prompts_in_their_lane_and_its_journal_names_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    journal = tmp_path / "run.jsonl"
    asked = ["--policy", EXAMPLE, *SMALL, "--trace", "azure-code", "--journal", str(journal), "--json", "-"]
    code, out, err = run(capsys, "simulate", *asked)
    assert code == 0, err
    assert json.loads(out)["policy"] == EXAMPLE
    steps = list(read_journal(journal))
    assert isinstance(configured := steps[0].event, Configured)
    assert configured.settings["router"] == EXAMPLE
    assert configured.settings["target_requests"] == 40
    prompts = {s.event.request.id: s.event.request.prompt_tokens for s in steps if isinstance(s.event, Arrived)}
    lanes: dict[bool, set[str]] = {True: set(), False: set()}
    for step in steps:
        for action in step.actions:
            if isinstance(action, Dispatch):
                lanes[prompts[action.request] >= 2000].add(action.instance)
    assert len(lanes[True]) == 1
    assert len(lanes[False]) == 3
    assert not lanes[True] & lanes[False]
    code, out, _ = run(capsys, "replay-journal", str(journal))
    assert code == 0
    assert "every decision the same" in out


BROKEN = {
    "mine:Policy": ("raise RuntimeError('no luck')", "cannot import mine: RuntimeError: no luck"),
    "mine:Other": ("class Policy: ...", "mine has no class Other"),
    "mine:Empty": ("class Empty: ...", "lacks place and refill; see docs/policies.md"),
    "mine:place": ("def place(): ...", "mine has no class place"),
    "mine:Wished": (
        "from polyserve.core.baselines import LeastRequests\nclass Wished(LeastRequests):\n    engine = 'fast'",
        "its `engine` is an EngineWish, not 'fast'",
    ),
    "mine:Told": (
        "from polyserve.core.baselines import LeastRequests\nclass Told(LeastRequests):\n    settings = {'colour': 1}",
        "unknown setting 'colour'",
    ),
    "mine:Set": (
        "from polyserve.core.baselines import LeastRequests\nclass Set(LeastRequests):\n    settings = 'fast'",
        "its `settings` is a dict of setting and value, not 'fast'",
    ),
    "nowhere.at.all:Policy": ("", "cannot import nowhere.at.all: ModuleNotFoundError: No module named 'nowhere'"),
    "mine:": ("", "a policy from outside is their.module:Policy"),
    ":Policy": ("", "a policy from outside is their.module:Policy"),
    "mine:Policy()": ("", "a policy from outside is their.module:Policy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_policy_is_one_line_and_exit_2(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, complaint = BROKEN[name]
    (tmp_path / "mine.py").write_text(source + "\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "simulate", "--policy", name, *SMALL)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1
    if "unknown setting" not in complaint:
        assert f"policy {name!r}" in err


def test_a_gateways_config_may_name_a_policy_from_outside(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text(
        "model: m\npolicy: nowhere:Policy\ntiers: [{name: t, tpot_ms: 50, ttft_ms: 500}]\n"
        "profile: a100-llama-3-8b\ninstances: [{id: a, url: 'http://127.0.0.1:1'}]\n"
    )
    code, _, err = run(capsys, "serve", str(config))
    assert code == 2
    assert f"{config}: policy: policy 'nowhere:Policy': cannot import nowhere" in err


def test_settings_given_by_hand_come_after_a_policys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    assert policy(EXAMPLE, {"target_requests": 9}).target_requests == 9
    assert policy(EXAMPLE).on_late == "never"


def test_every_policy_is_in_every_table() -> None:
    assert set(BASELINES) == set(POOLS)
    assert set(ROUTERS) == set(ENGINES)
    assert set(BASELINES) < set(POLICIES)
    for name, settings in POLICIES.items():
        assert settings.router in ROUTERS
        assert engine_wish(settings.router) is ENGINES[settings.router]
        if name in BASELINES:
            assert settings.router == name
            assert settings.on_late == ("refuse" if name == "single-slo" else "never"), "who refuses in truth"


def test_every_policy_has_its_section_in_the_docs() -> None:
    told = set(re.findall(r"^### `([a-z-]+)`", (ROOT / "docs" / "policies.md").read_text(), re.MULTILINE))
    assert told == set(POLICIES)


@pytest.mark.parametrize("router", ["fastest", "", 3])
def test_a_router_that_does_not_exist_is_named_with_those_that_do(router: object) -> None:
    with pytest.raises(SettingError, match=r"'router' is one of tiers, random, .*or their\.module:Policy"):
        policy("polyserve", {"router": router})


@pytest.mark.parametrize("sizes", ["3,4,", "many", "-1,2", 4])
def test_sizes_that_are_no_sizes_are_named(sizes: object) -> None:
    with pytest.raises(SettingError, match="'static_sizes' is instances per tier, tightest first, like 3,4,6,7"):
        policy("static", {"static_sizes": sizes})


def test_a_partition_is_sized_by_the_requests_unless_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for given, expected in ([], None), (["--set", "static_sizes=1, 1,1,1"], "1,1,1,1"):
        journal = tmp_path / "run.jsonl"
        code, _, err = run(capsys, "simulate", "--policy", "static", *SMALL, *given, "--journal", str(journal))
        assert code == 0, err
        configured = next(iter(read_journal(journal))).event
        assert isinstance(configured, Configured)
        sizes = str(configured.settings["static_sizes"])
        assert sum(map(int, sizes.split(","))) == 4
        assert expected in (None, sizes)
    code, _, err = run(capsys, "simulate", "--policy", "static", *SMALL, "--set", "static_sizes=1,2")
    assert code == 2
    assert "one number for each of the 4 tiers" in err
