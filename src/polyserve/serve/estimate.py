"""How many tokens a prompt has, before an engine says so: bytes per token, learned from what engines report."""

from __future__ import annotations

from polyserve.serve.ask import Ask

# English prose in a byte-pair vocabulary of about 100,000.
FIRST_BYTES_PER_TOKEN = 4.0
# Prompt tokens after which an observation counts half: a few hundred requests of conversation.
HALF_LIFE_TOKENS = 200_000.0
PRIOR_TOKENS = 2_000.0


class TokenEstimator:
    """Bytes per token of one model's prompts, weighted by length, older ones less."""

    def __init__(self) -> None:
        self._bytes = PRIOR_TOKENS * FIRST_BYTES_PER_TOKEN
        self._tokens = PRIOR_TOKENS

    def __repr__(self) -> str:
        return f"<{self.bytes_per_token:.2f} bytes per token>"

    @property
    def bytes_per_token(self) -> float:
        return self._bytes / self._tokens

    def estimate(self, ask: Ask) -> int:
        """Prompt tokens of a request; exact where it came as token ids."""
        if ask.exact_prompt_tokens is not None:
            return max(1, ask.exact_prompt_tokens)
        return max(1, round(ask.prompt_bytes / self.bytes_per_token))

    def learn(self, ask: Ask, prompt_tokens: int) -> None:
        """Take in what an engine counted."""
        if ask.exact_prompt_tokens is not None or prompt_tokens <= 0 or ask.prompt_bytes <= 0:
            return
        kept = 0.5 ** (prompt_tokens / HALF_LIFE_TOKENS)
        self._bytes = self._bytes * kept + ask.prompt_bytes
        self._tokens = self._tokens * kept + prompt_tokens
