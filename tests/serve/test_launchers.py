"""Instances as processes: started when they answer, ended with everything they began, whatever becomes of us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from live import until

from polyserve.serve.launchers import LaunchError
from polyserve.serve.launchers.local import KEPT_BYTES, LocalLauncher, Output
from polyserve.serve.launchers.static import StaticLauncher
from polyserve.serve.plan import LocalPlan

HEALTHY = """
import http.server, os, subprocess, sys
open(sys.argv[2], "a").write(f"{os.getpid()} ")
if len(sys.argv) > 3:
    child = subprocess.Popen(["sleep", "1000"])
    open(sys.argv[2], "a").write(f"{child.pid} ")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def local(command: list[str], **values: float) -> LocalPlan:
    return LocalPlan("a100-llama-3-8b", tuple(command), start_timeout_s=values.get("start_timeout_s", 20.0))


@contextlib.asynccontextmanager
async def launcher(command: list[str], **values: float) -> AsyncIterator[LocalLauncher]:
    async with aiohttp.ClientSession() as session:
        made = LocalLauncher(local(command, **values), session)
        try:
            yield made
        finally:
            await made.close()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(file: Path) -> list[int]:
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


async def test_an_instance_answers_when_it_has_started_and_is_gone_when_it_was_stopped(tmp_path: Path) -> None:
    noted = tmp_path / "pids"
    async with launcher([sys.executable, "-c", HEALTHY, "{port}", str(noted), "child"]) as made:
        url = await made.start("i1")
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as answer:
            assert answer.status == 200
        assert all(map(alive, pids(noted)))
        await made.stop("i1")
        assert len(pids(noted)) == 2
        await until(lambda: not any(map(alive, pids(noted))))
        await made.stop("i1")


async def test_a_command_that_ends_says_why() -> None:
    async with launcher([sys.executable, "-c", "raise SystemExit('no such profile')"]) as made:
        with pytest.raises(LaunchError, match="i1 ended with 1: no such profile"):
            await made.start("i1")


async def test_of_a_command_that_says_much_the_end_is_kept() -> None:
    much = "print('x' * 300_000, flush=True); raise SystemExit('no such profile')"
    async with launcher([sys.executable, "-c", much]) as made:
        with pytest.raises(LaunchError, match="i1 ended with 1: no such profile"):
            await made.start("i1")


async def test_output_beyond_what_is_kept_is_let_go_and_the_writer_never_waits() -> None:
    reading, writing = os.pipe()
    pipe = open(reading, "rb", buffering=0)  # noqa: ASYNC230, SIM115 - a pipe does not wait; the output closes it

    def write() -> None:
        with open(writing, "wb") as file:
            for _ in range(4 * KEPT_BYTES // 1024):
                file.write(b"x" * 1023 + b"\n")
            file.write(b"end\n")

    output = Output(pipe)
    await asyncio.to_thread(write)
    assert output.last_line() == "end"
    assert repr(output) == f"<output, {KEPT_BYTES} bytes kept>"
    output.close()


async def test_an_instance_that_closes_its_output_goes_on(tmp_path: Path) -> None:
    noted = tmp_path / "pids"
    closed = "import os; os.close(1); os.close(2)\n" + HEALTHY
    async with launcher([sys.executable, "-c", closed, "{port}", str(noted)]) as made:
        await made.start("i1")
        assert all(map(alive, pids(noted)))


async def test_a_command_that_does_not_exist_says_so() -> None:
    async with launcher(["/nowhere/engine"]) as made:
        with pytest.raises(LaunchError, match="i1: /nowhere/engine: No such file"):
            await made.start("i1")


async def test_a_command_that_never_answers_is_given_up_and_ended(tmp_path: Path) -> None:
    noted = tmp_path / "pids"
    write = f"import os, time; open({str(noted)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    async with launcher([sys.executable, "-c", write], start_timeout_s=0.5) as made:
        with pytest.raises(LaunchError, match=r"did not answer within 0.5 s"):
            await made.start("i1")
        assert not any(map(alive, pids(noted)))


async def test_an_instance_stopped_while_it_starts_is_gone() -> None:
    async with launcher([sys.executable, "-c", "import time; time.sleep(1000)"]) as made:
        starting = asyncio.create_task(made.start("i1"))
        await until(lambda: "1 processes" in repr(made))
        await made.stop("i1")
        with pytest.raises(LaunchError):
            await starting


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a child die with its parent")
async def test_no_instance_outlives_a_gateway_that_is_killed(tmp_path: Path) -> None:
    noted = tmp_path / "pids"
    gateway = f"""
import asyncio, aiohttp
from polyserve.serve.launchers.local import LocalLauncher
from polyserve.serve.plan import LocalPlan
async def main():
    async with aiohttp.ClientSession() as session:
        plan = LocalPlan("p", {(sys.executable, "-c", HEALTHY, "{port}", str(noted))!r})
        launcher = LocalLauncher(plan, session)
        await launcher.start("a")
        print("started", flush=True)
        await asyncio.sleep(1000)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", gateway, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"started\n"
    (engine,) = pids(noted)
    assert alive(engine)
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    await until(lambda: not alive(engine))


async def test_without_a_launcher_nothing_is_started() -> None:
    with pytest.raises(LaunchError, match="there is no launcher"):
        await StaticLauncher().start("i1")
