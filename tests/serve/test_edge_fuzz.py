"""Whatever clients send, the gateway answers by the book: no 5xx of its own, no traceback, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from live import Live
from test_gateway import CHAT, over

from polyserve.serve.access import hashed

KEY = "sk-fuzz"
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]


class Target:
    """A gateway in a loop of its own, and what it has logged."""

    def __init__(self, engine: FakeEngine, **values: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.refusing = engine.status != 200
        self._context = over(engine, **values)
        self.live: Live = self.loop.run_until_complete(self._context.__aenter__())
        self.port = int(self.live.url.rpartition(":")[2])

    def path(self, number: int) -> str:
        """A path that the engine knows."""
        return PATHS[number % (4 if self.refusing else 2)]

    def close(self) -> None:
        self.loop.run_until_complete(self._context.__aexit__(None, None, None))
        self.loop.close()

    def send(self, data: bytes) -> list[tuple[int, bytes, bytes]]:
        """Every answer to these bytes: status, head and body."""
        return answers(self.loop.run_until_complete(self._send(data)))

    async def _send(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        got = b""
        try:
            async with asyncio.timeout(10):
                with contextlib.suppress(ConnectionError):
                    writer.write(data)
                    await writer.drain()
                    while not whole(got) and (piece := await reader.read(65536)):
                        got += piece
        finally:
            writer.transport.abort()
        return got


def whole(got: bytes) -> bool:
    """Whether a last answer is there to its end."""
    try:
        return bool(answers(got))
    except (AssertionError, ValueError):
        return False


def answers(got: bytes) -> list[tuple[int, bytes, bytes]]:
    """Answers one after another, whose bodies have a length or chunks."""
    found = []
    while got:
        head, mark, got = got.partition(b"\r\n\r\n")
        assert mark, head
        lines = head.lower().split(b"\r\n")
        if b"transfer-encoding: chunked" in lines:
            body, mark, got = got.partition(b"0\r\n\r\n")
            assert mark, head
        else:
            (length,) = [line.partition(b": ")[2] for line in lines if line.startswith(b"content-length: ")] or [b"0"]
            body, got = got[: int(length)], got[int(length) :]
            assert len(body) == int(length) or int(head.split()[1]) < 200, head
        found.append((int(head.split()[1]), head, body))
    return [answer for answer in found if answer[0] >= 200]


@pytest.fixture(scope="module", params=["open", "tenants"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    bounds = {"probe_s": 0.5, "shutdown_s": 1, "head_s": 0.1, "upload_s": 0.1, "body_mib": 0.05}
    tenants = [{"name": "t", "keys": [hashed(KEY)], "tightest": {"tpot_ms": 50}}] if request.param == "tenants" else []
    # One that refuses everything knows all paths.
    made = Target(FakeEngine(tokens=2, status=400 if tenants else 200), limits=bounds, tenants=tenants)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test may leave an error in the log."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NAMES = st.sampled_from([
    "x-slo-ttft-ms", "x-slo-tpot-ms", "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-sgl-ttft-slo-ms",
    "x-sgl-tps-slo", "x-polyserve-tier", "x-request-id", "authorization", "x-api-key", "traceparent", "accept",
    "accept-encoding", "expect", "connection", "te", "cookie", "user-agent", "content-type", "content-encoding",
    "x-should-retry", "range", "if-none-match", "upgrade", "priority", "origin", "host", "x-forwarded-for",
])  # fmt: skip
NUMBERS = st.one_of(
    st.floats().map(repr),
    st.integers().map(str),
    st.sampled_from(["1e999", "-0", "0x10", "٣", "1_000", "", " 5 ", "1,5"]),
)
TEXTS = st.one_of(
    NUMBERS, st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=40)
)
HEADERS = st.lists(st.tuples(NAMES, TEXTS), max_size=5)


def asking(path: str, headers: list[tuple[str, str]], body: bytes, *, key: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"content-length: {len(body)}"]
    if not any(name == "host" for name, _ in headers):
        lines.append("host: gateway")
    if key and not any(name in ("authorization", "x-api-key") for name, _ in headers):
        lines.append(f"authorization: Bearer {KEY}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + body


def check(target: Target, data: bytes, *, answered: bool = True) -> None:
    """Answered by the book; `answered`: at all."""
    got = target.send(data)
    assert got or not answered, data
    for status, head, body in got:
        shown = (data, head, body)
        assert status < 500, shown
        assert b"Traceback" not in body, shown
        if status >= 400 and b"engine says no" not in body:
            error = json.loads(body)["error"]
            assert error.keys() >= {"message", "type", "param", "code"}, shown
            assert error["message"], shown
            assert error["code"], shown
            assert KEY not in error["message"], shown
    target.loop.run_until_complete(target.live.quiet())


@FUZZ
@given(headers=HEADERS, path=st.integers(0, 3))
@example(headers=[("expect", "100-continue")], path=0)
@example(headers=[("connection", "upgrade"), ("upgrade", "h2c")], path=0)
@example(headers=[("connection", "upgrade"), ("upgrade", "websocket")], path=0)
@example(headers=[("x-slo-tpot-ms", "1e-320")], path=0)
@example(headers=[("x-polyserve-tier", "sløw")], path=0)
def test_headers(target: Target, headers: list[tuple[str, str]], path: int) -> None:
    check(target, asking(target.path(path), headers, json.dumps(CHAT | {"prompt": "a", "input": "a"}).encode()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([
    "model", "messages", "prompt", "input", "stream", "stream_options", "max_tokens", "max_completion_tokens",
    "max_output_tokens", "n", "best_of", "service_tier", "nvext", "vllm_xargs", "priority", "tools", "logprobs",
    "response_format", "user", "echo", "suffix", "background", "seed", "stop", "kv_transfer_params",
])  # fmt: skip
NESTED = st.sampled_from([
    {"nvext": {"router": {"ttft_target": "x"}}}, {"nvext": {"router": {"itl_target": -1}}}, {"nvext": {"router": 5}},
    {"vllm_xargs": {"slo_ttft_ms": [], "slo_tpot_ms": {}}}, {"vllm_xargs": {"slo_tpot_ms": 1e308}},
    {"stream_options": {"include_usage": "yes"}}, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": []}, {"messages": [5]}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [[1], "a"]}, {"prompt": [-1]},
    {"stream_options": None, "stream": None}, {"max_tokens": 2**63}, {"n": 2**40}, {"input": []}, {"input": {}},
])  # fmt: skip


@FUZZ
@given(changes=st.dictionaries(FIELDS, JSON, max_size=4), nested=NESTED | st.just({}), path=st.integers(0, 3))
def test_bodies_of_json(target: Target, changes: dict[str, Any], nested: dict[str, Any], path: int) -> None:
    body = json.dumps({**CHAT, "prompt": "a", "input": "a", **nested, **changes}).encode()
    check(target, asking(target.path(path), [], body))


@FUZZ
@given(body=st.binary(max_size=200), path=st.integers(0, 3))
@example(body=b"[" * 40_000, path=0)
@example(body=b'{"a":' * 8_000, path=0)
@example(body=b'{"model":"tiny","messages":' + b"[" * 20_000 + b"]" * 20_000 + b"}", path=0)
@example(body=b'{"model":"tiny","prompt":' + b"[" * 20_000 + b"]" * 20_000 + b"}", path=1)
@example(body=b'{"model":"tiny","prompt":"\\ud800"}', path=1)
@example(body=b'{"model":"\\ud800","prompt":"a"}', path=1)
@example(body=b'{"model":"tiny","prompt":"\xff"}', path=1)
@example(body=b'{"model":"tiny","model":"other","prompt":"a"}', path=1)
@example(body=b'{"model":"tiny","prompt":"a","max_tokens":1e400}', path=1)
@example(body=b'{"model":"tiny","prompt":"a","n":' + b"9" * 5000 + b"}", path=1)
@example(body=b"\xef\xbb\xbf{}", path=0)
def test_bodies_of_bytes(target: Target, body: bytes, path: int) -> None:
    check(target, asking(target.path(path), [], body))


@FUZZ
@given(st.binary(min_size=1, max_size=300))
@example(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
@example(b"GET http://elsewhere/v1/models HTTP/1.1\r\nhost: h\r\n\r\n")
@example(b"GET //v1/models HTTP/1.1\r\nhost: h\r\n\r\n")
@example(b"GET /%2e%2e/admin/fleet HTTP/1.1\r\nhost: h\r\n\r\n")
@example(b"GET /v1/models/%ff%00 HTTP/1.1\r\nhost: h\r\n\r\n")
@example(b"OPTIONS * HTTP/1.1\r\nhost: h\r\n\r\n")
@example(b"CONNECT a:1 HTTP/1.1\r\nhost: h\r\n\r\n")
@example(b"GET /v1/models HTTP/1.0\r\n\r\n")
@example(b"GET \xff\xfe HTTP/1.1\r\nhost: h\r\n\r\n")
@example(b"GET /\x00 HTTP/1.1\r\nhost: h\r\n\r\n")
@example(b"GET ? HTTP/1.1\r\n\r\n")
@example(b"DELETE /admin/instances/e0 HTTP/1.1\r\nhost: elsewhere\r\n\r\n")
def test_bytes_that_are_hardly_http(target: Target, data: bytes) -> None:
    check(target, data, answered=False)
    assert target.live.gateway.fleet.get("e0") is not None


@FUZZ
@given(
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    path=st.sampled_from(PATHS[:2]),
)
def test_requests_with_some_bytes_wrong(target: Target, cut: int, flips: list[tuple[int, int]], path: str) -> None:
    data = bytearray(
        asking(path, [("x-slo-tpot-ms", "50")], json.dumps(CHAT | {"prompt": "a", "stream": True}).encode())
    )
    for at, byte in flips:
        data[at % len(data)] = byte
    check(target, bytes(data[: len(data) - cut % 40]), answered=False)
