"""Errors as OpenAI clients know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from polyserve.core.types import Limit, Refuse, RefuseCode, Request

Headers = list[tuple[bytes, bytes]]


@dataclass(eq=False)  # not frozen: whoever passes an exception on may set its traceback
class ApiError(Exception):
    """What a client is told."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": _type(self.status),
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    @property
    def headers(self) -> Headers:
        """The headers that tell a client whether and when to try again."""
        headers: Headers = [(b"www-authenticate", b"Bearer")] if self.status == 401 else []
        if self.retry_after_s is not None:
            # Seconds are whole, and never 0: a client that comes back at once meets the same refusal.
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
            headers.append((b"retry-after-ms", b"%d" % max(1, math.ceil(self.retry_after_s * 1e3))))
        if self.status < 500 and self.status not in (408, 429):
            headers.append((b"x-should-retry", b"false"))
        return headers

    @property
    def event(self) -> bytes:
        """The same as an event, for a stream that has begun."""
        return b"data: " + self.body + b"\n\n"


def _type(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 404:
            return "not_found_error"
        case 429:
            return "rate_limit_error"
        case _:
            return "invalid_request_error" if status < 500 else "server_error"


_REFUSALS: dict[RefuseCode, tuple[int, str]] = {
    "overloaded": (429, "no instance can serve this request in time"),
    "slo_infeasible": (
        400,
        "the pace is tighter than every tier, or even an idle instance would be late with this prompt; "
        "ask for a looser TTFT or TPOT",
    ),
    "context_length_exceeded": (
        400,
        "the prompt (about {prompt} tokens) and the answer (up to {wanted}) are longer than the context of the model",
    ),
    "no_instances": (503, "no instance is ready"),
    "queue_full": (429, "the queue of this tier is full"),
    "queue_timeout": (429, "the request waited longer than the queue allows"),
    "rate_limit_exceeded": (429, "this key's tenant is over its bound"),
}
_LIMITS: dict[Limit, str] = {
    "requests": "requests per second",
    "tokens": "tokens per second",
    "concurrency": "requests at once",
}
# What a client that may retry waits when the core cannot tell: one look at the fleet's tails.
_UNKNOWN_RETRY_S = 1.0


def refusal(refuse: Refuse, request: Request) -> ApiError:
    """What the client is told of a request that the core refused."""
    status, message = _REFUSALS[refuse.code]
    if refuse.code == "context_length_exceeded":
        message = message.format(prompt=request.prompt_tokens, wanted=request.max_tokens or 1)
    if refuse.tier is not None:
        message = f"{message} (tier {refuse.tier!r})"
    if refuse.limit is not None:
        message = f"{message} of {_LIMITS[refuse.limit]}"
    if status == 400:
        return ApiError(status, refuse.code, message)
    retry = _UNKNOWN_RETRY_S if refuse.retry_after_s is None else refuse.retry_after_s
    return ApiError(status, refuse.code, message, retry_after_s=retry)
