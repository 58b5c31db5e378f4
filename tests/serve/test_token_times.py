import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.serve.token_times import Ended, TokenStream


def event(value: object, end: str = "\n\n") -> bytes:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}{end}".encode()


def text(word: str, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": word, "finish_reason": finish}]}


def said(delta: dict[str, object], finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def usage(tokens: int) -> dict[str, object]:
    return {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}}


def watched(*events: bytes) -> Ended:
    """Each event in a read of its own, at 0, 1, 2, ..."""
    stream = TokenStream()
    for at, data in enumerate(events):
        stream.feed(float(at), data)
    return stream.ended()


def test_a_completion_is_one_token_per_event() -> None:
    ended = watched(event(text(" a")), event(text(" b")), event(text(" c", "length")), event("[DONE]"))
    assert ended == Ended([0.0, 1.0, 2.0], done=True)


def test_who_speaks_how_many_and_done_are_no_tokens() -> None:
    ended = watched(
        event(said({"role": "assistant", "content": ""})),
        event(said({"content": " a"})),
        event(said({"content": " b"})),
        event(said({}, "stop")),
        event(usage(2)),
        event("[DONE]"),
    )
    assert ended.token_at == [1.0, 2.0]
    assert ended.usage == 2
    assert ended.done


def test_a_first_event_that_names_the_role_and_speaks_is_a_token() -> None:
    ended = watched(event(said({"role": "assistant", "content": "Hi"}, "stop")), event("[DONE]"))
    assert ended.token_at == [0.0]


def test_a_silent_last_event_is_a_token_when_the_engine_counts_it() -> None:
    stop = event(said({"content": ""}, "stop"))
    counted = watched(event(said({"content": " a"})), stop, event(usage(2)), event("[DONE]"))
    assert counted.token_at == [0.0, 1.0]
    not_counted = watched(event(said({"content": " a"})), stop, event(usage(1)), event("[DONE]"))
    assert not_counted.token_at == [0.0]


def test_an_event_that_brings_several_tokens_brings_them_at_its_time() -> None:
    ended = watched(event(text(" a b")), event(text(" c d", "length")), event(usage(4)), event("[DONE]"))
    assert ended.token_at == [0.0, 0.0, 1.0, 1.0]


def test_events_held_back_count_when_their_token_is_whole() -> None:
    ended = watched(*[event(text("x"))] * 4, event(usage(2)), event("[DONE]"))
    assert ended.token_at == [1.0, 3.0]


def test_an_error_in_the_stream_is_kept_and_is_no_token() -> None:
    ended = watched(event(text(" a")), event({"error": {"message": "gone", "code": "upstream_error"}}))
    assert ended == Ended([0.0], error="upstream_error")


def test_a_stream_cut_short_is_not_done() -> None:
    assert not watched(event(text(" a")), event(text(" b"))).done


def test_a_stream_without_a_byte_has_no_tokens() -> None:
    assert watched() == Ended([])


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
@given(st.data())
def test_however_the_bytes_are_cut_the_same_tokens_come(end: str, data: st.DataObject) -> None:
    words = data.draw(st.lists(st.text(max_size=8).map(lambda w: w + "\ndata: x"), min_size=1, max_size=40))
    whole = event(said({"role": "assistant", "content": ""}), end)
    whole += b"".join(event(said({"content": word}), end) for word in words)
    whole += event(said({}, "stop"), end) + event(usage(len(words)), end) + event("[DONE]", end)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=60)))
    stream = TokenStream()
    for at, (low, high) in enumerate(zip([0, *cuts], [*cuts, len(whole)], strict=True)):
        stream.feed(float(at), whole[low:high])
    ended = stream.ended()
    assert len(ended.token_at) == len(words)
    assert ended.token_at == sorted(ended.token_at)
    assert ended.done
    assert ended.usage == len(words)
