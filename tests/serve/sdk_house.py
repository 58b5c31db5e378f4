"""One gateway for which every case of the error table is a model, so that any SDK meets all of them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fake_engine import FakeEngine
from live import PROFILE, TIERS, Live, listening, until

from polyserve.config import Config, plan


class Case(NamedTuple):
    """A request that is refused, and what the client is to see of it."""

    name: str
    model: str
    raised: str  # the SDK's class, the same name in Python and JS
    status: int
    code: str
    headers: Mapping[str, str] = MappingProxyType({})
    body: Mapping[str, Any] = MappingProxyType({})


NONE: dict[str, str] = {}
HURRY = {"x-slo-ttft-ms": "60", "x-slo-tpot-ms": "100"}
CROWDED = "Bearer of-crowd"  # of a tenant that may have one request open, and has
CASES = [
    Case("saturated", "busy", "RateLimitError", 429, "overloaded", HURRY),
    Case("impossible", "good", "BadRequestError", 400, "slo_infeasible", {"x-slo-ttft-ms": "1"}),
    Case("malformed pace", "good", "BadRequestError", 400, "invalid_slo", {"x-slo-tpot-ms": "fast"}),
    Case("queue full", "full", "RateLimitError", 429, "queue_full"),
    Case("waited too long", "waiting", "RateLimitError", 429, "queue_timeout"),
    Case("no instance", "gone", "InternalServerError", 503, "no_instances"),
    Case("unknown model", "nobody", "NotFoundError", 404, "model_not_found"),
    Case("wrong type", "good", "BadRequestError", 400, "invalid_type", NONE, {"max_tokens": "ten"}),
    Case("too long", "good", "BadRequestError", 400, "context_length_exceeded", NONE, {"max_tokens": 10**9}),
    Case("wrong key", "good", "AuthenticationError", 401, "invalid_api_key", {"Authorization": "Bearer wrong"}),
    Case(
        "forbidden tier",
        "good",
        "PermissionDeniedError",
        403,
        "tier_not_allowed",
        {"Authorization": "Bearer of-fast", "x-polyserve-tier": "slow"},
    ),
    Case("more than its share", "held", "RateLimitError", 429, "rate_limit_exceeded", {"Authorization": CROWDED}),
    Case("engine fails", "dying", "InternalServerError", 502, "upstream_error"),
]
# What the engine itself says is passed on, its own code too.
REJECTED = Case("engine refuses", "picky", "UnprocessableEntityError", 422, "422")
# Larger than a gateway of this house takes; the SDKs have no class of its own for it.
LARGEST_MIB = 0.5

SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}}


def _stream(*deltas: dict[str, Any], finish: str) -> bytes:
    head: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    events = [json.dumps({**head, "choices": [choice]}) for choice in choices]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


def _calls(arguments: str, **function: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": arguments, **function}}]}


CALLING = _stream(
    {"role": "assistant", "content": None},
    {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather"}}]},
    _calls('{"city": "'),
    _calls('Bonn"}'),
    finish="tool_calls",
)
STRUCTURED = _stream({"role": "assistant", "content": '{"city": '}, {"content": '"Bonn"}'}, finish="stop")


class Engines(NamedTuple):
    """Those that a test looks at."""

    good: FakeEngine
    slow: FakeEngine


def endless() -> FakeEngine:
    """An engine whose answers take longer than any test."""
    return FakeEngine(tokens=3000, every_s=0.05)


@contextlib.asynccontextmanager
async def house() -> AsyncIterator[tuple[Live, Engines]]:
    """The gateway, its busy models busy."""
    good, slow = FakeEngine(), endless()
    engines = {
        "good": good,
        "slow": slow,
        "busy": endless(),
        "held": endless(),
        "full": endless(),
        "waiting": endless(),
        "again": FakeEngine(tokens=80, every_s=0.02),
        "dying": FakeEngine(status=500),
        "picky": FakeEngine(status=422),
        "breaking": FakeEngine(error_event=True, every_s=0.02),
        "calling": FakeEngine(answer=CALLING),
        "structured": FakeEngine(answer=STRUCTURED),
    }
    settings = {
        "full": {"queue_limit": 1, "on_late": "never"},
        "waiting": {"queue_timeout_s": 0.05, "on_late": "never"},
        "again": {"queue_timeout_s": 0.05, "on_late": "never"},
    }
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines.values():
            await stack.enter_async_context(engine.running())
        urls = {name: engine.url for name, engine in engines.items()} | {"gone": "http://127.0.0.1:1"}
        narrow = {"busy", "again", *settings}
        models: list[dict[str, Any]] = [
            {"name": name, "settings": settings.get(name, {}), "instances": [{"id": "e0", "url": url}]}
            for name, url in urls.items()
        ]
        for model in models:
            if model["name"] in narrow:
                model["instances"][0]["max_num_seqs"] = 1
        limits = {"probe_s": 0.05, "shutdown_s": 1, "body_mib": LARGEST_MIB, "attempts": 1}
        tenants = [
            {"name": name, "keys": [hashlib.sha256(key.encode()).hexdigest()], **bounds}
            for name, key, bounds in (
                ("all", "none", {}),
                ("fast", "of-fast", {"tiers": ["fast"]}),
                ("crowd", "of-crowd", {"concurrency": 1}),
            )
        ]
        plain = {"tenants": tenants, "profile": PROFILE, "tiers": TIERS, "limits": limits, "models": models}
        live = await stack.enter_async_context(listening(plan(Config.model_validate(plain), "test.yaml")))
        fleets = {name: gateway.fleet for name, gateway in live.house.gateways.items()}
        await until(lambda: all(fleet.ready for name, fleet in fleets.items() if name != "gone"))
        asked = [asyncio.create_task(_occupy(live, name)) for name in ("busy", "full", "waiting", "full")]
        asked.append(asyncio.create_task(_occupy(live, "held", CROWDED)))
        await until(lambda: all(engines[name].streams == 1 for name in ("busy", "full", "waiting", "held")))
        await until(lambda: len(live.house.gateways["full"].inflight) == 2)
        try:
            yield live, Engines(good, slow)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)


async def _occupy(live: Live, model: str, key: str = "Bearer none") -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "hold"}], "stream": True}
    headers = {"Authorization": key}
    async with live.http.post(f"{live.url}/v1/chat/completions", json=body, headers=headers) as answer:
        await answer.read()
