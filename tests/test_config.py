"""The YAML file: what it means, and every way to get it wrong, in one line that says what would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyserve.config import ConfigError, load
from polyserve.core.controller import Controller
from polyserve.core.types import ChunkRule

GOOD = """
model: llama
profile: a100-llama-3-8b
tiers:
  - {name: fast, tpot_ms: 20, ttft_ms: 300}
  - {name: slow, tpot_ms: 100, ttft_ms: 1000, on_late: serve_late}
instances:
  - {id: e0, url: "http://127.0.0.1:9000"}
  - {id: e1, url: "http://127.0.0.1:9001", chunk: "fixed:512", profile: h200-llama-3-8b}
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "gateway.yaml"


def test_a_config_makes_a_plan_that_the_brain_takes(written: Path) -> None:
    written.write_text(GOOD)
    plan = load(written)
    model = plan.sole
    assert [engine.chunk for engine in model.engines] == [None, ChunkRule("fixed", 512)]
    assert model.default_tier == "slow"
    assert plan.admin == plan.listen
    assert set(model.configured.profiles) == {"a100-llama-3-8b", "h200-llama-3-8b"}
    assert model.configured.tiers[1].tpot_s == 0.1
    assert Controller().step(0.0, model.configured) == []


def test_the_admin_api_is_not_shown_to_the_world_unasked(written: Path) -> None:
    written.write_text(GOOD + "listen: {host: 0.0.0.0, port: 80}\n")
    assert load(written).admin is None
    written.write_text(GOOD + "listen: {host: 0.0.0.0, port: 80}\nadmin: {port: 81}\n")
    admin = load(written).admin
    assert admin is not None
    assert (admin.host, admin.port) == ("127.0.0.1", 81)
    for off in ("off", '"off"'):
        written.write_text(GOOD + f"admin: {off}\n")
        assert load(written).admin is None


def test_a_launcher_counts_only_where_it_may_start_something(written: Path) -> None:
    written.write_text(GOOD + "launcher: {kind: local, min: 1, max: 3}\n")
    assert load(written).sole.launcher is None
    assert load(written).sole.configured.settings["max_instances"] == 0
    plan = load(written, launch=True).sole
    assert plan.launcher is not None
    assert plan.launcher.profile == "a100-llama-3-8b"
    assert plan.configured.settings["min_instances"] == 3
    assert plan.configured.settings["max_instances"] == 5


MISTAKES = {
    "an unknown key": ("modle: x\n", "modle: unknown key; there are: aliases, policy, "),
    "an unknown key within": ("limits: {body: 3}\n", "limits.body: unknown key; there are: body_mib"),
    "a wrong type": ("seed: many\n", "seed: input should be a valid integer, not 'many'"),
    "a port out of range": ("listen: {port: 70000}\n", "listen.port: "),
    "a tier of no time": ("tiers: [{name: a, tpot_ms: 0, ttft_ms: 1}]\n", "tiers.0.tpot_ms: "),
    "a time without a number": ("tiers: [{name: a, tpot_ms: .nan, ttft_ms: 1}]\n", "tiers.0.tpot_ms: "),
    "no tiers": ("tiers: []\n", "tiers: "),
    "two tiers of one name": (
        "tiers: [{name: a, tpot_ms: 1, ttft_ms: 1}, {name: a, tpot_ms: 2, ttft_ms: 1}]\n",
        "tiers: two tiers have name a; each needs its own",
    ),
    "two tiers of one pace": (
        "tiers: [{name: a, tpot_ms: 20, ttft_ms: 1}, {name: b, tpot_ms: 20.0, ttft_ms: 9}]\n",
        "tiers: two tiers have tpot_ms 20.0; each needs its own",
    ),
    "two instances of one id": (
        "instances: [{id: a, url: 'http://h:1'}, {id: a, url: 'http://h:2'}]\n",
        "instances: two have the id 'a'",
    ),
    "no instances": ("instances: []\n", "instances: there are none, give at least one"),
    "only a launcher": ("instances: []\nlauncher: {kind: local}\n", "`polyserve up` starts those of its launcher"),
    "a URL that is none": ("instances: [{id: a, url: 'localhost:80'}]\n", "instances.0.url: "),
    "a chunk that is none": (
        "instances: [{id: a, url: 'http://h:1', chunk: big}]\n",
        "instances.0.chunk: a chunk rule is dynamic, fixed:TOKENS or unknown, not 'big'",
    ),
    "an unknown policy": ("policy: best\n", "policy: unknown policy 'best'; there are: polyserve,"),
    "an unknown setting": ("settings: {speed: 9}\n", "settings: unknown setting 'speed'; there are:"),
    "a setting of the wrong type": ("settings: {head_walk: far}\n", "settings: setting 'head_walk' is a whole number"),
    "an unknown profile": ("profile: tpu\n", "profile: unknown profile 'tpu'; there are: "),
    "a default that is no tier": ("default_tier: gold\n", "default_tier: no tier 'gold'; there are: best-effort, fast"),
    "a service tier of nobody": ("service_tiers: {gold: fast}\n", "service_tiers: OpenAI's service tiers are"),
    "a service tier to nowhere": ("service_tiers: {flex: gold}\n", "service_tiers.flex: no tier 'gold'"),
    "more at least than at most": ("launcher: {kind: local, min: 3, max: 2}\n", "launcher: min 3 is more than max 2"),
    "a tokenizer that is not there": ("tokenizer: nowhere.json\n", "tokenizer: nowhere.json cannot be read: No such"),
    "a launcher of no kind": ("launcher: {kind: cloud}\n", "launcher.kind: input should be 'static' or 'local'"),
}


