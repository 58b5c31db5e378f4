"""The simulated engine again, one object per resident, no haste: what the compiled loops are held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from polyserve.core.chunking import Prefill, Verdict, chunk_law, plan_prefill
from polyserve.core.profile import Profile, attention_work
from polyserve.core.settings import Settings
from polyserve.core.types import Instance, to_microsecond
from polyserve.sim.engine import Done, Job


@dataclass(eq=False)
class Resident:
    job: Job
    arrival: int
    generated: int
    computed: int = 0
    target: int = 0  # KV tokens to compute before the next token
    blocks: int = 0
    admission: int | None = None  # None: waits for a seat
    chunk: int = 0
    brought: bool = False  # its KV came along and waits for blocks
    relegated: bool = False
    worst_s: float = -math.inf
    first_at: float | None = None

    @property
    def due_at(self) -> float:
        return math.inf if self.job.slo is None else self.job.slo.due_at(self.job.arrived_at, self.generated)

    @property
    def tpot_s(self) -> float:
        return math.inf if self.job.slo is None else self.job.slo.tpot_s


@dataclass
class Outcome:
    tokens: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    finished: list[Done] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    shape: tuple[int, int, int] = (0, 0, 0)  # prefill tokens, decodes, KV tokens that the decodes read


class PlainEngine:
    """One that never corrects what it believes: exact, or jittering without correction."""

    def __init__(
        self, instance: Instance, profile: Profile, settings: Settings, stretch: Callable[[], float] = lambda: 1.0
    ) -> None:
        self.stretch = stretch
        self.profile, self.deadline, self.relegates = profile, instance.order == "deadline", settings.relegate
        self.law = chunk_law(instance, profile, settings.chunk_bound, settings.chunk_floor_tokens)
        self.block = profile.limits.block_size
        self.free = (instance.kv_tokens or profile.limits.kv_tokens) // self.block
        self.seats = min(instance.max_num_seqs or profile.limits.max_num_seqs, self.law.tokens)
        self.pace_s = math.inf
        self.decoding: list[Resident] = []
        self.queue: list[Resident] = []
        self.arrivals = self.admissions = self.forced_chunks = 0
        self.outcome = Outcome()

    def submit(self, job: Job) -> None:
        self.enqueue(Resident(job, self.arrivals, job.resume_from, brought=job.brings_kv))
        self.arrivals += 1

    def enqueue(self, resident: Resident) -> None:
        resident.target = resident.job.prompt_tokens + resident.generated
        self.queue.append(resident)
        self.sort()

    def sort(self) -> None:
        self.queue.sort(key=lambda r: (r.relegated, r.due_at if self.deadline else 0.0, r.arrival))

    def relegate(self, now: float, kv: int) -> None:
        while self.queue and not (head := self.queue[0]).relegated and head.admission is None and not head.brought:
            at_once = self.profile.iteration_s(head.target, len(self.decoding), kv, attention_work(head.target, 0))
            if now + at_once <= head.due_at:
                return
            head.relegated = True
            self.sort()

    def cancel(self, id: str) -> None:
        for residents in (self.decoding, self.queue):
            for resident in [r for r in residents if r.job.id == id]:
                residents.remove(resident)
                self.give_back(resident)
        self.outcome.preempted = [other for other in self.outcome.preempted if other != id]

    def give_back(self, resident: Resident) -> None:
        self.free += resident.blocks
        resident.blocks = resident.computed = resident.chunk = 0
        resident.admission = None

    def running(self) -> list[Resident]:
        return [r for r in self.decoding + self.queue if r.admission is not None]

    def preempt(self) -> None:
        victim = max(self.running(), key=lambda r: (r.due_at if self.deadline else 0.0, r.admission))
        (self.decoding if victim in self.decoding else self.queue).remove(victim)
        self.give_back(victim)
        self.enqueue(victim)
        self.outcome.preempted.append(victim.job.id)

    def blocks_for(self, tokens: int) -> int:
        return math.ceil(tokens / self.block)

    def join_brought(self) -> None:
        """Whoever brought its KV decodes at once, unless somebody before it in the queue waits too."""
        for resident in list(self.queue):
            if resident.admission is not None:
                continue
            context = resident.target - 1
            blocks = self.blocks_for(context + 1)
            if not resident.brought or len(self.running()) >= self.seats or blocks > self.free:
                return
            self.queue.remove(resident)
            self.decoding.append(resident)
            resident.brought = False
            resident.admission = self.admissions
            self.admissions += 1
            resident.computed, resident.blocks = context, blocks
            self.free -= blocks

    def able(self) -> list[tuple[Resident, Prefill]]:
        """Who may get a chunk now, and how much of the prompt that may be."""
        able: list[tuple[Resident, Prefill]] = []
        free, seats = self.free, self.seats - len(self.running())
        closed = bool(self.outcome.preempted)
        for resident in self.queue:
            if sum(p.remaining for _, p in able) >= self.law.tokens - len(self.decoding):
                break
            left = resident.target - resident.computed
            room = (resident.blocks + free) * self.block - resident.computed
            if resident.admission is None:
                closed = closed or seats == 0 or room < left or resident.brought
                if closed:
                    continue
                seats -= 1
            elif room < left:
                if room < self.law.floor:
                    break
                left = room
            free -= max(0, self.blocks_for(resident.computed + left) - resident.blocks)
            able.append((resident, Prefill(left, resident.computed)))
        return able

    def begin(self, now: float) -> float | None:
        if not self.decoding and not self.queue:
            return None
        self.outcome = Outcome()
        while sum(r.computed % self.block == 0 for r in self.decoding) > self.free:
            self.preempt()
        for resident in self.decoding:
            if resident.computed % self.block == 0:
                resident.blocks += 1
                self.free -= 1
        if self.relegates:
            self.relegate(now, sum(r.computed + 1 for r in self.decoding))
        if not self.outcome.preempted:
            self.join_brought()
        kv = sum(r.computed + 1 for r in self.decoding)
        able = self.able()
        head_due_at = able[0][0].due_at if able and not able[0][0].relegated else math.inf
        pace_s = min([self.pace_s, *(r.tpot_s for r in self.running())])
        chunks, verdict = plan_prefill(
            self.profile,
            self.law,
            pace_s,
            kv,
            [r.due_at - now for r in self.decoding],
            head_due_at - now,
            [prefill for _, prefill in able],
        )
        self.forced_chunks += verdict == Verdict.FORCED
        work = 0.0
        for (resident, prefill), chunk in zip(able, chunks, strict=True):
            if chunk:
                self.start(resident, chunk)
                work += attention_work(chunk, prefill.past)
        self.outcome.shape = (sum(chunks), len(self.decoding), kv)
        seconds = self.stretch() * self.profile.iteration_s(sum(chunks), len(self.decoding), kv, work)
        return to_microsecond(now + seconds)

    def start(self, resident: Resident, chunk: int) -> None:
        if resident.admission is None:
            resident.admission = self.admissions
            self.admissions += 1
        more = max(0, self.blocks_for(resident.computed + chunk) - resident.blocks)
        resident.blocks += more
        self.free -= more
        resident.chunk = chunk

    def end(self, now: float) -> Outcome:
        for resident in list(self.decoding):
            resident.computed += 1
            self.token(resident, now)
        for resident in [r for r in self.queue if r.chunk]:
            resident.computed += resident.chunk
            resident.chunk = 0
            if resident.computed == resident.target:
                self.queue.remove(resident)
                self.decoding.append(resident)
                self.token(resident, now)
        return self.outcome

    def token(self, resident: Resident, now: float) -> None:
        job = resident.job
        self.outcome.tokens.append(job.id)
        resident.worst_s = max(resident.worst_s, now - resident.due_at)
        resident.generated += 1
        if resident.first_at is None:
            resident.first_at = now
            if not job.brings_kv:
                self.outcome.first.append(job.id)
        if resident.generated == job.output_tokens:
            self.decoding.remove(resident)
            self.give_back(resident)
            self.outcome.finished.append(Done(job.id, resident.generated, resident.worst_s, resident.first_at, now))
