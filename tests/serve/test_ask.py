"""What is read of a body, and that everything else stays the bytes it was."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.serve.ask import parse, rewritten
from polyserve.serve.errors import ApiError
from polyserve.serve.estimate import FIRST_BYTES_PER_TOKEN, TokenEstimator

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def ask(endpoint: Any, **fields: Any) -> Any:
    return parse(endpoint, json.dumps({"model": "m"} | fields).encode())


@pytest.mark.parametrize(("prompt", "n", "bytes_", "exact"), [
    ("hello", 1, 5, None),
    ([1, 2, 3], 1, 0, 3),
    ([[1, 2], [3]], 2, 0, 3),
    (["ab", "ü"], 2, 4, None),
])  # fmt: skip
def test_every_shape_of_prompt_is_measured(prompt: Any, n: int, bytes_: int, exact: int | None) -> None:
    got = ask("completions", prompt=prompt)
    assert (got.n, got.prompt_bytes, got.exact_prompt_tokens) == (n, bytes_, exact)


@pytest.mark.parametrize("prompt", [None, [], 5, {}, [1, "a"], [[1], "a"], [None], [1.5]])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        ask("completions", prompt=prompt)
    assert caught.value.param == "prompt"


def test_max_tokens_is_what_the_api_says_it_is() -> None:
    assert ask("completions", prompt="a").max_tokens == 16
    assert ask("chat", messages=[]).max_tokens is None
    assert ask("chat", messages=[], max_tokens=5, max_completion_tokens=7).max_tokens == 7


def test_a_picture_is_not_counted_as_text() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    assert ask("chat", messages=[{"role": "user", "content": [picture]}]).prompt_bytes < 500


@given(
    st.dictionaries(st.text(max_size=8), values, max_size=6), st.dictionaries(st.text(max_size=8), values, max_size=3)
)
def test_rewriting_changes_what_it_is_told_and_nothing_else(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    raw = json.dumps(fields).encode()
    parsed = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    got = json.loads(rewritten(parsed, changes))
    wanted = {key: value for key, value in (fields | changes).items() if changes.get(key, "kept") is not None}
    assert got == wanted


def test_numbers_and_escapes_of_the_client_stay_as_they_were_written() -> None:
    raw = b'{"model":"m","messages":[ {"content" : "\\u00fc\\/"} ],"seed":12345678901234567890123,"top_p":1e-1}'
    got = rewritten(parse("chat", raw).fields, {"stream": True})
    assert got == raw[:-1] + b',"stream":true}'


@given(st.binary(max_size=200))
def test_no_bytes_are_anything_but_read_or_refused(raw: bytes) -> None:
    for endpoint in ("chat", "completions"):
        with pytest.raises(ApiError):
            parse(endpoint, raw)


def test_bytes_per_token_follow_what_engines_count() -> None:
    estimator = TokenEstimator()
    text = ask("completions", prompt="x" * 3000)
    assert estimator.estimate(text) == 3000 / FIRST_BYTES_PER_TOKEN
    for _ in range(50):
        estimator.learn(text, 1000)
    assert estimator.estimate(text) == pytest.approx(1000, rel=0.05)
    exact = ask("completions", prompt=[5] * 10)
    estimator.learn(exact, 10**6)
    assert estimator.estimate(exact) == 10
