"""Bytes that no client should send, on the real listener: never a 5xx of ours, a traceback, a hang or a ghost."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from random import Random
from typing import Any

import pytest
from fake_engine import FakeEngine
from live import Live
from test_gateway import CHAT, over, post

# Connections of one test; a failure names the number of the one that found it.
CASES = 100
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/ready", "/version", "/",
         "/admin/fleet", "/admin/decisions?limit=3", "/admin/tiers", "/v1/models/tiny", "/v1/embeddings",
         "/%00", "/..//..", "*", "http://h/health", "/\xff", "/admin/instances/e0/nothing")  # fmt: skip
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT", "get", "P\x00ST", "")
HEADERS = (
    b"content-length: 5", b"content-length: -1", b"content-length: 99999999999999999999", b"content-length: 0x10",
    b"content-length: 3, 3", b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked",
    b"transfer-encoding: identity", b"Transfer-Encoding : chunked", b"connection: close", b"connection: upgrade",
    b"upgrade: websocket", b"upgrade: h2c", b"expect: 100-continue", b"expect: nonsense", b" folded: line",
    b"no colon", b": empty", b"x-nul: a\x00b", b"x-high: \xff\xfe", b"x-polyserve-tier: nobody", b"x-slo-ttft-ms: nan",
    b"x-slo-tpot-ms: 1e400", b"x-request-id: " + b"i" * 300, b"x-long: " + b"y" * 9_000, b"host: a\r\nhost: b",
    b"content-type: multipart/form-data", b"accept-encoding: gzip", b"traceparent: 00-zz",
    b"authorization: Bearer \x80",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    1e308,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": {}},
    [None],
    ["x", 1],
    [2**70],
    "1" * 99,
)
FIELDS = ("model", "messages", "prompt", "stream", "stream_options", "n", "max_tokens", "tools",
          "max_completion_tokens",
          "service_tier", "nvext", "vllm_xargs", "logprobs", "stop", "seed", "user", "priority", "")  # fmt: skip


def body(random: Random) -> bytes:
    """A chat, mostly, with something odd in it."""
    asked: dict[str, Any] = {**CHAT, "stream": random.random() < 0.5}
    for _ in range(random.randrange(3)):
        asked[random.choice(FIELDS)] = random.choice(VALUES)
    data = json.dumps(asked).encode()
    match random.randrange(8):
        case 0:
            return b"[" * random.choice((10, 5_000, 200_000))
        case 1:
            return data[: random.randrange(len(data))]
        case 2:
            return data.replace(b'"user"', b'"us\xff\xfer"')
        case 3:
            return b'{"model":"tiny","messages":' + b'{"a":' * 3_000 + b"1" + b"}" * 3_000 + b"}"
        case _:
            return data


def chunked(random: Random, data: bytes) -> bytes:
    """A body in chunks, one of them perhaps not as it says."""
    pieces = []
    while data:
        size = random.randrange(1, 60)
        said = random.choice(
            (b"%x" % len(data[:size]),) * 12 + (b"%X;ext=1" % len(data[:size]), b"-1", b"fffffffffff", b"g")
        )
        pieces.append(said + b"\r\n" + data[:size] + random.choice((b"\r\n",) * 20 + (b"\n", b"")))
        data = data[size:]
    return b"".join([*pieces, random.choice((b"0\r\n\r\n",) * 4 + (b"0\r\nx-trailer: 1\r\n\r\n", b"0\r\n", b""))])


def request(random: Random) -> bytes:
    """One request, more or less."""
    likely = random.random() < 0.6
    method, path = ("POST", PATHS[random.randrange(2)]) if likely else (random.choice(METHODS), random.choice(PATHS))
    version = random.choice(("HTTP/1.1",) * 9 + ("HTTP/1.0", "HTTP/2.0", "HTTP/1.", "http/1.1", ""))
    data = body(random)
    lines = [f"{method} {path} {version}".encode("latin-1"), b"host: h"]
    if random.random() < 0.35:
        lines.append(b"transfer-encoding: chunked")
        data = chunked(random, data)
    else:
        lines.append(b"content-length: %d" % (len(data) + random.choice((0,) * 8 + (-1, 1, 10_000_000))))
    lines += random.sample(HEADERS, random.choice((0, 0, 1, 1, 2, 3)))
    return random.choice((b"\r\n",) * 15 + (b"\n",)).join(lines) + b"\r\n\r\n" + data


def mutated(random: Random, data: bytes) -> bytes:
    """The bytes with something flipped, dropped, doubled or put in."""
    for _ in range(random.choice((0, 0, 0, 1, 2, 4))):
        at, size = random.randrange(len(data) + 1), random.randrange(1, 30)
        new = random.choice((bytes([random.randrange(256)]), b"\r\n", b"\0", data[at : at + size], random.randbytes(9)))
        data = data[:at] + new + data[at + random.choice((0, 1, size)) :]
    return data


async def say(live: Live, random: Random) -> bytes:
    """What comes back on one connection, until the gateway or both have closed it."""
    sent = b"".join(mutated(random, request(random)) for _ in range(random.choice((1, 1, 1, 2, 5))))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(live.url.rpartition(":")[2]))
    try:
        reading = asyncio.create_task(reader.read())
        cuts = sorted(random.randrange(len(sent)) for _ in range(random.choice((0, 1, 6))))
        for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
            writer.write(sent[start:end])
            await asyncio.sleep(0)
        match random.randrange(3):
            case 0:
                writer.write_eof()
            case 1:
                await asyncio.wait((reading,), timeout=0.02)
                writer.write_eof()
            case _:
                await asyncio.wait((reading,), timeout=0.01)
                writer.transport.abort()
        return await reading
    except OSError:  # reset, or not connected any more
        return b""
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_that_a_client_may_send_breaks_the_edge(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(tokens=3)
    bounds = {"probe_s": 0.05, "shutdown_s": 1, "body_mib": 0.5, "head_kib": 8}
    async with over(engine, limits=bounds) as live:
        for number in range(CASES):
            async with asyncio.timeout(20):
                answer = await say(live, Random(f"{seed} {number}"))
            statuses = [int(status) for status in STATUS.findall(answer)]
            assert all(status < 500 for status in statuses), (number, answer)
            assert not answer or answer.startswith(b"HTTP/1."), (number, answer)
        assert (await post(live, CHAT))[0] == 200
        await live.quiet()
    assert all(isinstance(asked, dict) for _, _, asked in engine.seen)
    loud = [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert not loud, loud[0].getMessage()
