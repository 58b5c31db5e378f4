"""Clients that send in drops, send too much, or do not read: each costs a bounded time and memory, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from live import Live, until
from test_gateway import CHAT, over, post

BODY = json.dumps(CHAT).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n" % len(BODY)


def limits(**values: Any) -> dict[str, Any]:
    return {"probe_s": 0.05, "shutdown_s": 1} | values


@contextlib.asynccontextmanager
async def connected(live: Live, **values: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(live.url.rpartition(":")[2]), **values)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def end(reader: asyncio.StreamReader) -> bytes:
    """What comes until the gateway closes."""
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionResetError:
        return b""


def told(answer: bytes) -> tuple[int, str]:
    """Status and code of an error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.01)


async def test_a_head_in_drops_is_cut_off() -> None:
    async with over(FakeEngine(), limits=limits(head_s=0.2)) as live, connected(live) as (reader, writer):
        dripping = asyncio.create_task(drip(writer, HEAD * 5))
        assert told(await end(reader)) == (408, "request_timeout")
        dripping.cancel()


async def test_a_second_head_in_drops_is_cut_off_too() -> None:
    async with over(FakeEngine(), limits=limits(head_s=0.2)) as live, connected(live) as (reader, writer):
        writer.write(HEAD + b"\r\n" + BODY)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        dripping = asyncio.create_task(drip(writer, HEAD * 5))
        answer = await end(reader)
        assert told(answer[answer.index(b"HTTP/1.1 408") :]) == (408, "request_timeout")
        dripping.cancel()


async def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async with over(FakeEngine(), limits=limits(head_s=0.1)) as live, connected(live) as (reader, _):
        assert await end(reader) == b""


async def test_a_body_in_drops_is_cut_off() -> None:
    engine = FakeEngine()
    async with over(engine, limits=limits(upload_s=0.2)) as live, connected(live) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        dripping = asyncio.create_task(drip(writer, BODY[:-1]))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 408 ")
        dripping.cancel()
        assert not engine.seen


async def test_a_body_that_nobody_reads_does_not_hold_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyserve.serve.edge.GRACE_S", 0.1)
    async with over(FakeEngine(), limits=limits(upload_s=0.1)) as live, connected(live) as (reader, writer):
        writer.write(b"POST /health HTTP/1.1\r\nhost: h\r\ncontent-length: 100000\r\n\r\n")
        dripping = asyncio.create_task(drip(writer, b"x" * 500))
        assert (await end(reader)).startswith(b"HTTP/1.1 405 ")
        dripping.cancel()


async def test_a_head_without_end_is_refused_at_its_bound() -> None:
    async with over(FakeEngine(), limits=limits(head_kib=4)) as live, connected(live) as (reader, writer):
        writer.write(HEAD)
        for _ in range(5):
            writer.write(b"x-more: " + b"x" * 1000 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)
        assert told(await end(reader)) == (431, "headers_too_large")
        assert (await post(live, CHAT))[0] == 200


@pytest.mark.parametrize("sent", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"HELLO\r\n\r\n",
    b"GET /health HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\nbad header\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
])  # fmt: skip
async def test_what_is_not_http_is_told_so(sent: bytes) -> None:
    async with over(FakeEngine()) as live, connected(live) as (reader, writer):
        writer.write(sent)
        answer = await end(reader)
        assert told(answer[answer.rindex(b"HTTP/1.1 4") :]) == (400, "invalid_http")
        assert (await post(live, CHAT))[0] == 200


async def test_more_connections_than_there_may_be_are_refused(caplog: Any) -> None:
    async with over(FakeEngine(), limits=limits(connections=10)) as live, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(connected(live)) for _ in range(10)]
        await asyncio.sleep(0.05)
        for _ in range(3):
            async with connected(live) as (reader, _):
                answer = await end(reader)
                assert told(answer) == (503, "too_many_connections")
                assert b"retry-after: 1" in answer
            await asyncio.sleep(0.05)  # until the gateway knows that it has gone
        assert caplog.text.count("10 connections are open") == 1
        held[0][1].transport.abort()
        await asyncio.sleep(0.05)
        async with connected(live) as (reader, writer):
            writer.write(HEAD + b"\r\n" + BODY)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


