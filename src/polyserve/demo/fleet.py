"""Starts and ends the demo's fleet: `polyserve up` as a process of its own, which starts the engines itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polyserve.core.settings import Settings
from polyserve.core.types import Configured

STOP_S = 20.0
LOOK_S = 0.1
LOG_LINES = 15


class FleetError(Exception):
    """The fleet could not be started; the message says why and where the log is."""


@dataclass
class Fleet:
    """A running `polyserve up`. `record` is the file that lets another process end it."""

    pid: int
    url: str
    record: Path
    process: subprocess.Popen[bytes] | None = None  # None: started by another process

    @staticmethod
    def start(config: Path, run: Path, say: Callable[[str], None] = print) -> Fleet:
        """Start what `config` describes; `run` takes its log and its record. A port that is taken is replaced."""
        run.mkdir(parents=True, exist_ok=True)
        plan = yaml.safe_load(config.read_text(encoding="utf-8"))
        listen = plan["listen"]
        host, port = listen["host"], listen["port"]
        listen["port"] = free_port(host, port)
        if port and listen["port"] != port:
            say(f"port {port} is taken: the gateway listens on {listen['port']} instead")
        settled = run / "fleet.yaml"
        settled.write_text(f"# {config} with the port of this run\n{yaml.safe_dump(plan, sort_keys=False)}")
        log = run / "fleet.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "polyserve", "up", str(settled)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to handle: it ends the fleet in order
            )
        fleet = Fleet(process.pid, f"http://{host}:{listen['port']}", run / "fleet.json", process)
        fleet.record.write_text(json.dumps({"pid": fleet.pid, "url": fleet.url}))
        return fleet

    @staticmethod
    def running(run: Path) -> Fleet | None:
        """The fleet that an earlier `start` left running in `run`, if it still is."""
        record = run / "fleet.json"
        try:
            known = json.loads(record.read_text())
            fleet = Fleet(int(known["pid"]), str(known["url"]), record)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return fleet if fleet.alive and fleet._is_gateway() else None

    @property
    def alive(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _is_gateway(self) -> bool:
        """Whether the process is what the record says, and not another that got its number later."""
        try:
            return b"polyserve" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:  # no /proc on this system
            return self.get("/health") is not None

    def get(self, path: str) -> Any:
        """What the gateway answers at `path`: JSON where it is JSON, else text; None when it does not say 200."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=2.0) as response:
                text = response.read().decode()
        except (OSError, urllib.error.URLError):
            return None
        try:
            return json.loads(text)
        except ValueError:
            return text

    def wait_ready(self, instances: int, patience_s: float) -> None:
        """Come back when so many instances are ready; raises `FleetError`."""
        deadline = time.monotonic() + patience_s
        while self._ready() < instances:
            if not self.alive:
                raise FleetError(f"the fleet ended before it was ready; {self._log()}")
            if time.monotonic() > deadline:
                raise FleetError(f"the fleet was not ready after {patience_s:.0f} s; {self._log()}")
            time.sleep(LOOK_S)

    def _ready(self) -> int:
        fleet = self.get("/admin/fleet") or {}
        return sum(instance["state"] == "ready" for instance in fleet.get("instances", ()))

    def stop(self) -> None:
        """End it in order, then for certain; nothing it started outlives this."""
        try:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            while self.alive and time.monotonic() < deadline:
                time.sleep(LOOK_S)
        finally:  # even when somebody is too impatient to wait for the order
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            if self.process is not None:
                self.process.wait()
            self.record.unlink(missing_ok=True)

    def _log(self) -> str:
        log = self.record.with_name("fleet.log")
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return f"the end of {log}:\n" + "\n".join(f"  {line}" for line in lines)


def instances_of(configured: Configured) -> int:
    """How many instances a fleet has that neither grows nor shrinks."""
    return Settings(**configured.settings).max_instances  # type: ignore[arg-type]


def free_port(host: str, wanted: int) -> int:
    """The wanted port, or any other one when it is taken."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            chosen: int = probe.getsockname()[1]
            return chosen
    raise FleetError(f"no port is free on {host}")
