"""Parts of the admin API: the config and the tiers changed, decisions in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from polyserve.core.types import Tier, to_microsecond
from polyserve.serve.errors import ApiError
from polyserve.serve.gateway import Gateway
from polyserve.serve.plan import PlanError
from polyserve.serve.reload import Reloader, Report, retier


class House(Protocol):
    """What is served here, as these endpoints see it."""

    reloader: Reloader | None


class Reply(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class _Tier(msgspec.Struct, forbid_unknown_fields=True):
    """A tier as `GET /admin/tiers` shows it and the config writes it."""

    name: str
    tpot_ms: float
    ttft_ms: float
    min_instances: int = 0
    weight: float = 1.0
    on_late: Literal["refuse", "serve_late", "never"] | None = None
    model: str | None = None

    def tier(self) -> Tier:
        tpot_s, ttft_s = to_microsecond(self.tpot_ms / 1e3), to_microsecond(self.ttft_ms / 1e3)
        return Tier(self.name, tpot_s, ttft_s, self.min_instances, self.weight, self.on_late)


class _Tiers(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `PUT /admin/tiers`: all of them, those that are to stay included."""

    tiers: list[_Tier]


def routes(house: House, gateway_of: Callable[[str | None], Gateway]) -> list[Route]:
    """`gateway_of` finds the gateway of a model, or the only one for None; it raises `ApiError`."""

    async def reload(request: Request) -> Response:
        """Read the config again; a bad one changes nothing."""
        if house.reloader is None:
            raise ApiError(409, "no_config_file", "this gateway was not started from a config file")
        try:
            report = await house.reloader.reload("POST /admin/reload")
        except PlanError as error:
            raise ApiError(400, "invalid_config", f"the config stays as it was: {error}") from None
        return _told(report)

    async def put_tiers(request: Request) -> Response:
        """Have these tiers in place of a model's present ones."""
        try:
            body = msgspec.json.decode(await request.body(), type=_Tiers)
        except msgspec.MsgspecError as error:
            raise ApiError(400, "invalid_tiers", f"the body is no list of tiers: {error}") from None
        _check(body.tiers)
        models = {tier.model for tier in body.tiers} - {None}
        if len(models) > 1:
            raise ApiError(400, "invalid_tiers", "tiers of one model at a time", "model")
        gateway = gateway_of(request.query_params.get("model") or next(iter(models), None))
        try:
            report = retier(gateway, tuple(tier.tier() for tier in body.tiers))
        except PlanError as error:
            raise ApiError(400, "invalid_tiers", str(error), "tiers") from None
        return _told(report)

    return [
        Route("/admin/reload", reload, methods=["POST"]),
        Route("/admin/tiers", put_tiers, methods=["PUT"]),
    ]


def _check(tiers: list[_Tier]) -> None:
    for at, tier in enumerate(tiers):
        for key in ("tpot_ms", "ttft_ms"):
            if not 0.0 < getattr(tier, key) <= 86_400_000.0:
                raise _wrong(at, key, "above 0 and at most a day")
        if tier.min_instances < 0:
            raise _wrong(at, "min_instances", "not negative")
        if not 0.0 < tier.weight < float("inf"):
            raise _wrong(at, "weight", "above 0")
        if not (tier.name and tier.name.replace(".", "").replace("-", "").replace("_", "").isalnum()):
            raise _wrong(at, "name", "letters, digits, dots and dashes")


def _wrong(at: int, key: str, what: str) -> ApiError:
    return ApiError(400, "invalid_tiers", f"tiers.{at}.{key} is {what}", f"tiers.{at}.{key}")


def _told(report: Report) -> Response:
    return Reply({"changed": report.changed, "restart_needed": report.restart})


def decided(request: Request, decisions: list[dict[str, Any]]) -> Response:
    """Decisions as JSON or, with `?format=text`, as sentences."""
    if request.query_params.get("format") != "text":
        return Reply({"decisions": decisions})
    lines = []
    for one in decisions:
        lines.append(f"{one['at']:.3f} s  {one['request']} ({one['tier'] or 'no tier'}): {one['why']}")
        lines += [f"    {other}" for other in [*one["others"], *filter(None, [one["not_asked"]])]]
    return Response("".join(f"{line}\n" for line in lines), media_type="text/plain; charset=utf-8")
