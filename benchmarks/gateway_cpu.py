"""CPU per chunk and per request of the gateway, beside a relay that does nothing else, in the same run.

    python benchmarks/gateway_cpu.py [--streams 512] [--rate 10] [--seconds 10] [--requests 3000]

Three processes: a source of vLLM-like streams, the relay under test, and this one, which is the client. The CPU time
is that of the relay's process alone. Both relays are uvicorn with httptools on uvloop, bare ASGI in front and aiohttp
behind; one of them passes bytes on, the other is the gateway with its brain, books, journal and metrics.
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
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
import uvloop

EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1795344878,'
    b'"model":"m","choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
TAIL = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
INSTANCES = 4


class Source(asyncio.Protocol):
    """One connection to the source; `x-chunks` and `x-every-ms` say what is wanted."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.data = b""
        self.timer: asyncio.TimerHandle | None = None

    def connection_lost(self, error: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, _, body = self.data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if not _ or len(body) < int(fields.get(b"content-length", b"0")):
            return
        self.data = b""
        if head.startswith(b"GET"):
            known = head.startswith(b"GET /health")
            self.transport.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % (200 if known else 404))
            return
        self.left, every_s = int(fields[b"x-chunks"]), int(fields[b"x-every-ms"]) / 1e3
        self.transport.write(HEAD)
        self.tick(asyncio.get_running_loop(), every_s)

    def tick(self, loop: asyncio.AbstractEventLoop, every_s: float) -> None:
        self.left -= 1
        self.transport.write(CHUNK if self.left else CHUNK + TAIL)
        if self.left:
            self.timer = loop.call_later(every_s, self.tick, loop, every_s)


async def source(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Source, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def bare(port: int, upstream: str) -> None:
    """Bare ASGI and aiohttp: what a relay costs that only relays."""
    session: aiohttp.ClientSession | None = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal session
        if session is None:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
            )
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"] if name.startswith(b"x-")}
        async with session.post(upstream + scope["path"], data=body, headers=headers) as answer:
            head = [(b"content-type", answer.headers["content-type"].encode())]
            await send({"type": "http.response.start", "status": answer.status, "headers": head})
            while data := await answer.content.readany():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    uvicorn.run(
        app,
        port=port,
        http="httptools",
        loop="uvloop",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        backlog=4096,
    )


def gateway(port: int, upstream: str, folder: Path) -> None:
    from polyserve.config import run_gateway

    config = {
        "model": "m",
        "listen": {"port": port},
        "profile": "h200-llama-3-8b",
        "tiers": [{"name": "slow", "tpot_ms": 200, "ttft_ms": 60_000}],
        "instances": [{"id": f"e{n}", "url": upstream, "kind": "openai", "chunk": "dynamic"} for n in range(INSTANCES)],
        "settings": {"on_late": "never", "placement": "spread"},
        "journal": str(folder / "journal.jsonl"),
    }
    path = folder / "gateway.yaml"
    path.write_text(json.dumps(config))
    run_gateway(path, launch=False)


BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x " * 500}], "max_tokens": 300,
                   "stream": True}).encode()  # fmt: skip


