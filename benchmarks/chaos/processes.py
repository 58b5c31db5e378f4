"""The processes of a run: each dies with it, whatever ends it, and may be hurt on the way."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# What the log says of a bad file, which is one of the faults.
_BAD_CONFIG = "config not reloaded"
_fork_server = multiprocessing.get_context("forkserver")
_fork_server.set_forkserver_preload(["chaos.nursery"])


def die_with_parent() -> None:
    """Have the kernel kill this process, stopped or not, when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Place:
    """A port of this machine that nobody else gets, whether anybody listens there or not."""

    def __init__(self) -> None:
        # Only after it has got its port: with the option set, the kernel gives one port to two.
        self._held = socket.socket()
        self._held.bind(("127.0.0.1", 0))
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port: int = self._held.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._held.close()


def _engine(log: str, profile: str, model: str, port: int, bias: float) -> None:
    """What `polyserve engine` does, in a process of the fork server."""
    from polyserve.engines.server import EngineOptions, run_engine

    die_with_parent()
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    options = EngineOptions(profile, port=port, model_name=model, bias=bias)
    run_engine(options, lambda line: print(line, flush=True))


class EngineProcess:
    """One emulated engine at one address, which may live many times."""

    def __init__(self, name: str, folder: Path, profile: Path, model: str) -> None:
        self.name = name
        self.place = Place()
        self.log = folder / f"{name}.log"
        self._profile, self._model = profile, model
        self._process: BaseProcess | None = None

    def __repr__(self) -> str:
        return f"<engine {self.name} at {self.place.url}, {'up' if self.up else 'down'}>"

    @property
    def up(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def start(self, bias: float = 0.0) -> None:
        """Let it live; its iterations take `1 + bias` times what the gateway believes."""
        args = (str(self.log), str(self._profile), self._model, self.place.port, bias)
        self._process = _fork_server.Process(target=_engine, args=args, daemon=True)
        self._process.start()

    async def listens(self) -> None:
        """Come back when it takes connections."""
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.place.port)
                writer.close()
                return
            await asyncio.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    async def gone(self) -> None:
        """Come back when the process has ended."""
        while self.up:  # noqa: ASYNC110 - the fork server tells of an end only when it is asked
            await asyncio.sleep(0.01)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.gone()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self.place.close()


class GatewayProcess:
    """`polyserve serve` on a config."""

    def __init__(self, config: Path, place: Place, log: Path) -> None:
        self.place, self.log = place, log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "polyserve", "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        self.pid = self._process.pid

    @property
    def up(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self, within_s: float) -> int | None:
        """Its exit code once it has ended; None: it has not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return await asyncio.to_thread(self._process.wait, within_s)
        return None

    def close(self) -> None:
        if self.up:
            self._process.kill()
            self._process.wait()
        self.place.close()

    def memory_bytes(self) -> int:
        """Resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0

    def files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def processor_s(self) -> float:
        """Seconds of processor time used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def complaints(self) -> list[str]:
        """Lines of its log that no run should bring."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if _BAD_CONFIG not in line]
        return [line for line in lines if "Traceback" in line or " ERROR " in line or "Exception" in line]
