"""Everything that is not a completion: models, health, metrics, and the admin API."""

from __future__ import annotations

import re
from typing import Any, Protocol, cast

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import polyserve
from polyserve.core.types import Tier
from polyserve.serve import console, observe, openapi
from polyserve.serve.access import OPEN_PATHS, Operators
from polyserve.serve.adapters import KINDS, chunk_rule
from polyserve.serve.app import RESTART_S, App, no_model, send_error
from polyserve.serve.console import Reply, decided
from polyserve.serve.decisions import DECISIONS_KEPT
from polyserve.serve.errors import ApiError
from polyserve.serve.fleet import Node
from polyserve.serve.gateway import Gateway
from polyserve.serve.headers import incoming
from polyserve.serve.plan import EngineKind, EngineSpec


class House(console.House, Protocol):
    """What is served here, as this API sees it."""

    gateways: dict[str, Gateway]
    created: int

    def accepting(self) -> bool: ...

    def metrics_text(self) -> bytes: ...


def public(house: House, with_admin: bool, with_metrics: bool) -> Starlette:
    """What stands beside the completions; with the admin API when both share a listener."""
    metrics = [_metrics(house)] if with_admin or with_metrics else []
    return _application([*_public_routes(house), *metrics, *(_admin_routes(house) if with_admin else ())])


def admin(house: House, operators: Operators) -> App:
    """The admin API on a listener of its own."""
    application = _application([*_public_routes(house), _metrics(house), *_admin_routes(house)])

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        try:
            headers = incoming(scope["headers"])
            if scope["path"] not in OPEN_PATHS:
                operators.check(scope, headers)
        except ApiError as error:
            await send_error(send, error)
            return
        await application(scope, receive, send)

    return guarded


def _application(routes: list[Route]) -> Starlette:
    written = msgspec.json.encode(openapi.document(routes))

    async def described(request: Request) -> Response:
        return Response(written, media_type="application/json")

    routes = [*routes, Route("/openapi.json", described)]
    handlers: dict[Any, Any] = {ApiError: _on_error, HTTPException: _on_http_error, Exception: _on_crash}
    return Starlette(routes=routes, exception_handlers=handlers)


def _public_routes(house: House) -> list[Route]:
    async def models(request: Request) -> Response:
        """The names of all models, aliases too."""
        return Reply({"object": "list", "data": [_model(house, name) for name in _names(house)]})

    async def model(request: Request) -> Response:
        """One model by its name."""
        return Reply(_model(house, request.path_params["model"]))

    async def health(request: Request) -> Response:
        """Whether the gateway is alive."""
        return Reply({"status": "ok"})

    async def ready(request: Request) -> Response:
        """Whether requests are taken in and any model has an instance."""
        if not house.accepting():
            raise ApiError(503, "shutting_down", "the gateway is shutting down", retry_after_s=RESTART_S)
        ready = {model: gateway.fleet.ready for model, gateway in house.gateways.items()}
        if not any(ready.values()):
            raise ApiError(503, "no_instances", "no instance is ready", retry_after_s=1.0)
        return Reply({"status": "ready", "models": ready})

    async def version(request: Request) -> Response:
        """Which version serves."""
        return Reply({"version": polyserve.__version__})

    return [
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/version", version),
    ]


