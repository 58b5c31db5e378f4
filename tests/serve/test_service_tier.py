"""OpenAI's service tiers: what a client is told of the one it got, and that nobody else's bytes are touched."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.types import Tier
from polyserve.serve.pace import BEST_EFFORT, Paces
from polyserve.serve.service_tier import StampingScanner, stamped
from polyserve.serve.sse import EventScanner

FAST, SLOW = Tier("fast", 0.02, 0.3), Tier("slow", 0.1, 1.0)
PACES = Paces((FAST, SLOW), {"priority": "fast", "flex": BEST_EFFORT, "auto": "fast"}, "slow")


def test_the_tier_told_is_the_one_that_served() -> None:
    assert PACES.served("priority", "fast") == "priority"
    assert PACES.served("flex", None) == "flex"
    assert PACES.served("auto", "fast") == "priority"
    assert PACES.served("priority", "slow") == "default"  # a header asked for another pace
    assert PACES.served("scale", "slow") == "default"
    assert PACES.served("default", "slow") == "default"


def chunk(text: str, **more: object) -> bytes:
    return json.dumps({"object": "chunk", "choices": [{"index": 0, "delta": {"content": text}}], **more}).encode()


@given(
    st.lists(st.text() | st.sampled_from(["}", "data: {", '"service_tier"', "{}"]), min_size=1, max_size=5),
    st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    st.integers(1, 50),
    st.booleans(),
)
def test_every_event_is_stamped_and_nothing_else_changes(texts: list[str], end: bytes, cut: int, null: bool) -> None:
    more = {"service_tier": None} if null else {}
    payloads = [chunk(text, **more) for text in texts]
    stream = b": ping" + end + b"".join(b"data: " + one + end for one in payloads) + b"data: [DONE]" + end
    plain, stamping = EventScanner(), StampingScanner("flex")
    pieces = [stream[at : at + cut] for at in range(0, len(stream), cut)]
    got = b"".join(map(stamping.feed, pieces))
    assert b"".join(map(plain.feed, pieces)) == stream
    assert (stamping.events, stamping.done) == (plain.events, True)
    first, *events, last, rest = got.split(end)
    assert (first, last, rest) == (b": ping", b"data: [DONE]", b"")
    for event, payload in zip(events, payloads, strict=True):
        pairs: list[tuple[str, object]] = json.loads(event.removeprefix(b"data: "), object_pairs_hook=list)
        assert dict(pairs) == json.loads(payload, object_pairs_hook=dict_of_lists) | {"service_tier": "flex"}
        assert len(pairs) == len(dict(pairs))


def dict_of_lists(pairs: list[tuple[str, object]]) -> object:
    """An object as `object_pairs_hook=list` leaves it, the outermost one as a dict."""
    return dict(pairs) if pairs and pairs[0][0] == "object" else pairs


def test_a_whole_answer_is_stamped_once_and_what_is_none_stays() -> None:
    assert json.loads(stamped(b'{"service_tier":null,"id":1}', "flex")) == {"service_tier": "flex", "id": 1}
    assert stamped(b"[1]", "flex") == b"[1]"
