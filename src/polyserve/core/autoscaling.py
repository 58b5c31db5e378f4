"""The usual way to scale a pool: so many requests per instance, as Kubernetes' autoscalers do it.

Wanted are the running and waiting requests over the target, rounded up (KEDA's scaler for vLLM, Knative's target
concurrency). As there, a fleet within a tenth of its target stays as it is, more instances are started at once, and
fewer are kept only when for a whole window no more were wanted. An instance that has to go is drained: the one with
the fewest residents, so that it is gone soon.

Source: https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale (algorithm details, stabilization
window; tolerance 0.1, window 300 s), https://knative.dev/docs/serving/autoscaling/kpa-specific (stable window 60 s).
Kinder than they are: they look every 2 to 15 seconds and at samples, this one at every look of the controller and at
the truth, and its drains end no stream.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from polyserve.core.fleet import Books, Fleet, State
from polyserve.core.pending import Pending
from polyserve.core.scaling import Demand, Plan, Scaler
from polyserve.core.settings import Settings
from polyserve.core.types import Tier, TierName

TOLERANCE = 0.1  # Kubernetes' default


class Autoscaler(Protocol):
    """Looks at the fleet now and then, and says which instances change tier, start or stop."""

    wanted: dict[TierName, int]  # instances that each tier should have, where tiers are sized

    @property
    def elastic(self) -> bool:
        """Whether instances may be started and stopped at all."""
        ...

    @property
    def least(self) -> int:
        """Instances that an elastic fleet keeps whatever the load."""
        ...

    def look(self, now: float, waiting: Sequence[TierName], starting: int) -> Plan:
        """One look: `waiting` tiers have pending requests, `starting` instances are on their way."""
        ...


class QueueScaler:
    """Instances by requests per instance; with `sizes`, the tiers share what there is by their own rule."""

    def __init__(
        self, settings: Settings, tiers: Sequence[Tier], fleet: Fleet, pending: Pending, sizes: Scaler | None = None
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._pending = pending
        self._sizes = sizes
        self._floor = max(settings.min_instances, sum(tier.min_instances for tier in tiers))
        self._wanted: deque[tuple[float, int]] = deque()  # of the last `scale_down_s`, falling
        self.wanted: dict[TierName, int] = sizes.wanted if sizes else {}

    @property
    def elastic(self) -> bool:
        return self._settings.max_instances > 0 and self._settings.autoscaler == "queue"

    @property
    def least(self) -> int:
        return self._floor if self.elastic else 0

    def look(self, now: float, waiting: Sequence[TierName], starting: int) -> Plan:
        plan = Plan([], 0, [])
        if self._sizes is not None:
            plan = self._sizes.look(now, waiting, starting)
            self.wanted = self._sizes.wanted
        if self.elastic:
            ready = self._fleet.ready()
            if not self._wanted:  # what is there at first counts as wanted
                self._wanted.append((now, len(ready) + starting))
            wanted = self._now_wanted(ready, starting)
            plan.start = self._starts(wanted, len(ready), starting)
            plan.stop = self._stops(self._held(now, wanted), ready, starting)
        return plan

    def _now_wanted(self, ready: list[Books], starting: int) -> int:
        """What the requests of this moment ask for, within the bounds."""
        have = len(ready) + starting
        requests = sum(len(books.jobs) + books.foreign for books in ready) + len(self._pending)
        exact = requests / self._settings.target_requests
        if have and abs(exact / have - 1.0) <= TOLERANCE + 1e-9:
            exact = have
        return max(self._floor, min(math.ceil(exact), self._settings.max_instances))

    def _held(self, now: float, wanted: int) -> int:
        """The most that was wanted within the window."""
        while self._wanted and self._wanted[-1][1] <= wanted:
            self._wanted.pop()
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - self._settings.scale_down_s:
            self._wanted.popleft()
        return self._wanted[0][1]

    def _starts(self, wanted: int, ready: int, starting: int) -> int:
        paid = sum(books.state is not State.STARTING for books in self._fleet) + starting  # those that drain, too
        room = min(self._settings.max_instances - paid, self._settings.start_step - starting)
        return max(0, min(wanted - ready - starting, room))

    def _stops(self, held: int, ready: list[Books], starting: int) -> list[Books]:
        spare = min(len(ready) + starting - held, len(ready))
        leaving = sorted(ready, key=lambda books: (len(books.jobs), -books.since, books.id))
        return leaving[: max(spare, 0)]


def autoscaler(settings: Settings, tiers: Sequence[Tier], fleet: Fleet, demand: Demand, pending: Pending) -> Autoscaler:
    """The autoscaler that the settings name; a baseline has none of its own."""
    sizes = Scaler(settings, tiers, fleet, demand) if settings.router == "tiers" else None
    if sizes is not None and settings.autoscaler != "queue":
        return sizes
    return QueueScaler(settings, tiers, fleet, pending, sizes)
