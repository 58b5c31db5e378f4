"""The configs of docs/serving.md are configs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from polyserve.config import Config, plan

TEXT = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
CONFIGS = re.findall(r"(?<!-->\n)```yaml\n(.*?)```", TEXT, re.DOTALL)
# What every gateway has, for examples that show one feature only.
REST = {
    "model": "llama",
    "profile": "a100-llama-3-8b",
    "tiers": [{"name": "fast", "tpot_ms": 20, "ttft_ms": 500}, {"name": "slow", "tpot_ms": 100, "ttft_ms": 2000}],
    "instances": [{"id": "e0", "url": "http://127.0.0.1:9000"}],
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text.split("\n")[0])
def test_its_configs_make_a_gateway(text: str) -> None:
    plain = yaml.safe_load(text)
    rest = {} if "models" in plain else REST
    assert plan(Config.model_validate(rest | plain), "docs/serving.md").models