# ---------------------------------------------------------------------------------------------------- never reading


def small() -> socket.socket:
    """A socket that takes little before it is read."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return made


@contextlib.asynccontextmanager
async def deaf(live: Live, body: dict[str, Any]) -> AsyncIterator[socket.socket]:
    """A client that sends a request and reads nothing."""
    made = small()
    made.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(made, ("127.0.0.1", int(live.url.rpartition(":")[2])))
        data = json.dumps(body).encode()
        await loop.sock_sendall(made, HEAD.replace(b"%d" % len(BODY), b"%d" % len(data)) + b"\r\n" + data)
        yield made
    finally:
        made.close()


async def test_a_client_that_stops_reading_its_stream_is_cut_off_and_its_engine_freed(caplog: Any) -> None:
    caplog.set_level("INFO")
    engine = FakeEngine(tokens=40_000)
    async with over(engine, limits=limits(stall_s=0.3)) as live, deaf(live, CHAT | {"stream": True}):
        await until(lambda: engine.streams == 1)
        (ticket,) = live.gateway.fleet.get("e0").tickets.values()  # type: ignore[union-attr]
        await until(lambda: ticket.unread)
        seen = ticket.reading.unread if ticket.reading else 0
        assert seen < 2_000_000
        await live.quiet()
        await until(lambda: engine.streams == 0)
        assert "cut off" in caplog.text


async def test_a_stalled_client_is_not_taken_for_a_silent_engine() -> None:
    engine = FakeEngine(tokens=40_000)
    bounds = limits(stall_s=1.0, silence_s=0.2)
    async with over(engine, FakeEngine(), limits=bounds) as live, deaf(live, CHAT | {"stream": True}):
        await until(lambda: any(node.tickets for node in live.gateway.fleet))
        await live.quiet()
        assert len(engine.seen) == 1


async def test_a_whole_answer_that_is_not_read_is_cut_off() -> None:
    answer = json.dumps({"choices": [{"text": "x" * 8_000_000}], "usage": {"completion_tokens": 1}}).encode()
    engine = FakeEngine(answer=answer, answer_type="application/json")
    body = {"model": "tiny", "prompt": "a", "best_of": 2}
    async with over(engine, limits=limits(stall_s=0.2)) as live:
        data = json.dumps(body).encode()
        made = small()
        made.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(made, ("127.0.0.1", int(live.url.rpartition(":")[2])))
        head = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(data)
        await loop.sock_sendall(made, head + data)
        await asyncio.sleep(0.7)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := await loop.sock_recv(made, 65536):
                got += len(piece)
        made.close()
        assert got < len(answer)


async def test_a_client_that_reads_slowly_but_reads_gets_it_all() -> None:
    engine = FakeEngine(tokens=3000)
    async with over(engine, limits=limits(stall_s=0.5)) as live, deaf(live, CHAT | {"stream": True}) as made:
        got = b""
        loop = asyncio.get_running_loop()
        while not got.endswith(b"0\r\n\r\n"):
            await asyncio.sleep(0.002)
            got += await loop.sock_recv(made, 4096)
        assert b"t2999 " in got
        assert b"[DONE]" in got


async def test_others_do_not_notice_those_that_do_not_read() -> None:
    engine, other = FakeEngine(tokens=40_000), FakeEngine(tokens=200, every_s=0.001)
    async with over(other, limits=limits(stall_s=5)) as live, contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(deaf(live, CHAT | {"stream": True}))
        answers = await asyncio.gather(*(post(live, CHAT | {"stream": True}) for _ in range(5)))
        assert [status for status, _, _ in answers] == [200] * 5
        assert all(text.endswith("data: [DONE]\n\n") for _, text, _ in answers)
        assert not engine.seen
