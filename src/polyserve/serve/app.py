"""OpenAI's API at the front: bare ASGI where tokens flow, Starlette for everything else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, Protocol

from polyserve.core.types import Request
from polyserve.serve import ask as asks
from polyserve.serve.access import OPEN_PATHS, Operators, tenants_keyring
from polyserve.serve.ask import Endpoint
from polyserve.serve.errors import ApiError
from polyserve.serve.fleet import PATHS, Fleet
from polyserve.serve.gateway import Gateway
from polyserve.serve.headers import incoming
from polyserve.serve.inflight import Inflight, Send, Ticket
from polyserve.serve.plan import Bounds, TenantPlan
from polyserve.serve.upstream import Exchange

log = logging.getLogger(__name__)

Scope = dict[str, Any]

_ENDPOINTS: dict[str, Endpoint] = {path: endpoint for endpoint, path in PATHS.items()}
# What a client waits for another gateway, or for this one to come back.
RESTART_S = 5.0
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Receive(Protocol):
    async def __call__(self) -> Any: ...


class App(Protocol):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class Front:
    """The ASGI application of the gateway's listener."""

    def __init__(
        self,
        gateways: Sequence[Gateway],
        bounds: Bounds,
        beside: App,
        tenants: Sequence[TenantPlan] = (),
        operators: Operators | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """`operators` guard what is beside; None: it has nothing that is not for everybody."""
        self._clock = clock
        self.bounds = bounds
        self._beside = beside
        self.know(tenants)
        self._operators = operators
        self._gateways = {name: gateway for gateway in gateways for name in (gateway.model, *gateway.plan.aliases)}

    def know(self, tenants: Sequence[TenantPlan]) -> None:
        """Other tenants from now on: the keys of those before open nothing any more."""
        self._tenants = tenants_keyring(tenants) if tenants else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        client_id = b""
        try:
            headers = incoming(scope["headers"])
            client_id = headers.get(b"x-request-id", b"")
            if not _REQUEST_ID.fullmatch(client_id):
                client_id = uuid.uuid4().hex.encode()
            tenant = self._admit(scope, path, headers)
            endpoint = _ENDPOINTS.get(path)
            if endpoint is None:
                await self._beside(scope, receive, send)
            elif scope["method"] != "POST":
                raise ApiError(405, "method_not_allowed", f"{path} takes POST, not {scope['method']}")
            else:
                await self._complete(endpoint, headers, client_id, tenant, receive, send)
        except ApiError as error:
            await send_error(send, error, client_id)

    def _admit(self, scope: Scope, path: str, headers: Mapping[bytes, bytes]) -> TenantPlan | None:
        """Who asks, where that matters; raises `ApiError` for those who may not."""
        if path.startswith("/v1/"):
            return None if self._tenants is None else self._tenants.owner(headers)
        if self._operators is not None and path not in OPEN_PATHS:
            self._operators.check(scope, headers)
        return None

    async def _complete(
        self,
        endpoint: Endpoint,
        headers: Mapping[bytes, bytes],
        client_id: bytes,
        tenant: TenantPlan | None,
        receive: Receive,
        send: Send,
    ) -> None:
        arrived_at = self._clock()
        most = self.bounds.body_bytes if tenant is None or tenant.body_bytes is None else tenant.body_bytes
        raw = await _body(headers, receive, most, self.bounds.upload_s)
        if raw is None:
            return
        ask = asks.parse(endpoint, raw)
        gateway = self._gateways.get(ask.model)
        if gateway is None:
            raise no_model(ask.model, self._gateways)
        slo = gateway.paces.asked(headers, ask.body, tenant)
        prompt_tokens = await gateway.counter.tokens(ask)
        request = Request(
            id=_internal_id(client_id, gateway.inflight),
            arrived_at=gateway.driver.at(arrived_at),
            prompt_tokens=prompt_tokens,
            slo=slo,
            max_tokens=ask.max_tokens,
            n=ask.n,
            tenant="" if tenant is None else tenant.tenant.name,
        )
        ticket = gateway.inflight.open(request, client_id)
        if ticket is None:
            raise ApiError(429, "queue_full", "too many requests are open", retry_after_s=1.0)
        exchange = Exchange(ticket, ask, headers, send, gateway.driver, gateway.paces)
        watch = asyncio.get_running_loop().create_task(_watch(receive, ticket))
        try:
            await self._answer(exchange, gateway.fleet, watch)
        finally:
            watch.cancel()
            ticket.close()
            gateway.answered(ticket)
            if exchange.usage is not None:
                gateway.counter.learn(ask, exchange.usage.prompt_tokens)

    async def _answer(self, exchange: Exchange, fleet: Fleet, watch: asyncio.Task[None]) -> None:
        """Run an exchange to its end, whatever ends it; raises `ApiError` as long as a status can still tell it."""
        ticket = exchange.ticket
        try:
            await exchange.run(fleet, self.bounds)
        except ApiError:
            raise
        except asyncio.CancelledError:
            _uncancel()
            if not ticket.gone:
                ending = "the gateway ends before the answer does"
                await exchange.give_up(ApiError(503, "shutting_down", ending, retry_after_s=RESTART_S))
        except Exception as error:
            if _says_gone(error):
                ticket.gone = True
                await asyncio.wait((watch,), timeout=1.0)  # until the server knows it too
                return
            # Ours: the client is told as much, the log everything.
            log.exception("request %s failed", ticket.request.id)
            await exchange.give_up(ApiError(500, "internal_error", "the gateway failed; its log says how"))


def no_model(name: str, there: Iterable[str]) -> ApiError:
    """What a client is told who asks for a model that is not here."""
    message = f"the model {name!r} does not exist here; there are: {', '.join(map(repr, there))}"
    return ApiError(404, "model_not_found", message, "model")


def _internal_id(client_id: bytes, inflight: Inflight) -> str:
    """The client's id, made unique: the brain and the engines know requests by it."""
    name = client_id.decode()
    return f"{name}-{uuid.uuid4().hex[:8]}" if name in inflight else name


async def send_error(send: Send, error: ApiError, client_id: bytes = b"") -> None:
    """An error as the whole answer."""
    body = error.body
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *([(b"x-request-id", client_id)] if client_id else ()),
        *error.headers,
    ]
    try:
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
    except RuntimeError as problem:
        if not _says_gone(problem):
            raise


