"""Sockets that listen, and the HTTP server on them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import resource
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from polyserve.serve.corked import CorkedProtocol, State
from polyserve.serve.edge import EdgeConfig
from polyserve.serve.plan import Address, Bounds

log = logging.getLogger(__name__)

BACKLOG = 4096
# Open files besides those of streams: listeners, journals, probes.
OTHER_FILES = 512


class GatewayError(Exception):
    """The gateway cannot start; the message says why in one line."""


# No client takes up a connection that it has not used for this long (openai's SDK: 5 s).
IDLE_S = 6.0
LOOK_S = 0.1


class Server(uvicorn.Server):
    """One listener; signals are the business of `serve`."""

    def __init__(self, app: Any, bounds: Bounds) -> None:
        super().__init__(
            EdgeConfig(
                app,
                bounds,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.ERROR,  # what clients do wrong is no news
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=math.ceil(bounds.shutdown_s),
            )
        )
        self.server_state = self._state = State()

    async def retire(self, most_s: float) -> None:
        """Take no more connections, answer what is under way or comes on those there are, and end after the last.

        Each connection is told with its next answer that it is the last; one that stays idle is closed when no client
        would use it any more. What lasts longer than `most_s` is left to the shutdown.
        """
        loop = asyncio.get_running_loop()
        retired_at = loop.time()
        self._state.retiring = True
        for server in self.servers:
            server.close()
        while self._state.connections and not self.should_exit and loop.time() - retired_at < most_s:
            await asyncio.sleep(LOOK_S)
            if loop.time() - retired_at > IDLE_S:
                for connection in list(self._state.connections):
                    if isinstance(connection, CorkedProtocol) and connection.idle:
                        connection.shutdown()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_room(bounds: Bounds) -> None:
    """Let this process open as many files as its connections need, each of them one more to an engine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * bounds.connections + OTHER_FILES
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if hard < wanted:
        log.warning(
            "%d open files are allowed, which is about %d streams; limits.connections is %d",
            hard,
            max(hard - OTHER_FILES, 0) // 2,
            bounds.connections,
        )


def bound(address: Address) -> socket.socket:
    """A socket that listens there; raises `GatewayError`."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise GatewayError(f"cannot listen on {address.host}:{address.port}: {error.strerror or error}") from None
    return listener
