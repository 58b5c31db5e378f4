"""What a request wants computed before its first token: how much text, how many pictures, how many token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from polyserve.serve.fields import field, missing, read, wrong

# Pictures and sound travel as base64 inside messages; their length says nothing about tokens.
# Two patterns that begin with a literal are found twice as fast as one that is either.
_INLINE_DATA = re.compile(rb";base64,[A-Za-z0-9+/=\\]*")
_SOUND = re.compile(rb'"data"\s*:\s*"[A-Za-z0-9+/=\\]*')
# Parts of a message that are no text, as the chat and responses APIs (and vLLM, for video) call them.
_MEDIUM = re.compile(
    rb'"type"\s*:\s*"(?:image_url|input_image|input_audio|audio_url|video_url|input_video|file|input_file)"'
)
_PROMPT = "a string, an array of strings or of token ids"

_prompts = msgspec.json.Decoder(list[str | int | list[int]])


class Prompt(NamedTuple):
    """The size of a prompt, as far as a body tells it."""

    choices: int  # prompts that are answered each on their own
    text_bytes: int  # of text whose tokens are to be estimated
    exact_tokens: int | None = None  # of prompts given as token ids
    media: int = 0  # pictures and the like
    messages: int = 0  # around which a template puts tokens of its own


def chat_prompt(fields: Mapping[str, Raw]) -> Prompt:
    """Of `/v1/chat/completions`; raises `ApiError`."""
    if "messages" not in fields:
        raise missing("messages")
    if not bytes(fields["messages"]).startswith(b"["):
        raise wrong("messages", "an array of messages")
    return _measured(fields, ("messages", "tools"))


def response_prompt(fields: Mapping[str, Raw]) -> Prompt:
    """Of `/v1/responses`; raises `ApiError`. What an engine keeps of earlier responses is not seen."""
    if "input" in fields and not bytes(fields["input"]).startswith((b"[", b'"')):
        raise wrong("input", "a string or an array of items")
    return _measured(fields, ("input", "instructions", "tools"))


def text_prompt(fields: Mapping[str, Raw], key: str) -> Prompt:
    """Of `/v1/completions` and `/v1/embeddings`; raises `ApiError`. Several prompts count as one that is their sum."""
    if key not in fields:
        raise missing(key)
    raw = bytes(fields[key])
    if raw.startswith(b'"'):
        return Prompt(1, len(raw) - 2)
    prompt: list[Any] | None = read(fields, key, _prompts, _PROMPT)
    if not prompt or len({type(one) for one in prompt}) > 1:
        raise wrong(key, _PROMPT)
    match prompt[0]:
        case int():
            return Prompt(1, 0, len(prompt))
        case list():
            return Prompt(len(prompt), 0, sum(map(len, prompt)))
        case _:
            return Prompt(len(prompt), sum(len(one.encode(errors="replace")) for one in prompt))


def _measured(fields: Mapping[str, Raw], keys: tuple[str, ...]) -> Prompt:
    size = media = messages = 0
    for key in keys:
        if key in fields:
            text = bytes(fields[key])
            if b";base64," in text:
                text = _INLINE_DATA.sub(b"", text)
            if b'"input_audio"' in text:
                text = _SOUND.sub(b"", text)
            if b'"type"' in text:
                media += len(_MEDIUM.findall(text))
            messages += text.count(b'"role"')  # inside of a text the quotes would be escaped
            size += len(text)
    return Prompt(1, size, None, media, messages)


def texts(fields: Mapping[str, Raw], keys: tuple[str, ...]) -> list[str]:
    """The texts of a prompt that a tokenizer is to count: no names of fields, no pictures."""
    return [text for key in keys for text in _texts(field(fields, key))]


# Fields of messages and tools whose strings no template shows to a model.
_UNSEEN = frozenset(("type", "image_url", "input_audio", "audio_url", "video_url", "file", "file_data", "detail", "id"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if key not in _UNSEEN:
                yield from _texts(one)
