"""What a simulation is asked, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import ChunkRule, Instance, InstanceId, Request, RequestId, Role, Tier, TierName
from polyserve.report import Outcome


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, and when."""

    losses: tuple[tuple[float, InstanceId], ...] = ()  # an instance dies, and everything on it
    leaving: Mapping[RequestId, float] = field(default_factory=dict)  # a client goes, seconds after its arrival
    failing_starts: float = 0.0  # share of starts that come to nothing


@dataclass(frozen=True, slots=True)
class Group:
    """Instances that are alike."""

    profile: Profile  # the true one: how long iterations last
    count: int
    believed: Profile | None = None  # None: the true one
    chunk: ChunkRule = field(default_factory=ChunkRule)
    order: Literal["deadline", "fcfs"] = "deadline"
    role: Role = Role.MIXED

    def instance(self, id: InstanceId) -> Instance:
        """One of them, as the core is told of it."""
        return Instance(id, (self.believed or self.profile).name, self.chunk, self.order, self.role)


@dataclass(frozen=True, slots=True)
class SimulationSpec:
    """Everything a simulation rests on; the same spec gives the same journal.

    A fleet of one kind is told by `profile`, `instances` and so on; `others` are the groups of a mixed fleet beside
    it. Instances are numbered through, and those that the core starts are of the first kind.
    """

    requests: Sequence[tuple[Request, int]]  # with the output tokens each will have, in order of arrival
    tiers: tuple[Tier, ...]
    settings: Settings
    profile: Profile  # the true one: how long iterations last
    instances: int
    believed: Profile | None = None  # None: the true one
    chunk: ChunkRule = field(default_factory=ChunkRule)
    order: Literal["deadline", "fcfs"] = "deadline"
    seed: int = 0
    jitter: float = 0.0
    sight: Literal["gateway", "perfect"] = "gateway"
    lag_s: float = 0.0
    network_s: float = 0.0
    start_up_s: float = 0.0
    faults: Faults = Faults()
    drain_s: float = 120.0  # how long requests may still finish after the last arrival
    samples: int = 300  # looks at the load of every instance, evenly over the run
    role: Role = Role.MIXED  # of the instances of `profile`
    others: tuple[Group, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The whole fleet at the start."""
        return (Group(self.profile, self.instances, self.believed, self.chunk, self.order, self.role), *self.others)


@dataclass(frozen=True, slots=True)
class Look:
    """One instance at one time."""

    at: float
    instance: InstanceId
    tier: TierName | None
    residents: int
    load: float  # the largest of the shares of pace, memory and seats that are taken


@dataclass(frozen=True, slots=True)
class Life:
    """From when to when an instance was paid for; None: beyond the end."""

    instance: InstanceId
    joined_at: float
    gone_at: float | None


@dataclass(frozen=True)
class Run:
    """What a simulation leaves behind. Counters cover the whole run, warm-up included."""

    outcomes: list[Outcome]
    looks: list[Look]
    labels: list[tuple[float, InstanceId, TierName | None]]  # when each instance took which tier
    lives: list[Life]
    ended_at: float
    iterations: int
    preemptions: int
    forced_chunks: int
    steps: int
    decision_us: dict[str, float]  # of one step: mean and p99, by the wall clock
    wall_s: float

    def instance_seconds(self, start: float, end: float) -> float:
        """Instance-seconds paid for between two times."""
        return sum(
            max(0.0, min(end, end if life.gone_at is None else life.gone_at) - max(start, life.joined_at))
            for life in self.lives
        )
