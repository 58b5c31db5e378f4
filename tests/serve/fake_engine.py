"""An engine on a real socket that speaks vLLM's dialect of OpenAI's API and misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

Headers = dict[str, str]

FIRST_ID = 1000  # token t0 as a number


@dataclass
class FakeEngine:
    """What it does with a completion request; counters say what it saw."""

    tokens: int = 5
    every_s: float = 0.0
    first_after_s: float = 0.0
    hang_up_after: int | None = None  # events sent before the connection is dropped; -1: before the head
    hang_ups: int = 0  # requests whose connection is dropped before anything else happens
    status: int = 200
    refusal: str = "engine says no"  # with a status that is not 200
    answer: bytes | None = None  # in place of everything else, with `answer_type`
    answer_type: str = "text/event-stream"
    error_event: bool = False  # after the first token
    healthy: bool = True
    models: tuple[str, ...] = ()  # that it lists, if any
    headers: tuple[tuple[str, str], ...] = ()  # more of them, with a stream
    wants_key: str | None = None  # without which nobody is answered
    prompt_tokens: int = 7
    separator: bytes = b"\n\n"
    says_done: bool = True  # whether its streams end with [DONE]
    name: str = "cmpl-1"  # id of its answers
    created: int = 1
    seen: list[tuple[str, Headers, dict[str, Any]]] = field(default_factory=list)
    streams: int = 0  # open now
    cut: int = 0  # streams that their client closed early
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[FakeEngine]:
        connections: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            try:
                await self._talk(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                writer.close()
                connections.discard(task)

        server = await asyncio.start_server(connected, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(connections):
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            first, *lines = head.decode("latin-1").rstrip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            method, path, _ = first.split()
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            if not await self._answer(method, path, headers, body, reader, writer):
                return

    async def _answer(
        self,
        method: str,
        path: str,
        headers: Headers,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Whether the connection stays open."""
        if self.wants_key is not None and headers.get("authorization") != f"Bearer {self.wants_key}":
            _whole(writer, 401, "application/json", b'{"error": "Unauthorized"}')
            return True
        if method == "GET":
            found = path == "/health" and self.healthy
            text = b"" if found else b"nothing here"
            if path == "/v1/models" and self.models:
                found, text = True, json.dumps({"data": [{"id": model} for model in self.models]}).encode()
            if path == "/health" and not self.healthy:
                return False
            _whole(writer, 200 if found else 404, "text/plain", text)
            return True
        ask = json.loads(body)
        if path == "/tokenize":
            ids = [FIRST_ID + int(number) for number in re.findall(r"t(\d+) ", ask["prompt"])]
            _whole(writer, 200, "application/json", json.dumps({"tokens": ids}).encode())
            return True
        self.seen.append((path, headers, ask))
        if self.hang_up_after == -1 or self.hang_ups > 0:
            self.hang_ups -= 1
            return False
        if self.status != 200:
            error = {"error": {"message": self.refusal, "type": "BadRequestError", "code": self.status}}
            _whole(writer, self.status, "application/json", json.dumps(error).encode())
            return True
        if self.answer is not None:
            _whole(writer, 200, self.answer_type, self.answer)
            return True
        self.streams += 1
        try:
            await asyncio.sleep(self.first_after_s)
            return await self._stream(path, ask, reader, writer)
        finally:
            self.streams -= 1

    async def _stream(
        self, path: str, ask: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nx-engine: fake\r\n"
            + "".join(f"{name}: {value}\r\n" for name, value in self.headers).encode()
            + b"transfer-encoding: chunked\r\n\r\n"
        )
        for number, event in enumerate(self.events(path, ask)):
            if number == self.hang_up_after:
                return False
            if reader.at_eof():
                self.cut += 1
                return False
            piece = b"data: " + event + self.separator
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            if self.every_s:
                await asyncio.sleep(self.every_s)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def events(self, path: str, ask: dict[str, Any]) -> list[bytes]:
        """Payloads of a whole stream."""
        chat = path == "/v1/chat/completions"
        n = ask.get("n") or 1
        head = {"id": self.name, "object": "chat.completion.chunk" if chat else "text_completion",
                "created": self.created, "model": ask["model"]}  # fmt: skip
        begun = _begun(chat, ask)
        events: list[dict[str, Any]] = []
        if chat:
            for index in range(n):
                delta = {"role": "assistant", "content": ""}
                events.append({**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}]})
        for token in range(begun, self.tokens):
            finish = "stop" if token == self.tokens - 1 else None
            for index in range(n):
                text = f"t{token} "
                part = {"delta": {"content": text}} if chat else {"text": text}
                events.append({**head, "choices": [{"index": index, **part, "finish_reason": finish}]})
            if self.error_event and token == 0:
                events.append({"error": {"message": "engine core died", "type": "InternalServerError", "code": 500}})
                break
        prompt, made = self.prompt_tokens + begun, (self.tokens - begun) * n
        usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        if (ask.get("stream_options") or {}).get("include_usage"):
            events.append({**head, "choices": [], "usage": usage})
        return [*(json.dumps(event, separators=(",", ":")).encode() for event in events),
                *([b"[DONE]"] if self.says_done else [])]  # fmt: skip


def _begun(chat: bool, ask: dict[str, Any]) -> int:
    """Tokens of the answer that came with the request."""
    if not chat and isinstance(ask["prompt"], list):
        return sum(isinstance(each, int) and each >= FIRST_ID for each in ask["prompt"])
    if not chat:
        return len(re.findall(r"t\d+ ", str(ask["prompt"])))
    last = ask["messages"][-1] if ask.get("continue_final_message") else {}
    return len(re.findall(r"t\d+ ", str(last.get("content"))))


def _whole(writer: asyncio.StreamWriter, status: int, kind: str, body: bytes) -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