async def _body(headers: Mapping[bytes, bytes], receive: Receive, most: int, within_s: float) -> bytes | None:
    """The request's body; None when the client left before its end. Raises `ApiError` when it is too large or slow.

    What is too large is taken in all the same, and thrown away: clients read no answer before they have sent all.
    """
    length = headers.get(b"content-length", b"0")
    too_large = length.isdigit() and int(length) > most
    message = await receive()
    if message["type"] == "http.request" and not message["more_body"] and not too_large:  # all there at once
        body: bytes = message["body"]
        too_large = len(body) > most
    else:
        try:
            async with asyncio.timeout(within_s):
                rest = await _rest(message, receive, 0 if too_large else most)
        except TimeoutError:
            raise ApiError(408, "request_timeout", f"the body did not arrive within {within_s:g} s") from None
        if rest is None:
            return None
        body, too_large = rest
    if too_large:
        raise ApiError(413, "request_too_large", f"the body is larger than {most} bytes")
    return body


async def _rest(message: Any, receive: Receive, most: int) -> tuple[bytes, bool] | None:
    """A body in pieces, and whether it is larger than `most`; None when the client left before its end."""
    pieces: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        size += len(message["body"])
        if size > most:
            pieces.clear()
        else:
            pieces.append(message["body"])
        if not message["more_body"]:
            return b"".join(pieces), size > most
        message = await receive()
    return None


def _says_gone(error: Exception) -> bool:
    """Whether a write failed because the client has left, which uvloop tells this way before it tells anybody."""
    return isinstance(error, RuntimeError) and "closed" in str(error)


async def _watch(receive: Receive, ticket: Ticket) -> None:
    """Wait for the client to go; the server says so too when the answer is complete, which is too late to matter."""
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.leave()


def _uncancel() -> None:
    task = asyncio.current_task()
    assert task is not None, "a handler runs in a task"
    while task.cancelling():
        task.uncancel()
