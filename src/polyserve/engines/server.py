"""`polyserve engine`: emulated engines behind vLLM's HTTP API, and what a gateway of ours asks besides.

One process may be several instances on consecutive ports; the port that a request came to says which one it is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import msgspec
import uvicorn
import uvloop

from polyserve import __version__
from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import ChunkBound, ChunkRule, Instance, Slo
from polyserve.engines.bodies import Asked, BadRequestError, Pace, Tokenize, decode, read_chat, read_completion
from polyserve.engines.emulator import Emulator
from polyserve.engines.replies import GoneError, Reply
from polyserve.engines.words import tokenize
from polyserve.profiles import store
from polyserve.sim.engine import Engine, Job

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# The longest context in own words or token ids is about 1 MB; a body far beyond that is no prompt.
LARGEST_BODY = 32 * 1024 * 1024
JSON = (b"content-type", b"application/json")


class App:
    """The ASGI application of all instances of a process, by port."""

    def __init__(self, emulators: dict[int, Emulator]) -> None:
        self._emulators = emulators
        self._started = int(time.time())
        self._routes: dict[str, tuple[str, Callable[[Emulator, Scope, Receive, Send], Awaitable[None]]]] = {
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._completion),
            "/v1/models": ("GET", self._models),
            "/metrics": ("GET", self._metrics),
            "/health": ("GET", self._health),
            "/version": ("GET", self._version),
            "/tokenize": ("POST", self._tokenize),
            "/polyserve/info": ("GET", self._info),
            "/polyserve/pace": ("POST", self._pace),
            "/polyserve/telemetry": ("GET", self._telemetry),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        emulator = self._emulators[scope["server"][1]]
        try:
            method, route = self._routes.get(scope["path"], ("", None))
            if route is None:
                raise BadRequestError(f"there is nothing at {scope['path']}", None, 404, "NotFoundError")
            if scope["method"] not in (method, "HEAD" if method == "GET" else method):
                raise BadRequestError(f"{scope['path']} takes {method}", None, 405, "MethodNotAllowedError")
            await route(emulator, scope, receive, send)
        except BadRequestError as error:
            await _answer(send, error.body(), error.status)
        except GoneError:
            pass

    async def _chat(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(emulator, scope, receive, send, read_chat)

    async def _completion(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(emulator, scope, receive, send, read_completion)

    async def _generate(
        self,
        emulator: Emulator,
        scope: Scope,
        receive: Receive,
        send: Send,
        read: Callable[[bytes, str, int, int], Asked],
    ) -> None:
        arrived_at = emulator.clock()
        asked = read(await _body(receive), emulator.model, emulator.context_tokens, emulator.seed)
        request_id = _header(scope, b"x-request-id") or uuid4().hex
        reply = Reply(asked, request_id, emulator.model)
        answers = [
            emulator.submit(
                request_id,
                reply,
                wanted.index,
                wanted.voice,
                prompt_tokens=wanted.prompt_tokens,
                delivered=wanted.delivered,
                output_tokens=wanted.output_tokens,
                reason=wanted.reason,
                slo=asked.slo,
                arrived_at=arrived_at,
            )
            for wanted in asked.answers
        ]
        gone = asyncio.ensure_future(receive())
        gone.add_done_callback(lambda _: reply.wake())
        try:
            if asked.stream:
                await _stream(reply, gone, send)
            else:
                await reply.get(gone)
                await _answer(send, reply.whole())
        finally:
            gone.cancel()
            for answer in answers:
                emulator.cancel(answer)

    async def _models(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        model = {
            "id": emulator.model,
            "object": "model",
            "created": self._started,
            "owned_by": "polyserve",
            "root": emulator.model,
            "parent": None,
            "max_model_len": emulator.context_tokens,
        }
        await _answer(send, msgspec.json.encode({"object": "list", "data": [model]}))

    async def _metrics(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        kind = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
        await _answer(send, emulator.gauges.exposition(), headers=[kind])

    async def _health(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        await _answer(send, b"", headers=[])

    async def _version(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        await _answer(send, msgspec.json.encode({"version": __version__}))

    async def _tokenize(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        asked = decode(await _body(receive), Tokenize)
        ids = [i for text in asked.texts() for i in tokenize(text)]
        answer = {"count": len(ids), "max_model_len": emulator.context_tokens, "tokens": ids, "token_strs": None}
        await _answer(send, msgspec.json.encode(answer))

    async def _info(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        await _answer(send, msgspec.json.encode(emulator.facts()))

    async def _pace(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        pace_s = decode(await _body(receive), Pace).pace_s
        emulator.set_pace(math.inf if pace_s is None else pace_s)
        await _answer(send, b"{}")

    async def _telemetry(self, emulator: Emulator, scope: Scope, receive: Receive, send: Send) -> None:
        await _body(receive)
        gone = asyncio.ensure_future(receive())
        lines = asyncio.ensure_future(_send_telemetry(emulator, send))
        try:
            await asyncio.wait((gone, lines), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            lines.cancel()


async def _send_telemetry(emulator: Emulator, send: Send) -> None:
    headers = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for line in emulator.telemetry():
        await send({"type": "http.response.body", "body": msgspec.json.encode(line) + b"\n", "more_body": True})


async def _stream(reply: Reply, gone: asyncio.Future[Message], send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while True:
        data = await reply.get(gone)
        await send({"type": "http.response.body", "body": data, "more_body": reply.open > 0})
        if not reply.open:
            return


async def _answer(send: Send, body: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = (JSON,)) -> None:
    sized = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": sized})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    """The request's body; raises `BadRequestError` when it is too large, after having taken all of it in.

    A client that still sends when it is answered sees a broken connection rather than the answer.
    """
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size <= LARGEST_BODY:
            parts.append(part)
        elif size > 8 * LARGEST_BODY:
            break
    if size > LARGEST_BODY:
        raise BadRequestError(
            f"the body is larger than {LARGEST_BODY // 2**20} MiB", None, 413, "RequestEntityTooLargeError"
        )
    return b"".join(parts)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


# ------------------------------------------------------------------------------------------------------------- running


class EngineError(ValueError):
    """Engines that cannot be run as asked; the message names the option."""


class Server(uvicorn.Server):
    """Says when it is up; ends in order on a signal, and with code 0."""

    def __init__(self, config: uvicorn.Config, up: Callable[[], object]) -> None:
        super().__init__(config)
        self._up = up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._up()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        self.should_exit = True


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What `polyserve engine` takes; None and "" stand for what the profile says."""

    profile: str
    port: int = 8000
    host: str = "127.0.0.1"
    instances: int = 1  # on consecutive ports; port 0 takes free ones
    chunk: str = "dynamic"  # or fixed:N
    order: Literal["deadline", "fcfs"] | None = None  # None: deadline with a dynamic chunk, else as stock vLLM
    chunk_bound: ChunkBound = "need"
    jitter: float = 0.0  # spread of iteration times, as a share
    bias: float = 0.0  # iterations take 1 + bias times what the profile says
    believed: str = ""  # another profile for the chunk rule
    model_name: str = ""
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_tokens: int | None = None
    seed: int = 0