@pytest.mark.parametrize(("change", "line"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_file_and_key(written: Path, change: str, line: str) -> None:
    written.write_text(_without(GOOD, change.partition(":")[0]) + change)
    with pytest.raises(ConfigError) as caught:
        load(written)
    message = str(caught.value)
    assert message.startswith(f"{written}: ")
    assert line in message
    assert "\n" not in message


def _without(text: str, key: str) -> str:
    """The document without one of its top-level blocks."""
    blocks: list[list[str]] = []
    for row in text.strip().split("\n"):
        if not row.startswith(" "):
            blocks.append([])
        blocks[-1].append(row)
    return "".join("\n".join(block) + "\n" for block in blocks if not block[0].startswith(f"{key}:"))


@pytest.mark.parametrize(("text", "line"), [
    ("model: [", "not YAML: line "),
    ("model: a\nmodel: b\n", "not YAML: line 2: key 'model' is given twice"),
    ("- 1\n", "a config is a mapping of keys"),
    ("", "a config is a mapping of keys"),
    ("model: a\n", "tiers: is missing"),
    ("model: !!python/object:os.system a\n", "not YAML: "),
])  # fmt: skip
def test_a_file_that_is_no_config_is_told_so(written: Path, text: str, line: str) -> None:
    written.write_text(text)
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        load(written)
    assert line in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_told_so(written: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(written)
    written.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(written)


def test_every_mistake_of_a_file_is_told_at_once(written: Path) -> None:
    written.write_text(GOOD + "seed: many\ncolour: red\n")
    with pytest.raises(ConfigError) as caught:
        load(written)
    assert len(str(caught.value).splitlines()) == 2


SEVERAL = """
profile: a100-llama-3-8b
tiers:
  - {name: fast, tpot_ms: 20, ttft_ms: 300}
settings: {head_walk: 4}
models:
  - name: small
    aliases: [mini]
    instances: [{id: e0, url: "http://127.0.0.1:9000"}]
    journal: small.jsonl
  - name: large
    profile: h200-llama-3-70b-tp4
    tiers: [{name: calm, tpot_ms: 100, ttft_ms: 1000}]
    settings: {head_walk: 8}
    instances: [{id: e0, url: "http://127.0.0.1:9001"}]
"""


def test_models_share_what_the_top_says_unless_they_say_it_themselves(written: Path) -> None:
    written.write_text(SEVERAL)
    small, large = load(written).models
    assert (small.name, small.aliases, small.default_tier) == ("small", ("mini",), "fast")
    assert (large.name, large.aliases, large.default_tier) == ("large", (), "calm")
    assert (list(small.configured.profiles), list(large.configured.profiles)) == (
        ["a100-llama-3-8b"],
        ["h200-llama-3-70b-tp4"],
    )
    assert (small.configured.settings["head_walk"], large.configured.settings["head_walk"]) == (4, 8)


@pytest.mark.parametrize(("old", "new", "line"), [
    ("models:", "model: x\nmodels:", "model: with `models`, say it of one of them"),
    ("models:", "journal: j\nmodels:", "journal: with `models`, say it of one of them"),
    ("name: large", "name: mini", "models: two are called 'mini'; each needs a name of its own"),
    ("{head_walk: 8}", "{speed: 8}", "models.1.settings: unknown setting 'speed'"),
    ("h200-llama-3-70b-tp4", "tpu", "models.1.instances.0.profile: unknown profile 'tpu'"),
    ("tpot_ms: 100", "tpot_ms: 0", "models.1.tiers.0.tpot_ms: "),
    ("name: large", "nom: large", "models.1.nom: unknown key; there are: aliases, "),
    ("name: large", "name: large\n    journal: small.jsonl", "models: two write the journal small.jsonl"),
    ("tiers: [{name: calm", "tiers: [{nom: calm", "models.1.tiers.0.nom: unknown key; there are: name, tpot_ms"),
    ("[{id: e0, url: \"http://127.0.0.1:9001\"}]", "[]", "models.1.instances: there are none"),
])  # fmt: skip
def test_a_mistake_in_one_of_several_models_names_it(written: Path, old: str, new: str, line: str) -> None:
    assert SEVERAL.count(old) == 1
    written.write_text(SEVERAL.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load(written)
    assert any(told.startswith(f"{written}: {line}") for told in str(caught.value).splitlines())
