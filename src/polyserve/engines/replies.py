"""What goes back to a client of the emulated engine: events as tokens are made, or the answer in one piece."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from polyserve.engines.bodies import Asked
from polyserve.engines.emulator import Answer
from polyserve.engines.words import word, word_id


class GoneError(Exception):
    """The client has left."""


class Reply:
    """What goes to one client: its answers as they are made."""

    def __init__(self, asked: Asked, request_id: str, model: str) -> None:
        self.asked, self.model = asked, model
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{request_id}"
        self.created = int(time.time())
        self.open = len(asked.answers)
        self._parts: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        head = {
            "id": self.id,
            "object": "chat.completion.chunk" if asked.chat else "text_completion",
            "created": self.created,
            "model": model,
        }
        self._head = b"data: " + msgspec.json.encode(head)[:-1]
        # All of an event but its word is the same for every token of a choice: encoded once.
        text = b'"delta":{"content":"' if asked.chat else b'"text":"'
        self._heads = [b'%b,"choices":[{"index":%d,%b' % (self._head, a.index, text) for a in asked.answers]
        close = b'"}' if asked.chat else b'"'
        self._tail = close + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._last = {
            reason: close + b',"logprobs":null,"finish_reason":"%b"}]}\n\n' % reason.encode()
            for reason in {answer.reason for answer in asked.answers}
        }

    def token(self, answer: Answer) -> None:
        """Take an answer's newest token; one event each, and the end of the stream after the last."""
        if self.asked.stream:
            self._put(self._event(answer))
        if answer.ended:
            self.open -= 1
            if not self.open:
                self._put(self._end() if self.asked.stream else b"")

    def _event(self, answer: Answer) -> bytes:
        position = answer.made - 1
        tail = self._last[answer.reason] if answer.ended else self._tail
        if self.asked.token_ids:
            tail = tail.replace(b',"logprobs"', b',"token_ids":[%d],"logprobs"' % word_id(answer.voice, position), 1)
        event = b"".join((self._heads[answer.index], word(answer.voice, position), tail))
        if self.asked.chat and position == answer.job.resume_from:
            return self._role(answer.index) + event
        return event

    def _role(self, index: int) -> bytes:
        choice = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
        return self._head + b',"choices":[' + choice + b"]}\n\n"

    def _end(self) -> bytes:
        if not self.asked.include_usage:
            return b"data: [DONE]\n\n"
        return self._head + b',"choices":[],"usage":' + msgspec.json.encode(self.usage()) + b"}\n\ndata: [DONE]\n\n"

    def usage(self) -> dict[str, int]:
        made = sum(answer.output_tokens - answer.delivered for answer in self.asked.answers)
        prompt = self.asked.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def whole(self) -> bytes:
        """The answer in one piece."""
        choices: list[dict[str, Any]] = []
        for answer in self.asked.answers:
            made = range(answer.delivered, answer.output_tokens)
            text = b"".join([word(answer.voice, position) for position in made]).decode()
            choice: dict[str, Any] = {"index": answer.index, "logprobs": None, "finish_reason": answer.reason}
            if self.asked.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            if self.asked.token_ids:
                choice["token_ids"] = [word_id(answer.voice, position) for position in made]
            choices.append(choice)
        kind = "chat.completion" if self.asked.chat else "text_completion"
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return msgspec.json.encode({**about, "choices": choices, "usage": self.usage()})

    def _put(self, data: bytes) -> None:
        self._parts.append(data)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self, gone: asyncio.Future[Any]) -> bytes:
        """What has come since the last call, at least one event; raises `GoneError` when the client has."""
        while not self._parts:
            if gone.done():
                raise GoneError
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)
