"""Names of engines: asked for again and again, and their last addresses kept for as long as nobody knows better."""

from __future__ import annotations

import socket

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult


class LastKnown(AbstractResolver):
    """Answers as the system does; while it has no answer, as it did the last time.

    An engine whose name has gone is lost only when it does not answer any more.
    """

    def __init__(self) -> None:
        self._system = ThreadedResolver()
        self._known: dict[tuple[str, int], list[ResolveResult]] = {}

    def __repr__(self) -> str:
        return f"<{len(self._known)} names known>"

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            found = await self._system.resolve(host, port, family)
        except OSError:
            if (host, port) not in self._known:
                raise
            return self._known[host, port]
        self._known[host, port] = found
        return found

    async def close(self) -> None:
        await self._system.close()