def run_engine(options: EngineOptions, said: Callable[[str], None] = print) -> None:
    """Serve until a signal comes; raises `EngineError` or `ProfileError` when it cannot."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_engine(options, said))


async def serve_engine(options: EngineOptions, said: Callable[[str], None]) -> None:
    """Serve until a signal comes or this task is cancelled; `said` gets a line per instance, its URL last."""
    true, believed, chunk = _checked(options)
    sockets = _listen(options)
    try:
        _warm_up(true)
        emulators = {
            (port := each.getsockname()[1]): _emulator(options, true, believed, chunk, port) for each in sockets
        }
        # What is here now stays: later collections need not look at it, and pause everybody less.
        gc.collect()
        gc.freeze()
        await _serve(emulators, sockets, lambda: _tell(emulators, options, said))
    finally:
        for each in sockets:
            each.close()


def _tell(emulators: dict[int, Emulator], options: EngineOptions, said: Callable[[str], None]) -> None:
    for emulator in emulators.values():
        said(f"engine {emulator.model}, chunk {options.chunk}: http://{emulator.instance.id}")


def _checked(options: EngineOptions) -> tuple[Profile, Profile, ChunkRule]:
    profile = store.load(options.profile)
    believed = store.load(options.believed) if options.believed else profile
    kind, _, tokens = options.chunk.partition(":")
    if options.chunk == "dynamic":
        chunk = ChunkRule()
    elif kind == "fixed" and tokens.isascii() and tokens.isdigit() and 0 < int(tokens) < 10**9:
        chunk = ChunkRule("fixed", int(tokens))
    else:
        raise EngineError(f"--chunk: dynamic or fixed:TOKENS, not {options.chunk!r}")
    if not -1 < options.bias < math.inf:
        raise EngineError(f"--bias: more than -1, not {options.bias}")
    if not 0 <= options.jitter < 1:
        raise EngineError(f"--jitter: from 0 to below 1, not {options.jitter}")
    for name in ("instances", "max_num_seqs", "max_num_batched_tokens", "kv_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise EngineError(f"--{name.replace('_', '-')}: at least 1, not {value}")
    if not 0 <= options.port <= 65536 - options.instances:
        raise EngineError(f"--port: from 0 to {65536 - options.instances}, not {options.port}")
    if options.kv_tokens is not None and options.kv_tokens < profile.limits.block_size:
        raise EngineError(f"--kv-tokens: at least a block of {profile.limits.block_size}, not {options.kv_tokens}")
    return profile.slowed(1 + options.bias), believed, chunk


def _listen(options: EngineOptions) -> list[socket.socket]:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    sockets = []
    for number in range(options.instances):
        port = options.port + number if options.port else 0
        listener = socket.socket(family)
        sockets.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, port))
        except OSError as error:
            for each in sockets:
                each.close()
            raise EngineError(f"--port: cannot listen on {options.host}:{port}: {error.strerror or error}") from None
    return sockets


def _warm_up(profile: Profile) -> None:
    """Load, or compile once for this machine, the loops that the first request would wait for."""
    engine = Engine(Instance("warm-up", profile.name), profile, profile, settings=Settings())
    for n in range(2):
        engine.submit(0.0, Job(str(n), 200, 3, Slo(1.0, 0.05), 0.0))
        engine.end(engine.begin(0.0) or 0.0)
    engine.cancel(0.0, "0")


def _emulator(options: EngineOptions, true: Profile, believed: Profile, chunk: ChunkRule, port: int) -> Emulator:
    host = f"[{options.host}]" if ":" in options.host else options.host
    instance = Instance(
        f"{host}:{port}",
        believed.name,
        chunk,
        options.order or ("deadline" if chunk.kind == "dynamic" else "fcfs"),
        kv_tokens=options.kv_tokens,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    return Emulator(
        instance,
        true,
        believed,
        settings=Settings().replaced({"chunk_bound": options.chunk_bound}),
        model=options.model_name or true.name,
        seed=options.seed,
        jitter=options.jitter,
    )


async def _serve(emulators: dict[int, Emulator], sockets: list[socket.socket], up: Callable[[], object]) -> None:
    config = uvicorn.Config(
        App(emulators),
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        # A gateway keeps its connections; one that we closed first would cost it a request.
        timeout_keep_alive=600,
        timeout_graceful_shutdown=1,
    )
    server = Server(config, up)
    serving = asyncio.create_task(server.serve(sockets))
    running = [asyncio.create_task(emulator.run()) for emulator in emulators.values()]
    try:
        done, _ = await asyncio.wait((serving, *running), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # an engine that stands still is no engine: its error ends them all
    finally:
        server.stop()
        await asyncio.wait((serving,))
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
