"""Instances as processes of this machine.

No process outlives the gateway: each is the leader of its own process group, which is ended as a whole, and the kernel
ends it when the gateway dies without a chance to do so (Linux; elsewhere a gateway that is killed leaves them).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import IO

import aiohttp

from polyserve.core.types import InstanceId
from polyserve.serve.adapters import PROBE_TIMEOUT, UNREACHABLE
from polyserve.serve.launchers import LaunchError
from polyserve.serve.plan import LocalPlan

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LOOK_EVERY_S = 0.1
# As much as a pipe holds, so that one read empties it.
KEPT_BYTES = 64 * 1024
_PR_SET_PDEATHSIG = 1


class Output:
    """The last that a process said; its pipe is emptied as it fills, so that the process never waits for us."""

    def __init__(self, pipe: IO[bytes]) -> None:
        os.set_blocking(pipe.fileno(), False)
        self._pipe = pipe
        self._kept = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pipe.fileno(), self._take)

    def __repr__(self) -> str:
        return f"<output, {len(self._kept)} bytes kept>"

    def last_line(self) -> str:
        self._take()
        lines = self._kept[-4096:].decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def close(self) -> None:
        if not self._pipe.closed:
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()

    def _take(self) -> None:
        piece = b"" if self._pipe.closed else self._pipe.read(KEPT_BYTES)
        if piece:
            self._kept = (self._kept + piece)[-KEPT_BYTES:]
        elif piece is not None:  # the end, not merely nothing yet
            self.close()


class LocalLauncher:
    """Runs one command per instance and waits until it answers `/health`."""

    def __init__(self, plan: LocalPlan, session: aiohttp.ClientSession) -> None:
        self._plan = plan
        self._session = session
        self._processes: dict[InstanceId, tuple[subprocess.Popen[bytes], Output]] = {}

    def __repr__(self) -> str:
        return f"<local launcher of {len(self._processes)} processes>"

    async def start(self, instance: InstanceId) -> str:
        if instance in self._processes:
            raise LaunchError(f"instance {instance} runs already")
        port = _free_port()
        self._processes[instance] = self._spawn(instance, port)
        url = f"http://{HOST}:{port}"
        try:
            await self._answers(instance, url)
        except BaseException:
            await self.stop(instance)
            raise
        return url

    async def stop(self, instance: InstanceId) -> None:
        if instance not in self._processes:
            return
        process, output = self._processes[instance]
        try:
            _signal_group(process, signal.SIGTERM)
            if not await _ended(process, self._plan.stop_timeout_s):
                log.warning("instance %s does not end by itself; it is killed", instance)
        finally:
            # Children that the engine left behind are in its group.
            _signal_group(process, signal.SIGKILL)
            await _ended(process, self._plan.stop_timeout_s)
            self._processes.pop(instance, None)
            output.close()

    async def close(self) -> None:
        await asyncio.gather(*(self.stop(instance) for instance in list(self._processes)))

    def _spawn(self, instance: InstanceId, port: int) -> tuple[subprocess.Popen[bytes], Output]:
        plan = self._plan
        values = {"port": str(port), "profile": plan.profile, "instance": instance}
        command = [_filled(part, values) for part in plan.command]
        try:
            process = subprocess.Popen(
                command,
                env={**os.environ, **plan.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
                preexec_fn=_dies_with_parent(),
            )
        except OSError as error:
            raise LaunchError(f"instance {instance}: {command[0]}: {error.strerror or error}") from None
        log.info("instance %s: process %d on port %d", instance, process.pid, port)
        assert process.stdout is not None, "it was asked for"
        return process, Output(process.stdout)

    async def _answers(self, instance: InstanceId, url: str) -> None:
        process, output = self._processes[instance]
        deadline = asyncio.get_running_loop().time() + self._plan.start_timeout_s
        while asyncio.get_running_loop().time() < deadline:
            if instance not in self._processes:
                raise LaunchError(f"instance {instance} was stopped while it started")
            if process.poll() is not None:
                raise LaunchError(f"instance {instance} ended with {process.returncode}: {output.last_line()}")
            with contextlib.suppress(*UNREACHABLE):
                async with self._session.get(f"{url}/health", timeout=PROBE_TIMEOUT) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(LOOK_EVERY_S)
        raise LaunchError(f"instance {instance} did not answer within {self._plan.start_timeout_s:g} s")


def _filled(part: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        part = part.replace("{" + name + "}", value)
    return part


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _dies_with_parent() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def ask_kernel() -> None:  # pragma: no cover - runs in the child
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask_kernel


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


async def _ended(process: subprocess.Popen[bytes], within_s: float) -> bool:
    deadline = asyncio.get_running_loop().time() + within_s
    while process.poll() is None:
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(LOOK_EVERY_S / 4)
    return True
