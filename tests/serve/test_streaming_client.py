import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from polyserve.serve.streaming_client import Answer, StreamingClient

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[StreamingClient]:
    """A client of a real server that speaks raw bytes."""
    ended: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        over = asyncio.get_running_loop().create_future()
        ended.append(over)
        await handler(reader, writer)
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        over.set_result(None)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = StreamingClient(f"http://127.0.0.1:{port}")
    try:
        yield client
    finally:
        client.close()
        server.close()
        await asyncio.gather(*ended)


async def asked(reader: asyncio.StreamReader) -> bytes:
    """One whole request with a body of two bytes."""
    return await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)


async def posted(client: StreamingClient) -> tuple[Answer, list[bytes]]:
    pieces: list[bytes] = []
    answer = Answer(pieces.append)
    await client.post("/x", {"X-Name": "v"}, b"{}", answer)
    return answer, pieces


async def test_a_request_is_what_http_wants_and_the_answer_comes_in_pieces() -> None:
    seen: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await asked(reader))
        writer.write(b"HTTP/1.1 201 Created\r\nX-Tier: a\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"2\r\nab\r\n")
        await writer.drain()
        writer.write(b"1\r\nc\r\n0\r\n\r\n")
        writer.close()

    async with listening(handler) as client:
        answer, pieces = await posted(client)
    assert seen[0].startswith(b"POST /x HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"content-length: 2\r\nX-Name: v\r\n\r\n{}" in seen[0]
    assert (answer.status, answer.headers["x-tier"]) == (201, "a")
    assert b"".join(pieces) == b"abc"


async def test_connections_are_used_again_one_answer_after_the_other() -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await asked(reader):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na")
        writer.close()

    async with listening(handler) as client:
        for _ in range(3):
            _, pieces = await posted(client)
            assert pieces == [b"a"]
        await asyncio.gather(*(posted(client) for _ in range(4)))
    assert connections == 4


async def test_a_server_that_closes_after_each_answer_is_asked_on_a_new_connection() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\na")
        writer.close()

    async with listening(handler) as client:
        for _ in range(3):
            assert (await posted(client))[1] == [b"a"]


async def test_a_body_without_length_ends_with_the_connection() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nabc")
        writer.close()

    async with listening(handler) as client:
        assert b"".join((await posted(client))[1]) == b"abc"


@pytest.mark.parametrize(
    "bytes_before_the_end", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", b"SSH-2.0-x\r\n"]
)
async def test_an_answer_cut_short_or_none_at_all_is_an_error(bytes_before_the_end: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        writer.write(bytes_before_the_end)
        writer.close()

    async with listening(handler) as client:
        with pytest.raises(OSError, match=r"closed in mid-answer|not HTTP"):
            await posted(client)


async def test_who_gives_up_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        with contextlib.suppress(OSError):
            await reader.read()
        gone.set()
        writer.close()

    async with listening(handler) as client:
        task = asyncio.create_task(posted(client))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone.wait()


@pytest.mark.parametrize("url", ["ftp://x", "x:80", "http://"])
async def test_a_url_that_is_not_http_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        StreamingClient(url)
