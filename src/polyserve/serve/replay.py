"""Replays requests against any OpenAI-compatible endpoint and keeps what the client saw of each.

Open loop: every request leaves at its own time, however the endpoint fares, and asks for its pace in the
`x-slo-*` headers. For the score a request arrives when it was really sent; token i is late after
`sent + ttft + i * tpot`, and comes when the server-sent event that carries it comes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np

from polyserve.core.types import RefuseCode, Request, Slo
from polyserve.demand import Bools, Ints, Workload
from polyserve.report import Outcome, Percentiles
from polyserve.serve.token_times import TokenStream, json_object
from polyserve.serve.wire import Answer, Wire
from polyserve.traces import Trace

# Prompts are lists of token ids, so that they have exactly the wanted length. These ids exist in every
# vocabulary in use, none of them is special, and each costs the body four bytes.
LEAST_ID, MOST_ID = 100, 999
# Words that common tokenizers keep whole with their space, so that a chat is about as long as wanted.
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "was", "on", "are", "as", "with", "his")
# A client that is later than this one time in a hundred is no measure of others.
LAG_THAT_MATTERS_S = 0.02
LAG_LOOK_S = 0.02
CONNECT_S = 30.0


class ReplayError(ValueError):
    """An endpoint that cannot be replayed against; the message says what would do."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go and how they are put."""

    url: str  # with or without /v1
    model: str = ""  # the only one that is served there
    api: Literal["completions", "chat"] = "completions"
    # How the endpoint learns the output length. `exact`: `max_tokens` with `ignore_eos`. `none`: in a field
    # that only an emulated engine reads, so that nobody in between knows it in advance.
    max_tokens: Literal["exact", "none"] = "exact"
    api_key: str | None = None
    patience_s: float = 120.0  # after the last request was sent; streams open then are unfinished

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def path(self) -> str:
        """Behind the base."""
        return f"/v1/{'chat/completions' if self.api == 'chat' else 'completions'}"


@dataclass(frozen=True, slots=True)
class ClientLag:
    """How well the client itself kept time, in seconds."""

    sent: Percentiles  # a request's sending after its planned time
    loop: Percentiles  # how long an arrived event may have waited to be seen

    @property
    def kept_up(self) -> bool:
        return max(self.sent.p99 or 0.0, self.loop.p99 or 0.0) <= LAG_THAT_MATTERS_S


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the client saw; times of outcomes in seconds from the start of the replay."""

    outcomes: list[Outcome]
    started_at: float  # Unix time
    wall_s: float
    lag: ClientLag


# ----------------------------------------------------------------------------------------------- what is sent


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of exact length: equal prefix blocks of the trace are equal tokens, nothing else is shared."""

    trace: Trace
    workload: Workload
    seed: int = 0

    def ids(self, index: int) -> list[int]:
        """Token ids of the prompt of request `index`."""
        wanted = self.workload.requests[index].prompt_tokens
        blocks = self.trace.blocks[int(self.workload.rows[index])] if self.trace.blocks else ()
        shared = [self._drawn(0, block, self.trace.block_tokens) for block in blocks]
        ids = [i for part in shared for i in part][:wanted]
        return ids + self._drawn(1, index, wanted - len(ids))

    def _drawn(self, kind: int, which: int, count: int) -> list[int]:
        drawn = np.random.default_rng([self.seed, kind, which]).integers(LEAST_ID, MOST_ID + 1, count)
        ids: list[int] = drawn.tolist()
        return ids


def body(endpoint: Endpoint, output_tokens: int, most_tokens: int, prompt_ids: list[int]) -> bytes:
    """The request's JSON; no answer of the replay is longer than `most_tokens`."""
    fields: dict[str, Any] = {"model": endpoint.model}
    if endpoint.api == "chat":
        text = " ".join(WORDS[i % len(WORDS)] for i in prompt_ids)
        fields["messages"] = [{"role": "user", "content": text}]
    else:
        fields["prompt"] = prompt_ids
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if endpoint.max_tokens == "exact":
        fields |= {"max_tokens": output_tokens, "ignore_eos": True}
    else:
        # A completion that says no bound gets 16 tokens: the same loose one for all tells nothing of this answer.
        fields |= {"max_tokens": most_tokens, "vllm_xargs": {"output_tokens": output_tokens}}
    return msgspec.json.encode(fields)


