"""What `gateway.py` stands on: processes on cores of their own, what they use, and requests for the engine of C."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gateway_peers import HERE, UnavailableError

PATH = "/v1/chat/completions"
PROMPT = "x " * 500


def body(chunks: int, every_s: float) -> bytes:
    """A chat request; upstream.c reads from it how many chunks are wanted, and when."""
    ask = {
        "model": "m",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": chunks,
        "seed": round(every_s * 1e6),
        "stream": True,
    }
    return json.dumps(ask).encode()


def compiled(name: str, folder: Path) -> Path:
    """The program that `name`.c makes."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise SystemExit("bench-gateway: there is no C compiler; install gcc, or name one in CC")
    program = folder / name
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", str(program), str(HERE / f"{name}.c")], check=True)
    return program


def cores() -> tuple[int, int]:
    """The core of the relay, and that of everything else."""
    there = sorted(os.sched_getaffinity(0))
    if len(there) < 2:
        raise SystemExit("bench-gateway: wants two cores: one for the relay, one for engine and load")
    return there[1], there[0]


def in_child(*cores: int) -> Callable[[], None]:
    """What a process of ours does first: stay on its core, end with us, open many files."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        os.sched_setaffinity(0, set(cores))
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    return prepare


@contextmanager
def process(
    command: Sequence[str], core: int | tuple[int, ...], log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on one core, or on some, that is gone when the block is left."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
            preexec_fn=in_child(*((core,) if isinstance(core, int) else core)),
        )
    try:
        yield child
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(5.0)


def tree(pid: int) -> list[int]:
    """A process and everything that it began."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [pid, *(below for child in children for below in tree(child))]


def cpu_s(pid: int, alone: bool = False) -> float:
    """Processor seconds of a process, and of its children unless `alone`, so far."""
    total = 0.0
    for each in [pid] if alone else tree(pid):
        with suppress(OSError):
            total += time.clock_gettime((~each << 3) | 2)  # clock_getcpuclockid(3), which Python lacks
    return total


def resident(pid: int) -> int:
    """Bytes of memory that a process and its children hold."""
    pages = 0
    for each in tree(pid):
        with suppress(OSError):
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_ports(count: int) -> range:
    """Ports in a row that nobody listens on."""
    for first in range(20_000, 30_000, count + 1):
        taken = False
        for port in range(first, first + count):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                taken = taken or probe.connect_ex(("127.0.0.1", port)) == 0
                with suppress(OSError):
                    probe.close()
            if taken:
                break
        if not taken:
            return range(first, first + count)
    raise SystemExit("bench-gateway: no free ports between 20,000 and 30,000")


def answers(port: int, child: subprocess.Popen[bytes], within_s: float) -> None:
    """Come back when a request gets its answer; raises `UnavailableError`."""
    deadline, said = time.monotonic() + within_s, "nothing"
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise UnavailableError(f"it ended with {child.returncode}")
        ask = urllib.request.Request(
            f"http://127.0.0.1:{port}{PATH}", body(1, 0.001), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(ask, timeout=5.0) as answer:
                if b"[DONE]" in answer.read():
                    return
                said = f"{answer.status} without an end"
        except (OSError, urllib.error.URLError) as error:
            said = str(error)
        time.sleep(0.2)
    raise UnavailableError(f"it does not answer: {said}")


def fetched(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10.0) as answer:
        text: str = answer.read().decode()
        return text


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:200] if lines else "it said nothing"
