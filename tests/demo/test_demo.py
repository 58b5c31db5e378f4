"""The demo as a newcomer meets it: real processes, in real time, and nothing left when it has ended."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
MARK = "POLYSERVE_TEST_MARK"
LONGEST_S = 180.0


@dataclass
class Place:
    """A folder for the demo's records, and a mark that every process it starts inherits."""

    run: Path
    config: Path
    mark: str
    port: int

    def command(self, *args: str) -> list[str]:
        here = ("--config", str(self.config), "--run", str(self.run))
        return [sys.executable, "-m", "polyserve.demo", *args, *here]

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*args),
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, *args: str) -> tuple[int, str, str]:
        process = self.start(*args)
        out, err = process.communicate(timeout=LONGEST_S)
        return process.returncode, out, err

    def left(self) -> list[str]:
        """Command lines of the processes that carry the mark, ours apart."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def wait_for(self, processes: int, process: subprocess.Popen[str]) -> None:
        """Come back when that many run; fails when `process` ends before."""
        deadline = time.monotonic() + LONGEST_S
        while len(self.left()) < processes:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, self.left()
            time.sleep(0.1)

    def wait_for_none(self) -> None:
        """The kernel ends the engines of a gateway that was killed; that takes them a moment."""
        deadline = time.monotonic() + LONGEST_S
        while left := self.left():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = yaml.safe_load((ROOT / "examples/demo/fleet.yaml").read_text())
    plain["listen"]["port"] = port
    config = tmp_path / "fleet.yaml"
    config.write_text(yaml.safe_dump(plain))
    made = Place(tmp_path / "run", config, uuid.uuid4().hex, port)
    yield made
    made.finish("down")


def test_it_prints_every_tier_live_and_simulated_and_leaves_nothing(place: Place) -> None:
    code, out, err = place.finish("run", "--seconds", "8")
    assert code == 0, err
    assert err == ""
    figures = r"  +\d+\.\d %(  +[\d.-]+){6} *$"
    for tier in ("voice 20 ms", "agent 30 ms", "chat 50 ms", "report 100 ms", "all"):
        assert re.search(rf"^ *{tier}  +\d+  live{figures}", out, re.M), out
    assert len(re.findall(rf"^ +simulated{figures}", out, re.M)) == 5
    assert len(re.findall(rf"^ +round-robin{figures}", out, re.M)) == 5
    assert re.search(r"^  i1 [abcd·]", out, re.M), out
    assert "client lag p99" in out
    assert "engine lag: " in out
    assert place.left() == []


def test_interrupted_it_leaves_nothing(place: Place) -> None:
    process = place.start("run", "--seconds", "60")
    place.wait_for(6, process)  # itself, the gateway, four engines
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 130
    assert err == "demo: interrupted; nothing is left running\n"
    assert place.left() == []


def test_interrupted_twice_it_leaves_nothing_either(place: Place) -> None:
    process = place.start("run", "--seconds", "60")
    place.wait_for(6, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LONGEST_S)
    place.wait_for_none()


def test_a_fleet_that_cannot_start_says_why_and_leaves_nothing(place: Place) -> None:
    plain = yaml.safe_load(place.config.read_text())
    plain["launcher"]["command"] = [sys.executable, "-c", "raise SystemExit('no such engine')"]
    place.config.write_text(yaml.safe_dump(plain))
    process = place.start("up", "--patience", "5")
    _, err = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 1
    assert "no such engine" in err
    assert "Traceback" not in err
    assert place.left() == []


def test_a_port_that_is_taken_is_replaced_and_said(place: Place) -> None:
    with socket.create_server(("127.0.0.1", place.port)):
        code, out, err = place.finish("up")
    assert code == 0, err
    assert f"port {place.port} is taken" in out
    assert place.finish("down")[:2] == (0, "ended\n")
    assert place.left() == []


def test_what_up_prints_works_as_printed_until_down(place: Place) -> None:
    code, out, err = place.finish("up")
    assert code == 0, err
    again = place.finish("up")
    assert again[0] == 0
    assert again[1].startswith(f"already running at http://127.0.0.1:{place.port}/v1")

    curl = out[out.index("curl -N") : out.index("with the openai SDK")].strip()
    if shutil.which("curl"):
        said = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=60)
        assert said.stdout.count("data: {") >= 32, said
        assert said.stdout.rstrip().endswith("data: [DONE]")
    else:  # the line is still the one that a shell takes apart into curl's arguments
        assert shlex.split(curl)[0] == "curl"

    snippet = out[out.index("from openai import") : out.index("what it decides")]
    said = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.split()) > 8

    assert place.finish("down")[:2] == (0, "ended\n")
    assert place.finish("down")[:2] == (0, "nothing is running\n")
    assert place.left() == []