def headers(endpoint: Endpoint, request: Request) -> list[tuple[bytes, bytes]]:
    """The request's pace, in decimal milliseconds, and its name."""
    named = {"content-type": "application/json", "x-request-id": request.id}
    if endpoint.api_key:
        named["authorization"] = f"Bearer {endpoint.api_key}"
    if request.slo is not None:
        named["x-slo-ttft-ms"] = f"{request.slo.ttft_s * 1e3:g}"
        named["x-slo-tpot-ms"] = f"{request.slo.tpot_s * 1e3:g}"
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]


# ------------------------------------------------------------------------------------------------- the replay


async def replay(
    workload: Workload,
    prompts: Prompts,
    endpoint: Endpoint,
    on_answered: Callable[[int], None] = lambda answered: None,
    live: list[Outcome] | None = None,
) -> Replayed:
    """Send every request at its time and watch its tokens. Raises `ReplayError` when nothing there can answer.

    `on_answered` hears how many requests are over; `live` takes the outcomes while they happen.
    """
    endpoint = dataclasses.replace(endpoint, model=await served_model(endpoint))
    loop = asyncio.get_running_loop()
    run = _Run(endpoint, prompts, on_answered, [] if live is None else live)
    unix = time.time()
    wire = Wire(endpoint.base, CONNECT_S)
    looker = asyncio.create_task(run.watch_loop())
    try:
        await run.send_all(wire, workload)
    finally:
        looker.cancel()
        wire.close()
    lag = ClientLag(Percentiles.of(run.send_lag_s), Percentiles.of(run.loop_lag_s))
    return Replayed(run.outcomes, unix, loop.time() - run.start, lag)


async def served_model(endpoint: Endpoint) -> str:
    """The endpoint's model, or the only one there is when it names none; raises `ReplayError` when there is none."""
    base = endpoint.base
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
        raise ReplayError(f"url is http://HOST:PORT, with /v1 or without, not {endpoint.url!r}")
    auth = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0)) as session,
            session.get(f"{base}/v1/models", headers=auth) as response,
        ):
            answer = json_object(await response.read())
            status = response.status
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise ReplayError(f"{base} does not answer: {error or type(error).__name__}") from None
    if status != 200 or not isinstance(answer.get("data"), list):
        raise ReplayError(f"{base}/v1/models answers {status}: not an OpenAI endpoint, or the key is wrong")
    models = [str(m.get("id")) for m in answer["data"] if isinstance(m, dict)]
    if endpoint.model in models:
        return endpoint.model
    if not endpoint.model and len(models) == 1:
        return models[0]
    there = ", ".join(models) or "none"
    raise ReplayError(f"{base} does not serve {endpoint.model!r}; models there: {there}")


