"""One request body, parsed once: what a decision needs is read, everything else stays the bytes it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from msgspec import Raw

from polyserve.serve.errors import ApiError
from polyserve.serve.fields import an_object, boolean, count, field, fields_of, missing, rewritten, string, wrong
from polyserve.serve.prompt import Prompt, chat_prompt, response_prompt, text_prompt

Endpoint = Literal["chat", "completions", "embeddings", "responses"]

# `/v1/completions` without max_tokens means 16 in OpenAI's API, and so in vLLM.
COMPLETION_MAX_TOKENS = 16
MOST_CHOICES = 128


@dataclass(slots=True)
class Ask:
    """What a client asks for; `fields` are the top-level fields of its body, values unparsed."""

    endpoint: Endpoint
    raw: bytes
    fields: dict[str, Raw]
    model: str
    stream: bool
    include_usage: bool
    n: int
    max_tokens: int | None
    prompt: Prompt
    body: Mapping[str, Any]  # the fields that may ask for a pace, parsed
    counted_tokens: int | None = None  # of its texts, by the model's own tokenizer

    @property
    def prompt_bytes(self) -> int:
        """Of text whose tokens are to be estimated."""
        return self.prompt.text_bytes

    @property
    def exact_prompt_tokens(self) -> int | None:
        """Of prompts given as token ids."""
        return self.prompt.exact_tokens

    @property
    def streamable(self) -> bool:
        """Whether the engine can be asked for a stream whatever the client wants."""
        return not (self.endpoint == "embeddings" or "best_of" in self.fields or "use_beam_search" in self.fields)


def parse(endpoint: Endpoint, raw: bytes) -> Ask:
    """Read a body; raises `ApiError` naming the field that is at fault."""
    fields = fields_of(raw)
    model = string(fields, "model")
    if model is None:
        raise missing("model")
    options = an_object(fields, "stream_options") or {}
    prompt = _prompt(endpoint, fields)
    return Ask(
        endpoint=endpoint,
        raw=raw,
        fields=fields,
        model=model,
        stream=endpoint != "embeddings" and boolean(fields, "stream"),
        include_usage=options.get("include_usage") is True,
        n=_choices(endpoint, fields) * prompt.choices,
        max_tokens=_max_tokens(endpoint, fields),
        prompt=prompt,
        body={
            key: (string if key == "service_tier" else an_object)(fields, key)
            for key in ("nvext", "vllm_xargs", "service_tier")
            if key in fields
        },
    )


def _prompt(endpoint: Endpoint, fields: Mapping[str, Raw]) -> Prompt:
    match endpoint:
        case "chat":
            return chat_prompt(fields)
        case "completions":
            return text_prompt(fields, "prompt")
        case "embeddings":
            # All inputs are one request's work, and its answer is one.
            return text_prompt(fields, "input")._replace(choices=1)
        case "responses":
            if boolean(fields, "background"):
                raise ApiError(400, "unsupported_parameter", "responses in the background are not served", "background")
            return response_prompt(fields)
        case _:
            assert_never(endpoint)


def _choices(endpoint: Endpoint, fields: Mapping[str, Raw]) -> int:
    n = 1 if endpoint in ("embeddings", "responses") else count(fields, "n") or 1
    if n > MOST_CHOICES:
        raise wrong("n", f"at most {MOST_CHOICES}")
    return n


def _max_tokens(endpoint: Endpoint, fields: Mapping[str, Raw]) -> int | None:
    match endpoint:
        case "chat":
            older = count(fields, "max_tokens")
            return count(fields, "max_completion_tokens") or older
        case "completions":
            return count(fields, "max_tokens") or COMPLETION_MAX_TOKENS
        case "embeddings":
            return 1  # the answer
        case "responses":
            return count(fields, "max_output_tokens")
        case _:
            assert_never(endpoint)


__all__ = ["Ask", "Endpoint", "field", "parse", "rewritten"]
