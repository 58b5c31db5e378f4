"""Requests that wait: one queue per tier in deadline order, and one for best effort in order of arrival.

Where tenants have shares and requests of several wait, a queue is in the order of their turns (`fairness.py`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyserve.core.fairness import Turns
from polyserve.core.fleet import Job
from polyserve.core.kernels import R_COLUMNS, R_PROMPT, Matrix
from polyserve.core.types import RequestId, TierName

_Entry = tuple[bool, float, int, RequestId]  # behind, due at, order of entry


class _Fair(NamedTuple):
    """A queue in the order of turns: places in deadline order, the rows there, and when each has its turn."""

    places: list[int]
    rows: Matrix
    late: NDArray[np.bool_]
    turns: list[tuple[bool, float]]  # of the places, in deadline order


class Queue:
    """Jobs by the due time of their next token, those that went `behind` last; ties by order of entry."""

    def __init__(self, turns: Turns | None = None) -> None:
        """With `turns`: by those, while jobs of several tenants wait."""
        self._turns = turns
        self._waiting: dict[str, int] = {}  # jobs by tenant, with turns only
        self._fair: _Fair | None = None
        self._entries: list[_Entry] = []
        self._jobs: dict[RequestId, _Entry] = {}
        self._by_id: dict[RequestId, Job] = {}
        self._sequence = 0
        self._rows: Matrix = np.zeros((8, R_COLUMNS))
        self._late: NDArray[np.bool_] = np.zeros(8, np.bool_)
        self.wary: set[RequestId] = set()  # jobs that avoid some instance

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Job]:
        return (self._by_id[entry[-1]] for entry in self._entries)

    @property
    def rows(self) -> Matrix:
        """The jobs as rows of the books, in order."""
        if len(self._waiting) > 1:
            return self._in_turn().rows
        return self._rows[: len(self._entries)]

    @property
    def late(self) -> NDArray[np.bool_]:
        """Whose deadline no longer counts, in the order of `rows`."""
        if len(self._waiting) > 1:
            return self._in_turn().late
        return self._late[: len(self._entries)]

    def push(self, job: Job) -> None:
        self._sequence += 1
        entry = (job.behind, job.due_at, self._sequence, job.id)
        self._jobs[job.id] = entry
        self._by_id[job.id] = job
        if job.avoid:
            self.wary.add(job.id)
        at, count = bisect_left(self._entries, entry), len(self._entries)
        self._entries.insert(at, entry)
        if count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._late = np.concatenate([self._late, np.zeros_like(self._late)])
        self._rows[at + 1 : count + 1] = self._rows[at:count]
        self._late[at + 1 : count + 1] = self._late[at:count]
        self._rows[at], self._late[at] = job.row(), job.late
        if self._turns is not None:
            self._came(job, self._turns)

    def remove(self, job: Job) -> None:
        del self._by_id[job.id]
        at, count = bisect_left(self._entries, self._jobs.pop(job.id)), len(self._entries)
        del self._entries[at]
        self.wary.discard(job.id)
        self._rows[at : count - 1] = self._rows[at + 1 : count]
        self._late[at : count - 1] = self._late[at + 1 : count]
        if self._turns is not None:
            self._went(job, self._turns)

    def job(self, at: int) -> Job:
        """The job at a place of the order, from 0."""
        if len(self._waiting) > 1:
            at = self._in_turn().places[at]
        return self._by_id[self._entries[at][-1]]

    def named(self, request: RequestId) -> Job:
        """The job of that name."""
        return self._by_id[request]

    def head(self, count: int) -> list[Job]:
        """The first `count` jobs."""
        if len(self._waiting) > 1:
            return [self._by_id[self._entries[at][-1]] for at in self._in_turn().places[:count]]
        return [self._by_id[entry[-1]] for entry in self._entries[:count]]

    def ahead(self, due_at: float) -> int:
        """How many jobs are due before `due_at`."""
        return bisect_left(self._entries, (False, due_at, -1, ""))

    def ahead_tokens(self, due_at: float) -> tuple[int, int]:
        """Jobs, and their prompt tokens, that are due before `due_at`."""
        count = self.ahead(due_at)
        return count, int(self._rows[:count, R_PROMPT].sum())

    # -- several tenants

    def before(self, job: Job) -> int:
        """How many jobs go before one that is not here yet."""
        return len(self._before(job)) if self._contested(job) else self.ahead(job.due_at)

    def before_tokens(self, job: Job) -> int:
        """Their prompt tokens."""
        if not self._contested(job):
            return self.ahead_tokens(job.due_at)[1]
        return int(self._rows[self._before(job), R_PROMPT].sum())

    def served(self, job: Job) -> None:
        """A job that is about to be removed has its turn."""
        if self._turns is not None:
            self._turns.served(job.request.tenant, job.prefill_tokens)

    def to_make_way(self, job: Job) -> Job | None:
        """Whom a full queue gives up for a job of a tenant that has less than its share of it; None: nobody."""
        if self._turns is None or not self._contested(job):
            return None
        share = self._turns.share
        most = max(self._waiting, key=lambda tenant: (self._waiting[tenant] / share(tenant), tenant))
        mine = job.request.tenant
        if self._waiting[most] / share(most) <= (self._waiting.get(mine, 0) + 1) / share(mine):
            return None
        waiting = (self._by_id[entry[-1]] for entry in reversed(self._entries))
        return next((one for one in waiting if one.request.tenant == most and not one.late), None)

    def _contested(self, job: Job) -> bool:
        return len(self._waiting) > (job.request.tenant in self._waiting)

    def _came(self, job: Job, turns: Turns) -> None:
        tenant = job.request.tenant
        if tenant not in self._waiting:
            turns.came(tenant)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1
        self._fair = None

    def _went(self, job: Job, turns: Turns) -> None:
        tenant = job.request.tenant
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            if not self._waiting:
                turns.rest()
        self._fair = None

    def _in_turn(self) -> _Fair:
        if self._fair is None:
            turns = self._turn_of_each()
            places = sorted(range(len(turns)), key=turns.__getitem__)  # stable: equal turns by deadline
            count = len(places)
            self._fair = _Fair(places, self._rows[:count][places], self._late[:count][places], turns)
        return self._fair

    def _turn_of_each(self) -> list[tuple[bool, float]]:
        """When each job has its turn, in deadline order; those that went behind come last."""
        assert self._turns is not None, "tenants have turns"
        cost = self._turns.cost
        times = {tenant: self._turns.time(tenant) for tenant in self._waiting}
        found = []
        for behind, _, _, request in self._entries:
            job = self._by_id[request]
            tenant = job.request.tenant
            found.append((behind, times[tenant]))
            times[tenant] += cost(tenant, job.prefill_tokens)
        return found

    def _before(self, job: Job) -> list[int]:
        """The places, in deadline order, of those who go before a job that is not here yet."""
        assert self._turns is not None, "tenants have turns"
        turns = self._in_turn().turns if len(self._waiting) > 1 else self._turn_of_each()
        tenant, mine = job.request.tenant, self._turns.time(job.request.tenant)
        due = self.ahead(job.due_at)
        for entry in self._entries[:due]:
            other = self._by_id[entry[-1]]
            if other.request.tenant == tenant:
                mine += self._turns.cost(tenant, other.prefill_tokens)
        return [at for at, turn in enumerate(turns) if turn < (False, mine) or (turn == (False, mine) and at < due)]


class Pending:
    """Every waiting job, by tier, and when each is beyond hope."""

    def __init__(self, tiers: list[TierName], turns: Callable[[], Turns] | None = None) -> None:
        """`turns` makes those of one queue."""
        self.queues: dict[TierName, Queue] = {name: Queue(turns() if turns else None) for name in tiers}
        self.best_effort: dict[RequestId, Job] = {}
        self._beyond: list[tuple[float, RequestId]] = []
        self._jobs: dict[RequestId, Job] = {}

    def retier(self, tiers: list[TierName], turns: Callable[[], Turns] | None = None) -> None:
        """Other queues: every job is in that of the tier it has by now, and has waited as long as before.

        Turns begin anew.
        """
        jobs = list(self._jobs.values())
        self.queues = {name: Queue(turns() if turns else None) for name in tiers}
        self.best_effort, self._beyond, self._jobs = {}, [], {}
        for job in jobs:
            self.push(job, job.pending_since)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __contains__(self, request: RequestId) -> bool:
        return request in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def push(self, job: Job, now: float) -> None:
        job.pending_since = now
        self._jobs[job.id] = job
        if job.tier is None:
            self.best_effort[job.id] = job
            return
        self.queues[job.tier].push(job)
        if not job.late:
            heapq.heappush(self._beyond, (job.latest_at, job.id))

    def remove(self, request: RequestId) -> Job:
        job = self._jobs.pop(request)
        if job.tier is None:
            del self.best_effort[request]
        else:
            self.queues[job.tier].remove(job)
        return job

    def get(self, request: RequestId) -> Job | None:
        return self._jobs.get(request)

    def beyond_hope(self, now: float) -> list[Job]:
        """Jobs whose `latest_at` has passed since the last call."""
        jobs: dict[RequestId, Job] = {}  # a job that has waited twice is in the heap twice
        while self._beyond and self._beyond[0][0] <= now:
            _, request = heapq.heappop(self._beyond)
            job = self._jobs.get(request)
            if job is not None and job.tier is not None and job.latest_at <= now:
                jobs[request] = job
        return list(jobs.values())

    @property
    def next_beyond_at(self) -> float | None:
        """When the next waiting job is beyond hope, if any."""
        while self._beyond and self._beyond[0][1] not in self._jobs:
            heapq.heappop(self._beyond)
        return self._beyond[0][0] if self._beyond else None
