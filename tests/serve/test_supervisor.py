"""One gateway process in place of another behind the same socket: real processes, real load, every request counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from fake_engine import FakeEngine
from live import PROFILE, TIERS, until

from polyserve.serve.handed import CONTROL, READY, RETIRE, SOCKETS, Line, Sockets
from polyserve.serve.plan import Address
from polyserve.serve.supervisor import Supervisor


class Supervised:
    """`polyserve serve --supervise` as a process, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, config: Path) -> None:
        self.process = process
        self.config = config
        self.said = ""
        self.client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.said += line.decode()

    async def says(self, pattern: str, within_s: float = 60.0) -> re.Match[str]:
        await until(lambda: re.search(pattern, self.said) or self.process.returncode is not None, within_s)
        found = re.search(pattern, self.said)
        assert found is not None, self.said
        return found

    async def ask(self, tokens: int) -> str:
        """One whole stream's text."""
        messages: Any = [{"role": "user", "content": "hi"}]
        stream = await self.client.chat.completions.create(model="tiny", messages=messages, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        assert text == "".join(f"t{n} " for n in range(tokens))
        return text


def config_for(engine: FakeEngine, port: int, **values: Any) -> str:
    plain = {
        "model": "tiny",
        "profile": PROFILE,
        "tiers": TIERS,
        "listen": {"port": port},
        "instances": [{"id": "e0", "url": engine.url}],
        "settings": {"on_late": "never"},
        "limits": {"probe_s": 0.05},
    }
    return yaml.safe_dump(plain | values)


@contextlib.asynccontextmanager
async def supervised(engine: FakeEngine, folder: Path, **values: Any) -> AsyncIterator[Supervised]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    config = folder / "gateway.yaml"
    config.write_text(config_for(engine, port, **values))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "polyserve", "serve", "--supervise", str(config)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    running = Supervised(process, port, config)
    try:
        await running.says("polyserve: tiny on http")
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 20.0)
        except TimeoutError:
            process.kill()
            raise
        await running.client.close()


@pytest.mark.live
@pytest.mark.parametrize("relays", [0, 2])
async def test_no_request_is_lost_when_one_process_takes_over_from_another(relays: int, tmp_path: Path) -> None:
    engine = FakeEngine(tokens=20, every_s=0.02)
    values = {"journal": str(tmp_path / "steps.jsonl"), "relays": relays}
    async with engine.running(), supervised(engine, tmp_path, **values) as gateway:
        asked = answered = 0
        over = False

        async def client() -> None:
            nonlocal asked, answered
            while not over:
                asked += 1
                await gateway.ask(20)
                answered += 1

        clients = [asyncio.create_task(client()) for _ in range(12)]
        await until(lambda: answered > 20)
        command = (sys.executable, "-m", "polyserve", "restart", "--pid", str(gateway.process.pid))
        asking = await asyncio.create_subprocess_exec(*command)
        assert await asking.wait() == 0
        found = await gateway.says(r"process (\d+) serves; process (\d+) retires")
        then = answered
        await until(lambda: answered > then + 40, 30.0)
        await until(lambda: not Path(f"/proc/{found[2]}").exists(), 30.0)
        over = True
        await asyncio.gather(*clients)  # raises what any of them met
        assert asked == answered
        assert len(engine.seen) == asked
        assert engine.cut == 0
        assert (tmp_path / "steps.jsonl.before").stat().st_size > 0


@pytest.mark.live
async def test_a_new_process_that_cannot_start_leaves_the_old_one_to_serve_and_says_why(tmp_path: Path) -> None:
    engine = FakeEngine(tokens=3)
    async with engine.running(), supervised(engine, tmp_path) as gateway:
        good = gateway.config.read_text()
        gateway.config.write_text(good + "\nnonsense: 1\n")
        gateway.process.send_signal(signal.SIGUSR2)
        await gateway.says(r"nonsense: unknown key")
        await gateway.says(r"process \d+ ended with 2 before it was ready; process \d+ goes on")
        await gateway.ask(3)
        gateway.config.write_text(good)
        gateway.process.send_signal(signal.SIGUSR2)
        await gateway.says(r"process \d+ serves; process \d+ retires")
        await gateway.ask(3)


@pytest.mark.live
async def test_a_process_that_is_killed_is_replaced_behind_the_same_socket(tmp_path: Path) -> None:
    engine = FakeEngine(tokens=3)
    async with engine.running(), supervised(engine, tmp_path) as gateway:
        gateway.process.send_signal(signal.SIGUSR2)
        serving = await gateway.says(r"process (\d+) serves; process \d+ retires")
        os.kill(int(serving[1]), signal.SIGKILL)
        # A client that comes meanwhile waits in the backlog of the socket that the supervisor holds.
        await gateway.ask(3)
        await gateway.says(r"ended with -9, unasked; another is started")


SAYS_READY = f"""
import os, socket, sys
control = socket.socket(fileno=int(os.environ[{CONTROL!r}]))
handed = [n for n in os.environ[{SOCKETS!r}].split(",") if n]
listener = socket.socket(fileno=int(handed[0])) if handed else socket.create_server(("127.0.0.1", 0))
socket.send_fds(control, [{READY!r}], [listener.fileno()])
print(len(handed), flush=True)
sys.exit(0 if control.recv(100) == {RETIRE!r} else 1)
"""


async def test_the_socket_of_the_first_process_is_handed_to_the_next(capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = Supervisor([sys.executable, "-c", SAYS_READY])
    running = asyncio.create_task(supervisor.run())
    said = ""

    def says(what: str) -> bool:
        nonlocal said
        captured = capfd.readouterr()
        said += captured.out + captured.err
        return what in said

    await until(lambda: says("0\n"))
    os.kill(os.getpid(), signal.SIGUSR2)
    await until(lambda: says("retires"))
    await until(lambda: says("1\n"))
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == -signal.SIGTERM


async def test_a_first_process_that_fails_ends_the_supervisor_with_its_status() -> None:
    assert await Supervisor([sys.executable, "-c", "raise SystemExit(2)"]).run() == 2


async def test_a_process_that_never_gets_ready_is_given_up() -> None:
    assert await Supervisor([sys.executable, "-c", "import time; time.sleep(60)"], start_s=0.1).run() == -9


def test_sockets_of_systemd_are_taken_by_port_and_only_by_the_process_they_are_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr("polyserve.serve.handed._FIRST_OF_SYSTEMD", os.dup(listener.fileno()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_PID", "1")
        assert Sockets.from_environment().all() == []
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        sockets = Sockets.from_environment()
        assert "LISTEN_FDS" not in os.environ
        assert sockets.take(Address("127.0.0.1", port + 1 if port < 65535 else 1)) is None
        taken = sockets.take(Address("127.0.0.1", port))
        assert taken is not None
        with taken:
            assert taken.getsockname()[1] == port
            assert not taken.get_inheritable()
        assert sockets.drop_rest() == []


async def test_a_process_hears_that_its_supervisor_has_gone() -> None:
    ours, theirs = socket.socketpair()
    heard: list[str] = []
    line = Line(theirs)
    line.listen(lambda: heard.append("retire"), lambda: heard.append("alone"))
    ours.send(RETIRE)
    await until(lambda: heard == ["retire"])
    ours.close()
    await until(lambda: heard == ["retire", "alone"])
    line.close()
