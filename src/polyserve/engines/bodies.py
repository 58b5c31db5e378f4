"""Request bodies of the emulated engine: vLLM's fields, checked, and turned into what the engine needs."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from polyserve.core.types import Slo
from polyserve.engines.words import (
    MOST_CHOICES,
    OWN,
    Prompt,
    count_tokens,
    digest,
    output_length,
    read_ids,
    read_text,
    voice,
)

# What vLLM's completions make when nobody says; chats go on to the end of the context.
COMPLETION_TOKENS = 16
T = TypeVar("T")
TokenId = Annotated[int, Meta(ge=0, lt=OWN << 1)]
Count = Annotated[int, Meta(ge=1, lt=1 << 31)]


class BadRequestError(Exception):
    """A request that cannot be served, as OpenAI's and vLLM's clients read it."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, kind: str = "BadRequestError"
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.kind = param, status, kind

    def body(self) -> bytes:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return msgspec.json.encode({"error": error})


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Common(msgspec.Struct, kw_only=True):
    """What both kinds of completions take. Sampling is checked for its types and has no effect."""

    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    ignore_eos: bool = False
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    seed: int | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    priority: int = 0
    vllm_xargs: dict[str, Any] | None = None


class Completion(Common, kw_only=True):
    prompt: str | list[TokenId | str | list[TokenId]]
    echo: Literal[False] | None = None
    suffix: None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


