"""The gateway's API as an OpenAPI 3.1 document: what it reads and answers, made from the routes and from structs.

Only fields that the gateway itself reads are described; all others go to the engine as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.routing import Route

import polyserve
from polyserve.serve.ask import COMPLETION_MAX_TOKENS, MOST_CHOICES, Endpoint
from polyserve.serve.fleet import PATHS

Flag = bool | None
Count = Annotated[int, Meta(ge=1, lt=2**31)] | None
Choices = Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None
Milliseconds = Annotated[float, Meta(ge=0.001, lt=1e12, description="Milliseconds.")] | None
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
Text = Annotated[  # a union of several arrays, which no struct may have
    Any,
    Meta(
        description="A text, token ids, or several of either.",
        extra_json_schema={
            "anyOf": [{"type": "string"}, _TEXTS, _TOKENS, {"type": "array", "items": _TOKENS, "minItems": 1}]
        },
    ),
]
ServiceTier = Literal["auto", "default", "flex", "priority", "scale"] | None


class StreamOptions(Struct):
    include_usage: Flag = None


class DynamoRouter(Struct):
    """Dynamo's way to ask for a pace."""

    ttft_target: Milliseconds = None
    itl_target: Milliseconds = None


class Nvext(Struct):
    router: DynamoRouter | None = None


class VllmXargs(Struct):
    """vLLM's way to ask for a pace; what else is in it goes to the engine."""

    slo_ttft_ms: Milliseconds = None
    slo_tpot_ms: Milliseconds = None


class Asking(Struct):
    """What every request may say."""

    model: Annotated[str, Meta(description="A name of `GET /v1/models`.")]
    service_tier: ServiceTier = None
    nvext: Nvext | None = None
    vllm_xargs: VllmXargs | None = None


class ChatRequest(Asking, kw_only=True):
    messages: list[Any]
    tools: Any = None
    stream: Flag = None
    stream_options: StreamOptions | None = None
    n: Choices = None
    max_tokens: Count = None
    max_completion_tokens: Annotated[Count, Meta(description="Before `max_tokens`, where both are there.")] = None


class CompletionRequest(Asking, kw_only=True):
    prompt: Text
    stream: Flag = None
    stream_options: StreamOptions | None = None
    n: Choices = None
    max_tokens: Annotated[Count, Meta(description=f"{COMPLETION_MAX_TOKENS} where it is missing.")] = None


class EmbeddingsRequest(Asking, kw_only=True):
    input: Text


class ResponsesRequest(Asking, kw_only=True):
    input: str | list[Any] = ""
    instructions: Any = None
    tools: Any = None
    stream: Flag = None
    max_output_tokens: Count = None
    background: Literal[False] | None = None


class Problem(Struct):
    message: str
    type: str
    param: str | None
    code: str | int | None


class Error(Struct):
    """What OpenAI's clients read; an engine's own refusal is passed on as it is."""

    error: Problem


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Struct):
    object: Literal["list"]
    data: list[Model]


class Chat(Struct):
    object: Literal["chat.completion"]
    choices: list[dict[str, Any]]
    service_tier: ServiceTier = None


class Completion(Struct):
    object: Literal["text_completion"]
    choices: list[dict[str, Any]]
    service_tier: ServiceTier = None


class Embeddings(Struct):
    object: Literal["list"]
    data: list[dict[str, Any]]


class ResponseObject(Struct):
    object: Literal["response"]
    output: list[dict[str, Any]]


_ASKED: dict[Endpoint, tuple[type[Struct], type[Struct], bool]] = {
    "chat": (ChatRequest, Chat, True),
    "completions": (CompletionRequest, Completion, True),
    "embeddings": (EmbeddingsRequest, Embeddings, False),
    "responses": (ResponsesRequest, ResponseObject, True),
}
_STRUCTS = (Error, Models, *(one for asked, answered, _ in _ASKED.values() for one in (asked, answered)))
_REF = "#/components/schemas/"

