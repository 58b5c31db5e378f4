"""Requests that wait: one queue per tier in deadline order, and one for best effort in order of arrival."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from polyserve.core.fleet import Job
from polyserve.core.kernels import R_COLUMNS, R_PROMPT, Matrix
from polyserve.core.types import RequestId, TierName

_Entry = tuple[bool, float, int, RequestId]  # behind, due at, order of entry


class Queue:
    """Jobs by the due time of their next token, those that went `behind` last; ties by order of entry."""

    def __init__(self) -> None:
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
        return self._rows[: len(self._entries)]

    @property
    def late(self) -> NDArray[np.bool_]:
        """Whose deadline no longer counts, in the order of `rows`."""
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

    def remove(self, job: Job) -> None:
        del self._by_id[job.id]
        at, count = bisect_left(self._entries, self._jobs.pop(job.id)), len(self._entries)
        del self._entries[at]
        self.wary.discard(job.id)
        self._rows[at : count - 1] = self._rows[at + 1 : count]
        self._late[at : count - 1] = self._late[at + 1 : count]

    def job(self, at: int) -> Job:
        """The job at a place of the order, from 0."""
        return self._by_id[self._entries[at][-1]]

    def named(self, request: RequestId) -> Job:
        """The job of that name."""
        return self._by_id[request]

    def head(self, count: int) -> list[Job]:
        """The first `count` jobs."""
        return [self._by_id[entry[-1]] for entry in self._entries[:count]]

    def ahead(self, due_at: float) -> int:
        """How many jobs are due before `due_at`."""
        return bisect_left(self._entries, (False, due_at, -1, ""))

    def ahead_tokens(self, due_at: float) -> tuple[int, int]:
        """Jobs, and their prompt tokens, that are due before `due_at`."""
        count = self.ahead(due_at)
        return count, int(self._rows[:count, R_PROMPT].sum())


class Pending:
    """Every waiting job, by tier, and when each is beyond hope."""

    def __init__(self, tiers: list[TierName]) -> None:
        self.queues: dict[TierName, Queue] = {name: Queue() for name in tiers}
        self.best_effort: dict[RequestId, Job] = {}
        self._beyond: list[tuple[float, RequestId]] = []
        self._jobs: dict[RequestId, Job] = {}

    def retier(self, tiers: list[TierName]) -> None:
        """Other queues: every job is in that of the tier it has by now, and has waited as long as before."""
        jobs = list(self._jobs.values())
        self.queues = {name: Queue() for name in tiers}
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
