"""What clients ask, and the only right answer to it: the emulator's tokens hang on request and position alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np

from chaos.scene import ENGINES, MODEL, PROFILE, TIERS
from polyserve.core.bound import optimal_rate, tier_mix
from polyserve.engines.bodies import read_chat, read_completion
from polyserve.engines.words import word

Manner = Literal["patient", "abandons", "stalls"]
Api = Literal["chat", "text", "ids"]

# Share of each way to ask for a pace; None: by the `x-slo` headers.
PACES = (("fast", 0.25), ("medium", 0.25), ("slow", 0.2), (None, 0.1), ("best-effort", 0.2))
# What takes the exactness out of continuing an answer elsewhere.
INEXACT = (("n", 0.04), ("tools", 0.02), ("logprobs", 0.02), ("response_format", 0.02))
# How far into its answer a client that leaves or stalls does so: most get something first.
FIRST_EVENTS = 40


@dataclass(frozen=True)
class Ask:
    """One request of one client."""

    id: str
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    manner: Manner
    after_events: int  # of the answer, before a client that leaves or stalls does so
    stalls_s: float

    @property
    def chat(self) -> bool:
        return self.path.endswith("chat/completions")

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def exact(self) -> bool:
        """Whether an answer that breaks off can be continued exactly."""
        return not any(name in self.body for name, _ in INEXACT)


@dataclass(frozen=True)
class Expected:
    """The answer that a fault-free run gives."""

    texts: list[str]  # by choice
    reasons: list[str]
    prompt_tokens: int
    completion_tokens: int


def draw(seed: int, number: int) -> Ask:
    """Request `number` of the run with this seed."""
    random = Random(f"{seed} ask {number}")
    api: Api = random.choices(("chat", "text", "ids"), (0.6, 0.25, 0.15))[0]
    pace = random.choices([name for name, _ in PACES], [share for _, share in PACES])[0]
    prompt, output = draw_lengths(random)
    manner: Manner = random.choices(("patient", "abandons", "stalls"), (0.88, 0.07, 0.05))[0]
    body = {"model": MODEL, **_prompt(random, api, number, prompt), **_length(random, output)}
    body |= _extras(random, api, stream=manner == "stalls" or random.random() < 0.75)
    return Ask(
        id=f"chaos-{seed}-{number}",
        path="/v1/chat/completions" if api == "chat" else "/v1/completions",
        body=body,
        headers={"content-type": "application/json", "x-request-id": f"chaos-{seed}-{number}", **_pace(random, pace)},
        manner=manner,
        after_events=random.choice((-1, 0, random.randrange(FIRST_EVENTS))),
        stalls_s=random.uniform(0.5, 4.0),
    )


def draw_lengths(random: Random) -> tuple[int, int]:
    """Prompt and output tokens of one request."""
    return min(600, 8 + int(random.expovariate(1 / 120))), min(250, 2 + int(random.expovariate(1 / 45)))


def _prompt(random: Random, api: Api, number: int, tokens: int) -> dict[str, Any]:
    if api == "ids":
        return {"prompt": [number, *(random.randrange(100, 1000) for _ in range(tokens))]}
    text = f"{number} " + "".join(random.choice("abcdefgh \u00fc\n\"'") for _ in range(tokens * 4))
    if api == "text":
        return {"prompt": text}
    system = [{"role": "system", "content": "Be brief."}] if random.random() < 0.3 else []
    return {"messages": [*system, {"role": "user", "content": text}]}


def _length(random: Random, output: int) -> dict[str, Any]:
    """Most answers end by themselves; some at `max_tokens`."""
    told = {"vllm_xargs": {"output_tokens": output}}
    match random.randrange(4):
        case 0:
            return {"max_tokens": output, "ignore_eos": True}
        case 1:
            return {"max_tokens": output + 40, **told}
        case _:
            return {"max_tokens": max(1, output - 3 * random.randrange(2)), **told}


def _extras(random: Random, api: Api, stream: bool) -> dict[str, Any]:
    extras: dict[str, Any] = {"stream": True} if stream else {}
    if stream and random.random() < 0.3:
        extras["stream_options"] = {"include_usage": True}
    inexact = random.choices([None, *(name for name, _ in INEXACT)], [1, *(share for _, share in INEXACT)])[0]
    match inexact:
        case "n":
            extras["n"] = random.choice((2, 3))
        case "tools" if api == "chat":
            extras["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
        case "logprobs":
            extras["logprobs"] = True if api == "chat" else 1
        case "response_format" if api == "chat":
            extras["response_format"] = {"type": "json_object"}
    return extras


def _pace(random: Random, pace: str | None) -> dict[str, str]:
    if pace is not None:
        return {"x-polyserve-tier": pace}
    return {"x-slo-ttft-ms": str(random.randrange(2_000, 8_000)), "x-slo-tpot-ms": str(random.randrange(60, 400))}


def expected(ask: Ask) -> Expected:
    """What the engine makes of an ask, by the engine's own rules."""
    read = read_chat if ask.chat else read_completion
    asked = read(json.dumps(ask.body).encode(), MODEL, PROFILE.limits.context_tokens, 0)
    texts = [b"".join([word(a.voice, i) for i in range(a.output_tokens)]).decode() for a in asked.answers]
    return Expected(
        texts, [a.reason for a in asked.answers], asked.prompt_tokens, sum(a.output_tokens for a in asked.answers)
    )


def optimum(engines: int = ENGINES) -> float:
    """Requests per second that so many engines hold at best, lengths and tiers as drawn."""
    random = Random("optimum")
    drawn = np.array([draw_lengths(random) for _ in range(4_000)], np.int64)
    tiers = [tier_mix(tpot / 1e3, 1 / len(TIERS), drawn[:, 0], drawn[:, 1]) for _, tpot, _ in TIERS]
    return optimal_rate(PROFILE, engines, tiers)
