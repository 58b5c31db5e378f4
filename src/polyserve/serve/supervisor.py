"""The parent of gateway processes: it holds their sockets and replaces one by another without losing a request.

It knows nothing of what they do, so it hardly ever has to be restarted itself. A new process gets the sockets of the
old one, and only when it says that it is ready is the old one told to retire: both accept for a moment, then the new
one alone, while the old one answers what it has. A new process that fails changes nothing. A process that dies unasked
is replaced.

    SIGUSR2            start a new process, then let the old one retire    (`polyserve restart --pid PID`)
    SIGHUP             is passed on to the process that serves
    SIGTERM, SIGINT    are passed on to all; a second one too, which does not wait for streams
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from polyserve.serve.handed import CONTROL, MOST_SOCKETS, READY, RETIRE, SOCKETS, Sockets

# Compiling every loop of the core takes a minute or two where nothing is kept from an earlier run.
START_S = 300.0
# A process that dies again and again is started after this, then after twice as long, up to half a minute.
BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0
STEADY_S = 60.0  # after which a process that dies counts as the first to do so


class Child:
    """One gateway process."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, started_at: float) -> None:
        self.process = process
        self.control = control
        self.started_at = started_at
        self.ready = False

    def __repr__(self) -> str:
        return f"<process {self.process.pid}, {'ready' if self.ready else 'starting'}>"

    def retire(self) -> None:
        with contextlib.suppress(OSError):  # it ends already
            self.control.send(RETIRE)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class Supervisor:
    """Runs one command as the process that serves, and replaces it."""

    def __init__(self, command: Sequence[str], start_s: float = START_S) -> None:
        self._command = list(command)
        self._start_s = start_s
        self._sockets: list[socket.socket] = []
        self._children: set[Child] = set()
        self._serving: Child | None = None  # the latest that was ready
        self._starting: Child | None = None
        self._deaths = 0
        self._ending = False
        self._code = 0  # of the process that served last
        self._over: asyncio.Future[int] | None = None

    def __repr__(self) -> str:
        return f"<supervisor of {self._serving!r}>"

    async def run(self) -> int:
        """Serve until a signal ends it, or the first process fails to start; the exit status."""
        loop = asyncio.get_running_loop()
        self._over = loop.create_future()
        # What systemd handed to this process goes to every process that serves.
        self._sockets = Sockets.from_environment().all()
        handlers = {
            signal.SIGTERM: self._end,
            signal.SIGINT: self._end,
            signal.SIGUSR2: self.replace,
            signal.SIGHUP: self._pass_on,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler, number)
        try:
            self._start()
            return await self._over
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)
            for one in self._sockets:
                one.close()

    # -- signals

    def replace(self, number: int = signal.SIGUSR2) -> None:
        """Start a new process in place of the one that serves."""
        if self._starting is not None:
            _say(f"process {self._starting.process.pid} is starting already")
        elif not self._ending:
            self._start()

    def _pass_on(self, number: int) -> None:
        if self._serving is not None:
            self._serving.signal(number)

    def _end(self, number: int) -> None:
        self._ending = True
        for child in self._children:
            child.signal(number)
        self._finish_if_alone()

    # -- processes

    def _start(self) -> None:
        if self._ending:
            return
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        numbers = [theirs.fileno(), *(one.fileno() for one in self._sockets)]
        environment = {CONTROL: str(numbers[0]), SOCKETS: ",".join(map(str, numbers[1:]))}
        with theirs:
            process = subprocess.Popen(self._command, pass_fds=numbers, env=os.environ | environment)
        child = self._starting = Child(process, ours, loop.time())
        self._children.add(child)
        loop.add_reader(ours.fileno(), self._hear, child)
        loop.call_later(self._start_s, self._give_up, child)
        loop.create_task(self._wait(child), name=f"process {process.pid}")  # noqa: RUF006 - `_children` ends with it

    def _hear(self, child: Child) -> None:
        try:
            said, numbers, _, _ = socket.recv_fds(child.control, 4096, MOST_SOCKETS)
        except OSError:
            said, numbers = b"", []
        if not said:
            asyncio.get_running_loop().remove_reader(child.control.fileno())
        elif READY in said and not child.ready:
            self._ready(child, [socket.socket(fileno=number) for number in numbers])

    def _ready(self, child: Child, sockets: list[socket.socket]) -> None:
        child.ready = True
        self._starting = None
        for one in self._sockets:
            one.close()
        self._sockets = sockets
        old, self._serving = self._serving, child
        if old is not None and old in self._children:
            _say(f"process {child.process.pid} serves; process {old.process.pid} retires")
            old.retire()

    def _give_up(self, child: Child) -> None:
        if child is self._starting:
            _say(f"process {child.process.pid} is not ready after {self._start_s:g} s, and is ended")
            child.signal(signal.SIGKILL)

    async def _wait(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        code = await loop.run_in_executor(None, child.process.wait)
        loop.remove_reader(child.control.fileno())
        child.control.close()
        self._children.discard(child)
        if child is self._starting:
            self._starting = None
            self._failed_to_start(child, code)
        elif child is self._serving:
            self._serving, self._code = None, code
            self._died(child, code)
        self._finish_if_alone()

    def _failed_to_start(self, child: Child, code: int) -> None:
        if self._serving is not None:
            _say(
                f"process {child.process.pid} ended with {code} before it was ready; "
                f"process {self._serving.process.pid} goes on"
            )
        elif self._sockets and self._deaths and not self._ending:
            self._again(f"process {child.process.pid} ended with {code} before it was ready")
        else:
            self._ending, self._code = True, code

    def _died(self, child: Child, code: int) -> None:
        if self._ending or self._starting is not None:
            return
        if asyncio.get_running_loop().time() - child.started_at > STEADY_S:
            self._deaths = 0
        self._again(f"process {child.process.pid} ended with {code}, unasked")

    def _again(self, why: str) -> None:
        delay_s = min(BACKOFF_S * 2**self._deaths, LONGEST_BACKOFF_S)
        self._deaths += 1
        _say(f"{why}; another is started in {delay_s:g} s")
        asyncio.get_running_loop().call_later(delay_s, self._start)

    def _finish_if_alone(self) -> None:
        assert self._over is not None, "it runs"
        if self._ending and not self._children and not self._over.done():
            self._over.set_result(self._code)


def _say(what: str) -> None:
    print(f"polyserve: {what}", file=sys.stderr, flush=True)


def run(command: Sequence[str]) -> int:
    """Supervise a command until a signal ends it; its exit status."""
    code = asyncio.run(Supervisor(command).run())
    return code if code >= 0 else 128 - code
