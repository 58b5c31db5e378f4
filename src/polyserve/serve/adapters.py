"""What engines say and accept: plain OpenAI servers, vLLM, and our emulated engine.

All dialects of one protocol are spoken here, so that nothing else knows which software an instance runs.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from polyserve.core.types import ChunkRule, RequestId, Slo
from polyserve.serve.ask import Ask, field
from polyserve.serve.plan import EngineSpec, Order

PROBE_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
# Best effort comes after every deadline; engines keep priorities in 32 bits.
LAST_PRIORITY = 2**31 - 1

# Fields that only the router understands, or that only the router may set: who goes first, on which rank, under which
# id, and whose KV is fetched from where.
NOT_FOR_CLIENTS = ("nvext", "vllm_xargs", "priority", "request_id", "rid", "data_parallel_rank", "kv_transfer_params",
                   "bootstrap_host", "bootstrap_port", "bootstrap_room")  # fmt: skip
# What a process's start time may seem to move by.
CLOCK_STEP_S = 0.5

# The engine is gone, or answers what no engine would.
UNREACHABLE = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)


class KeyRefusedError(Exception):
    """The engine wants another key than it was given."""


class Facts(msgspec.Struct, frozen=True):
    """What an engine says about itself; None where it says nothing."""

    profile: str | None = None
    chunk: str | None = None
    order: Order | None = None
    kv_tokens: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


class Telemetry(msgspec.Struct, frozen=True):
    """One line of the emulated engine's telemetry: its latest iteration, and how far each resident is."""

    ended_at_ago_s: float
    seconds: float
    prefill_tokens: int = 0
    decodes: int = 0
    kv_tokens: int = 0  # that the decodes of the iteration read
    kv_held: int | None = None  # in memory
    tokens: dict[RequestId, int] = {}
    prefilling: dict[RequestId, int] = {}


class _ServerInfo(msgspec.Struct, frozen=True):
    max_total_num_tokens: int | None = None
    max_running_requests: int | None = None


class _Model(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model] = []


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine's metrics say right now."""

    running: int
    waiting: int
    kv_share: float | None = None  # of its KV room that is in use
    kv_capacity_tokens: int | None = None
    work: float = 0.0  # tokens computed since its process began, prompts included; 0 where it does not say
    started_at: float | None = None  # when that was, on the engine's clock

    def restarted_since(self, earlier: Load) -> bool:
        """Whether another process answers than at an earlier look."""
        if self.started_at is not None and earlier.started_at is not None:
            return abs(self.started_at - earlier.started_at) > CLOCK_STEP_S
        return self.work < earlier.work


class OpenAIEngine:
    """A server that knows OpenAI's API and nothing of ours: what it may choke on is left out."""

    kind = "openai"
    continues_chats = False  # whether it can go on with a message that was begun elsewhere

    def __init__(
        self, session: aiohttp.ClientSession, url: str, send_priority: bool = False, api_key: str | None = None
    ) -> None:
        self.session = session
        self.url = url.rstrip("/")
        self.send_priority = send_priority
        self.headers = credentials(api_key)
        self.refused = False  # at the latest look nobody listened

    def __repr__(self) -> str:
        return f"<{self.kind} engine at {self.url}>"

    async def healthy(self) -> bool:
        """Whether the engine answers and says that it can serve."""
        try:
            async with self.session.get(f"{self.url}/health", headers=self.headers, timeout=PROBE_TIMEOUT) as answer:
                self.refused = False
                # A plain OpenAI server may not know the path; that it answers is enough.
                return answer.status < 500
        except UNREACHABLE as error:
            self.refused = isinstance(error, aiohttp.ClientConnectorError) and isinstance(
                error.os_error, ConnectionRefusedError
            )
            return False

    async def models(self) -> list[str]:
        """The models that it lists; none when it keeps them to itself. Raises `KeyRefusedError`."""
        try:
            async with self.session.get(f"{self.url}/v1/models", headers=self.headers, timeout=PROBE_TIMEOUT) as answer:
                if answer.status in (401, 403):
                    raise KeyRefusedError(f"refuses {'our key' if self.headers else 'us without a key'}; see api_key")
                if answer.status != 200:
                    return []
                return [model.id for model in msgspec.json.decode(await answer.read(), type=_Models).data]
        except UNREACHABLE:
            return []

    async def facts(self) -> Facts:
        return Facts()

    async def load(self) -> Load | None:
        """Its metrics, or None when it has none."""
        return None

    async def tokenize(self, model: str, text: str) -> list[int] | None:
        """Token ids of a text that follows a prompt, where the engine gives them."""
        return None

    async def set_pace(self, pace_s: float) -> None:
        """Tell the engine the bound for its iterations, where it listens to that."""

    async def telemetry(self) -> AsyncIterator[Telemetry]:
        """Its iterations as they end; ends at once where the engine tells nothing."""
        return
        yield

    def changes(self, ask: Ask, slo: Slo | None, left_s: float, due_at: float) -> dict[str, object]:
        """Top-level fields of the body to set, or (None) to leave out, for this engine.

        `left_s` is what is left of the TTFT, `due_at` the first token's deadline on our clock.
        """
        changes: dict[str, object] = {key: None for key in NOT_FOR_CLIENTS if key in ask.fields}
        if ask.streamable and not ask.stream:
            changes["stream"] = True
        if ask.streamable and not ask.include_usage and ask.endpoint != "responses":  # which tells it anyway
            options = field(ask.fields, "stream_options") or {}
            # Usage in every chunk would follow from ours, and the client asked for none.
            options.pop("continuous_usage_stats", None)
            changes["stream_options"] = options | {"include_usage": True}
        return changes


