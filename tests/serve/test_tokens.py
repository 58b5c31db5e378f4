"""Prompt tokens by the model's own tokenizer: counted where it matters, estimated elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from live import listening, make_plan
from test_gateway import post
from tiny_tokenizer import make

from polyserve.serve.ask import Ask, parse
from polyserve.serve.estimate import TokenEstimator
from polyserve.serve.tokens import LONG_TOKENS, MOST_WAITING, PromptCounter, TokenizerError, tokenizer

CONTEXT = 8192


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def counter(path: Path) -> Any:
    made = PromptCounter(TokenEstimator(), tokenizer(path), CONTEXT)
    yield made
    made.close()


def completion(words: int, **fields: Any) -> Ask:
    prompt = " ".join(["word"] * words)
    return parse("completions", json.dumps({"model": "m", "prompt": prompt, **fields}).encode())


def chat(words: int, messages: int = 1, **fields: Any) -> Ask:
    said = [{"role": "user", "content": " ".join(["word"] * words)} for _ in range(messages)]
    return parse("chat", json.dumps({"model": "m", "messages": said, **fields}).encode())


async def test_a_long_prompt_is_counted_and_a_short_one_estimated(counter: PromptCounter) -> None:
    words = LONG_TOKENS * 4 // 5 + 2  # of five bytes each, four of which are estimated to be a token
    assert await counter.tokens(completion(words)) == words
    assert counter.counted == 1
    assert await counter.tokens(completion(100)) == round(499 / 4)
    assert counter.counted == 1


async def test_a_short_prompt_is_counted_where_the_context_hangs_on_it(counter: PromptCounter) -> None:
    await counter.tokens(completion(1000, max_tokens=CONTEXT - 1001))  # estimated to be too long
    await counter.tokens(completion(1000, max_tokens=CONTEXT - 1300))  # estimated to fit, but only just
    assert counter.counted == 2
    await counter.tokens(completion(1000, max_tokens=CONTEXT))  # too long whatever the prompt
    await counter.tokens(completion(1000, max_tokens=100))  # fits whatever the prompt
    await counter.tokens(completion(CONTEXT * 40, max_tokens=1))  # beyond all doubt
    assert counter.counted == 2


async def test_token_ids_are_never_counted_again(counter: PromptCounter) -> None:
    ask = parse("completions", json.dumps({"model": "m", "prompt": [1] * 5000}).encode())
    assert await counter.tokens(ask) == 5000
    assert counter.counted == 0


async def test_only_what_a_model_is_shown_counts(counter: PromptCounter) -> None:
    words = LONG_TOKENS
    parts = [
        {"type": "text", "text": " ".join(["word"] * words)},
        {"type": "image_url", "image_url": {"url": "https://example.org/a picture with a long name"}},
    ]
    ask = parse("chat", json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode())
    await counter.tokens(ask)
    assert ask.counted_tokens == words + 1  # the role


async def test_what_a_template_adds_is_learned(counter: PromptCounter) -> None:
    for _ in range(60):
        ask = chat(1000, messages=3)
        guess = await counter.tokens(ask)
        counter.learn(ask, 3 * (1000 + 1 + 9))
    assert guess == 3 * (1000 + 1 + 9)


async def test_streams_go_on_while_a_prompt_is_counted(counter: PromptCounter) -> None:
    counting = asyncio.create_task(counter.tokens(completion(60 * CONTEXT // 20)))
    turns = 0
    while not counting.done():
        await asyncio.sleep(0)
        turns += 1
    assert counter.counted == 1
    assert turns > 2


async def test_a_crowd_of_long_prompts_makes_do_with_estimates(counter: PromptCounter) -> None:
    asks = [completion(LONG_TOKENS) for _ in range(MOST_WAITING + 5)]
    got = await asyncio.gather(*map(counter.tokens, asks))
    assert got.count(LONG_TOKENS) == counter.counted == MOST_WAITING
    assert got[-1] == round((5 * LONG_TOKENS - 1) / 4)


def test_what_is_no_tokenizer_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere cannot be read: No such file"):
        tokenizer(tmp_path / "nowhere")
    bad = tmp_path / "tokenizer.json"
    for text in ("", "{}", "[1]", '{"model": {"type": "BPE"}}'):
        bad.write_text(text)
        with pytest.raises(TokenizerError, match=r"^[^\n]* is no tokenizer.json: [^\n]*$"):
            tokenizer(bad)


async def test_the_verdict_on_the_context_is_that_of_the_tokenizer(path: Path) -> None:
    # By bytes the prompt is estimated to be 8,750 tokens, which would not do at all.
    engine = FakeEngine(prompt_tokens=7000)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(engine.running())
        instances = [{"id": "e0", "url": engine.url, "kv_tokens": CONTEXT}]
        live = await stack.enter_async_context(listening(make_plan([], instances=instances, tokenizer=str(path))))
        await live.ready()
        fits = {"model": "tiny", "prompt": " ".join(["word"] * 7000), "max_tokens": 1000}
        assert (await post(live, fits, "/v1/completions"))[0] == 200
        status, answer, _ = await post(live, fits | {"max_tokens": 1193}, "/v1/completions")
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "about 7000 tokens" in answer["error"]["message"]
        assert "up to 1193" in answer["error"]["message"]
        assert live.gateway.counter.counted == 2
