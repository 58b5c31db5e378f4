"""Bytes that no engine should send: the client gets a whole answer, or is told that it is none."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import AsyncIterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Live, listening, make_plan

from polyserve.serve.sse import LONGEST_EVENT, EventScanner, NotAStreamError
from polyserve.serve.wire import LONGEST_HEAD, Wire

CASES = 60
MODEL = {"model": "tiny", "stream": True, "max_tokens": 9, "prompt": "Count."}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(payload: object) -> bytes:
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


def part(text: str, finish: str | None = None) -> dict[str, object]:
    return {"id": "c", "object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish}]}


USAGE = {"id": "c", "choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}}
EVENTS = [event(part(f"t{n} ", "stop" if n == 3 else None)) for n in range(4)]
SEEN = b"".join(EVENTS) + b"data: [DONE]\n\n"  # by a client that asked for no usage


def framed(pieces: list[bytes]) -> bytes:
    """A chunked body."""
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


SANE = HEAD + framed([*EVENTS, event(USAGE), b"data: [DONE]\n\n"])


class RawEngine:
    """Answers every completion with the bytes it has, in the pieces it has them."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.hangs_up = False
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._talk(reader, writer)
            writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET "):
                status = b"200 OK" if b"/health" in head else b"404 Not Found"
                writer.write(b"HTTP/1.1 %s\r\ncontent-length: 0\r\n\r\n" % status)
                continue
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if self.hangs_up:
                return


@contextlib.asynccontextmanager
async def over(engine: RawEngine) -> AsyncIterator[Live]:
    bounds = {"probe_s": 0.02, "shutdown_s": 1, "silence_s": 0.1, "attempts": 2}
    async with engine.running() as url, listening(make_plan([url], limits=bounds)) as live:
        await live.ready()
        yield live


async def ask(live: Live, stream: bool) -> tuple[int, bytes]:
    async with (
        asyncio.timeout(20),
        live.http.post(live.url + "/v1/completions", json={**MODEL, "stream": stream}) as got,
    ):
        return got.status, await got.read()


async def test_an_answer_cut_at_any_place_is_the_same_answer() -> None:
    engine = RawEngine()
    async with engine.running() as url:
        wire = Wire(url, 5.0)
        for cut in range(1, len(SANE)):
            engine.pieces = [SANE[:cut], SANE[cut:]]
            answer = await wire.post("/v1/completions", [], b"{}")
            scanner, out = EventScanner(strip_usage=True), b""
            while data := await answer.read():
                out += scanner.feed(data)
            assert (answer.status, out, scanner.events, scanner.done) == (200, SEEN, 4, True), cut
        wire.close()


