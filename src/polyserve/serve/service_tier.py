"""OpenAI's `service_tier` in the answers to those who sent one: the tier as served, not as asked for."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from polyserve.serve.fields import rewritten
from polyserve.serve.sse import EventScanner


class StampingScanner(EventScanner):
    """Writes the service tier into every event; no other stream pays for it."""

    __slots__ = ("_stamp", "_tier")

    def __init__(self, tier: str, strip_usage: bool = False, strip_role: bool = False) -> None:
        super().__init__(strip_usage, strip_role)
        self._tier = tier
        self._stamp = b',"service_tier":' + msgspec.json.encode(tier)

    def feed(self, data: bytes) -> bytes:
        """As `EventScanner.feed`, stamped."""
        piece = super().feed(data)
        end = b"}" + self._separator
        if b'"service_tier"' in piece or b"{" + end in piece:
            events = piece.split(self._separator)
            return self._separator.join(map(self._replaced, events))
        # A line break cannot be inside of a JSON string: this is the end of an event and of its object.
        return piece.replace(end, self._stamp + end)

    def _replaced(self, event: bytes) -> bytes:
        """An event that has a service tier already, or no field at all."""
        head, colon, payload = event.partition(b"data:")
        if not colon or not payload.lstrip().startswith(b"{"):
            return event
        return head + b"data: " + stamped(payload.strip(), self._tier)


def stamped(body: bytes, tier: str) -> bytes:
    """An object with its service tier set; what is no object stays as it is."""
    try:
        return rewritten(msgspec.json.decode(body, type=dict[str, Raw]), {"service_tier": tier})
    except msgspec.MsgspecError:
        return body