def _metrics(house: House) -> Route:
    async def metrics(request: Request) -> Response:
        """All metrics in Prometheus' text format."""
        return Response(house.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Route("/metrics", metrics)


def _admin_routes(house: House) -> list[Route]:
    async def fleet(request: Request) -> Response:
        """Every instance, of one model with `?model=`."""
        shown = [_shown(gateway, node) for gateway in _asked(house, request) for node in gateway.fleet]
        return Reply({"instances": shown})

    async def decisions(request: Request) -> Response:
        """The latest decisions, `?limit=` of them, of one model with `?model=`."""
        limit = request.query_params.get("limit", "100")
        if not re.fullmatch(r"\d{1,6}", limit):
            raise ApiError(400, "invalid_limit", f"limit is a number up to {DECISIONS_KEPT}, not {limit!r}", "limit")
        latest = _latest(_asked(house, request), int(limit), request.query_params.get("request"))
        return decided(request, latest)

    async def audit(request: Request) -> Response:
        """Predicted against observed, of one model with `?model=`."""
        return Reply({gateway.model: gateway.audit.to_dict() for gateway in _asked(house, request)})

    async def watched(request: Request) -> Response:
        gateways = {one: observe.observed(one.brain) for one in _asked(house, request)}
        if not any(gateways.values()):
            raise ApiError(404, "not_observing", "PolyServe routes here; `polyserve serve --observe` only watches")
        shadows = {one.model: observe.told(shadow, one.audit, 100) for one, shadow in gateways.items() if shadow}
        return Reply(shadows)

    async def tiers(request: Request) -> Response:
        """Every tier, of one model with `?model=`."""
        return Reply({"tiers": [_tier(gateway, tier) for gateway in _asked(house, request) for tier in gateway.tiers]})

    async def join(request: Request) -> Response:
        """Take an instance in."""
        gateway, spec = _joining(house, await request.body())
        if gateway.fleet.get(spec.id) is not None:
            raise ApiError(409, "instance_exists", f"there is an instance {spec.id!r} already", "id")
        gateway.join(spec)
        return Reply({"id": spec.id, "model": gateway.model}, status_code=202)

    async def remove(request: Request) -> Response:
        """Take an instance out at once; its requests go elsewhere."""
        gateway, node = _node(house, request)
        await gateway.remove(node.id)
        return Response(status_code=204)

    async def drain(request: Request) -> Response:
        """Let an instance end what it has, and take it out."""
        gateway, node = _node(house, request)
        gateway.drain(node.id)
        return Reply({"id": node.id, "model": gateway.model, "state": "draining"}, status_code=202)

    return [
        Route("/admin/fleet", fleet),
        Route("/admin/decisions", decisions),
        Route("/admin/audit", audit),
        Route("/admin/observe", watched),
        Route("/admin/tiers", tiers),
        Route("/admin/instances", join, methods=["POST"]),
        Route("/admin/instances/{id}", remove, methods=["DELETE"]),
        Route("/admin/instances/{id}/drain", drain, methods=["POST"]),
        *console.routes(house, lambda name: _gateway(house, name)),
    ]


def _names(house: House) -> list[str]:
    """What clients may call a model, aliases too."""
    return [name for model, gateway in house.gateways.items() for name in (model, *gateway.plan.aliases)]


def _model(house: House, name: str) -> dict[str, Any]:
    if name not in (there := _names(house)):
        raise no_model(name, there)
    return {"id": name, "object": "model", "created": house.created, "owned_by": "polyserve"}


def _asked(house: House, request: Request) -> list[Gateway]:
    """The gateways that `?model=` names; all without it."""
    name = request.query_params.get("model")
    return list(house.gateways.values()) if name is None else [_gateway(house, name)]


def _gateway(house: House, name: str | None) -> Gateway:
    """The gateway of a model; where there is only one model it need not be named."""
    if name is None and len(house.gateways) == 1:
        return next(iter(house.gateways.values()))
    if name is None:
        there = ", ".join(house.gateways)
        raise ApiError(400, "missing_field", f"field 'model' is missing; there are: {there}", "model")
    if name not in house.gateways:
        raise no_model(name, house.gateways)
    return house.gateways[name]


def _node(house: House, request: Request) -> tuple[Gateway, Node]:
    name = request.path_params["id"]
    gateways = _asked(house, request)
    found = [(gateway, node) for gateway in gateways if (node := gateway.fleet.get(name)) is not None]
    if not found:
        there = ", ".join(known.id for gateway in gateways for known in gateway.fleet) or "none"
        raise ApiError(404, "unknown_instance", f"no instance {name!r}; there are: {there}", "id")
    if len(found) > 1:
        models = ", ".join(gateway.model for gateway, _ in found)
        raise ApiError(400, "missing_field", f"{name!r} is an instance of {models}: say which, ?model=NAME", "model")
    return found[0]


def _latest(gateways: list[Gateway], limit: int, request: str | None) -> list[dict[str, Any]]:
    """The last decisions of several brains, the latest first."""
    told = [
        (gateway.driver.epoch + one["at"], {"model": gateway.model, **one})
        for gateway in gateways
        for one in gateway.decisions.last(limit, request)
    ]
    return [one for _, one in sorted(told, key=lambda pair: pair[0], reverse=True)[:limit]]


def _shown(gateway: Gateway, node: Node) -> dict[str, Any]:
    load = node.load
    return {
        "model": gateway.model,
        "id": node.id,
        "url": node.spec.url,
        "state": node.state,
        "engine": node.engine.kind if node.engine else None,
        "tier": node.tier,
        "pace_ms": None if node.pace_s is None else round(node.pace_s * 1e3, 3),
        "requests": len(node.tickets),
        "running": load.running if load else None,
        "waiting": load.waiting if load else None,
        "kv_usage": load.kv_share if load else None,
        "launched": node.spec.launched,
        "instance": node.instance,
    }


def _tier(gateway: Gateway, tier: Tier) -> dict[str, Any]:
    return {
        "model": gateway.model,
        "name": tier.name,
        "tpot_ms": round(tier.tpot_s * 1e3, 3),
        "ttft_ms": round(tier.ttft_s * 1e3, 3),
        "min_instances": tier.min_instances,
        "weight": tier.weight,
        "on_late": tier.on_late,
    }


class _Join(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /admin/instances`."""

    id: str
    url: str
    model: str | None = None
    profile: str | None = None
    kind: str = "auto"
    chunk: str | None = None
    send_priority: bool = False
    api_key: str | None = None


def _joining(house: House, raw: bytes) -> tuple[Gateway, EngineSpec]:
    try:
        body = msgspec.json.decode(raw, type=_Join)
        chunk = None if body.chunk is None else chunk_rule(body.chunk)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ApiError(400, "invalid_instance", f"the body is no instance: {error}") from None
    gateway = _gateway(house, body.model)
    profile = body.profile if body.profile is not None else gateway.profiles[0]
    if profile not in gateway.profiles:
        there = ", ".join(gateway.profiles)
        raise ApiError(400, "unknown_profile", f"profile {profile!r} is not configured; there are: {there}", "profile")
    if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", body.url):
        message = "url is http://HOST:PORT, without user and password (api_key is for that)"
        raise ApiError(400, "invalid_url", message, "url")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", body.id):
        raise ApiError(400, "invalid_id", f"id is up to 63 letters, digits, dots and dashes, not {body.id!r}", "id")
    if body.kind not in ("auto", *KINDS):
        raise ApiError(400, "invalid_kind", f"kind is one of auto, {', '.join(KINDS)}, not {body.kind!r}", "kind")
    if body.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", body.api_key):
        raise ApiError(400, "invalid_api_key", "api_key is printable ASCII without spaces", "api_key")
    kind = cast(EngineKind, body.kind)
    return gateway, EngineSpec(
        body.id, body.url, profile, kind, chunk, send_priority=body.send_priority, api_key=body.api_key
    )


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body, error.status, headers, "application/json")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    told = ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail.lower()}")
    return Response(told.body, told.status, dict(error.headers or {}), "application/json")


async def _on_crash(request: Request, error: Exception) -> Response:
    told = ApiError(500, "internal_error", "the gateway failed; its log says how")
    return Response(told.body, told.status, media_type="application/json")