class _Run:
    """One replay while it runs."""

    def __init__(
        self, endpoint: Endpoint, prompts: Prompts, on_answered: Callable[[int], None], outcomes: list[Outcome]
    ) -> None:
        self.endpoint = endpoint
        self.prompts = prompts
        self.outcomes = outcomes
        self.send_lag_s: list[float] = []
        self.loop_lag_s: list[float] = []
        self._on_answered = on_answered
        self._answered = 0
        self._now = asyncio.get_running_loop().time
        self.start = self._now()

    def now(self) -> float:
        return self._now() - self.start

    async def watch_loop(self) -> None:
        """Measure how late the loop comes round: so late an event may be seen."""
        while True:
            due = self.now() + LAG_LOOK_S
            await asyncio.sleep(LAG_LOOK_S)
            self.loop_lag_s.append(max(self.now() - due, 0.0))

    async def send_all(self, wire: Wire, workload: Workload) -> None:
        streams: set[asyncio.Task[None]] = set()
        most = max(workload.output_tokens)
        try:
            for index, (request, output_tokens) in enumerate(workload):
                data = body(self.endpoint, output_tokens, most, self.prompts.ids(index))
                if (ahead := request.arrived_at - self.now()) > 0:
                    await asyncio.sleep(ahead)
                outcome = Outcome(request.id, self.now(), request.prompt_tokens, request.slo)
                self.outcomes.append(outcome)
                self.send_lag_s.append(outcome.arrived_at - request.arrived_at)
                streams.add(asyncio.create_task(self._stream(wire, request, outcome, data)))
            await asyncio.wait(streams, timeout=self.endpoint.patience_s)
        finally:
            for stream in streams:
                stream.cancel()
            ends = await asyncio.gather(*streams, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _stream(self, wire: Wire, request: Request, outcome: Outcome, data: bytes) -> None:
        """One request from its sending to its last token; whatever goes wrong is its outcome."""
        tokens, refusal = TokenStream(), bytearray()
        answer: Answer | None = None

        def hear(status: int, data: bytes) -> None:
            if status == 200:
                tokens.feed(self.now(), data)
            else:
                refusal.extend(data)

        try:
            answer = await wire.post(self.endpoint.path, headers(self.endpoint, request), data, hear)
            await answer.heard()
            if answer.status != 200:
                _refused(outcome, answer.status, bytes(refusal))
                return
            _finished(outcome, tokens)
        except asyncio.CancelledError:
            outcome.delivered(tokens.ended().token_at)
            outcome.ending = "unfinished"
        except OSError as error:
            outcome.delivered(tokens.ended().token_at)
            outcome.ending, outcome.code = "failed", type(error).__name__
        finally:
            if answer is not None:
                answer.close()
                outcome.instance = answer.header(b"x-polyserve-instance").decode("latin-1") or None
                outcome.promoted = answer.header(b"x-polyserve-promoted") == b"true"
            self._answered += 1
            self._on_answered(self._answered)


def _refused(outcome: Outcome, status: int, answer: bytes) -> None:
    error = json_object(answer).get("error")
    code = error.get("code") or error.get("type") if isinstance(error, dict) else None
    outcome.code = str(code or status)
    outcome.ending = "refused" if status == 429 or outcome.code in get_args(RefuseCode) else "failed"


def _finished(outcome: Outcome, tokens: TokenStream) -> None:
    ended = tokens.ended()
    outcome.delivered(ended.token_at)
    if ended.error is None and ended.done and ended.token_at:
        outcome.ending = "finished"
    else:
        outcome.ending, outcome.code = "failed", ended.error or "stream_cut"


def anything(prompts: Ints, outputs: Ints, slo: Slo) -> Bools:
    """Every request is feasible: for endpoints of which no profile is known."""
    return np.ones(len(prompts), np.bool_)


def window(workload: Workload, replayed: Replayed) -> tuple[float, float]:
    """The time in which requests were sent: a client that lags sends the last ones after their time."""
    last = max((o.arrived_at for o in replayed.outcomes), default=0.0)
    return 0.0, max(workload.duration_s, math.nextafter(last, math.inf))


def lag_note(lag: ClientLag) -> str:
    """One line on whether the client's own times can be trusted."""
    sent, loop = (1e3 * (p.p99 or 0.0) for p in (lag.sent, lag.loop))
    said = f"client lag p99: sending {sent:.1f} ms, reading {loop:.1f} ms"
    if lag.kept_up:
        return said
    return f"{said}: THE CLIENT COULD NOT KEEP UP; its times are later than the endpoint's"


def to_rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as JSON values, one per request."""
    return [
        dataclasses.asdict(o) | {"attained": o.attained, "late_s": o.late_s if math.isfinite(o.late_s) else None}
        for o in outcomes
    ]
