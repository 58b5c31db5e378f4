"""An answer that is taken off one engine and goes on at another, from the text that the client has already.

Only for requests without an SLO, which are evicted to make room: their streams are kept until they end, and the engine
that takes them over is given the text so far as the beginning of its answer.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw

from polyserve.core.types import Request
from polyserve.serve.ask import Ask
from polyserve.serve.sse import NotAStreamError, assembled

# What an answer that was begun elsewhere cannot keep: counts and positions would start anew, calls be cut in two.
_UNCONTINUED = ("echo", "suffix", "logprobs", "tools", "functions", "response_format", "continue_final_message")


class Kept:
    """What the client of one stream has got."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def text(self, chat: bool) -> str:
        """The text so far; raises `NotAStreamError`."""
        (choice,) = msgspec.json.decode(assembled(b"".join(self._pieces), chat))["choices"]
        text = choice["message"]["content"] if chat else choice["text"]
        if not isinstance(text, str):
            raise NotAStreamError("an answer without text")
        return text


def kept_for(ask: Ask, request: Request) -> Kept | None:
    """Where to keep a stream that may be evicted; None for those that are not, or cannot be continued."""
    if request.slo is not None or not ask.stream or ask.n > 1 or ask.include_usage:
        return None
    if ask.exact_prompt_tokens is not None or any(key in ask.fields for key in _UNCONTINUED):
        return None
    return Kept()


def changes(ask: Ask, text: str, tokens: int) -> dict[str, object]:
    """The fields that make an engine go on after `text`, which is `tokens` long."""
    changed: dict[str, object] = {}
    if ask.endpoint == "chat":
        messages = msgspec.json.decode(ask.fields["messages"], type=list[Raw])
        begun = Raw(msgspec.json.encode({"role": "assistant", "content": text}))
        changed = {
            "messages": [*messages, begun],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }
    else:
        changed["prompt"] = msgspec.json.decode(ask.fields["prompt"], type=str) + text
    if ask.max_tokens is not None:
        key = "max_completion_tokens" if "max_completion_tokens" in ask.fields else "max_tokens"
        changed[key] = max(1, ask.max_tokens - tokens)
    return changed