@given(st.lists(st.integers(1, len(SANE) - 1), max_size=12), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_however_it_is_framed_and_cut_the_scanner_says_the_same(cuts: list[int], separator: bytes) -> None:
    stream = b"".join([*EVENTS, event(USAGE), b"data: [DONE]\n\n"]).replace(b"\n\n", separator)
    places = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    scanner = EventScanner(strip_usage=True)
    out = b"".join(scanner.feed(stream[a:b]) for a, b in itertools.pairwise(places))
    assert out == SEEN.replace(b"\n\n", separator)


@given(
    st.lists(st.binary(max_size=60) | st.sampled_from([*EVENTS, b"\n\n", b"data:", b"data: {", b"\r\n"]), max_size=20)
)
def test_no_bytes_make_the_scanner_lose_or_invent_any(pieces: list[bytes]) -> None:
    scanner, whole = EventScanner(), b"".join(pieces)
    out = b""
    with contextlib.suppress(NotAStreamError):
        for piece in pieces:
            out += scanner.feed(piece)
    assert whole.startswith(out) or scanner.error is not None


def feed_all(scanner: EventScanner, pieces: list[bytes]) -> None:
    for piece in pieces:
        scanner.feed(piece)


def test_an_event_without_end_is_given_up_before_it_is_large() -> None:
    scanner, piece = EventScanner(), b"x" * 65_536
    with pytest.raises(NotAStreamError):
        feed_all(scanner, [piece] * (2 + LONGEST_EVENT // len(piece)))


FRAMINGS = (b"content-length: 40", b"content-length: 99999", b"transfer-encoding: gzip", b"x: y", b"content-length: -1",
            b"content-length: 5\r\ncontent-length: 6", b"content-encoding: br")  # fmt: skip
STATUSES = (b"199 No", b"204 No Content", b"302 Found", b"404 No", b"418 Tea", b"500 Oh", b"503 Busy", b"999 X")
ODD_EVENTS = (event({"error": {"message": "dead"}}), b"data: {\n\n", b"data: [1]\n\n", b": comment\n\n",
              b"\xff\xfe\n\n", b"event: ping\n\n", event({"choices": 5}), event({"choices": [{"text": 5}]}),
              b"data: [DONE]\n\n", b"data: null\n\n", b"data:\n\n", b"\n\n\n\n")  # fmt: skip


def broken(random: Random) -> list[bytes]:
    """What an engine sends that is not well, or is."""
    data, at = SANE, random.randrange(len(SANE))
    match random.randrange(8):
        case 0:
            data = random.randbytes(random.randrange(400))
        case 1:
            data = SANE[:at]
        case 2:
            data = SANE.replace(b"transfer-encoding: chunked", random.choice(FRAMINGS))
        case 3:
            data = SANE.replace(b"200 OK", random.choice(STATUSES))
        case 4:
            data = HEAD + framed([*EVENTS[:2], random.choice(ODD_EVENTS), *EVENTS[2:], b"data: [DONE]\n\n"])
        case 5:
            data = SANE.replace(b"text/event-stream", random.choice((b"text/html", b"application/json", b"")))
        case 6:
            data = SANE[:at] + random.randbytes(random.randrange(1, 9)) + SANE[at + random.randrange(9) :]
    cuts = sorted(random.randrange(len(data) + 1) for _ in range(random.choice((0, 1, 5))))
    return [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]


def is_whole(answer: bytes) -> bool:
    """Whether a client can tell that this stream has come to an end, good or bad."""
    return answer.endswith(b"data: [DONE]\n\n") or b'data: {"error":' in answer


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_that_an_engine_may_send_breaks_the_relay(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    engine = RawEngine()
    async with over(engine) as live:
        for number in range(CASES):
            random = Random(f"{seed} {number}")
            engine.pieces, engine.hangs_up = broken(random), random.random() < 0.8
            stream = random.random() < 0.7
            status, answer = await ask(live, stream)
            assert b"internal_error" not in answer, (number, engine.pieces, answer)
            if status == 200:
                assert is_whole(answer) if stream else json.loads(answer)["choices"], (number, engine.pieces, answer)
            elif status >= 500:
                assert json.loads(answer)["error"]["code"] in ("upstream_error", "no_instances"), (number, answer)
            await live.ready()
        engine.pieces, engine.hangs_up = [SANE], False
        assert await ask(live, stream=True) == (200, SEEN)
        await live.quiet()
    loud = [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert not loud, loud[0].getMessage()


@pytest.mark.parametrize("line", [b"x-more: " + b"y" * 1000 + b"\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_a_head_without_end_is_given_up_before_it_is_large(line: bytes) -> None:
    engine = RawEngine()
    engine.pieces = [b"HTTP/1.1 100 Continue\r\n" + (b"\r\n" if line.startswith(b"HTTP") else b"")]
    engine.pieces += [line * 64] * (2 + LONGEST_HEAD // len(line * 64))
    async with engine.running() as url:
        wire = Wire(url, 5.0)
        with pytest.raises(ConnectionError, match="head"):
            await wire.post("/v1/completions", [], b"{}")
        wire.close()
