"""A model's own tokenizer, beside the loop, where an estimate of a prompt's length is not good enough.

An estimate from bytes is off by a tenth or so. For a short prompt that is a millisecond of prefill; for a long one it
is what its TTFT hangs on, and near the end of the context it is the verdict. Only those are tokenized, in a thread:
`encode_batch_fast` lets go of the interpreter's lock, so streams go on meanwhile (`encode` does not).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from polyserve.serve.ask import Ask
from polyserve.serve.estimate import TokenEstimator
from polyserve.serve.prompt import texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A tenth of this many prompt tokens takes an 8B model on one H200 some 7 ms: below, an estimate does.
LONG_TOKENS = 2048
# Estimates are within this of the truth; what is within it of the context's end is counted.
DOUBT = 0.5
# Prompts so much longer than the context are refused without being counted.
HOPELESS = 4
# Prompts that wait for the thread, and how long one waits, before the estimate has to do.
MOST_WAITING = 64
PATIENCE_S = 1.0
# What a template puts around a message, as ChatML does: two markers, the role and a line break.
FIRST_TOKENS_PER_MESSAGE = 4.0
LEARNING = 0.1

_KEYS = {
    "chat": ("messages", "tools"),
    "completions": ("prompt",),
    "embeddings": ("input",),
    "responses": ("input", "instructions", "tools"),
}


class TokenizerError(ValueError):
    """A file that is no tokenizer; the message says why in one line."""


def tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; raises `TokenizerError`."""
    from tokenizers import Tokenizer  # slow to import, and most gateways have none

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path} is no tokenizer.json: {' '.join(str(error).split())}") from None


class PromptCounter:
    """Prompt tokens of one model's requests: estimated, or counted where it matters."""

    def __init__(self, estimator: TokenEstimator, own: Tokenizer | None, context_tokens: int) -> None:
        self._estimator = estimator
        self._tokenizer = own
        self._context = context_tokens
        self._thread = None if own is None else ThreadPoolExecutor(1, "tokenizer")
        self._waiting = 0
        self.tokens_per_message = FIRST_TOKENS_PER_MESSAGE
        self.counted = 0  # prompts, so far

    def __repr__(self) -> str:
        return f"<{self.counted} prompts counted, {self._waiting} waiting>"

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def tokens(self, ask: Ask) -> int:
        """Prompt tokens of a request, as well as it pays to know them."""
        estimate = self._estimator.estimate(ask)
        if self._tokenizer is None or not self._worth(ask, estimate) or self._waiting >= MOST_WAITING:
            return estimate
        counted = await self._count(ask)
        if counted is None:
            return estimate
        ask.counted_tokens = counted
        return max(1, round(counted + self._around(ask)))

    def learn(self, ask: Ask, prompt_tokens: int) -> None:
        """Take in what an engine counted."""
        self._estimator.learn(ask, prompt_tokens)
        messages = ask.prompt.messages
        if ask.counted_tokens is not None and messages and not ask.prompt.media:
            each = max(0.0, (prompt_tokens - ask.counted_tokens) / messages)
            self.tokens_per_message += LEARNING * (each - self.tokens_per_message)

    def _worth(self, ask: Ask, estimate: int) -> bool:
        if ask.prompt.exact_tokens is not None or not ask.prompt.text_bytes or estimate > HOPELESS * self._context:
            return False
        wanted = ask.max_tokens or 1
        in_doubt = wanted < self._context <= estimate * (1 + DOUBT) + wanted
        return estimate >= LONG_TOKENS or in_doubt

    def _around(self, ask: Ask) -> float:
        """Tokens that no text shows: of the template, and of pictures."""
        media = ask.prompt.media * self._estimator.tokens_per_medium
        return ask.prompt.messages * self.tokens_per_message + media

    async def _count(self, ask: Ask) -> int | None:
        assert self._thread is not None, "there is a tokenizer"
        self._waiting += 1
        try:
            counting = asyncio.get_running_loop().run_in_executor(self._thread, self._count_now, ask)
            async with asyncio.timeout(PATIENCE_S):
                counted = await counting
        except TimeoutError:
            return None
        finally:
            self._waiting -= 1
        self.counted += 1
        return counted

    def _count_now(self, ask: Ask) -> int:
        assert self._tokenizer is not None, "there is a tokenizer"
        text = "\n".join(texts(ask.fields, _KEYS[ask.endpoint]))
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=ask.endpoint == "completions")
        return len(encoding)
