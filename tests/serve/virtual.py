"""An event loop whose time jumps to the next timer, and a network that is nothing but memory.

The gateway runs on it unchanged: it asks the loop for connections, and gets pairs of transports that hand each other
their bytes after a while. A minute of faults takes some milliseconds, and the same seed is the same minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import aiohttp

LATENCY_S = 0.0002


class StandstillError(Exception):
    """Nothing can ever happen again, though somebody still waits."""


class _Selector(selectors.SelectSelector):
    """Never waits for a file: it lets the time pass that the loop would have waited."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._owner = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise StandstillError
        self._owner.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time is a number that jumps to the next timer; connections stay in memory."""

    def __init__(self) -> None:
        self.now = 1000.0  # clocks do not begin at zero
        self.network = Network(self)
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.Protocol], host: str = "", port: int = 0, **_: Any
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        return await self.network.connect(protocol_factory, host, port)


class Pipe(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, network: Network, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.peer: Pipe | None = None
        self.frozen = False  # as if its process were stopped: bytes wait
        self._network = network
        self._transit: deque[bytes | BaseException | None] = deque()  # bytes under way to here, or the end
        self._inbox: deque[bytes | BaseException | None] = deque()  # arrived, and not taken in
        self._paused = False
        self._closing = False

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Any) -> None:
        if not self._closing and data:
            self._send(bytes(data))

    def close(self) -> None:
        """Let go of it in order."""
        if not self._closing:
            self._closing = True
            self._send(None)
            self._network.loop.call_soon(self._gone, None)

    def abort(self) -> None:
        """Let go of it at once; the other end meets a reset."""
        if not self._closing:
            self._closing = True
            self._send(ConnectionResetError(104, "Connection reset by peer"))
            self._network.loop.call_soon(self._gone, None)

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        self._network.loop.call_soon(self._pump)

    def thaw(self) -> None:
        """Let the process go on."""
        self.frozen = False
        self._pump()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def _send(self, item: bytes | BaseException | None) -> None:
        peer = self.peer
        assert peer is not None
        peer._transit.append(item)
        self._network.loop.call_later(LATENCY_S, peer._take)

    def _take(self) -> None:
        self._inbox.append(self._transit.popleft())
        self._pump()

    def _pump(self) -> None:
        while self._inbox and not self._paused and not self.frozen:
            item = self._inbox.popleft()
            if self._closing:
                continue
            if isinstance(item, bytes):
                self.protocol.data_received(item)
            else:
                self._closing = True
                self._gone(item if isinstance(item, Exception) else None)

    def _gone(self, error: Exception | None) -> None:
        protocol, self.protocol = self.protocol, asyncio.Protocol()
        protocol.connection_lost(error)


class Network:
    """Who listens where."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.listeners: dict[tuple[str, int], Callable[[], asyncio.Protocol]] = {}
        self.accepted: dict[tuple[str, int], list[Pipe]] = {}
        self.frozen: set[tuple[str, int]] = set()

    async def connect(
        self, protocol_factory: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        await asyncio.sleep(LATENCY_S)
        listener = self.listeners.get((host, port))
        if listener is None:
            raise ConnectionRefusedError(111, f"Connect call failed ({host!r}, {port})")
        near, far = Pipe(self, protocol_factory()), Pipe(self, listener())
        near.peer, far.peer = far, near
        far.frozen = (host, port) in self.frozen
        self.accepted.setdefault((host, port), []).append(far)
        far.protocol.connection_made(far)
        near.protocol.connection_made(near)
        return near, near.protocol

    def freeze(self, at: tuple[str, int], frozen: bool) -> None:
        """Stop, or go on with, the process that listens there."""
        (self.frozen.add if frozen else self.frozen.discard)(at)
        for pipe in list(self.accepted.get(at, [])):
            if frozen:
                pipe.frozen = True
            else:
                pipe.thaw()

    def kill(self, at: tuple[str, int]) -> None:
        """End the process that listens there, and with it all its connections."""
        self.listeners.pop(at, None)
        self.frozen.discard(at)
        for pipe in self.accepted.pop(at, []):
            pipe.abort()


class MemoryConnector(aiohttp.BaseConnector):
    """aiohttp's connections, over the loop's network."""

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:  # noqa: ASYNC109 - its name
        loop = cast(VirtualLoop, asyncio.get_running_loop())
        try:
            _, protocol = await loop.create_connection(self._factory, req.url.host, req.url.port)
        except OSError as error:
            raise aiohttp.ClientConnectorError(req.connection_key, error) from error
        return protocol


def session() -> aiohttp.ClientSession:
    """The gateway's session, over the loop's network."""
    return aiohttp.ClientSession(connector=MemoryConnector(), auto_decompress=False)


@contextlib.contextmanager
def virtual_time() -> Iterator[asyncio.Runner]:
    """A runner on a loop of virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        yield runner
