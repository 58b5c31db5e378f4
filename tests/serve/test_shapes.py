"""Requests and answers as OpenAI's API reference has them go through unchanged, streamed and whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from test_gateway import over, post

SHAPES = {file.stem: json.loads(file.read_text()) for file in sorted(Path(__file__).with_name("shapes").glob("*.json"))}
READ_BY: dict[str, tuple[Any, Any]] = {
    "/v1/chat/completions": (ChatCompletion, ChatCompletionChunk),
    "/v1/completions": (Completion, None),  # whose type has no chunk without a finish reason
    "/v1/embeddings": (CreateEmbeddingResponse, None),
}


@pytest.mark.parametrize("name", SHAPES)
async def test_a_recorded_exchange_comes_out_as_recorded(name: str) -> None:
    shape: dict[str, Any] = SHAPES[name]
    path, request, response = shape["path"], shape["request"], shape["response"]
    whole, part = READ_BY[path]
    chunks = [json.dumps(chunk) for chunk in shape.get("chunks", ())]
    stream = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"])
    sent, kind = (stream, "text/event-stream") if chunks else (json.dumps(response), "application/json")
    engine = FakeEngine(answer=sent.encode(), answer_type=kind)
    async with over(engine) as live:
        status, answer, headers = await post(live, request, path)
        assert (status, headers["content-type"], answer) == (200, "application/json", response)
        assert whole.model_validate(answer, strict=True).model_dump(exclude_unset=True) == response
        assert {key: engine.seen[0][2][key] for key in request} == request
        if chunks:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            status, text, headers = await post(live, request | options, path)
            assert (status, text) == (200, stream)
            assert headers["content-type"].startswith("text/event-stream")
            assert engine.seen[1][2] == request | options
            for chunk in chunks if part is not None else ():
                part.model_validate_json(chunk)
            _, text, _ = await post(live, request | {"stream": True}, path)
            assert text == stream.replace(f"data: {chunks[-1]}\n\n", "")
        await live.quiet()
