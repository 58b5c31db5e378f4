"""How many tokens a prompt has, before an engine says so: bytes per token, learned from what engines report.

Pictures and the like count as so many tokens each, learned the same way.
"""

from __future__ import annotations

from polyserve.serve.ask import Ask

# English prose in a byte-pair vocabulary of about 100,000.
FIRST_BYTES_PER_TOKEN = 4.0
# Prompt tokens after which an observation counts half: a few hundred requests of conversation.
HALF_LIFE_TOKENS = 200_000.0
PRIOR_TOKENS = 2_000.0
# A picture of 1024 by 1024 pixels in OpenAI's count; models differ widely, and usage tells soon.
FIRST_TOKENS_PER_MEDIUM = 765.0
MEDIUM_LEARNING = 0.2


class TokenEstimator:
    """Bytes per token of one model's prompts, weighted by length, older ones less."""

    def __init__(self) -> None:
        self._bytes = PRIOR_TOKENS * FIRST_BYTES_PER_TOKEN
        self._tokens = PRIOR_TOKENS
        self.tokens_per_medium = FIRST_TOKENS_PER_MEDIUM

    def __repr__(self) -> str:
        return f"<{self.bytes_per_token:.2f} bytes per token>"

    @property
    def bytes_per_token(self) -> float:
        return self._bytes / self._tokens

    def estimate(self, ask: Ask) -> int:
        """Prompt tokens of a request; exact where it came as token ids."""
        if ask.exact_prompt_tokens is not None:
            return max(1, ask.exact_prompt_tokens)
        media = ask.prompt.media * self.tokens_per_medium
        return max(1, round(ask.prompt_bytes / self.bytes_per_token + media))

    def learn(self, ask: Ask, prompt_tokens: int) -> None:
        """Take in what an engine counted."""
        if ask.exact_prompt_tokens is not None or prompt_tokens <= 0 or ask.prompt_bytes <= 0:
            return
        if ask.prompt.media:
            each = (prompt_tokens - ask.prompt_bytes / self.bytes_per_token) / ask.prompt.media
            self.tokens_per_medium += MEDIUM_LEARNING * (max(0.0, each) - self.tokens_per_medium)
            return
        kept = 0.5 ** (prompt_tokens / HALF_LIFE_TOKENS)
        self._bytes = self._bytes * kept + ask.prompt_bytes
        self._tokens = self._tokens * kept + prompt_tokens
