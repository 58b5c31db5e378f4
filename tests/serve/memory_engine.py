"""A vLLM in memory, for virtual time: its tokens are a function of request and position, and it fails in every way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast

import httptools
from virtual import Pipe, VirtualLoop

from polyserve.engines.bodies import Asked, BadRequestError, Wanted, read_chat, read_completion
from polyserve.engines.words import tokenize, word

MODEL = "tiny"
CONTEXT = 8192
STEP_S = 0.02

Garbage = Literal["no event", "half an event", "not http", "half a chunk", "error event", "no end", "cut", "html"]
GARBAGE: tuple[Garbage, ...] = (
    "no event", "half an event", "not http", "half a chunk", "error event", "no end", "cut", "html",
)  # fmt: skip
_READ = {"/v1/chat/completions": read_chat, "/v1/completions": read_completion}


def asked(path: str, body: bytes) -> Asked:
    """What a request asks for; raises `BadRequestError`."""
    return _READ[path](body, MODEL, CONTEXT, 0)


def text(wanted: Wanted, begins: int = 0) -> str:
    """What the answer to a request is, from a position on."""
    return b"".join(word(wanted.voice, position) for position in range(begins, wanted.output_tokens)).decode()


@dataclass(eq=False)
class Stream:
    """One request that is being answered."""

    connection: Connection
    asked: Asked
    path: str
    id: str
    created: int
    wait: int  # iterations until its first token
    positions: list[int] = field(default_factory=list)
    sent: int = 0  # events with a token
    goes_wrong: tuple[Garbage, int] | None = None  # how, and after how many tokens

    def __post_init__(self) -> None:
        self.positions = [wanted.delivered for wanted in self.asked.answers]

    @property
    def chat(self) -> bool:
        return self.asked.chat

    def open(self) -> None:
        self.connection.chunked(b"text/event-stream")
        if self.chat:
            for wanted in self.asked.answers:
                delta = {"role": "assistant", "content": ""}
                self._event([{"index": wanted.index, "delta": delta, "finish_reason": None}])

    def step(self) -> bool:
        """Make one token of each answer; whether that was the last."""
        for at, wanted in enumerate(self.asked.answers):
            position = self.positions[at]
            if position >= wanted.output_tokens:
                continue
            if self.goes_wrong is not None and self.sent >= self.goes_wrong[1] and self.goes_wrong[0] != "no end":
                self._go_wrong(self.goes_wrong[0])
                return True
            said = word(wanted.voice, position).decode()
            part = {"delta": {"content": said}} if self.chat else {"text": said}
            last = position == wanted.output_tokens - 1
            self._event([{"index": wanted.index, **part, "finish_reason": wanted.reason if last else None}])
            self.positions[at] += 1
            self.sent += 1
        if any(at < wanted.output_tokens for at, wanted in zip(self.positions, self.asked.answers, strict=True)):
            return False
        self._end()
        return True

    def _end(self) -> None:
        if self.goes_wrong is not None and self.goes_wrong[0] == "no end":
            self.connection.finish()
            return
        if self.asked.include_usage:
            made = sum(a.output_tokens - a.delivered for a in self.asked.answers)
            prompt = self.asked.prompt_tokens
            self._event([], {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made})
        self.connection.chunk(b"data: [DONE]\n\n")
        self.connection.finish()

    def _event(self, choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> None:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        event = {"id": self.id, "object": kind, "created": self.created, "model": MODEL, "choices": choices}
        plain = json.dumps(event | ({"usage": usage} if usage else {}), separators=(",", ":"))
        self.connection.chunk(b"data: " + plain.encode() + b"\n\n")

    def _go_wrong(self, how: Garbage) -> None:
        connection = self.connection
        match how:
            case "no event":
                connection.chunk(b"<p>Internal Server Error</p>\n\n")
            case "half an event":
                connection.chunk(b'data: {"id":"x","choices":[{"index":0,"te\n\n')
            case "not http":
                connection.transport.write(b"\x16\x03\x01 what is this\r\n")
            case "half a chunk":
                connection.transport.write(b'ff\r\ndata: {"id":"x","cho')
                connection.transport.close()
            case "error event":
                connection.chunk(b'data: {"error":{"message":"EngineCore died","code":500}}\n\n')
                connection.finish()
            case "cut":
                connection.finish()
            case "html" | "no end":
                raise AssertionError("goes wrong elsewhere")


class Connection(asyncio.Protocol):
    """One connection that an engine has taken."""

    def __init__(self, engine: MemoryEngine) -> None:
        self.engine = engine
        self.transport = cast(Pipe, None)
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(Pipe, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.engine.streams = [stream for stream in self.engine.streams if stream.connection is not self]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.engine.answer(self, self._url.decode(), self._body)

    def whole(self, status: int, body: bytes, kind: bytes = b"application/json") -> None:
        head = b"HTTP/1.1 %d X\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (status, kind, len(body))
        self.transport.write(head + body)

    def chunked(self, kind: bytes) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n" % kind)

    def chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%s\r\n" % (len(data), data))

    def finish(self) -> None:
        self.transport.write(b"0\r\n\r\n")


class MemoryEngine:
    """One engine: every `step_s` it makes a token for each of its streams."""

    def __init__(self, loop: VirtualLoop, number: int) -> None:
        self.id = f"e{number}"
        self.at = (f"10.0.0.{number + 1}", 80)
        self.url = f"http://{self.at[0]}:{self.at[1]}"
        self.streams: list[Stream] = []
        self.step_s = STEP_S
        self.status = 200  # of completions; anything else is all they get
        self.next_wrong: Callable[[], tuple[Garbage, int] | None] = lambda: None  # what befalls the next stream
        self.stuck = False  # its iterations have stopped, and everything else goes on
        self.served = 0
        self.asked_at: list[float] = []  # when it was sent a completion
        self._loop = loop
        self._serial = 0
        self._timer: asyncio.TimerHandle | None = None
        self._frozen_with_work = False
        self.start()

    def __repr__(self) -> str:
        return f"<{self.id}, {len(self.streams)} streams>"

    # -- what befalls it

    def start(self) -> None:
        """Begin as a new process."""
        self._loop.network.listeners[self.at] = lambda: Connection(self)
        self.started_at = self._loop.time()
        self.tokens_made = 0
        self.stuck = False

    def kill(self) -> None:
        self._loop.network.kill(self.at)
        self.streams.clear()
        self._stop()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._loop.network.freeze(self.at, True)
        self._stop()

    def thaw(self) -> None:
        """SIGCONT."""
        if self.at in self._loop.network.frozen:
            self._loop.network.freeze(self.at, False)
            self._go_on()

    # -- what it does

    def answer(self, connection: Connection, path: str, body: bytes) -> None:
        match path:
            case "/health":
                connection.whole(200, b"")
            case "/v1/models":
                connection.whole(200, json.dumps({"data": [{"id": MODEL}]}).encode())
            case "/metrics":
                connection.whole(200, self._metrics(), b"text/plain")
            case "/tokenize":
                ids = tokenize(json.loads(body)["prompt"].encode())
                connection.whole(200, json.dumps({"tokens": ids}).encode())
            case "/v1/chat/completions" | "/v1/completions":
                self._complete(connection, path, body)
            case _:
                connection.whole(404, b"")

    def _complete(self, connection: Connection, path: str, body: bytes) -> None:
        self.asked_at.append(self._loop.time())
        if self.status != 200:
            connection.whole(self.status, b'{"error":{"message":"engine says no","code":500}}')
            return
        try:
            ask = asked(path, body)
        except BadRequestError as error:
            connection.whole(error.status, error.body())
            return
        wrong = self.next_wrong()
        if wrong is not None and wrong[0] == "html":
            connection.whole(200, b"<html>surprise</html>", b"text/html")
            return
        self._serial += 1
        name = f"cmpl-{self.id}-{self._serial}"
        self.streams.append(Stream(connection, ask, path, name, int(self._loop.time()), 1, goes_wrong=wrong))
        self._go_on()

    def _go_on(self) -> None:
        if self._timer is None and self.streams and self.at not in self._loop.network.frozen:
            self._timer = self._loop.call_later(self.step_s, self._iterate)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _iterate(self) -> None:
        self._timer = None
        if not self.stuck:
            for stream in list(self.streams):
                if stream.wait:
                    stream.wait -= 1
                    if not stream.wait and not stream.sent:
                        stream.open()
                    continue
                self.tokens_made += 1
                if stream.step():
                    self.streams.remove(stream)
                    self.served += 1
        self._go_on()

    def _metrics(self) -> bytes:
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{engine="0"}} {len(self.streams)}.0',
            'vllm:num_requests_waiting{engine="0"} 0.0',
            'vllm:kv_cache_usage_perc{engine="0"} 0.0',
            f'vllm:generation_tokens_total{{engine="0"}} {self.tokens_made}.0',
            f"process_start_time_seconds {self.started_at}",
        ]
        return "\n".join([*lines, ""]).encode()
