"""The emulated engine's language: what counts as a token, and where an answer is to be continued."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polyserve.engines.words import (
    OWN,
    count_tokens,
    output_length,
    read_ids,
    read_text,
    tokenize,
    voice,
    word,
    word_id,
)

texts = st.text(max_size=60).map(lambda t: t.encode())
voices = st.integers(0, 2**64 - 1)
choices = st.integers(0, 5)


def said(own: int, count: int) -> bytes:
    return b"".join(word(own, position) for position in range(count))


@given(texts, voices, st.integers(0, 40))
def test_a_text_has_as_many_tokens_as_ids_and_own_words_are_one_each(text: bytes, own: int, count: int) -> None:
    whole = text + said(own, count)
    assert count_tokens(whole) == len(tokenize(whole)) == count_tokens(text) + count
    assert tokenize(whole)[len(tokenize(text)) :] == [word_id(own, position) for position in range(count)]


def test_four_bytes_of_other_text_are_a_token() -> None:
    assert [count_tokens(b"x" * size) for size in (0, 1, 4, 5, 4000)] == [0, 1, 1, 2, 1000]


@given(texts, st.integers(0, 99), choices, st.integers(1, 50))
def test_a_text_prompt_that_ends_with_an_answer_is_continued_where_it_ends(
    text: bytes, seed: int, choice: int, made: int
) -> None:
    first = read_text(text, seed)
    own = voice(first.identity, seed, choice)
    again = read_text(text + said(own, made), seed)
    assert (again.tokens, again.identity) == (first.tokens, first.identity)
    assert (again.delivered, again.choice) == (made, choice)


@given(st.lists(st.integers(0, OWN - 1), max_size=30), st.integers(0, 99), choices, st.integers(1, 50))
def test_a_token_prompt_that_ends_with_an_answer_is_continued_where_it_ends(
    ids: list[int], seed: int, choice: int, made: int
) -> None:
    first = read_ids(ids, seed)
    own = voice(first.identity, seed, choice)
    again = read_ids(ids + [word_id(own, position) for position in range(made)], seed)
    assert (again.tokens, again.identity) == (first.tokens, first.identity)
    assert (again.delivered, again.choice) == (made, choice)


def test_words_of_another_answer_or_not_from_its_start_are_prompt() -> None:
    own = voice(read_text(b"why?", 0).identity, 0, 0)
    answer = said(own, 5)
    for text in (b"who?" + answer, b"why?" + answer[len(word(own, 0)) :], b"why?" + answer + b".", b"why? 0~000"):
        prompt = read_text(text, 0)
        assert (prompt.delivered, prompt.choice, prompt.tokens) == (0, None, count_tokens(text))
    assert read_text(b"why?" + answer, 1).delivered == 0  # another seed says something else
    ids = [*tokenize(b"why?"), word_id(own, 0), word_id(own, 2)]
    assert read_ids(ids, 0).delivered == 0


def test_lengths_that_nobody_bounds_spread_around_their_mean() -> None:
    lengths = [output_length(voice(b"%d" % n, 0, 0)) for n in range(2000)]
    assert min(lengths) >= 1
    assert 180 < sum(lengths) / len(lengths) < 220
    assert max(lengths) > 800
