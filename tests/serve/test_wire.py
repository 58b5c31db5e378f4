"""The client for streamed answers, against a server that answers byte by byte what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import until

from polyserve.serve.wire import HIGH_WATER, ConnectError, Wire


class Server:
    """Answers each request with the next of its scripts: pieces of bytes, and whether to hang up after them."""

    def __init__(self, *scripts: tuple[list[bytes], bool]) -> None:
        self.scripts = list(scripts)
        self.heads: list[bytes] = []
        self.connections = 0
        self.port = 0
        self.lost = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Wire]:
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            self.connections += 1
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                await self._talk(reader, writer)
            self.lost.set()
            writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        wire = Wire(f"http://127.0.0.1:{self.port}/prefix", connect_s=5.0)
        try:
            yield wire
        finally:
            wire.close()
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            pieces, hang_up = self.scripts.pop(0)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if hang_up:
                return


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
WHOLE = HEAD + b"content-length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"


async def get(wire: Wire, body: bytes = b"{}") -> tuple[int, bytes]:
    answer = await wire.post("/path", [(b"x-a", b"b")], body)
    return answer.status, await answer.whole(1 << 30)


async def hear(wire: Wire, pieces: list[tuple[int, bytes]]) -> None:
    answer = await wire.post("/path", [], b"{}", lambda status, data: pieces.append((status, data)))
    await answer.heard()


@given(st.sampled_from([WHOLE, CHUNKED]), st.sets(st.integers(1, 80), max_size=6))
def test_however_an_answer_is_cut_its_body_is_the_same(answer: bytes, cuts: set[int]) -> None:
    async def check() -> None:
        places = [0, *sorted(cut for cut in cuts if cut < len(answer)), len(answer)]
        pieces = [answer[start:end] for start, end in itertools.pairwise(places)]
        server = Server((pieces, False), ([WHOLE], False))
        async with server.running() as wire:
            assert await get(wire) == (200, b"hello")
            assert await get(wire) == (200, b"hello")
            assert server.connections == 1

    asyncio.run(check())


@given(st.sampled_from([WHOLE, CHUNKED]), st.sets(st.integers(1, 80), max_size=6))
def test_a_listener_hears_the_same_body_as_a_reader_with_its_status(answer: bytes, cuts: set[int]) -> None:
    async def check() -> None:
        places = [0, *sorted(cut for cut in cuts if cut < len(answer)), len(answer)]
        pieces = [answer[start:end] for start, end in itertools.pairwise(places)]
        server = Server((pieces, False), ([WHOLE], False))
        async with server.running() as wire:
            for _ in range(2):
                heard: list[tuple[int, bytes]] = []
                await hear(wire, heard)
                assert {status for status, _ in heard} == {200}
                assert b"".join(data for _, data in heard) == b"hello"
            assert server.connections == 1

    asyncio.run(check())


async def test_a_listener_hears_a_piece_long_before_the_end() -> None:
    server = Server(([HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n"], False))
    async with server.running() as wire:
        pieces: list[tuple[int, bytes]] = []
        task = asyncio.create_task(hear(wire, pieces))
        await until(lambda: bool(pieces))
        assert pieces == [(200, b"a")]
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])


async def test_a_listener_hears_what_there_was_of_a_broken_answer() -> None:
    async with Server(([HEAD + b"content-length: 9\r\n\r\nhello"], True)).running() as wire:
        pieces: list[tuple[int, bytes]] = []
        with pytest.raises(ConnectionError):
            await hear(wire, pieces)
        assert pieces == [(200, b"hello")]


async def test_as_many_connections_as_answers_under_way_and_each_used_again() -> None:
    server = Server(*[([CHUNKED], False)] * 9)
    async with server.running() as wire:
        assert await get(wire) == (200, b"hello")
        for _ in range(2):
            assert await asyncio.gather(*(get(wire) for _ in range(4))) == [(200, b"hello")] * 4
        assert server.connections == 4


async def test_who_gives_up_before_the_answer_ends_the_connection() -> None:
    server = Server(([], False))
    async with server.running() as wire:
        task = asyncio.create_task(get(wire))
        await until(lambda: bool(server.heads))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await server.lost.wait()


async def test_a_request_is_what_was_asked_for() -> None:
    server = Server(([WHOLE], False))
    async with server.running() as wire:
        answer = await wire.post("/v1/x", [(b"x-a", b"b"), (b"x-c", b"\xfc")], b"12345")
        assert answer.header(b"content-type") == b"text/plain"
        assert server.heads == [
            b"POST /prefix/v1/x HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nx-a: b\r\nx-c: \xfc\r\ncontent-length: 5\r\n\r\n"
            % server.port
        ]


async def test_an_answer_that_ends_with_its_connection_is_whole() -> None:
    async with Server(([HEAD + b"\r\n", b"hel", b"lo"], True)).running() as wire:
        assert await get(wire) == (200, b"hello")


async def test_hints_before_the_answer_are_passed_over() -> None:
    async with Server(([b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", WHOLE], False)).running() as wire:
        answer = await wire.post("/", [], b"")
        assert answer.status == 200
        assert answer.header(b"link") == b""
        assert await answer.whole(100) == b"hello"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 20", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nbad header"])
async def test_no_answer_is_an_error(answer: bytes) -> None:
    async with Server(([answer], True)).running() as wire:
        with pytest.raises(ConnectionError):
            await get(wire)


@pytest.mark.parametrize(
    "rest", [b"content-length: 9\r\n\r\nhello", CHUNKED[len(HEAD) : -5], b"transfer-encoding: chunked\r\n\r\nzz\r\n"]
)
async def test_half_an_answer_is_an_error_after_what_there_was_of_it(rest: bytes) -> None:
    async with Server(([HEAD + rest], True)).running() as wire:
        answer = await wire.post("/", [], b"")
        with pytest.raises(ConnectionError):
            await answer.whole(100)


async def test_an_engine_that_closes_kept_connections_is_asked_again_on_a_new_one() -> None:
    server = Server(([WHOLE], False), ([], True), ([WHOLE], False))
    async with server.running() as wire:
        assert [await get(wire) for _ in range(2)] == [(200, b"hello")] * 2
        assert server.connections == 2


async def test_a_kept_connection_that_nobody_needs_is_let_go_also_by_a_closed_wire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("polyserve.serve.wire.KEEP_ALIVE_S", 0.02)
    for closes in (False, True):
        server = Server(([WHOLE], False))
        async with server.running() as wire:
            answer = await wire.post("/", [], b"")
            if closes:
                wire.close()
            assert await answer.whole(100) == b"hello"
            async with asyncio.timeout(5):
                await server.lost.wait()
            assert repr(wire).endswith("0 idle>")


async def test_connection_close_is_taken_at_its_word() -> None:
    server = Server(([HEAD + b"connection: close\r\ncontent-length: 0\r\n\r\n"], False), ([WHOLE], False))
    async with server.running() as wire:
        assert await get(wire) == (200, b"")
        assert await get(wire) == (200, b"hello")
        assert server.connections == 2


async def test_closing_an_answer_half_way_ends_its_connection() -> None:
    server = Server(([HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n"], False))
    async with server.running() as wire:
        answer = await wire.post("/", [], b"")
        assert await answer.read() == b"a"
        answer.close()
        async with asyncio.timeout(5):
            await server.lost.wait()


async def test_a_reader_that_is_behind_holds_the_sender_back() -> None:
    size = 64 * HIGH_WATER
    pieces = [HEAD + b"content-length: %d\r\n\r\n" % size] + [b"x" * HIGH_WATER] * 64
    async with Server((pieces, False)).running() as wire:
        answer = await wire.post("/", [], b"")
        await asyncio.sleep(0.2)
        first = await answer.read()
        assert len(first) < size / 2
        assert len(first) + len(await answer.whole(1 << 30)) == size


async def test_nobody_listening_is_told_apart() -> None:
    server = Server()
    async with server.running() as wire:
        pass
    with pytest.raises(ConnectError):
        await get(wire)
