"""An answer that an engine did not bring to its end, and that goes on at another from what its client has already.

What a client has got is kept until its answer is whole: text completions go on from their prompt with the text so far
behind it, chats from a message of the assistant that was begun. The next engine's part is made to look like one with
the part before: same id and time of creation, one count of tokens. What an answer in two parts could not keep (calls
that would be cut in two, positions and grammars that would start anew) is not continued: `obstacle` says what.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

from polyserve.serve.ask import Ask, field
from polyserve.serve.sse import Usage, event_payload

# A stream that is kept is read, and only its text kept, whenever so many bytes have gathered: some 300 tokens.
FOLDED_BYTES = 64 * 1024

# Fields that an answer in two parts could not keep, and the values with which they ask for nothing.
_OBSTACLES: dict[str, tuple[object, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "prompt_logprobs": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None,),
    "use_beam_search": (None, False),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "structural_tag": (None,),
    "truncate_prompt_tokens": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "audio": (None,),
}
_ID = re.compile(rb'"id"\s*:\s*"(?:[^"\\]|\\.)*"')
_CREATED = re.compile(rb'"created"\s*:\s*\d+(?=\s*[,}])')
_SEPARATOR = re.compile(rb"\r?\n\r?\n")
DONE = b"data: [DONE]\n\n"


class NotContinuableError(Exception):
    """What the client has of its answer cannot be gone on from; the message says why."""


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None


_chunk = msgspec.json.Decoder(_Chunk)
_head = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True, slots=True)
class Begun:
    """What a client has of its answer."""

    text: str
    tokens: int
    finish_reason: str | None  # where the last token is there
    counted: bool  # whether it has been told the usage
    first: bytes  # payload of its first event

    def left(self, ask: Ask) -> int | None:
        """Tokens that may still come; None: no bound."""
        if self.finish_reason is not None:
            return 0
        return None if ask.max_tokens is None else max(ask.max_tokens - self.tokens, 0)

    def complete(self, ask: Ask) -> bool:
        """Whether nothing is missing but the end of the stream."""
        return self.left(ask) == 0 and (self.counted or (ask.stream and not ask.include_usage))


class Kept:
    """What the client of one request has got, or will get in one piece."""

    __slots__ = ("_ask", "_counted", "_finish_reason", "_first", "_fold", "_size", "_texts", "obstacle", "pieces")

    def __init__(self, ask: Ask) -> None:
        self.obstacle = obstacle(ask)
        self._ask = ask
        self._fold = ask.stream  # a whole answer is needed as it came
        self.clear()

    def __repr__(self) -> str:
        return f"<{len(self.pieces)} pieces kept, obstacle {self.obstacle}>"

    def clear(self) -> None:
        """Forget it all: the answer is made again."""
        self.pieces: list[bytes] = []
        self._size = 0
        self._texts: list[str] = []
        self._first: bytes | None = None
        self._finish_reason: str | None = None
        self._counted = False

    def add(self, piece: bytes) -> None:
        """Keep whole events; runs for every chunk of every stream."""
        if self._fold and self.obstacle is not None:
            self.pieces = [piece]  # which says whether the answer had come to its end
            return
        self.pieces.append(piece)
        self._size += len(piece)
        if self._size > FOLDED_BYTES and self._fold:
            self._read()
            self.pieces.clear()
            self._size = 0

    def begun(self, tokens: int) -> Begun | None:
        """What there is, `tokens` long; None: nothing that matters. Raises `NotContinuableError`."""
        if not self.pieces and self._first is None:
            return None
        try:
            if self._fold:
                self._read()
                self.pieces.clear()
                self._size = 0
            else:
                self._texts.clear()
                self._read()
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise NotContinuableError(f"what it said is no completion: {error}") from None
        text = "".join(self._texts)
        if self._first is None or not (text or self._finish_reason or self._fold):
            return None
        tokens = tokens if text or self._finish_reason else 0  # tokens without text are made again
        begun = Begun(text, tokens, self._finish_reason, self._counted, self._first)
        if self.obstacle is not None and (self._ask.n > 1 or not begun.complete(self._ask)):
            raise NotContinuableError(f"an answer with {self.obstacle!r} cannot go on elsewhere")
        return begun

    def _read(self) -> None:
        for event in _SEPARATOR.split(b"".join(self.pieces)):
            payload = event_payload(event)
            if payload is None or payload == b"[DONE]":
                continue
            chunk = _chunk.decode(payload)
            if self._first is None:
                self._first = payload
            self._counted = self._counted or (chunk.usage is not None and not chunk.choices)
            for choice in chunk.choices:
                self._finish_reason = choice.finish_reason or self._finish_reason
                if self.obstacle is None:
                    self._texts.append(self._text(choice))

    def _text(self, choice: _Choice) -> str:
        if self._ask.endpoint != "chat":
            return choice.text or ""
        delta = choice.delta or {}
        for key, value in delta.items():
            if value and key not in ("role", "content"):  # reasoning, a refusal, a call that nobody announced
                raise NotContinuableError(f"an answer with {key!r} cannot go on elsewhere")
        content = delta.get("content") or ""
        if not isinstance(content, str):
            raise NotContinuableError("an answer that is no text cannot go on elsewhere")
        return content


def obstacle(ask: Ask) -> str | None:
    """The field of a request that an answer in two parts could not keep; None: it can be continued."""
    if ask.endpoint not in ("chat", "completions"):
        return ask.endpoint
    if ask.n > 1:
        return "n"
    for key in ask.fields.keys() & _OBSTACLES.keys():
        value = field(ask.fields, key)
        harmless = any(type(value) is type(none) and value == none for none in _OBSTACLES[key])  # 0 is not false here
        if not harmless and not (key == "tools" and field(ask.fields, "tool_choice") == "none"):
            return key
    if (field(ask.fields, "stream_options") or {}).get("continuous_usage_stats"):
        return "continuous_usage_stats"
    if field(ask.fields, "add_generation_prompt") is False and not field(ask.fields, "continue_final_message"):
        return "add_generation_prompt"
    return None


def prompt_ids(ask: Ask) -> list[int] | None:
    """The prompt of a completion where it came as token ids: then the text so far has to be tokens, too."""
    if ask.endpoint != "completions" or ask.exact_prompt_tokens is None:
        return None
    prompt = field(ask.fields, "prompt")
    return list(prompt[0]) if isinstance(prompt[0], list) else list(prompt)


def changes(ask: Ask, begun: Begun, ids: Sequence[int] = ()) -> dict[str, object]:
    """The fields that make an engine go on; `ids` are the tokens of the text where the prompt is token ids."""
    left = begun.left(ask)
    changed: dict[str, object] = _chat(ask, begun.text) if ask.endpoint == "chat" else _prompt(ask, begun.text, ids)
    if left is not None:
        key = "max_completion_tokens" if "max_completion_tokens" in ask.fields else "max_tokens"
        changed[key] = max(left, 1)
    least = field(ask.fields, "min_tokens")
    if isinstance(least, int):
        changed["min_tokens"] = 0 if left == 0 else max(least - begun.tokens, 0)
    return changed


def _chat(ask: Ask, text: str) -> dict[str, object]:
    messages = msgspec.json.decode(ask.fields["messages"], type=list[Raw])
    if field(ask.fields, "continue_final_message"):
        last = msgspec.json.decode(messages.pop(), type=dict[str, Any])
        content = last.get("content") or ""
        last["content"] = [*content, {"type": "text", "text": text}] if isinstance(content, list) else content + text
        begun = Raw(msgspec.json.encode(last))
    else:
        begun = Raw(msgspec.json.encode({"role": "assistant", "content": text}))
    return {"messages": [*messages, begun], "continue_final_message": True, "add_generation_prompt": False}


def _prompt(ask: Ask, text: str, ids: Sequence[int]) -> dict[str, object]:
    before = prompt_ids(ask)
    if before is not None:
        return {"prompt": [*before, *ids]}
    prompt = field(ask.fields, "prompt")
    return {"prompt": (prompt[0] if isinstance(prompt, list) else prompt) + text}


class Seam:
    """Makes what another engine says look like one answer with what the client has."""

    def __init__(self, begun: Begun, ask: Ask) -> None:
        self.closing = begun.left(ask) == 0  # all tokens are there: only the usage is wanted
        self.usage: Usage | None = None  # of both parts together
        self._begun = begun
        self._ask = ask
        self._swaps: list[tuple[bytes, bytes]] | None = None

    def mend(self, piece: bytes) -> bytes:
        """Events of the next part, under the id of the first."""
        if self.closing or not piece:
            return b""
        if self._swaps is None:
            pairs = [(each.search(piece), each.search(self._begun.first)) for each in (_ID, _CREATED)]
            self._swaps = [(theirs[0], ours[0]) for theirs, ours in pairs if theirs and ours and theirs[0] != ours[0]]
        for theirs, ours in self._swaps:
            piece = piece.replace(theirs, ours)
        return piece

    def ending(self) -> bytes:
        """What a client misses whose last token came without a word that it was the last."""
        if not self.closing or self._begun.finish_reason is not None:
            return b""
        nothing: dict[str, object] = {"delta": {}} if self._ask.endpoint == "chat" else {"text": ""}
        choice = {"index": 0, **nothing, "finish_reason": "length"}
        return self._event({"choices": [choice]})

    def count(self, payload: bytes | None) -> bytes:
        """The usage event of both parts, where the client is to see one; takes in the engine's."""
        try:
            told = _head.decode(payload or b"{}").get("usage")
        except msgspec.MsgspecError:
            told = None
        if not isinstance(told, Mapping):
            return b""
        try:
            here = msgspec.convert(told, Usage)
        except msgspec.MsgspecError:
            return b""
        before = self._begun.tokens
        prompt, made = max(here.prompt_tokens - before, 0), before + (0 if self.closing else here.completion_tokens)
        self.usage = Usage(prompt, made)
        if self._ask.stream and (not self._ask.include_usage or self._begun.counted):
            return b""
        counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return self._event({"choices": [], "usage": {**told, **counts}})

    def _event(self, values: dict[str, object]) -> bytes:
        first = _head.decode(self._begun.first)
        named = {key: first[key] for key in ("id", "object", "created", "model") if key in first}
        return b"data: " + msgspec.json.encode({**named, **values}) + b"\n\n"
