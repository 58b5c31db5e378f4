"""What a gateway is told before it starts; `polyserve.config` makes it from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyserve.core.types import ChunkRule, Configured, InstanceId, Tenant, TierName

BEST_EFFORT = "best-effort"  # in place of a tier's name: no SLO at all
EngineKind = Literal["auto", "vllm", "sglang", "emulator", "openai"]
Order = Literal["deadline", "fcfs"]


class PlanError(ValueError):
    """A plan that cannot be used; one line for each thing that is wrong."""


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine to send requests to; what is None the engine is asked, or its profile says."""

    id: InstanceId
    url: str
    profile: str
    kind: EngineKind = "auto"
    chunk: ChunkRule | None = None
    order: Order | None = None
    kv_tokens: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    send_priority: bool = False  # stock vLLM refuses `priority` unless it was started for it
    launched: bool = False  # by our launcher, which stops it too
    api_key: str | None = field(default=None, repr=False)  # that it wants of us


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """Instances as processes of this machine."""

    profile: str
    command: tuple[str, ...]  # `{port}`, `{profile}` and `{instance}` are filled in
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 120.0
    stop_timeout_s: float = 10.0
    api_key: str | None = field(default=None, repr=False)  # that they want of us


@dataclass(frozen=True, slots=True)
class TenantPlan:
    """One tenant at the door; how often it may come is in `tenant`, for the brain."""

    tenant: Tenant
    keys: tuple[str, ...] = field(repr=False)  # their SHA-256, in hex
    tiers: tuple[TierName, ...] | None = None  # that it may have; None: all, and best effort
    default_tier: TierName | None = None  # None: the model's, or the first of its own
    tightest_tpot_s: float = 0.0
    tightest_ttft_s: float = 0.0
    body_bytes: int | None = None  # None: as for everybody

    def may(self, tier: TierName) -> bool:
        """Whether it may have a tier, or best effort."""
        return self.tiers is None or tier in self.tiers


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far anything may go."""

    body_bytes: int = 16 * 1024 * 1024
    open_requests: int = 20_000
    attempts: int = 3  # dispatches of one request, before its first byte
    connections: int = 20_000
    head_bytes: int = 64 * 1024
    head_s: float = 10.0  # for a request's head to arrive
    upload_s: float = 60.0  # for its body
    stall_s: float = 30.0  # for a client to read what waits for it
    silence_s: float = 300.0  # of a stream, before it counts as broken
    connect_s: float = 5.0
    shutdown_s: float = 60.0  # for streams to end by themselves
    retire_s: float = 3600.0  # the same, where another process has taken over
    probe_s: float = 1.0  # between two looks at an engine


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What serves one model."""

    name: str
    configured: Configured
    default_tier: TierName
    service_tiers: Mapping[str, TierName]
    engines: tuple[EngineSpec, ...]
    aliases: tuple[str, ...] = ()  # other names that clients may use
    launcher: LocalPlan | None = None
    journal: Path | None = None
    tokenizer: Path | None = None  # the model's tokenizer.json


@dataclass(frozen=True, slots=True)
class LogPlan:
    """What is logged, and how."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    requests: bool = False  # a line for each at its end


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a gateway needs to know."""

    listen: Address
    admin: Address | None  # None: no admin endpoints; equal to `listen`: on the same listener
    models: tuple[ModelPlan, ...]
    tenants: tuple[TenantPlan, ...] = ()  # none: open to everybody
    admin_keys: tuple[str, ...] = field(default=(), repr=False)  # their SHA-256, in hex
    bounds: Bounds = Bounds()
    log: LogPlan = LogPlan()
    watch: bool = False  # take in the file again whenever it has changed
    relays: int = 0  # processes that answer clients for the one that decides; 0: it does so itself

    @property
    def sole(self) -> ModelPlan:
        """The model of a gateway that has only one."""
        (model,) = self.models
        return model
