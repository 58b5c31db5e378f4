"""What the README tells people to type works as printed."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from polyserve.config import Config
from polyserve.demo.fleet import Fleet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
ADDRESS = "127.0.0.1:8080"


@dataclass(frozen=True)
class Block:
    """A fenced block and the comment before it: `run`, `run: fleet` or `not run: WHY`."""

    mark: str
    language: str
    text: str

    def run(self, folder: Path, address: str = ADDRESS) -> str:
        """What it prints, run in `folder`; fails with what it says on stderr."""
        text = self.text.replace(ADDRESS, address)
        shell = ["sh", "-euc", text] if self.language == "sh" else [sys.executable, "-c", text]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            shell, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


BLOCKS = [Block(m["mark"] or "", m["language"], m["text"]) for m in BLOCK.finditer(README)]
ALONE = [block for block in BLOCKS if block.mark == "run"]
WITH_FLEET = [block for block in BLOCKS if block.mark == "run: fleet"]


def test_every_block_is_run_or_says_why_not() -> None:
    assert ALONE
    assert WITH_FLEET
    for block in BLOCKS:
        assert block in ALONE or block in WITH_FLEET or re.match(r"not run: \w+", block.mark), block.text


def test_its_first_two_commands_are_demo_and_test() -> None:
    commands = [line.split("#")[0].strip() for line in BLOCKS[0].text.splitlines()]
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test", "up", "down"} <= set(targets)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: b.text.split("\n")[0])
def test_its_configs_are_configs(block: Block) -> None:
    assert Config.model_validate(yaml.safe_load(block.text)).tiers


@pytest.mark.live
@pytest.mark.parametrize("block", ALONE, ids=lambda block: block.text.split("\n")[0][:60])
def test_a_command_runs_as_printed(block: Block, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert block.run(tmp_path).strip()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("readme")
    plain = yaml.safe_load((ROOT / "examples/demo/fleet.yaml").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        plain["listen"]["port"] = probe.getsockname()[1]
    plain["launcher"] |= {"min": 1, "max": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    fleet = Fleet.start(folder / "config.yaml", folder)
    try:
        fleet.wait_ready(1, patience_s=120.0)
        yield fleet.url.removeprefix("http://")
    finally:
        fleet.stop()


@pytest.mark.live
@pytest.mark.parametrize("block", WITH_FLEET, ids=lambda block: block.language)
def test_a_snippet_talks_to_the_fleet_as_printed(block: Block, address: str, tmp_path: Path) -> None:
    assert block.run(tmp_path, address).strip()
