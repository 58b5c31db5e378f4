"""The emulated engine's language: how it counts prompt tokens, and what it says.

A token is one of the engine's own words, or four bytes of the text between them (rounded up). The word at position i
of an answer is ` i~tag`: i in hexadecimal, and three hexadecimal digits that hang on i, the prompt, the seed and the
choice. So a client can check every token of a stream, and the engine can tell from a prompt that ends with words of
its own, from the first one on, that it is to continue that answer and where.

As token ids an own word is a number with the bit `OWN` set, then tag and position; other text makes smaller numbers.
"""

from __future__ import annotations

import math
import re
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

OWN = 1 << 29
POSITION_BITS = 17  # 131,072 positions
TAG_BITS = 12
OTHER_IDS = 1 << 20
BYTES_PER_TOKEN = 4
WORD = re.compile(rb" ([0-9a-f]{1,5})~([0-9a-f]{3})")
# Choices looked at when an answer is continued: `n` is allowed up to this.
MOST_CHOICES = 128
# Output tokens drawn on average where a request does not say: about what chat traces show.
MEAN_OUTPUT = 200

_MIX = 0x9E3779B97F4A7C15  # odd, its bits spread well: 2^64 over the golden ratio


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks to be answered, and how much of the answer it already brings."""

    tokens: int  # of the prompt proper
    identity: bytes  # equal for equal prompts
    delivered: int = 0  # tokens of the answer that were given with it
    choice: int | None = None  # whose they are


def voice(identity: bytes, seed: int, choice: int) -> int:
    """What makes one answer differ from all others: 64 bits."""
    return int.from_bytes(blake2b(b"%b|%d|%d" % (identity, seed, choice), digest_size=8).digest(), "big")


def tag(voice: int, position: int) -> int:
    return (((voice + position) * _MIX) >> 40) & 0xFFF


def word(voice: int, position: int) -> bytes:
    """The text of one token: ASCII that needs no escape in JSON."""
    return b" %x~%03x" % (position, (((voice + position) * _MIX) >> 40) & 0xFFF)


def word_id(voice: int, position: int) -> int:
    """The same token as a number."""
    return OWN | tag(voice, position) << POSITION_BITS | position


def output_length(voice: int, mean: float = MEAN_OUTPUT) -> int:
    """How many tokens an answer has that nobody bounds: exponentially distributed, at least 1."""
    share = ((voice * _MIX) & 0xFFFFFFFFFFFFFFFF) / 2**64
    return 1 + int(-math.log1p(-share) * (mean - 1))


def count_tokens(text: bytes) -> int:
    """Tokens of a text; no text has none."""
    tokens = at = 0
    if b"~" in text:
        for match in WORD.finditer(text):
            tokens += 1 + _groups(match.start() - at)
            at = match.end()
    return tokens + _groups(len(text) - at)


def _groups(size: int) -> int:
    return -(-size // BYTES_PER_TOKEN)


def tokenize(text: bytes) -> list[int]:
    """Token ids of a text, as many as `count_tokens` says."""
    ids: list[int] = []
    at = 0
    for match in WORD.finditer(text):
        ids += _other_ids(text[at : match.start()])
        ids.append(OWN | int(match[2], 16) << POSITION_BITS | int(match[1], 16) & ((1 << POSITION_BITS) - 1))
        at = match.end()
    return ids + _other_ids(text[at:])


def _other_ids(text: bytes) -> list[int]:
    groups = (text[i : i + BYTES_PER_TOKEN] for i in range(0, len(text), BYTES_PER_TOKEN))
    return [zlib.crc32(group) % OTHER_IDS for group in groups]


def read_text(text: bytes, seed: int, identify: Callable[[bytes], bytes] = bytes) -> Prompt:
    """A prompt given as text; `identify` says what makes the prompt with that text (less its answer) itself."""
    base, tags = _split_text(text)
    identity = digest(identify(base))
    choice = _whose(identity, seed, tags)
    if choice is None:
        return Prompt(count_tokens(text), digest(identify(text)))
    return Prompt(count_tokens(base), identity, len(tags), choice)


def read_ids(ids: Sequence[int], seed: int) -> Prompt:
    """A prompt given as token ids."""
    tags: list[int] = []
    mask = (1 << POSITION_BITS) - 1
    if ids and ids[-1] & OWN:
        length = (ids[-1] & mask) + 1
        last = ids[-length:] if length <= len(ids) else ()
        if all(i & OWN and i & mask == position for position, i in enumerate(last)):
            tags = [(i & ~OWN) >> POSITION_BITS for i in last]
    base = ids[: len(ids) - len(tags)]
    identity = digest(array("q", base).tobytes())
    choice = _whose(identity, seed, tags)
    if choice is None:
        return Prompt(len(ids), digest(array("q", ids).tobytes()))
    return Prompt(len(base), identity, len(tags), choice)


def digest(prompt: bytes) -> bytes:
    """The identity of a prompt."""
    return blake2b(prompt, digest_size=16).digest()


def _split_text(text: bytes) -> tuple[bytes, list[int]]:
    """A text without the answer that it ends with, and the tags of that answer's words."""
    tags: list[int] = []
    end, expected = len(text), None
    while (start := text.rfind(b" ", max(0, end - 10), end)) >= 0:
        match = WORD.fullmatch(text, start, end)
        if match is None or (expected is not None and int(match[1], 16) != expected):
            break
        position = int(match[1], 16)
        tags.append(int(match[2], 16))
        if position == 0:
            return text[:start], tags[::-1]
        end, expected = start, position - 1
    return text, []


def _whose(identity: bytes, seed: int, tags: list[int]) -> int | None:
    """The choice whose answer begins with these tags."""
    if not tags:
        return None
    for choice in range(MOST_CHOICES):
        own = voice(identity, seed, choice)
        if all(tag(own, position) == each for position, each in enumerate(tags)):
            return choice
    return None
