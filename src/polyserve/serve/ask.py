"""One request body, parsed once: what a decision needs is read, everything else stays the bytes it was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import Raw

from polyserve.serve.errors import ApiError

Endpoint = Literal["chat", "completions"]

# `/v1/completions` without max_tokens means 16 in OpenAI's API, and so in vLLM.
COMPLETION_MAX_TOKENS = 16
MOST_CHOICES = 128
# Pictures and sound travel as base64 inside messages; their length says nothing about tokens.
_INLINE_DATA = re.compile(rb";base64,[A-Za-z0-9+/=\\]*")

_fields = msgspec.json.Decoder(dict[str, Raw])
_any = msgspec.json.Decoder()
_integer = msgspec.json.Decoder(int | None)
_boolean = msgspec.json.Decoder(bool | None)
_string = msgspec.json.Decoder(str | None)
_object = msgspec.json.Decoder(dict[str, Any] | None)
_prompts = msgspec.json.Decoder(list[str | int | list[int]])


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
    prompt_bytes: int  # of text whose tokens are to be estimated
    exact_prompt_tokens: int | None  # of prompts given as token ids
    body: Mapping[str, Any]  # the fields that may ask for a pace, parsed

    @property
    def streamable(self) -> bool:
        """Whether the engine can be asked for a stream whatever the client wants."""
        return not ("best_of" in self.fields or "use_beam_search" in self.fields)


def parse(endpoint: Endpoint, raw: bytes) -> Ask:
    """Read a body; raises `ApiError` naming the field that is at fault."""
    try:
        fields = _fields.decode(raw)
    except msgspec.ValidationError:
        raise ApiError(400, "invalid_json", "the body is not a JSON object") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    model = _value(fields, "model", _string, "a string")
    if model is None:
        raise _missing("model")
    options = _value(fields, "stream_options", _object, "an object") or {}
    n = _count(fields, "n") or 1
    if n > MOST_CHOICES:
        raise _wrong("n", f"at most {MOST_CHOICES}")
    prompts, prompt_bytes, exact = _chat_prompt(fields) if endpoint == "chat" else _completion_prompt(fields)
    return Ask(
        endpoint=endpoint,
        raw=raw,
        fields=fields,
        model=model,
        stream=bool(_value(fields, "stream", _boolean, "true or false")),
        include_usage=options.get("include_usage") is True,
        n=n * prompts,
        max_tokens=_max_tokens(endpoint, fields),
        prompt_bytes=prompt_bytes,
        exact_prompt_tokens=exact,
        body={
            key: _value(fields, key, _string if key == "service_tier" else _object, "a string or an object")
            for key in ("nvext", "vllm_xargs", "service_tier")
            if key in fields
        },
    )


def rewritten(fields: Mapping[str, Raw], changes: Mapping[str, object]) -> bytes:
    """The body with some top-level fields replaced (None: left out); all other values keep their bytes."""
    changed = dict(fields)
    for key, value in changes.items():
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = Raw(msgspec.json.encode(value))
    return msgspec.json.encode(changed)


def field(fields: Mapping[str, Raw], key: str) -> Any:
    """One field's value, None where it is missing."""
    return _any.decode(fields[key]) if key in fields else None


def _value(fields: Mapping[str, Raw], key: str, decoder: msgspec.json.Decoder[Any], what: str) -> Any:
    if key not in fields:
        return None
    try:
        return decoder.decode(fields[key])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _wrong(key, what) from None


def _count(fields: Mapping[str, Raw], key: str) -> int | None:
    value: int | None = _value(fields, key, _integer, "a whole number of at least 1")
    if value is not None and not 1 <= value < 2**31:
        raise _wrong(key, "a whole number of at least 1")
    return value


def _max_tokens(endpoint: Endpoint, fields: Mapping[str, Raw]) -> int | None:
    if endpoint == "completions":
        return _count(fields, "max_tokens") or COMPLETION_MAX_TOKENS
    older = _count(fields, "max_tokens")
    return _count(fields, "max_completion_tokens") or older


def _chat_prompt(fields: Mapping[str, Raw]) -> tuple[int, int, int | None]:
    """(prompts, bytes of text, exact tokens) of a chat."""
    if "messages" not in fields:
        raise _missing("messages")
    text = bytes(fields["messages"])
    if not text.startswith(b"["):
        raise _wrong("messages", "an array of messages")
    if b";base64," in text:
        text = _INLINE_DATA.sub(b"", text)
    return 1, len(text) + (len(bytes(fields["tools"])) if "tools" in fields else 0), None


def _completion_prompt(fields: Mapping[str, Raw]) -> tuple[int, int, int | None]:
    """(prompts, bytes of text, exact tokens) of a completion; several prompts count as one that is their sum."""
    if "prompt" not in fields:
        raise _missing("prompt")
    raw = bytes(fields["prompt"])
    if raw.startswith(b'"'):
        return 1, len(raw) - 2, None
    what = "a string, an array of strings or of token ids"
    prompt: list[Any] | None = _value(fields, "prompt", _prompts, what)
    if not prompt or len({type(one) for one in prompt}) > 1:
        raise _wrong("prompt", what)
    match prompt[0]:
        case int():
            return 1, 0, len(prompt)
        case list():
            return len(prompt), 0, sum(map(len, prompt))
        case _:
            return len(prompt), sum(len(one.encode()) for one in prompt), None


def _wrong(key: str, what: str) -> ApiError:
    return ApiError(400, "invalid_type", f"field {key!r} of the body must be {what}", key)


def _missing(key: str) -> ApiError:
    return ApiError(400, "missing_field", f"field {key!r} of the body is missing", key)
