"""A body made of nothing: it carries a controller's actions out in dictionaries, and holds each to the contract."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from scenes import STEADY, TIERS

from polyserve.core.controller import Controller
from polyserve.core.fleet import Books, State
from polyserve.core.kernels import G_BATCH, G_KV, G_MOST, G_VARIANCE, PROMISED, R_CAP, R_LEFT, R_MADE, R_PROMPT
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import (
    Action,
    Arrived,
    Assign,
    Broken,
    Cancel,
    Cancelled,
    ChunkRule,
    Configured,
    Dispatch,
    Drain,
    DrainAsked,
    Event,
    Evict,
    Failed,
    Finished,
    FirstToken,
    HandOver,
    Instance,
    InstanceId,
    Joined,
    Lost,
    Progressed,
    Ready,
    Received,
    Reconfigured,
    Refuse,
    Request,
    RequestId,
    Restarted,
    Resume,
    Role,
    SetPace,
    SetRole,
    Silent,
    Slo,
    Start,
    Stop,
    Suspend,
    Tick,
    Tier,
    to_microsecond,
)

# Room for a few residents only, so that tests of memory and seats decide often.
CRAMPED = dataclasses.replace(STEADY, limits=Limits(3000, 6, 256, block_size=16, context_tokens=2500))


class Fate(StrEnum):
    """What has become of a request."""

    WAITS = "waits"
    RUNS = "runs"
    FINISHED = "finished"
    REFUSED = "refused"
    CANCELLED = "cancelled"


@dataclass
class Stream:
    """A request as its client and its engine know it."""

    request: Request
    fate: Fate = Fate.WAITS
    instance: InstanceId | None = None
    base: int = 0  # tokens before the present dispatch
    told: int = 0  # tokens that the core has been told of
    source: InstanceId | None = None  # in PD: where its KV is on its way from
    refusal: Refuse | None = None
    dispatches: list[Dispatch] = field(default_factory=list)

    @property
    def id(self) -> RequestId:
        return self.request.id


class Life(StrEnum):
    """Where an instance is in its life."""

    ASKED = "asked"
    JOINED = "joined"
    READY = "ready"
    DRAINING = "draining"


class Body:
    """Feeds one controller by hand; `send` steps it and checks everything it answers."""

    def __init__(
        self,
        settings: Settings,
        tiers: tuple[Tier, ...] = TIERS,
        profile: Profile = STEADY,
        ready: int = 0,
        seed: int = 0,
    ) -> None:
        self.controller = Controller()
        self.settings, self.tiers, self.profile = settings, tiers, profile
        self.now = 0.0
        self.streams: dict[RequestId, Stream] = {}
        self.lives: dict[InstanceId, Life] = {}
        self.left_draining: set[InstanceId] = set()  # lost before they were empty
        self.paces: dict[InstanceId, float] = {}
        self.roles: dict[InstanceId, Role] = {}
        self.split = settings.disaggregated
        self.send(Configured(0.0, settings.to_dict(), tiers, {profile.name: profile.to_dict()}, seed))
        for n in range(ready):
            self.join(f"m{n}")
            self.ready(f"m{n}")

    # ------------------------------------------------------------------------------------------------ events

    def send(self, event: Event) -> list[Action]:
        """Step at the present time, carry out what is answered, and look over the controller."""
        table = self.controller._lengths.table if self.streams else None
        self._event = event
        actions = self.controller.step(self.now, event)
        for action in actions:
            self._carry_out(action)
        self._look_over()
        if table is self.controller._lengths.table:
            self._look_at_memory({a.instance for a in actions if isinstance(a, Dispatch)})
        return actions

    def wait(self, seconds: float) -> list[Action]:
        """Let time pass, and tick whenever the controller wants to be woken."""
        until, actions = to_microsecond(self.now + seconds), []
        while (wake_at := self.controller.wake_at) is not None and wake_at <= until:
            self.now = max(self.now, wake_at)
            actions += self.send(Tick(self.now))
        self.now = until
        return actions

    def join(
        self,
        id: InstanceId,
        chunk: ChunkRule = ChunkRule(),  # noqa: B008
        role: Role = Role.MIXED,
        **limits: int,
    ) -> list[Action]:
        self.lives[id], self.roles[id] = Life.JOINED, role
        instance = Instance(id, self.profile.name, chunk, role=role, **limits)  # type: ignore[arg-type]
        return self.send(Joined(self.now, instance))

    def ready(self, id: InstanceId) -> list[Action]:
        self.lives[id] = Life.READY
        return self.send(Ready(self.now, id))

    def fail(self, id: InstanceId) -> list[Action]:
        del self.lives[id]
        return self.send(Failed(self.now, id, "did not start"))

    def lose(self, id: InstanceId) -> list[Action]:
        """The instance goes, and what its clients have got since the last report was never told."""
        if self.lives.pop(id) is Life.DRAINING:
            self.left_draining.add(id)
        for stream in self.streams.values():
            if id in (stream.instance, stream.source) and stream.fate is Fate.RUNS:
                stream.fate, stream.instance = Fate.WAITS, None
                stream.source = None if stream.source == id else stream.source
        return self.send(Lost(self.now, id))

    def silent(self, id: InstanceId, since: float) -> list[Action]:
        return self.send(Silent(self.now, id, since))

    def restart(self, id: InstanceId) -> list[Action]:
        """Another process answers there, and nothing of what was on it."""
        lost = tuple(stream.id for stream in self.on(id))
        for name in lost:
            self.streams[name].fate, self.streams[name].instance = Fate.WAITS, None
        return self.send(Restarted(self.now, id, lost))

    def drain(self, id: InstanceId) -> list[Action]:
        return self.send(DrainAsked(self.now, id))

    def arrive(
        self,
        id: RequestId,
        slo: Slo | None = Slo(1.0, 0.1),  # noqa: B008
        prompt: int = 100,
        most: int | None = 50,
    ) -> list[Action]:
        request = Request(id, self.now, prompt, slo, max_tokens=most)
        self.streams[id] = Stream(request)
        return self.send(Arrived(self.now, request))

    def first_token(self, id: RequestId) -> list[Action]:
        stream = self.streams[id]
        assert stream.instance is not None
        stream.told = stream.base + 1
        instance = stream.instance
        if self.roles[instance] is Role.PREFILL:
            stream.fate, stream.instance, stream.source = Fate.WAITS, None, instance
        return self.send(FirstToken(self.now, id, instance))

    def receive(self, id: RequestId) -> list[Action]:
        """Its KV is there."""
        stream = self.streams[id]
        assert stream.instance is not None
        stream.source = None
        return self.send(Received(self.now, id, stream.instance))

    def ends_at_once(self, stream: Stream) -> bool:
        """Whether an instance that computes prompts answers it: then it has no first token to tell of."""
        most = stream.request.max_tokens
        return self.split and most is not None and most <= stream.base + 1

    def progress(self, instance: InstanceId, tokens: int = 1) -> list[Action]:
        """So many more tokens for everybody on an instance; where prompts are computed nobody gets more than one."""
        there = [s for s in self.on(instance) if s.source is None and self.roles[instance] is not Role.PREFILL]
        for stream in there:
            stream.told += tokens
        return self.send(Progressed(self.now, instance, {s.id: s.told for s in there}))

    def finish(self, id: RequestId, tokens: int = 1) -> list[Action]:
        """Its last tokens come, and the end."""
        stream = self.streams[id]
        assert stream.instance is not None
        if stream.source is not None:
            self.receive(id)
        stream.told += 1 if self.roles[stream.instance] is Role.PREFILL else tokens
        stream.fate, instance, stream.instance = Fate.FINISHED, stream.instance, None
        return self.send(Finished(self.now, id, instance, stream.told))

    def break_off(self, id: RequestId, tokens: int = 0) -> list[Action]:
        stream = self.streams[id]
        assert stream.instance is not None
        stream.told += tokens if stream.source is None and self.roles[stream.instance] is not Role.PREFILL else 0
        stream.fate, instance, stream.instance, stream.source = Fate.WAITS, stream.instance, None, None
        return self.send(Broken(self.now, id, instance, stream.told))

    def retier(self, *tiers: Tier) -> list[Action]:
        """Other tiers from now on."""
        self.tiers = tiers
        return self.send(Reconfigured(self.now, tiers))

    def leave(self, id: RequestId) -> list[Action]:
        self.streams[id].fate = Fate.CANCELLED
        return self.send(Cancelled(self.now, id))

    # ----------------------------------------------------------------------------------------------- actions

    def _carry_out(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case HandOver():
                self._hand_over(action)
            case Refuse():
                stream = self.streams[action.request]
                assert stream.fate is Fate.WAITS, f"refused, but it {stream.fate}"
                assert stream.told == 0, "a stream that has begun is refused"
                stream.fate, stream.refusal = Fate.REFUSED, action
            case Cancel():
                stream = self.streams[action.request]
                assert (stream.fate, stream.instance) == (Fate.CANCELLED, action.instance)
                stream.instance = stream.source = None
            case Evict():
                stream = self.streams[action.request]
                if stream.source != action.instance:
                    assert (stream.fate, stream.instance) == (Fate.RUNS, action.instance)
                    hangs = isinstance(self._event, Silent) and self._event.instance == action.instance
                    assert hangs or stream.request.slo is None, "only best effort is evicted"
                stream.fate, stream.instance, stream.source = Fate.WAITS, None, None
            case Start():
                assert action.instance not in self.lives, "a name is used again"
                self.lives[action.instance] = Life.ASKED
                assert len(self.lives) <= self.settings.max_instances, "beyond the budget"
            case Drain():
                assert self.lives[action.instance] in (Life.READY, Life.JOINED)
                self.lives[action.instance] = Life.DRAINING
            case Stop():
                assert not self.holds(action.instance), "draining ends no stream"
                if action.instance in self.left_draining:  # it is not to be asked for again, either
                    self.left_draining.remove(action.instance)
                else:
                    del self.lives[action.instance]
                self.paces.pop(action.instance, None)
            case Assign():
                assert action.tier is None or action.tier in {tier.name for tier in self.tiers}
                assert action.instance in self.lives
            case SetRole():
                assert not self.holds(action.instance), "a role changes on an empty instance"
                assert self.lives[action.instance] in (Life.READY, Life.JOINED)
                self.roles[action.instance] = action.role
            case Suspend():
                assert action.until > self.now
            case Resume():
                assert self.lives[action.instance] is Life.READY
            case SetPace():
                assert action.instance in self.lives
                assert action.pace_s > 0
                self.paces[action.instance] = action.pace_s

    def _dispatch(self, action: Dispatch) -> None:
        stream = self.streams[action.request]
        assert stream.fate is Fate.WAITS, f"dispatched, but it {stream.fate}"
        assert self.lives[action.instance] is Life.READY, "only to an instance that is ready"
        assert action.resume_from == stream.told, "every token that was told of counts"
        assert action.tier is None or action.slo is not None
        assert not self.split or self.roles[action.instance] is Role.PREFILL
        stream.source = None
        stream.fate, stream.instance, stream.base = Fate.RUNS, action.instance, action.resume_from
        stream.dispatches.append(action)

    def _hand_over(self, action: HandOver) -> None:
        stream = self.streams[action.request]
        assert stream.fate is Fate.WAITS, f"handed over, but it {stream.fate}"
        assert stream.source == action.source, "its KV is elsewhere"
        assert self.lives[action.instance] is Life.READY, "only to an instance that is ready"
        assert (self.roles[action.source], self.roles[action.instance]) == (Role.PREFILL, Role.DECODE)
        stream.fate, stream.instance = Fate.RUNS, action.instance

    def holds(self, instance: InstanceId) -> list[Stream]:
        """Streams that run on an instance, or whose KV comes from there."""
        return [s for s in self.streams.values() if s.fate is Fate.RUNS and instance in (s.instance, s.source)]

    def on(self, instance: InstanceId) -> list[Stream]:
        """Streams that run on an instance."""
        return [stream for stream in self.streams.values() if stream.instance == instance]

    def of(self, *fates: Fate) -> list[Stream]:
        return [stream for stream in self.streams.values() if stream.fate in fates]

    # --------------------------------------------------------------------------------------------- invariants

    def _look_over(self) -> None:
        controller = self.controller
        wake_at = controller.wake_at
        assert wake_at is None or wake_at >= self.now, "woken in the past"
        waiting = {stream.id for stream in self.of(Fate.WAITS)}
        assert {id for id in self.streams if id in controller.pending} == waiting
        assert len(controller.pending) == len(waiting)
        assert wake_at is not None or not waiting, "somebody waits, and nobody looks"
        for id, books in controller.fleet.books.items():
            self._look_at(id, books)
        for stream in self.of(Fate.RUNS):
            assert stream.instance in controller.fleet.books

    def _look_at(self, id: InstanceId, books: Books) -> None:
        lives = {
            "starting": Life.JOINED, "ready": Life.READY, "resting": Life.READY, "turning": Life.READY,
            "draining": Life.DRAINING,
        }  # fmt: skip
        assert lives[books.state] is self.lives[id]
        promised = [job.id for job in books.jobs.values() if job.partner == id]
        ids = [*(stream.id for stream in self.on(id)), *promised]
        assert sorted(books.jobs) == sorted(ids)
        assert sorted(books.parting) == sorted(s.id for s in self.holds(id) if s.source == id)
        assert books.role is self.roles[id]
        for tier, count in books.by_tier.items():
            assert count == sum(job.tier == tier for job in books.jobs.values())
        for request in ids:
            assert (books.jobs[request].instance == id) != (request in promised)
        for request in promised:
            assert self.roles[self.streams[request].instance or ""] is Role.PREFILL, "it is computed elsewhere"
        if not books.watched:
            return
        assert sorted(books.ids) == sorted(ids)
        assert books._index == {request: at for at, request in enumerate(books.ids)}
        assert len(books.rows) == len(books.ids)
        for request, row in zip(books.ids, books.rows, strict=True):
            awaited = request in promised or self.streams[request].source is not None
            assert row[R_LEFT] == PROMISED if awaited else 0 <= row[R_LEFT] <= row[R_PROMPT]
            assert 0 <= row[R_MADE] <= max(row[R_CAP], self.streams[request].told)
        if books.role is Role.PREFILL:
            return
        if self.settings.router == "tiers" and books.state is not State.STARTING:
            self._look_at_pace(id, books)

    def _look_at_pace(self, id: InstanceId, books: Books) -> None:
        """The tightest of its tier and its residents; with neither, the loosest tier's."""
        tpots = {tier.name: tier.tpot_s for tier in self.tiers}
        bound = [tpots[job.tier] for job in books.jobs.values() if job.tier is not None]
        bound += [tpots[books.tier]] if books.tier is not None else []
        # Never looser than asked: tighter than its tier is only who came for one that has gone.
        bound += [job.slo.tpot_s for job in books.jobs.values() if job.slo is not None]
        wanted = min(bound, default=max(tpots.values()))
        assert books.pace_s == wanted
        if books.law.kind == 0:
            assert self.paces[id] == to_microsecond(wanted), "what the engine was told"

    def _look_at_memory(self, instances: set[InstanceId]) -> None:
        """Mean forecast KV and its margin lie within capacity wherever somebody joined others."""
        settings = self.settings
        if settings.router != "tiers" or not settings.test_memory or self.split:
            return
        for books in (self.controller.fleet.books.get(id) for id in instances):
            if books is None or len(books.ids) < 2:
                continue
            gauged = books.gauge()
            spread = settings.memory_margin_sigma * np.sqrt(gauged[G_VARIANCE])
            blocks = 0.5 * books.profile.limits.block_size * gauged[G_BATCH]
            needed = np.minimum(gauged[G_KV] + spread, gauged[G_MOST]) + blocks
            assert needed.max() <= books.kv_tokens * (1 + 1e-9)
            assert len(books.ids) <= books.max_num_seqs