class Chat(Common, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True


class Tokenize(msgspec.Struct):
    prompt: str | None = None
    messages: list[Message] | None = None

    def texts(self) -> list[bytes]:
        """What is to be counted; raises `BadRequestError` when it is not one of the two."""
        if (self.prompt is None) == (self.messages is None):
            raise BadRequestError("prompt: wants this or messages", "prompt")
        if self.prompt is not None:
            return [self.prompt.encode()]
        return [_text(message, number) for number, message in enumerate(self.messages or ())]


class Pace(msgspec.Struct):
    pace_s: Annotated[float, Meta(gt=0)] | None  # None: no bound


@dataclass(frozen=True, slots=True)
class Wanted:
    """One answer to make."""

    index: int
    voice: int
    prompt_tokens: int
    delivered: int
    output_tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that can be served."""

    chat: bool
    stream: bool
    include_usage: bool
    token_ids: bool
    slo: Slo | None
    answers: tuple[Wanted, ...]
    prompt_tokens: int  # of all prompts, what was delivered before included


def decode(body: bytes, kind: type[T]) -> T:
    """The body as `kind`; raises `BadRequestError` naming the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        field = re.sub(r"^\$\.?", "", path.rstrip("`"))
        if not field and (missing := re.search(r"missing required field `(\w+)`", message)):
            field = missing[1]
        raise BadRequestError(f"{field}: {message}" if field else message, field or None) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None


def read_completion(body: bytes, model: str, context: int, seed: int) -> Asked:
    """A `/v1/completions` body; raises `BadRequestError`."""
    asked = decode(body, Completion)
    limit = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
    return _asked(asked, _prompts(asked.prompt, _seed(asked, seed)), limit, model, context, seed, chat=False)


def read_chat(body: bytes, model: str, context: int, seed: int) -> Asked:
    """A `/v1/chat/completions` body; raises `BadRequestError`."""
    asked = decode(body, Chat)
    if asked.continue_final_message and (asked.add_generation_prompt or asked.messages[-1].role != "assistant"):
        raise BadRequestError(
            "continue_final_message: wants add_generation_prompt false and a last message of the assistant",
            "continue_final_message",
        )
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    prompt = chat_prompt(asked.messages, _seed(asked, seed))
    return _asked(asked, [prompt], limit, model, context, seed, chat=True)


def chat_prompt(messages: list[Message], seed: int) -> Prompt:
    """A chat as one prompt: only its texts count. An answer that the last message began is continued."""
    texts = [_text(message, number) for number, message in enumerate(messages)]
    turns = [b"%b\0%b\0" % (message.role.encode(), text) for message, text in zip(messages, texts, strict=True)]
    earlier = sum(map(count_tokens, texts[:-1]))
    if messages[-1].role != "assistant":
        return Prompt(earlier + count_tokens(texts[-1]), digest(b"".join(turns)))
    head = b"".join(turns[:-1])
    last = read_text(texts[-1], seed, lambda base: head + (b"assistant\0%b\0" % base if base else b""))
    return dataclasses.replace(last, tokens=earlier + last.tokens)


def _text(message: Message, number: int) -> bytes:
    content = message.content or ""
    if isinstance(content, str):
        return content.encode()
    texts = []
    for at, part in enumerate(content):
        text = part.get("text")
        if part.get("type") != "text" or not isinstance(text, str):
            field = f"messages[{number}].content[{at}]"
            raise BadRequestError(f"{field}: this engine reads text parts only", field)
        texts.append(text)
    return "".join(texts).encode()


def _seed(asked: Common, seed: int) -> int:
    return seed if asked.seed is None else asked.seed


def _prompts(prompt: str | list[Any], seed: int) -> list[Prompt]:
    """The prompts of a completion: one text, one list of token ids, or a list of either."""
    if isinstance(prompt, str):
        return [read_text(prompt.encode(), seed)]
    if not prompt:
        raise BadRequestError("prompt: is empty", "prompt")
    if all(isinstance(part, int) for part in prompt):
        return [read_ids(prompt, seed)]
    if any(isinstance(part, int) for part in prompt):
        raise BadRequestError("prompt: token ids and prompts cannot be mixed", "prompt")
    return [read_text(p.encode(), seed) if isinstance(p, str) else read_ids(p, seed) for p in prompt]


def _asked(
    asked: Common, prompts: list[Prompt], limit: int | None, model: str, context: int, seed: int, chat: bool
) -> Asked:
    if asked.model not in (None, model):
        raise BadRequestError(f"The model `{asked.model}` does not exist.", "model", 404, "NotFoundError")
    if asked.stream_options is not None and not asked.stream:
        raise BadRequestError("stream_options: only with stream true", "stream_options")
    if limit is not None and asked.min_tokens > limit:
        raise BadRequestError(f"min_tokens: {asked.min_tokens} is more than max_tokens", "min_tokens")
    xargs = asked.vllm_xargs or {}
    told = _number(xargs, "output_tokens")
    answers: list[Wanted] = []
    for prompt in prompts:
        room = _room(prompt, limit, context)
        for choice in range(asked.n or 1):
            own = voice(prompt.identity, _seed(asked, seed), choice if prompt.choice is None else prompt.choice)
            output, reason = _length(asked, own, prompt.delivered, room, told)
            tokens = max(1, prompt.tokens)
            answers.append(Wanted(len(answers), own, tokens, prompt.delivered, prompt.delivered + output, reason))
    return Asked(
        chat=chat,
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        token_ids=bool(asked.return_token_ids),
        slo=_slo(xargs),
        answers=tuple(answers),
        prompt_tokens=sum(max(1, p.tokens) + p.delivered for p in prompts),
    )


def _room(prompt: Prompt, limit: int | None, context: int) -> int:
    """Most tokens the answer to a prompt may have; raises `BadRequestError` when the context does not hold them."""
    given = max(1, prompt.tokens) + prompt.delivered
    asked = 1 if limit is None else limit
    if given + asked > context:
        raise BadRequestError(
            f"This model's maximum context length is {context} tokens. However, you requested {given + asked} tokens "
            f"({given} in the messages, {asked} in the completion). Please reduce the length of the messages or "
            "completion.",
            "max_tokens" if given < context else "prompt",
        )
    return context - given if limit is None else limit


def _length(asked: Common, voice: int, delivered: int, room: int, told: float | None) -> tuple[int, str]:
    """How many tokens to make, and why no more: of the whole answer's length, told or drawn, what is left."""
    if asked.ignore_eos:
        return room, "length"
    whole = output_length(voice) if told is None else int(told)
    drawn = max(whole - delivered, asked.min_tokens, 1)
    return (drawn, "stop") if drawn < room else (room, "length")


def _slo(xargs: dict[str, Any]) -> Slo | None:
    ttft_ms, tpot_ms = _number(xargs, "slo_ttft_ms"), _number(xargs, "slo_tpot_ms")
    if ttft_ms is None and tpot_ms is None:
        return None
    if ttft_ms is None or tpot_ms is None:
        absent = "vllm_xargs.slo_" + ("ttft_ms" if ttft_ms is None else "tpot_ms")
        raise BadRequestError(f"{absent}: is missing beside the other one", absent)
    return Slo(ttft_ms / 1e3, tpot_ms / 1e3)


def _number(xargs: dict[str, Any], name: str) -> float | None:
    value = xargs.get(name)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise BadRequestError(f"vllm_xargs.{name}: wants a positive number, not {value!r}", f"vllm_xargs.{name}")
    return number
