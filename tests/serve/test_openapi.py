"""The published OpenAPI document is true: schemathesis asks a live gateway everything that it allows, and more."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from fake_engine import FakeEngine, Headers
from live import Live
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from starlette.routing import Route
from test_gateway import over
from test_surface import STREAM, VECTORS

from polyserve.serve.fleet import PATHS
from polyserve.serve.openapi import document

# Every operation is asked so often; its examples are the same in every run.
EXAMPLES = 15
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
READ_ONLY = (
    "/v1/models", "/v1/models/{model}", "/health", "/ready", "/version", "/metrics",
    "/admin/fleet", "/admin/decisions", "/admin/tiers",
)  # fmt: skip


class Background:
    """A gateway in a loop and thread of its own, since schemathesis asks synchronously."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._context = over(Everything())
        self.live: Live = self.run(self._context.__aenter__())
        self.written: dict[str, Any] = self.run(self._get("/openapi.json"))

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(240)  # the core may be compiled first

    async def _get(self, path: str) -> Any:
        async with self.live.http.get(self.live.url + path) as answer:
            return await answer.json()

    def close(self) -> None:
        self.run(self._context.__aexit__(None, None, None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Everything(FakeEngine):
    """An engine that has embeddings and responses, too."""

    async def _answer(self, method: str, path: str, headers: Headers, body: bytes, reader: Any, writer: Any) -> bool:
        vectors = json.dumps(VECTORS).encode()
        others = {"/v1/embeddings": (vectors, "application/json"), "/v1/responses": (STREAM, "text/event-stream")}
        self.answer, self.answer_type = others.get(path, (None, ""))
        return await super()._answer(method, path, headers, body, reader, writer)


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


def test_every_route_is_described_and_nothing_else(background: Background) -> None:
    described = {(path, method) for path, one in background.written["paths"].items() for method in one}
    assert {(path, "post") for path in PATHS.values()} <= described
    assert {("/v1/models", "get"), ("/admin/instances", "post"), ("/admin/instances/{id}", "delete")} <= described
    assert {path for path, _ in described} >= set(READ_ONLY)


def test_the_document_is_openapi_and_all_its_references_lead_somewhere(background: Background) -> None:
    text = json.dumps(background.written)
    names = background.written["components"]["schemas"]
    assert background.written["openapi"] == "3.1.0"
    for name in (part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]):
        assert name in names


def test_a_route_is_described_by_its_own_words() -> None:
    async def look(request: Any) -> Any:
        """What there is
        to see."""

    path = document([Route("/a/{b:path}", look)])["paths"]["/a/{b}"]
    assert list(path) == ["get"]
    assert path["get"]["summary"] == "What there is to see."
    assert [one["name"] for one in path["get"]["parameters"]] == ["b"]


def operations(background: Background) -> Any:
    """The document, with the only model there is named: another is 404, which says little."""
    written = json.loads(json.dumps(background.written))
    for name in ("ChatRequest", "CompletionRequest", "EmbeddingsRequest", "ResponsesRequest"):
        written["components"]["schemas"][name]["properties"]["model"] = {"enum": ["tiny"]}
    schema = schemathesis.openapi.from_dict(written)
    schema.config.update(base_url=background.live.url)
    return schema


ASKED = [
    *((path, "POST", mode) for path in PATHS.values() for mode in ("positive", "negative")),
    *((path, "GET", "positive") for path in READ_ONLY),
]


@pytest.mark.parametrize(("path", "method", "mode"), ASKED)
def test_answers_are_as_described_whatever_is_asked(background: Background, path: str, method: str, mode: str) -> None:
    operation = operations(background)[path][method]
    statuses: Counter[int] = Counter()

    @hypothesis.settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def ask(case: Any) -> None:
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    ask()
    if mode == "positive" and path != "/v1/models/{model}":
        assert statuses[200], "what the document allows is served"
    if mode == "negative":
        assert not statuses[200], "what it forbids is refused"
