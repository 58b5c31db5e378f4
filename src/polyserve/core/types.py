"""The nouns of PolyServe, and the two unions that cross its one door: `Event` in, `Action` out.

Everything here is a frozen value that compares with `==`, so that a journal of events and actions is log, audit,
replay input and regression test at once. Times are float seconds on one clock, always whole microseconds
(`to_microsecond`), so that a journal that keeps integers loses nothing. A float field of an event or action is a
time or a duration in seconds; anything else numeric is an int.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

RequestId = str
InstanceId = str
TierName = str


def to_microsecond(seconds: float) -> float:
    """The nearest whole microsecond, in seconds: what a body applies to every time before it enters the core."""
    return round(seconds * 1e6) / 1e6


@dataclass(frozen=True, slots=True)
class Slo:
    """A deadline SLO (DSLO): token i, from 0, is due at `arrived + ttft_s + i * tpot_s`."""

    ttft_s: float
    tpot_s: float

    def due_at(self, arrived_at: float, token: int) -> float:
        """When output token `token` (from 0) is late."""
        return arrived_at + self.ttft_s + token * self.tpot_s


@dataclass(frozen=True, slots=True)
class Tier:
    """One bin of requests: those that need a token every `tpot_s` seconds, or may wait that long."""

    name: TierName
    tpot_s: float
    ttft_s: float  # for requests that name a tier and no TTFT
    min_instances: int = 0
    weight: float = 1.0  # share under shortage when `shortage` is "weight"
    on_late: Literal["refuse", "serve_late", "never"] | None = None  # None: the policy's


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody whose requests count together; what is None has no bound."""

    name: str
    requests_per_s: float | None = None
    tokens_per_s: float | None = None  # of prompts and answers together
    burst_s: float = 10.0  # of either rate that may come at once after a pause
    concurrency: int | None = None  # requests that are not answered yet
    share: float = 1.0  # against other tenants, where requests of one tier wait

    @property
    def limited(self) -> bool:
        """Whether anything bounds it."""
        return any(bound is not None for bound in (self.requests_per_s, self.tokens_per_s, self.concurrency))


class Role(StrEnum):
    """What an instance does in PD-disaggregated serving; co-located serving is `MIXED`."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


# What a dynamic chunk keeps within: the instance's pace; the slack that decodes have banked; or that slack only where
# the pace would lose the first prompt's deadline.
ChunkBound = Literal["pace", "slack", "need"]


@dataclass(frozen=True, slots=True)
class ChunkRule:
    """How an engine sizes the prefill chunk of an iteration.

    `dynamic`: within the instance's pace (`core/chunking.py`); `fixed`: decodes first, then prefill up to `tokens`
    tokens in the batch altogether (stock vLLM); `unknown`: forecast as `fixed` with the engine's maximum.
    """

    kind: Literal["dynamic", "fixed", "unknown"] = "dynamic"
    tokens: int = 0  # of `fixed`: the token budget of one iteration


@dataclass(frozen=True, slots=True)
class Instance:
    """One running engine as the fleet knows it."""

    id: InstanceId
    profile: str  # name of the believed profile in `Configured.profiles`
    chunk: ChunkRule = ChunkRule()
    order: Literal["deadline", "fcfs"] = "deadline"  # in which the engine serves its queued prefills
    role: Role = Role.MIXED
    kv_tokens: int | None = None  # None: the profile's
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived: `slo` None asks for best effort."""

    id: RequestId
    arrived_at: float
    prompt_tokens: int
    slo: Slo | None
    max_tokens: int | None = None  # None: whatever the context leaves
    n: int = 1  # choices: residents that share the prompt
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Iteration:
    """One engine iteration as a body saw it. Fields that nobody could see are None."""

    ended_at: float
    seconds: float
    prefill_tokens: int | None = None
    decodes: int | None = None
    kv_tokens: int | None = None
    inferred: bool = False  # from clustered stream arrivals, not from the engine itself


# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Configured:
    """The first event of every journal: everything that later decisions rest on.

    `settings` are the fields of `Settings`, `profiles` whole profiles by name (`Profile.to_dict`), so that a journal
    replays without any other file.
    """

    at: float
    settings: dict[str, object]
    tiers: tuple[Tier, ...]
    profiles: dict[str, dict[str, object]]
    seed: int = 0
    tenants: tuple[Tenant, ...] = ()


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """Other tiers and tenants from now on; requests that are here keep the SLO they came with.

    They are binned anew by it. `profiles` are those of instances to come that were not named before.
    """

    at: float
    tiers: tuple[Tier, ...]
    profiles: dict[str, dict[str, object]] = field(default_factory=dict)
    tenants: tuple[Tenant, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrived:
    at: float
    request: Request


@dataclass(frozen=True, slots=True)
class Corrected:
    """A better count of a request's prompt tokens."""

    at: float
    request: RequestId
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client has gone."""

    at: float
    request: RequestId


@dataclass(frozen=True, slots=True)
class Progressed:
    """What an instance has done since its last report; at most every 50 ms per instance.

    `tokens` maps each resident that has a first token to the output tokens seen so far. `prefilling` maps residents
    without one to the prompt tokens still to compute, where the body knows (engine telemetry); a resident in neither
    is unknown and rolls on by forecast.
    """

    at: float
    instance: InstanceId
    tokens: dict[RequestId, int] = field(default_factory=dict)
    prefilling: dict[RequestId, int] = field(default_factory=dict)
    iteration: Iteration | None = None
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A dispatch has given its first token. On a prefill instance the KV is then there to be handed over.

    Of a request that ends with this token a prefill instance sends `Finished` alone.
    """

    at: float
    request: RequestId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Received:
    """The KV that a `HandOver` sent has arrived: the request goes on here, and its source is free of it."""

    at: float
    request: RequestId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Finished:
    at: float
    request: RequestId
    instance: InstanceId
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """The engine dropped a resident's KV and will compute it again."""

    at: float
    request: RequestId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Broken:
    """A stream ended before its end: `tokens` were delivered (0: before the first byte)."""

    at: float
    request: RequestId
    instance: InstanceId
    tokens: int = 0
    fault: bool = True  # the instance's; False: it could not do this, and is sound


@dataclass(frozen=True, slots=True)
class Silent:
    """An instance that owes tokens to streams which are read has sent nothing `since` then."""

    at: float
    instance: InstanceId
    since: float


@dataclass(frozen=True, slots=True)
class Failed:
    """An instance that was asked to start did not."""

    at: float
    instance: InstanceId
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Joined:
    """An instance exists; it takes requests once `Ready`."""

    at: float
    instance: Instance


@dataclass(frozen=True, slots=True)
class Ready:
    at: float
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Lost:
    """An instance has gone, and everything on it."""

    at: float
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Restarted:
    """Another process answers at an instance's address: requests `lost` were on the one before."""

    at: float
    instance: InstanceId
    lost: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True)
class DrainAsked:
    at: float
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Reported:
    """What an engine's own metrics say."""

    at: float
    instance: InstanceId
    running: int
    waiting: int
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed and nothing else: what a body sends when `wake_at` is reached."""

    at: float


Event = (
    Configured
    | Reconfigured
    | Arrived
    | Corrected
    | Cancelled
    | Progressed
    | FirstToken
    | Received
    | Finished
    | Preempted
    | Broken
    | Silent
    | Failed
    | Joined
    | Ready
    | Lost
    | Restarted
    | DrainAsked
    | Reported
    | Tick
)

# --------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send a request to an instance; `resume_from` output tokens were delivered already."""

    request: RequestId
    instance: InstanceId
    tier: TierName | None  # the request's own; None: best effort
    host: TierName | None  # the instance's; differs from `tier` when promoted
    slo: Slo | None  # as binned: what the engine is told
    resume_from: int = 0
    predicted_ttft_s: float | None = None

    @property
    def promoted(self) -> bool:
        """Whether the request is a guest on another tier's instance."""
        return self.tier is not None and self.host is not None and self.host != self.tier


@dataclass(frozen=True, slots=True)
class HandOver:
    """Send the KV of a request whose first token was made to the instance that makes the others."""

    request: RequestId
    source: InstanceId  # where the KV lies
    instance: InstanceId
    tier: TierName | None  # as in `Dispatch`
    host: TierName | None
    slo: Slo | None

    @property
    def promoted(self) -> bool:
        """Whether the request is a guest on another tier's instance."""
        return self.tier is not None and self.host is not None and self.host != self.tier


RefuseCode = Literal[
    "overloaded",
    "slo_infeasible",
    "context_length_exceeded",
    "no_instances",
    "queue_full",
    "queue_timeout",
    "rate_limit_exceeded",
]
Limit = Literal["requests", "tokens", "concurrency"]


@dataclass(frozen=True, slots=True)
class Refuse:
    request: RequestId
    code: RefuseCode
    tier: TierName | None = None
    retry_after_s: float | None = None  # predicted drain; None: never worth a retry
    limit: Limit | None = None  # of its tenant, with `rate_limit_exceeded`


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop computing a request whose client has gone."""

    request: RequestId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Evict:
    """Take a request off its instance; it waits in the core with the tokens it has.

    A best-effort request that makes room, or any whose instance hangs.
    In PD also a request whose prompt is computed and whom nobody can answer: its KV is given up.
    """

    request: RequestId
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Start:
    """Start an instance under this id; answered by `Joined` and `Ready`, or `Failed`."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Drain:
    """Informs: the instance gets no new requests; `Stop` follows when its last resident has gone."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Stop:
    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Suspend:
    """Informs: the instance gets no new requests until then, and one to try it after."""

    instance: InstanceId
    until: float


@dataclass(frozen=True, slots=True)
class Resume:
    """Informs: the instance is sound again."""

    instance: InstanceId


@dataclass(frozen=True, slots=True)
class Assign:
    """Informs: the instance now serves `tier`; None puts it into the pool."""

    instance: InstanceId
    tier: TierName | None


@dataclass(frozen=True, slots=True)
class SetRole:
    """An instance that holds nothing computes prompts, or answers, from now on."""

    instance: InstanceId
    role: Role


@dataclass(frozen=True, slots=True)
class SetPace:
    """The bound an engine with a dynamic chunk keeps its iterations in."""

    instance: InstanceId
    pace_s: float


Action = (
    Dispatch | HandOver | Refuse | Cancel | Evict | Start | Drain | Stop | Suspend | Resume | Assign | SetRole | SetPace
)
