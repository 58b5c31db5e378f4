"""Headers: what ends at the gateway in either direction, on the wire."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from live import Live
from test_gateway import CHAT, over, post

from polyserve.serve.errors import ApiError
from polyserve.serve.headers import for_client, for_engine, incoming

NAMES = st.sampled_from([
    b"accept", b"authorization", b"connection", b"content-length", b"cookie", b"keep-alive", b"priority", b"te",
    b"traceparent", b"transfer-encoding", b"upgrade", b"user-agent", b"x-api-key", b"x-custom", b"x-polyserve-tier",
    b"x_polyserve_tier", b"x-slo-tpot-ms", b"x-vllm-rank", b"x-data-parallel-rank", b"x-forwarded-for",
])  # fmt: skip
PAIRS = st.lists(st.tuples(NAMES, st.sampled_from([b"1", b"close, x-custom", b"traceparent", b""])), max_size=8)
PASS = {b"accept", b"traceparent", b"user-agent", b"x-custom"}


@given(PAIRS)
def test_engines_get_only_what_is_theirs(pairs: list[tuple[bytes, bytes]]) -> None:
    try:
        headers = incoming(pairs)
    except ApiError:
        return
    passed = dict(for_engine(headers))
    assert passed.keys() <= PASS
    named = {name.strip() for name in headers.get(b"connection", b"").split(b",")}
    assert passed.keys() == (PASS & headers.keys()) - named


@given(PAIRS)
def test_clients_get_nothing_that_only_we_may_say(pairs: list[tuple[bytes, bytes]]) -> None:
    forbidden = {b"connection", b"keep-alive", b"te", b"transfer-encoding", b"upgrade", b"content-length"}
    names = {name for name, _ in for_client(pairs)}
    assert not names & forbidden
    assert not any(name.replace(b"_", b"-").startswith((b"x-polyserve-", b"x-vllm-")) for name in names)


def test_a_list_in_two_headers_is_one_list() -> None:
    assert incoming([(b"accept", b"a"), (b"accept", b"b")]) == {b"accept": b"a, b"}


async def raw(live: Live, head: str, body: bytes = b"") -> bytes:
    """All that comes back for these bytes until the gateway closes or has answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(live.url.rpartition(":")[2]))
    writer.write(head.replace("\n", "\r\n").encode("latin-1") + body)
    try:
        async with asyncio.timeout(5):
            got = await reader.readuntil(b"\r\n\r\n")
            length = [line for line in got.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            return got + (await reader.readexactly(int(length[0].partition(b":")[2])) if length else b"")
    finally:
        writer.close()


BODY = json.dumps(CHAT).encode()
SMUGGLED = {
    "two lengths": f"content-length: {len(BODY)}\ncontent-length: 5\n",
    "two lengths alike": f"content-length: {len(BODY)}\ncontent-length: {len(BODY)}\n",
    "length and chunks": f"content-length: {len(BODY)}\ntransfer-encoding: chunked\n",
    "chunks that are not last": "transfer-encoding: chunked, gzip\n",
    "chunks twice": "transfer-encoding: chunked\ntransfer-encoding: chunked\n",
    "a length of words": "content-length: many\n",
    "a negative length": "content-length: -5\n",
    "a folded header": f"content-length: {len(BODY)}\nx-custom: a\n b\n",
    "a space before the colon": f"content-length: {len(BODY)}\nx-custom : a\n",
    "a name with a control character": f"content-length: {len(BODY)}\nx-cus\x01tom: a\n",
    "a value with a null": f"content-length: {len(BODY)}\nx-custom: a\x00b\n",
    "two keys": f"content-length: {len(BODY)}\nauthorization: Bearer a\nauthorization: Bearer b\n",
    "two hosts": f"content-length: {len(BODY)}\nhost: other\n",
    "two paces": f"content-length: {len(BODY)}\nx-slo-tpot-ms: 50\nx-slo-tpot-ms: 5\n",
}


async def test_requests_that_two_readers_could_read_differently_are_refused() -> None:
    engine = FakeEngine()
    async with over(engine) as live:
        for name, lines in SMUGGLED.items():
            answer = await raw(live, f"POST /v1/chat/completions HTTP/1.1\nhost: h\n{lines}\n", BODY)
            assert answer.startswith(b"HTTP/1.1 400 "), (name, answer)
        assert not engine.seen
        assert (await post(live, CHAT))[0] == 200


async def test_what_connection_names_stays_here() -> None:
    engine = FakeEngine()
    async with over(engine) as live:
        head = f"content-length: {len(BODY)}\nconnection: close, x-secret\nx-secret: 1\nx-custom: 2\n"
        answer = await raw(live, f"POST /v1/chat/completions HTTP/1.1\nhost: h\n{head}\n", BODY)
        assert answer.startswith(b"HTTP/1.1 200 ")
        headers = engine.seen[0][1]
        assert headers["x-custom"] == "2"
        assert not headers.keys() & {"x-secret", "connection"}


@pytest.mark.parametrize("kind", ["vllm", "openai"])
async def test_a_body_cannot_say_what_only_the_router_may(kind: str) -> None:
    engine = FakeEngine()
    async with engine.running(), over(instances=[{"id": "e0", "url": engine.url, "kind": kind}]) as live:
        await live.ready()
        theirs = {"priority": -9, "request_id": "theirs", "kv_transfer_params": {"remote_host": "10.0.0.1"}}
        assert (await post(live, CHAT | theirs))[0] == 200
        assert not engine.seen[0][2].keys() & theirs.keys()


async def test_an_engine_cannot_speak_as_the_gateway() -> None:
    engine = FakeEngine(headers=(
        ("connection", "keep-alive, x-hop"), ("x-hop", "1"), ("set-cookie", "a=b"), ("server", "uvicorn"),
        ("x-polyserve-instance", "forged"), ("x-vllm-rank", "3"), ("via", "1.1 inner"),
    ))  # fmt: skip
    async with over(engine) as live:
        for body in (CHAT, CHAT | {"stream": True}):
            status, _, headers = await post(live, body)
            assert status == 200
            assert headers.getall("x-polyserve-instance") == ["e0"]
            assert headers["x-engine"] == "fake"
            for name in ("x-hop", "set-cookie", "server", "x-vllm-rank", "via"):
                assert name not in headers
