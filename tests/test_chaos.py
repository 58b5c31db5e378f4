"""The judge of the chaos run knows every way to break the law, and the run itself accounts for everybody."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from chaos.asks import Ask, draw, expected, optimum  # noqa: E402 - found by the line before
from chaos.client import How, Seen  # noqa: E402
from chaos.soak import Sample, per_hour  # noqa: E402
from chaos.verdict import Verdict, judge  # noqa: E402

RETRY = {"retry-after": "1", "retry-after-ms": "250"}


def ask(**wanted: bool) -> Ask:
    """The first request of a seed that is as wanted."""
    asks = (draw(7, number) for number in range(10_000))
    return next(
        one
        for one in asks
        if one.manner == "patient"
        and sum(expected(one).completion_tokens for _ in "1") > 5
        and all(bool(getattr(one, name)) is value for name, value in wanted.items())
    )


def seen(asked: Ask, data: bytes, how: How = "ended", status: int | None = 200, **headers: str) -> Seen:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Seen(asked, how, status, named, [data])


def stream(asked: Ask) -> list[bytes]:
    """The events of a right answer."""
    right = expected(asked)
    events: list[dict[str, Any]] = []
    for index, text in enumerate(right.texts):
        words = [f" {word}" for word in text.split(" ")[1:]]
        for number, word in enumerate(words):
            part: dict[str, Any] = {"delta": {"content": word}} if asked.chat else {"text": word}
            finish = right.reasons[index] if number == len(words) - 1 else None
            events.append({"id": "c", "choices": [{"index": index, **part, "finish_reason": finish}]})
    if "stream_options" in asked.body:
        usage = {"prompt_tokens": right.prompt_tokens, "completion_tokens": right.completion_tokens}
        events.append({"id": "c", "choices": [], "usage": usage})
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


def error(code: str, kind: str) -> bytes:
    return json.dumps({"error": {"message": "m", "type": kind, "param": None, "code": code}}).encode()


STREAMED = ask(streams=True, exact=True)
EVENTS = stream(STREAMED)


@pytest.mark.parametrize("chat", [True, False])
def test_a_right_answer_is_completed_however_it_was_asked_for(chat: bool) -> None:
    streamed = ask(streams=True, chat=chat)
    assert judge(seen(streamed, b"".join(stream(streamed)))) == Verdict("completed")
    asked = ask(streams=False, chat=chat, exact=True)
    right = expected(asked)
    said = {"message": {"content": right.texts[0]}} if chat else {"text": right.texts[0]}
    usage = {"prompt_tokens": right.prompt_tokens, "completion_tokens": right.completion_tokens}
    whole = {"choices": [{"index": 0, **said, "finish_reason": right.reasons[0]}], "usage": usage}
    assert judge(seen(asked, json.dumps(whole).encode())) == Verdict("completed")


@pytest.mark.parametrize(
    ("events", "how", "why"),
    [
        (EVENTS[:3], "ended", "truncated in silence"),
        (EVENTS[:3], "cut", "truncated in silence"),
        ([*EVENTS[:3], EVENTS[-1]], "ended", "truncated in silence"),
        ([*EVENTS[:3], *EVENTS[2:]], "ended", "duplicated"),
        ([*EVENTS[:2], *EVENTS[3:]], "ended", "wrong"),
        ([*EVENTS, EVENTS[0]], "ended", "an event after the end"),
        ([*EVENTS[:-1], b"data: {\n\n"], "ended", "not a chunk"),
        ([*EVENTS[:3], b"data: " + error("upstream_error", "server_error") + b"\n\n"], "ended", "given up"),
        (EVENTS, "waiting", "lost"),
        ([EVENTS[0], EVENTS[1].replace(b'"c"', b'"d"'), *EVENTS[2:]], "ended", "one answer under several ids"),
    ],
)
def test_a_stream_that_lacks_or_repeats_or_ends_in_silence_breaks_the_law(
    events: list[bytes], how: How, why: str
) -> None:
    verdict = judge(seen(STREAMED, b"".join(events), how))
    assert verdict.fate == "broken"
    assert verdict.why.startswith(why)


def test_an_error_event_is_right_only_where_continuing_cannot_be_exact() -> None:
    inexact = ask(streams=True, exact=False)
    begun = [*stream(inexact)[:2], b"data: " + error("upstream_error", "server_error") + b"\n\n"]
    assert judge(seen(inexact, b"".join(begun))) == Verdict("error event", "upstream_error")


def test_a_client_that_left_saw_nothing_wrong_as_far_as_it_stayed() -> None:
    assert judge(seen(STREAMED, b"", "left", None)) == Verdict("abandoned")
    assert judge(seen(STREAMED, b"".join(EVENTS[:2]) + EVENTS[2][:9], "left")) == Verdict("abandoned")
    assert judge(seen(STREAMED, EVENTS[1], "left")).fate == "broken"


def test_a_refusal_is_an_openai_error_that_says_when_to_come_back() -> None:
    asked = dataclasses.replace(STREAMED, id="x")
    right = seen(asked, error("overloaded", "rate_limit_error"), status=429)
    right.headers = RETRY
    assert judge(right) == Verdict("refused", "overloaded")
    for wrong in (
        dataclasses.replace(right, headers={}),
        dataclasses.replace(right, pieces=[b"Internal Server Error"]),
        dataclasses.replace(right, status=500),
        dataclasses.replace(right, how="cut"),
        dataclasses.replace(right, pieces=[error("overloaded", "server_error")]),
    ):
        assert judge(wrong).fate == "broken"


def test_requests_are_the_seeds_and_the_engines_hold_a_known_rate_of_them() -> None:
    assert [draw(3, number) for number in range(50)] == [draw(3, number) for number in range(50)]
    assert draw(3, 0) != draw(4, 0)
    assert {draw(3, number).manner for number in range(200)} == {"patient", "abandons", "stalls"}
    assert optimum(6) == pytest.approx(2 * optimum(3))


def chaos(*options: str) -> dict[str, Any]:
    """What a run comes to."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-m", "chaos", "--json", *options],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if told["lawful"] else 1)
    return told


@pytest.mark.live
def test_no_request_is_lost_while_engines_come_and_go() -> None:
    told = chaos("--minutes", "0.3", "--seed", "1", "--every", "1.2", "--load", "0.5")
    assert (told["broken"], told["left_over"]) == ({}, [])
    assert sum(told["faults"].values()) > 5
    assert told["completed"] > 200
    assert told["continued"] + told["moved"] > 0


def test_growth_is_told_from_what_comes_and_goes_with_requests() -> None:
    def samples(files: int, mib: float) -> list[Sample]:
        opened = [n % 7 for n in range(40)]
        return [
            Sample(60.0 * n, 100 + mib * n, 30 + files * n + 2 * count, 9 + 2 * count, 50, count)
            for n, count in enumerate(opened)
        ]

    assert per_hour(samples(0, 0.0), "files") == pytest.approx(0.0, abs=1e-6)
    assert per_hour(samples(0, 0.0), "tasks") == pytest.approx(0.0, abs=1e-6)
    assert per_hour(samples(1, 0.5), "files") == pytest.approx(60.0)
    assert per_hour(samples(1, 0.5), "memory_mib") == pytest.approx(30.0)
