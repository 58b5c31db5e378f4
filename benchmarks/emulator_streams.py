"""CPU per token of the emulated engine while it carries many streams in real time, and how late it gets.

    python benchmarks/emulator_streams.py [--streams 50,200,400] [--pace-ms 30] [--seconds 10]

One engine process makes a token per stream every `--pace-ms`; this process reads them and does nothing else. What the
engine uses is its processes' CPU time over the tokens its own counter says. Two cores are wanted: one is the reader's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.request import urlopen

import uvloop

from polyserve.core.profile import Limits, Profile
from polyserve.profiles import store

WARM_UP_S = 2.0


@dataclass(frozen=True)
class Sample:
    cpu_s: float
    tokens: int
    wall_s: float


class Reader(asyncio.Protocol):
    """Asks for one stream and counts the bytes of its answer."""

    def __init__(self, body: bytes) -> None:
        self._request = b"POST /v1/completions HTTP/1.1\r\nhost: engine\r\ncontent-length: %d\r\n\r\n%b" % (
            len(body),
            body,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        pass


def sample(pid: int, url: str) -> Sample:
    with urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    tokens = next(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Sample(cpu_s, int(tokens), time.monotonic())


def get_info(url: str) -> dict[str, Any]:
    with urlopen(f"{url}/polyserve/info") as answer:
        facts: dict[str, Any] = json.load(answer)
    return facts


async def measure(pid: int, url: str, streams: int, pace_s: float, seconds: float) -> None:
    host, port = url.removeprefix("http://").split(":")
    tokens = int((WARM_UP_S + seconds + 5) / pace_s)
    body = json.dumps({"prompt": [1] * 8, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    loop = asyncio.get_running_loop()
    readers = [await loop.create_connection(lambda: Reader(body), host, int(port)) for _ in range(streams)]
    await asyncio.sleep(WARM_UP_S)
    before = await asyncio.to_thread(sample, pid, url)
    await asyncio.sleep(seconds)
    after = await asyncio.to_thread(sample, pid, url)
    facts = await asyncio.to_thread(get_info, url)
    for transport, _ in readers:
        transport.close()
    made, wall_s = after.tokens - before.tokens, after.wall_s - before.wall_s
    cpu_s = after.cpu_s - before.cpu_s
    print(
        f"{streams:7}  {made / wall_s:8.0f}  {made / wall_s / streams * pace_s:9.1%}  {cpu_s / made * 1e6:12.1f}  "
        f"{cpu_s / wall_s:8.1%}  {facts['late_iterations']:4}/{facts['iterations']:<5}  "
        f"{facts['worst_lag_s'] * 1e3:8.1f}"
    )


def run(streams: int, pace_s: float, seconds: float, folder: Path) -> None:
    limits = Limits(kv_tokens=10**7, max_num_seqs=4096, max_num_batched_tokens=8192)
    store.save(Profile("steady", (0, 10_000), (pace_s, pace_s), 0.0, 0.0, 0.0, limits), folder / "steady.json")
    command = [sys.executable, "-m", "polyserve", "engine", "--profile", str(folder / "steady.json"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(measure(process.pid, url, streams, pace_s, seconds))
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="50,200,400")
    parser.add_argument("--pace-ms", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    print("streams  tokens/s  of pace  us CPU/token  of a core  late iterations  worst ms")
    with tempfile.TemporaryDirectory() as folder:
        for streams in map(int, options.streams.split(",")):
            run(streams, options.pace_ms / 1e3, options.seconds, Path(folder))


if __name__ == "__main__":
    main()
