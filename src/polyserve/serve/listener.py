"""Sockets that listen, and the HTTP server on them."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from polyserve.serve.corked import CorkedProtocol
from polyserve.serve.plan import Address

BACKLOG = 4096


class GatewayError(Exception):
    """The gateway cannot start; the message says why in one line."""


class Server(uvicorn.Server):
    """One listener; signals are the business of `serve`."""

    def __init__(self, app: Any, shutdown_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=CorkedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=math.ceil(shutdown_s),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
