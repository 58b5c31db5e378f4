"""One client: sends its request, reads what comes in its own manner, and keeps all of it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

from chaos.asks import Ask

# Of a client that stalls: so little that the gateway feels it at once.
SMALL_BUFFER = 4096

How = Literal["ended", "left", "cut", "waiting"]


@dataclass
class Seen:
    """What one client saw."""

    ask: Ask
    how: How = "waiting"  # ended: the answer came to its end as HTTP frames it; cut: it did not
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    problem: str = ""
    sent_at: float = 0.0
    took_s: float = 0.0

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """Clients that share connections, as many as they need."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as shared:
        yield shared


def _small_socket(address: tuple[object, ...]) -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    return made


async def send(shared: aiohttp.ClientSession, url: str, ask: Ask, seen: Seen) -> None:
    """Ask, and fill `seen`; a client that leaves closes its connection."""
    seen.sent_at = time.monotonic()
    try:
        if ask.manner == "stalls":
            connector = aiohttp.TCPConnector(socket_factory=_small_socket)
            async with aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=SMALL_BUFFER
            ) as own:
                await _converse(own, url, ask, seen)
        else:
            await _converse(shared, url, ask, seen)
    except (aiohttp.ClientError, OSError) as error:  # a timeout is one, too
        seen.how, seen.problem = "cut", f"{type(error).__name__}: {error}"
    finally:
        seen.took_s = time.monotonic() - seen.sent_at


async def _converse(http: aiohttp.ClientSession, url: str, ask: Ask, seen: Seen) -> None:
    asking = asyncio.ensure_future(http.post(url + ask.path, json=ask.body, headers=ask.headers))
    if ask.manner == "abandons" and ask.after_events < 0:
        done, _ = await asyncio.wait((asking,), timeout=0.05 * ask.stalls_s)
        if not done:
            asking.cancel()
            seen.how = "left"
            return
    answer = await asking
    async with answer:
        seen.status, seen.headers = answer.status, {name.lower(): value for name, value in answer.headers.items()}
        await _read(answer, ask, seen)


async def _read(answer: aiohttp.ClientResponse, ask: Ask, seen: Seen) -> None:
    events, turned = 0, False
    async for piece in answer.content.iter_any():
        seen.pieces.append(piece)
        events += piece.count(b"\n\n")
        if not turned and ask.manner != "patient" and events > ask.after_events and answer.status == 200:
            turned = True
            if ask.manner == "abandons":
                seen.how = "left"
                answer.close()
                return
            await asyncio.sleep(ask.stalls_s)
    seen.how = "ended"