class Client(asyncio.Protocol):
    """One client connection: sends a request, counts events until the end of the answer."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.chunks = 0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done: asyncio.Future[None] = self.lost

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def ask(self) -> asyncio.Future[None]:
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(self.request)
        return self.done

    def data_received(self, data: bytes) -> None:
        self.chunks += data.count(b"data: {")
        if data.endswith((b"0\r\n\r\n", b"[DONE]\n\n")) and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError("the relay hung up"))


def request(port: int, chunks: int, every_ms: int) -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"x-chunks: {chunks}\r\nx-every-ms: {every_ms}\r\ncontent-length: {len(BODY)}\r\n\r\n"
    )
    return head.encode() + BODY


async def connected(port: int, chunks: int, every_ms: int, count: int) -> list[Client]:
    loop = asyncio.get_running_loop()
    made = []
    for _ in range(count):
        _, client = await loop.create_connection(lambda: Client(request(port, chunks, every_ms)), "127.0.0.1", port)
        made.append(client)
    return made


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def streams(port: int, pid: int, count: int, rate: float, seconds: float) -> tuple[float, float]:
    """(CPU microseconds per chunk, share of the wanted chunks that came in time)."""
    clients = await connected(port, round((seconds + 5.0) * rate), round(1e3 / rate), count)
    answers = []
    for client in clients:
        answers.append(client.ask())
        await asyncio.sleep(1.0 / count)
    await asyncio.sleep(2.0)
    seen, used, began = sum(c.chunks for c in clients), cpu_s(pid), time.monotonic()
    await asyncio.sleep(seconds)
    seen, used, took = sum(c.chunks for c in clients) - seen, cpu_s(pid) - used, time.monotonic() - began
    await asyncio.gather(*answers)
    for client in clients:
        client.transport.abort()
    return used / seen * 1e6, seen / (took * rate * count)


async def requests(port: int, pid: int, count: int, at_once: int) -> tuple[float, float]:
    """(CPU microseconds per request, requests per second) of one-chunk answers."""
    clients = await connected(port, 1, 1, at_once)

    async def ask(client: Client, times: int) -> None:
        for _ in range(times):
            await client.ask()

    await asyncio.gather(*(ask(client, 5) for client in clients))
    used, began = cpu_s(pid), time.monotonic()
    await asyncio.gather(*(ask(client, count // at_once) for client in clients))
    used, took = cpu_s(pid) - used, time.monotonic() - began
    for client in clients:
        client.transport.abort()
    done = count // at_once * at_once
    return used / done * 1e6, done / took


async def delays(port: int, direct: int, count: int) -> list[float]:
    """Seconds from asking to the end of one-chunk answers, one at a time, in order; each less one without a relay."""
    through, (straight,) = (await connected(port, 1, 1, 1))[0], await connected(direct, 1, 1, 1)
    added = []
    for _ in range(count):
        took = []
        for client in (straight, through):
            began = time.perf_counter()
            await client.ask()
            took.append(time.perf_counter() - began)
        added.append(took[1] - took[0])
    for client in (straight, through):
        client.transport.abort()
    return sorted(added)


async def measure(args: argparse.Namespace, ports: dict[str, int], pids: dict[str, int]) -> None:
    print(
        f"{args.streams} streams at {args.rate:g} chunks/s; {args.requests} one-chunk requests, {args.at_once} at once"
    )
    per_chunk: dict[str, list[float]] = {"bare": [], "gateway": []}
    for turn in range(args.turns):
        for name in ("bare", "gateway"):
            used, share = await streams(ports[name], pids[name], args.streams, args.rate, args.seconds)
            per_chunk[name].append(used)
            print(f"turn {turn}: {name:8} {used:6.1f} us per chunk, {share:.0%} of the chunks in time")
    for name in ("bare", "gateway"):
        used, rate = await requests(ports[name], pids[name], args.requests, args.at_once)
        print(f"{name:8} {used:6.0f} us per request, {rate:.0f} requests/s")
    for name in ("bare", "gateway"):
        added = await delays(ports[name], ports["source"], 1000)
        print(f"{name:8} adds {added[500] * 1e3:.2f} ms (p50), {added[990] * 1e3:.2f} ms (p99) to an answer")
    best = {name: min(values) for name, values in per_chunk.items()}
    print(f"per chunk, best turns: {best['gateway']:.1f} / {best['bare']:.1f} = {best['gateway'] / best['bare']:.2f}")


async def listening(port: int) -> None:
    for _ in range(600):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise SystemExit(f"nothing listens on port {port}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--base-port", type=int, default=18400)
    parser.add_argument("--run", choices=["source", "bare", "gateway"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    base = args.base_port
    ports = {"source": base, "bare": base + 1, "gateway": base + 2}
    upstream = f"http://127.0.0.1:{base}"
    match args.run:
        case "source":
            uvloop.run(source(base))
        case "bare":
            bare(ports["bare"], upstream)
        case "gateway":
            with tempfile.TemporaryDirectory() as folder:
                gateway(ports["gateway"], upstream, Path(folder))
        case _:
            command = [sys.executable, __file__, "--base-port", str(base), "--run"]
            running = {name: subprocess.Popen([*command, name]) for name in ports}
            try:
                pids = {name: process.pid for name, process in running.items()}
                uvloop.run(compare(args, ports, pids))
            finally:
                for process in running.values():
                    process.terminate()
                for process in running.values():
                    process.wait()


async def compare(args: argparse.Namespace, ports: dict[str, int], pids: dict[str, int]) -> None:
    for port in ports.values():
        await listening(port)
    await asyncio.sleep(2.0)
    await measure(args, ports, pids)


if __name__ == "__main__":
    main()