class VllmEngine(OpenAIEngine):
    """vLLM: metrics, and the SLO in `vllm_xargs`, where our scheduler class finds it."""

    kind = "vllm"
    continues_chats = True

    async def facts(self) -> Facts:
        load = await self.load()
        return Facts(kv_tokens=load.kv_capacity_tokens if load else None)

    async def load(self) -> Load | None:
        try:
            async with self.session.get(f"{self.url}/metrics", headers=self.headers, timeout=PROBE_TIMEOUT) as answer:
                return parsed_metrics(await answer.text()) if answer.status == 200 else None
        except UNREACHABLE:
            return None

    async def tokenize(self, model: str, text: str) -> list[int] | None:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        url = f"{self.url}/tokenize"
        try:
            async with self.session.post(url, json=body, headers=self.headers, timeout=PROBE_TIMEOUT) as answer:
                return msgspec.json.decode(await answer.read(), type=_Tokens).tokens if answer.status == 200 else None
        except UNREACHABLE:
            return None

    def changes(self, ask: Ask, slo: Slo | None, left_s: float, due_at: float) -> dict[str, object]:
        changes = super().changes(ask, slo, left_s, due_at)
        if self.send_priority:
            changes["priority"] = _rank(due_at)  # lower goes first
        if ask.endpoint in ("embeddings", "responses"):  # older ones refuse what they do not know there
            return changes
        xargs = dict(ask.body.get("vllm_xargs") or {})
        xargs = {key: value for key, value in xargs.items() if not key.startswith("slo_")}
        if slo is not None:
            xargs["slo_ttft_ms"] = round(left_s * 1e3, 3)
            xargs["slo_tpot_ms"] = round(slo.tpot_s * 1e3, 3)
        if xargs:
            changes["vllm_xargs"] = xargs
        return changes


class SglangEngine(OpenAIEngine):
    """SGLang: its metrics, what its server says of itself, and priorities the other way round."""

    kind = "sglang"
    continues_chats = True

    async def facts(self) -> Facts:
        url = f"{self.url}/get_server_info"
        async with self.session.get(url, headers=self.headers, timeout=PROBE_TIMEOUT) as answer:
            if answer.status != 200:
                return Facts()
            info = msgspec.json.decode(await answer.read(), type=_ServerInfo)
        return Facts(kv_tokens=info.max_total_num_tokens, max_num_seqs=info.max_running_requests)

    async def load(self) -> Load | None:
        try:
            async with self.session.get(f"{self.url}/metrics", headers=self.headers, timeout=PROBE_TIMEOUT) as answer:
                return parsed_sglang_metrics(await answer.text()) if answer.status == 200 else None
        except UNREACHABLE:
            return None

    def changes(self, ask: Ask, slo: Slo | None, left_s: float, due_at: float) -> dict[str, object]:
        changes = super().changes(ask, slo, left_s, due_at)
        if self.send_priority:
            changes["priority"] = LAST_PRIORITY - _rank(due_at)  # higher goes first
        return changes


def _rank(due_at: float) -> int:
    """A deadline as a priority: milliseconds of our clock, best effort after all of them."""
    return LAST_PRIORITY if math.isinf(due_at) else min(int(due_at * 1e3), LAST_PRIORITY - 1)