_NUMBER = {"type": "string", "pattern": r"^[0-9]{1,12}(\.[0-9]{1,9})?$"}
_ASKING = {
    "x-slo-ttft-ms": (_NUMBER, "TTFT asked for, milliseconds."),
    "x-slo-tpot-ms": (_NUMBER, "TPOT asked for, milliseconds."),
    "x-llm-d-slo-ttft-ms": (_NUMBER, "The same, as llm-d spells it."),
    "x-llm-d-slo-tpot-ms": (_NUMBER, "The same, as llm-d spells it."),
    "x-sgl-ttft-slo-ms": (_NUMBER, "The same, as SGLang spells it."),
    "x-sgl-tps-slo": (_NUMBER, "Tokens per second, as SGLang spells it."),
    "x-polyserve-tier": ({"type": "string"}, "A tier by name, or `best-effort`."),
    "x-request-id": ({"type": "string", "pattern": "^[!-~]{1,128}$"}, "Kept, and told back; made where missing."),
}
_TOLD = {
    "x-request-id": "The request's id.",
    "x-polyserve-tier": "The tier that it was binned to.",
    "x-polyserve-instance": "The instance that served it.",
    "x-polyserve-promoted": "Whether that is a tighter tier's.",
    "x-polyserve-predicted-ttft-ms": "The TTFT that was forecast.",
    "x-polyserve-queue-ms": "How long it waited for an instance.",
    "x-polyserve-overhead-ms": "What the gateway itself took.",
}
# Of each server-sent event; the data are a chunk as the engine made it, or `[DONE]`, or an `Error`.
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_RETRY = ("retry-after", "retry-after-ms")
_FAILURES = {
    "4XX": "The request's fault, or (429) too much at once.",
    "5XX": "Nobody can serve it now, or the engine failed.",
}


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The document for an application with these routes, the completions beside them."""
    _, schemas = msgspec.json.schema_components(_STRUCTS, ref_template=_REF + "{name}")
    paths: dict[str, Any] = {PATHS[endpoint]: {"post": _asking(endpoint)} for endpoint in _ASKED}
    for route in routes:
        path = paths.setdefault(re.sub(r":\w+\}", "}", route.path), {})
        for method in sorted((route.methods or set()) - {"HEAD"}):
            path[method.lower()] = _operation(route, method)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "PolyServe",
            "version": polyserve.__version__,
            "description": "OpenAI's API, each request at the pace it asks for.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _asking(endpoint: Endpoint) -> dict[str, Any]:
    asked, answered, streams = _ASKED[endpoint]
    content: dict[str, Any] = {"application/json": {"schema": _ref(answered)}}
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    told = {name: {"description": what, "schema": {"type": "string"}} for name, what in _TOLD.items()}
    return {
        "operationId": endpoint,
        "summary": f"OpenAI's {PATHS[endpoint]}.",
        "parameters": [
            {"name": name, "in": "header", "required": False, "schema": schema, "description": what}
            for name, (schema, what) in _ASKING.items()
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(asked)}}},
        "responses": {"200": {"description": "The answer.", "headers": told, "content": content}, **_failures()},
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    """What a route's own function says of it."""
    name = route.endpoint.__name__
    said = " ".join((route.endpoint.__doc__ or name).split())
    schema: dict[str, Any] = {"/v1/models": _ref(Models), "/v1/models/{model:path}": {"$ref": _REF + "Model"}}.get(
        route.path, {}
    )
    kind = "text/plain" if route.path == "/metrics" else "application/json"
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{name}",
        "summary": said,
        "responses": {"2XX": {"description": said, "content": {kind: {"schema": schema}}}, **_failures()},
    }
    if route.param_convertors:
        operation["parameters"] = [
            {"name": one, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for one in route.param_convertors
        ]
    return operation


def _failures() -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(Error)}}
    headers = {name: {"description": "When to try again.", "schema": {"type": "string"}} for name in _RETRY}
    return {status: {"description": what, "headers": headers, "content": content} for status, what in _FAILURES.items()}


def _ref(struct: type[Struct]) -> dict[str, Any]:
    return {"$ref": _REF + struct.__name__}
