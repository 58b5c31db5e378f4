"""Everything that is not a completion: models, health, metrics, and the admin API."""

from __future__ import annotations

import re
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import polyserve
from polyserve.core.types import InstanceId, Tier
from polyserve.serve.adapters import KINDS, chunk_rule
from polyserve.serve.app import RESTART_S
from polyserve.serve.errors import ApiError
from polyserve.serve.fleet import Fleet, Node
from polyserve.serve.metrics import DECISIONS_KEPT, Decisions, Metrics
from polyserve.serve.plan import EngineSpec


class Reply(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class House(Protocol):
    """What the admin API may do to the gateway."""

    fleet: Fleet
    decisions: Decisions
    metrics: Metrics
    tiers: tuple[Tier, ...]
    profiles: tuple[str, ...]
    model: str
    created: int

    def accepting(self) -> bool: ...

    def join(self, spec: EngineSpec) -> None: ...

    def drain(self, instance: InstanceId) -> None: ...

    async def remove(self, instance: InstanceId) -> None: ...


def public(house: House, with_admin: bool) -> Starlette:
    """What stands beside the completions; with the admin API when both share a listener."""
    return _application([*_public_routes(house), *(_admin_routes(house) if with_admin else ())])


def admin(house: House) -> Starlette:
    """The admin API on a listener of its own."""
    return _application([*_public_routes(house), *_admin_routes(house)])


def _application(routes: list[Route]) -> Starlette:
    handlers: dict[Any, Any] = {ApiError: _on_error, HTTPException: _on_http_error, Exception: _on_crash}
    return Starlette(routes=routes, exception_handlers=handlers)


def _public_routes(house: House) -> list[Route]:
    async def models(request: Request) -> Response:
        model = {"id": house.model, "object": "model", "created": house.created, "owned_by": "polyserve"}
        return Reply({"object": "list", "data": [model]})

    async def model(request: Request) -> Response:
        if request.path_params["model"] != house.model:
            raise ApiError(404, "model_not_found", f"there is one model here: {house.model!r}", "model")
        return Reply({"id": house.model, "object": "model", "created": house.created, "owned_by": "polyserve"})

    async def health(request: Request) -> Response:
        return Reply({"status": "ok"})

    async def ready(request: Request) -> Response:
        if not house.accepting():
            raise ApiError(503, "shutting_down", "the gateway is shutting down", retry_after_s=RESTART_S)
        if not house.fleet.ready:
            raise ApiError(503, "no_instances", "no instance is ready", retry_after_s=1.0)
        return Reply({"status": "ready"})

    async def metrics(request: Request) -> Response:
        return Response(house.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(request: Request) -> Response:
        return Reply({"version": polyserve.__version__})

    return [
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/version", version),
    ]


def _admin_routes(house: House) -> list[Route]:
    async def fleet(request: Request) -> Response:
        return Reply({"instances": [_shown(node) for node in house.fleet]})

    async def decisions(request: Request) -> Response:
        limit = request.query_params.get("limit", "100")
        if not re.fullmatch(r"\d{1,6}", limit):
            raise ApiError(400, "invalid_limit", f"limit is a number up to {DECISIONS_KEPT}, not {limit!r}", "limit")
        return Reply({"decisions": house.decisions.last(int(limit))})

    async def tiers(request: Request) -> Response:
        return Reply({"tiers": [_tier(tier) for tier in house.tiers]})

    async def join(request: Request) -> Response:
        spec = _spec(await request.body(), house.profiles)
        if house.fleet.get(spec.id) is not None:
            raise ApiError(409, "instance_exists", f"there is an instance {spec.id!r} already", "id")
        house.join(spec)
        return Reply({"id": spec.id}, status_code=202)

    async def remove(request: Request) -> Response:
        await house.remove(_node(house, request).id)
        return Response(status_code=204)

    async def drain(request: Request) -> Response:
        house.drain(_node(house, request).id)
        return Reply({"id": request.path_params["id"], "state": "draining"}, status_code=202)

    return [
        Route("/admin/fleet", fleet),
        Route("/admin/decisions", decisions),
        Route("/admin/tiers", tiers),
        Route("/admin/instances", join, methods=["POST"]),
        Route("/admin/instances/{id}", remove, methods=["DELETE"]),
        Route("/admin/instances/{id}/drain", drain, methods=["POST"]),
    ]


def _node(house: House, request: Request) -> Node:
    node = house.fleet.get(request.path_params["id"])
    if node is None:
        there = ", ".join(known.id for known in house.fleet) or "none"
        raise ApiError(404, "unknown_instance", f"no instance {request.path_params['id']!r}; there are: {there}", "id")
    return node


def _shown(node: Node) -> dict[str, Any]:
    load = node.load
    return {
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


def _tier(tier: Tier) -> dict[str, Any]:
    return {
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
    profile: str | None = None
    kind: str = "auto"
    chunk: str | None = None
    send_priority: bool = False


def _spec(raw: bytes, profiles: tuple[str, ...]) -> EngineSpec:
    try:
        body = msgspec.json.decode(raw, type=_Join)
        chunk = None if body.chunk is None else chunk_rule(body.chunk)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ApiError(400, "invalid_instance", f"the body is no instance: {error}") from None
    profile = body.profile if body.profile is not None else profiles[0]
    if profile not in profiles:
        there = ", ".join(profiles)
        raise ApiError(400, "unknown_profile", f"profile {profile!r} is not configured; there are: {there}", "profile")
    if not re.fullmatch(r"https?://[^\s/]+\S*", body.url):
        raise ApiError(400, "invalid_url", f"url is http://HOST:PORT, not {body.url!r}", "url")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", body.id):
        raise ApiError(400, "invalid_id", f"id is up to 63 letters, digits, dots and dashes, not {body.id!r}", "id")
    if body.kind not in ("auto", *KINDS):
        raise ApiError(400, "invalid_kind", f"kind is one of auto, {', '.join(KINDS)}, not {body.kind!r}", "kind")
    return EngineSpec(body.id, body.url, profile, body.kind, chunk, send_priority=body.send_priority)  # type: ignore[arg-type]


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