class EmulatedEngine(VllmEngine):
    """Our emulated engine: vLLM's API, and it tells its iterations and listens to a pace."""

    kind = "emulator"

    async def facts(self) -> Facts:
        async with self.session.get(
            f"{self.url}/polyserve/info", headers=self.headers, timeout=PROBE_TIMEOUT
        ) as answer:
            return msgspec.json.decode(await answer.read(), type=Facts)

    async def set_pace(self, pace_s: float) -> None:
        body = {"pace_s": pace_s}
        url = f"{self.url}/polyserve/pace"
        async with self.session.post(url, json=body, headers=self.headers, timeout=PROBE_TIMEOUT):
            pass

    async def telemetry(self) -> AsyncIterator[Telemetry]:
        decoder = msgspec.json.Decoder(Telemetry)
        async with self.session.get(f"{self.url}/polyserve/telemetry", headers=self.headers) as answer:
            if answer.status == 200:
                async for line in answer.content:
                    if line.strip():
                        yield decoder.decode(line)


KINDS: dict[str, type[OpenAIEngine]] = {
    kind.kind: kind for kind in (OpenAIEngine, VllmEngine, SglangEngine, EmulatedEngine)
}


def credentials(api_key: str | None) -> dict[str, str]:
    """The headers that show an engine our key."""
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


async def detect(session: aiohttp.ClientSession, spec: EngineSpec) -> OpenAIEngine | None:
    """The engine that answers at a URL, or None when nothing does."""
    kind: str | None = spec.kind
    if kind == "auto":
        kind = await _detected_kind(session, spec.url.rstrip("/"), credentials(spec.api_key))
    if kind is None:
        return None
    engine = KINDS[kind](session, spec.url, spec.send_priority, spec.api_key)
    return engine if await engine.healthy() else None


async def _detected_kind(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> str | None:
    try:
        async with session.get(f"{url}/polyserve/info", headers=headers, timeout=PROBE_TIMEOUT) as answer:
            if answer.status == 200:
                return EmulatedEngine.kind
        async with session.get(f"{url}/metrics", headers=headers, timeout=PROBE_TIMEOUT) as answer:
            text = await answer.text() if answer.status == 200 else ""
            found = (kind for kind in (VllmEngine.kind, SglangEngine.kind) if f"\n{kind}:" in text)
            return next(found, OpenAIEngine.kind)
    except UNREACHABLE:
        return None


def parsed_metrics(text: str) -> Load | None:
    """vLLM's gauges, summed over its engine cores; None when they are not there."""
    running, waiting = _samples(text, "vllm:num_requests_running"), _samples(text, "vllm:num_requests_waiting")
    if not running or not waiting:
        return None
    shares = _samples(text, "vllm:kv_cache_usage_perc")
    return Load(
        running=int(sum(running)),
        waiting=int(sum(waiting)),
        kv_share=sum(shares) / len(shares) if shares else None,
        kv_capacity_tokens=_kv_capacity(text),
        work=sum(_samples(text, "vllm:generation_tokens_total")) + sum(_samples(text, "vllm:prompt_tokens_total")),
        started_at=max(_samples(text, "process_start_time_seconds"), default=None),
    )


def parsed_sglang_metrics(text: str) -> Load | None:
    """SGLang's gauges, summed over its workers; None when they are not there."""
    running, waiting = _samples(text, "sglang:num_running_reqs"), _samples(text, "sglang:num_queue_reqs")
    if not running or not waiting:
        return None
    shares = _samples(text, "sglang:token_usage")
    return Load(int(sum(running)), int(sum(waiting)), sum(shares) / len(shares) if shares else None)


def _samples(text: str, name: str) -> list[float]:
    found = re.findall(rf"^{name}(?:\{{[^\n]*\}})? (\S+)", text, re.MULTILINE)
    return [value for value in map(float, found) if math.isfinite(value)]


def _kv_capacity(text: str) -> int | None:
    tokens = 0
    for labels in re.findall(r"^vllm:cache_config_info\{([^\n]*)\}", text, re.MULTILINE):
        values: Mapping[str, Any] = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        try:
            tokens += int(values["num_gpu_blocks"]) * int(values["block_size"])
        except (KeyError, ValueError):
            return None
    return tokens or None


def chunk_rule(text: str) -> ChunkRule:
    """`dynamic`, `fixed:N` or `unknown`; raises `ValueError` saying so."""
    if text in ("dynamic", "unknown"):
        return ChunkRule("dynamic" if text == "dynamic" else "unknown")
    kind, _, tokens = text.partition(":")
    if kind == "fixed" and tokens.isascii() and tokens.isdigit() and int(tokens) > 0:
        return ChunkRule("fixed", int(tokens))
    raise ValueError(f"a chunk rule is dynamic, fixed:TOKENS or unknown, not {text!r}")
