"""A body in virtual time: feeds the controller and carries its actions out on simulated engines.

The controller sees what a gateway sees (`sim/sight.py`): first tokens, ends, and a progress report per
instance at most every 50 ms, all of them `lag_s` old; its dispatches take `network_s` to arrive. With
perfect sight it hears of every iteration at once, prompts included. What a client gets is judged by the
engines' own times, token by token, whatever the controller knew.

In PD an engine that computes prompts gets each request for one token. A hand-over takes what the settings say of the
link, whatever else is on its way; the KV then waits for its seat and blocks on the engine that answers, and where it
comes from its blocks were free since the first token. Both are kind to whoever crowds the links or the memory.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from time import perf_counter, perf_counter_ns

import numpy as np

from polyserve.core.controller import Controller
from polyserve.core.types import (
    Action,
    Arrived,
    Assign,
    Cancel,
    Cancelled,
    Configured,
    Dispatch,
    Drain,
    Event,
    Evict,
    Failed,
    Finished,
    FirstToken,
    HandOver,
    InstanceId,
    Joined,
    Lost,
    Preempted,
    Ready,
    Received,
    Refuse,
    RequestId,
    Resume,
    Role,
    SetPace,
    SetRole,
    Start,
    Stop,
    Suspend,
    Tick,
    TierName,
)
from polyserve.journal import JournalWriter
from polyserve.report import Ending, Outcome
from polyserve.sim import turns
from polyserve.sim.bank import Bank, Told
from polyserve.sim.engine import Engine, Job
from polyserve.sim.loop import Loop, Rank
from polyserve.sim.sight import SIGHTS, report
from polyserve.sim.spec import Group, Life, Look, Run, SimulationSpec
from polyserve.sim.station import Station, Stream

__all__ = ["SimulationSpec", "World", "simulate"]

# A core that answers this many ticks at one instant with "again, now" would never let time pass.
MOST_TICKS_AT_ONCE = 1000


def simulate(
    spec: SimulationSpec,
    journal: JournalWriter | None = None,
    on_look: Callable[[float, int], None] | None = None,
) -> Run:
    """Run the spec to its end; `on_look(now, arrived)` is called at every look."""
    return World(spec, journal, on_look).run()


@dataclass(slots=True)
class Counts:
    """What engines have done."""

    iterations: int = 0
    preemptions: int = 0
    forced_chunks: int = 0

    def add(self, engine: Engine) -> None:
        self.iterations += engine.iterations
        self.preemptions += engine.preemptions
        self.forced_chunks += engine.forced_chunks


def _label(role: Role) -> str | None:
    """What an instance without a tier is called in a picture."""
    return "prefill" if role is Role.PREFILL else None


class World:
    """Runs one simulation."""

    def __init__(
        self,
        spec: SimulationSpec,
        journal: JournalWriter | None = None,
        on_look: Callable[[float, int], None] | None = None,
    ) -> None:
        self.spec = spec
        self.controller = Controller()
        self.loop = Loop()
        self._journal = journal
        self._on_look = on_look
        self._bank = Bank(sum(group.count for group in spec.groups) or 1)
        self._sight = SIGHTS[spec.sight]
        self._kv_bytes = max(group.profile.kv_bytes_per_token for group in spec.groups)
        self._tightest_s = min(tier.tpot_s for tier in spec.tiers)
        self._stations: dict[InstanceId, Station] = {}
        self._in_row: dict[int, Station] = {}
        self._draining: set[InstanceId] = set()
        self._ahead = False  # engines are further than the core: nothing that it says may concern them
        self._live: dict[RequestId, Stream] = {}
        self._outcomes: list[Outcome] = []
        self._arrived = 0
        self._starts = Random(f"{spec.seed}/starts")
        self._lives: list[Life] = []  # of those that have gone; a name may come again
        self._labels: list[tuple[float, InstanceId, TierName | None]] = []
        self._looks: list[Look] = []
        self._counts = Counts()  # of engines that have gone
        self._unheard: set[InstanceId] = set()  # lost, but the core does not know yet
        self._armed_at: float | None = None
        self._ticks = 0
        self._step_ns = array("q")

    # --------------------------------------------------------------------------------------- from end to end

    def run(self) -> Run:
        """From the first event to the last answer, or to the end of patience."""
        began = perf_counter()
        spec, loop = self.spec, self.loop
        self._configure()
        last_at = spec.requests[-1][0].arrived_at if spec.requests else 0.0
        for at, instance in spec.faults.losses:
            loop.at(at, Rank.LOSS, self._lose, instance)
        every = max(last_at / max(spec.samples, 1), 1e-3)
        loop.at(every, Rank.SAMPLE, self._look, every)
        self._await_arrival()
        loop.run(last_at + spec.drain_s if spec.requests else 0.0, self._run_engines)
        self._settle()
        return self._result(perf_counter() - began)

    def _configure(self) -> None:
        spec = self.spec
        profiles: dict[str, dict[str, object]] = {}
        for group in spec.groups:
            believed = group.believed or group.profile
            plain = believed.to_dict()
            assert profiles.setdefault(believed.name, plain) == plain, (
                f"two profiles with the same name: {believed.name}"
            )
        self._step(Configured(0.0, spec.settings.to_dict(), spec.tiers, profiles, spec.seed))
        if not getattr(self.controller, "wants_progress", True):
            self._sight = turns.BLIND
        for group in spec.groups:
            for _ in range(group.count):
                instance = f"i{len(self._stations)}"
                self._join(instance, group)
                self._ready(instance)

    def _settle(self) -> None:
        """Every request was answered exactly once, or is still somewhere: on one engine, or in the core."""
        holders: dict[RequestId, InstanceId] = {}
        for station in list(self._stations.values()):
            for request, stream in list(station.residents.items()):
                assert holders.setdefault(request, station.id) == station.id, f"{request} is on two instances"
                assert stream.instance == station.id, f"{request} is where nobody sent it"
                assert request in self._live, f"{request} was answered and is still served"
                station.part(stream)
        for request, stream in self._live.items():
            known = request in holders or request in self.controller.pending
            under_way = stream.due_there_at > self.loop.now or stream.instance in self._unheard
            under_way |= stream.source is not None and (
                stream.source in self._stations or stream.source in self._unheard
            )
            assert known or under_way, f"the core has forgotten {request}"
        unfinished = [o.request for o in self._outcomes if o.ending == "unfinished"]
        assert sorted(unfinished) == sorted(self._live), "a request was lost, or answered twice"
        assert len(self._outcomes) == self._arrived, "a request arrived twice"

    def _result(self, wall_s: float) -> Run:
        counts = self._counts
        for station in self._stations.values():
            counts.add(station.engine)
        step_us = np.asarray(self._step_ns) / 1e3
        return Run(
            outcomes=self._outcomes,
            looks=self._looks,
            labels=self._labels,
            lives=[*self._lives, *(Life(s.id, s.joined_at, None) for s in self._stations.values())],
            ended_at=self.loop.now,
            iterations=counts.iterations,
            preemptions=counts.preemptions,
            forced_chunks=counts.forced_chunks,
            steps=len(step_us),
            decision_us={"mean": float(step_us.mean()), "p99": float(np.percentile(step_us, 99))},
            wall_s=wall_s,
        )

    # --------------------------------------------------------------------------------------- the core's door

    def _step(self, event: Event) -> None:
        now = self.loop.now
        began = perf_counter_ns()
        actions = self.controller.step(now, event)
        wake_at = self.controller.wake_at
        self._step_ns.append(perf_counter_ns() - began)
        if self._journal is not None:
            self._journal.write(now, event, actions)
        for action in actions:
            assert not self._ahead, f"{action} comes too late for engines that have gone on since {event}"
            self._carry_out(action)
        if wake_at is not None and (self._armed_at is None or wake_at < self._armed_at):
            assert not self._ahead, f"the core wants to be woken at {wake_at}, but engines have gone on since {event}"
            self._armed_at = max(wake_at, now)
            self.loop.at(self._armed_at, Rank.TICK, self._tick, self._armed_at)

    def _tick(self, armed_at: float) -> None:
        if armed_at != self._armed_at:
            return  # an earlier one was armed since, and has run
        self._armed_at = None
        now, wake_at = self.loop.now, self.controller.wake_at
        if wake_at is None:
            return
        if wake_at > now:
            self._armed_at = wake_at
            self.loop.at(wake_at, Rank.TICK, self._tick, wake_at)
            return
        self._step(Tick(now))
        self._ticks = self._ticks + 1 if self._armed_at == now else 0
        assert self._ticks < MOST_TICKS_AT_ONCE, f"the core wants to be woken at {now} for ever"

    def _carry_out(self, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case HandOver():
                self._hand_over(action)
            case Refuse():
                self._answer(self._live[action.request], "refused", action.code)
            case Cancel() | Evict():
                self._take_off(action.request, action.instance)
            case Start():
                self.loop.at(self.loop.now, Rank.INSTANCE, self._start, action.instance)
            case Suspend() | Resume():
                pass  # they say what the core does by itself
            case Stop() | Assign() | SetRole() | SetPace():
                # One that died is not there any more, though the core has yet to hear of it.
                if station := self._stations.get(action.instance):
                    self._tell(station, action)
            case Drain():
                self._draining.add(action.instance)  # the core sends nobody there any more, and says Stop

    def _tell(self, station: Station, action: Stop | Assign | SetRole | SetPace) -> None:
        match action:
            case Stop():
                assert station.idle, f"{station} was stopped with residents"
                self._remove(station)
            case Assign():
                station.tier = action.tier
                self._labels.append((self.loop.now, station.id, action.tier))
            case SetRole():
                assert station.idle, f"{station} changed its role with residents"
                station.role, station.tier = action.role, None
                self._labels.append((self.loop.now, station.id, _label(action.role)))
            case SetPace():
                station.pace_s = action.pace_s
                station.engine.set_pace(action.pace_s)

    def _holder(self, stream: Stream) -> Station | None:
        """The station whose engine has the request, unless it is still on its way there."""
        station = self._stations.get(stream.instance) if stream.instance is not None else None
        return station if station is not None and stream.request.id in station.residents else None

    # ---------------------------------------------------------------------------------------------- requests

    def _await_arrival(self) -> None:
        if self._arrived < len(self.spec.requests):
            self.loop.at(self.spec.requests[self._arrived][0].arrived_at, Rank.ARRIVAL, self._arrive)

    def _arrive(self, _: None) -> None:
        request, output_tokens = self.spec.requests[self._arrived]
        self._arrived += 1
        self._await_arrival()
        stream = self._live[request.id] = Stream(request, output_tokens)
        self._outcomes.append(stream.outcome)
        if (patience_s := self.spec.faults.leaving.get(request.id)) is not None:
            self.loop.at(self.loop.now + patience_s, Rank.LEAVING, self._leave, request.id)
        self._step(Arrived(self.loop.now, request))

    def _leave(self, request: RequestId) -> None:
        """The client goes, unless it has its answer."""
        if stream := self._live.get(request):
            self._answer(stream, "cancelled")
            if station := self._holder(stream):
                # The engine goes on until the core has heard of it and said so.
                station.so_far(stream)
            self._step(Cancelled(self.loop.now, request))

    def _dispatch(self, action: Dispatch) -> None:
        stream, loop, network_s = self._live[action.request], self.loop, self.spec.network_s
        self._keep_nothing(stream)
        stream.instance = stream.outcome.instance = action.instance
        if action.host != action.tier and action.promoted:
            stream.outcome.promoted = True
        stream.dispatches += 1
        stream.due_there_at = loop.now + network_s
        loop.at(stream.due_there_at, Rank.DELIVERY, self._deliver, (stream, action, stream.dispatches))

    def _deliver(self, sent: tuple[Stream, Dispatch, int]) -> None:
        stream, action, dispatches = sent
        station = self._stations.get(action.instance)
        if station is None or stream.dispatches != dispatches or stream.request.id not in self._live:
            return  # engine or client has gone, or it was sent elsewhere; the core hears of that
        request = stream.request
        # What the client has got is known exactly here; the core's count is as old as its last report.
        delivered = stream.outcome.output_tokens
        wanted = delivered + 1 if station.role is Role.PREFILL else stream.output_tokens
        station.engine.submit(
            self.loop.now, Job(request.id, request.prompt_tokens, wanted, action.slo, request.arrived_at, delivered)
        )
        station.residents[request.id] = stream
        self._bank.wake(station.engine.row)

    def _hand_over(self, action: HandOver) -> None:
        stream, settings = self._live[action.request], self.spec.settings
        self._keep_nothing(stream)
        stream.instance = stream.outcome.instance = action.instance
        stream.outcome.promoted |= action.promoted
        stream.dispatches += 1
        held = stream.request.prompt_tokens + stream.outcome.output_tokens - 1
        moved_s = settings.kv_latency_s + held * self._kv_bytes / settings.kv_bandwidth
        stream.due_there_at = self.loop.now + self.spec.network_s + moved_s
        stream.source = action.source
        if (source := self._stations.get(action.source)) is not None:
            source.sending[action.request] = stream
            self.loop.at(stream.due_there_at, Rank.DELIVERY, self._receive, (stream, action, stream.dispatches))

    def _receive(self, sent: tuple[Stream, HandOver, int]) -> None:
        stream, action, dispatches = sent
        station = self._stations.get(action.instance)
        if stream.dispatches != dispatches or stream.request.id not in self._live:
            return  # the client has gone, or the source, or it was sent elsewhere; the core hears of that
        self._keep_nothing(stream)
        if station is None:
            return
        request = stream.request
        job = Job(
            id=request.id,
            prompt_tokens=request.prompt_tokens,
            output_tokens=stream.output_tokens,
            slo=action.slo,
            arrived_at=request.arrived_at,
            resume_from=stream.outcome.output_tokens,
            brings_kv=True,
        )
        station.engine.submit(self.loop.now, job)
        station.residents[request.id] = stream
        self._bank.wake(station.engine.row)
        received = Received(self.loop.now, request.id, station.id)
        if self.spec.lag_s > 0:
            self.loop.at(self.loop.now + self.spec.lag_s, Rank.SIGHT, self._see, [received])
        else:
            self._step(received)

    def _keep_nothing(self, stream: Stream) -> None:
        """No instance has KV of the request to send any more."""
        if stream.source is not None and (source := self._stations.get(stream.source)) is not None:
            source.sending.pop(stream.request.id, None)
        stream.source = None

    def _take_off(self, request: RequestId, instance: InstanceId) -> None:
        """Stop computing a request; what its client has got by now stays."""
        station = self._stations.get(instance)
        if station is not None and (stream := station.residents.get(request)):
            station.part(stream)
            station.engine.cancel(self.loop.now, request)
        if (stream := self._live.get(request)) and instance in (stream.instance, stream.source):
            self._keep_nothing(stream)
            stream.instance = None
            stream.dispatches += 1

    def _answer(self, stream: Stream, ending: Ending, code: str | None = None) -> None:
        assert stream.outcome.ending == "unfinished", f"{stream.request.id} is answered twice"
        stream.outcome.ending = ending
        stream.outcome.code = code
        self._keep_nothing(stream)
        del self._live[stream.request.id]
        if not self._live and self._arrived == len(self.spec.requests):
            self.loop.stop()

    # --------------------------------------------------------------------------------------------- instances

    def _start(self, instance: InstanceId) -> None:
        self._join(instance, self.spec.groups[0])
        fails = self._starts.random() < self.spec.faults.failing_starts
        then = self._fail if fails else self._ready
        self.loop.at(self.loop.now + self.spec.start_up_s, Rank.INSTANCE, then, instance)

    def _join(self, instance: InstanceId, group: Group) -> None:
        spec, now = self.spec, self.loop.now
        engine = Engine(
            group.instance(instance),
            group.profile,
            group.believed or group.profile,
            settings=spec.settings,
            noise=Random(f"{spec.seed}/noise/{instance}") if spec.jitter else None,
            jitter=spec.jitter,
            bank=self._bank,
        )
        station = Station(engine, group.profile.iteration_s(0, 1, 0), now)
        self._stations[instance] = self._in_row[engine.row] = station
        if station.role is not Role.MIXED:
            self._labels.append((now, instance, _label(station.role)))
        self._step(Joined(now, engine.instance))

    def _ready(self, instance: InstanceId) -> None:
        if instance in self._stations:
            self._step(Ready(self.loop.now, instance))

    def _fail(self, instance: InstanceId) -> None:
        if station := self._stations.get(instance):
            self._remove(station)
            self._step(Failed(self.loop.now, instance, "did not start"))

    def _lose(self, instance: InstanceId) -> None:
        if station := self._stations.get(instance):
            for stream in list(station.residents.values()):
                station.part(stream)
            for stream in list(station.sending.values()):
                stream.dispatches += 1  # what is on its way is lost
            self._remove(station)
            self._unheard.add(instance)
            self.loop.at(self.loop.now + self.spec.lag_s, Rank.LOSS, self._see_loss, Lost(self.loop.now, instance))

    def _see_loss(self, lost: Lost) -> None:
        self._unheard.discard(lost.instance)
        self._step(lost)

    def _remove(self, station: Station) -> None:
        self._counts.add(station.engine)
        self._bank.give_back(station.engine.row)
        del self._stations[station.id], self._in_row[station.engine.row]
        self._draining.discard(station.id)
        self._lives.append(Life(station.id, station.joined_at, self.loop.now))
        self._labels.append((self.loop.now, station.id, None))

    # -------------------------------------------------------------------------------------------- iterations

    def _run_engines(self, time: float, rank: int) -> bool:
        """Run what engines do before the next thing of the loop, or to the first of it that is seen; True then.

        Where nobody listens, nothing waits and nothing is to be stopped when it is empty, a first token or an end
        moves nobody before the next thing of the loop. Then engines run that far at once and the core hears of it
        after, in order and at its times.
        """
        loop, bank = self.loop, self._bank
        wake = bool(bank.woken) and (time > loop.now or rank >= Rank.BEGIN)
        if not wake and (bank.next_at > time or (bank.next_at == time and rank <= Rank.ITERATION)):
            return False
        quiet = (
            self._sight == turns.BLIND and not self.spec.lag_s and not self._draining and not self.controller.pending
        ) and not self.spec.settings.disaggregated
        told = bank.advance(
            loop.now,
            time,
            inclusive=rank > Rank.ITERATION,
            wake=wake,
            quiet_until=time if quiet else -math.inf,
            sight=self._sight,
        )
        if bank.last_at > loop.now:
            loop.now = bank.last_at
        seen = self._take_in(told) if told else []
        if bank.reported >= 0:
            seen.append(report(bank, self._in_row[bank.reported].engine, self._sight))
        if not seen:
            return False
        if self.spec.lag_s > 0:
            loop.at(loop.now + self.spec.lag_s, Rank.SIGHT, self._see, seen)
            return True
        self._ahead = seen[0].at < loop.now
        for event in seen:
            loop.now = event.at
            self._step(event)
        self._ahead = False
        return True

    def _take_in(self, told: list[Told]) -> list[Event]:
        """Note what iterations gave to whom; returns what a gateway notices at once."""
        seen: list[Event] = []
        for at, kind, row, slot, output_tokens, worst_lateness_s, first_token_at in told:
            station = self._in_row[int(row)]
            if kind == turns.FINISHED:
                request = station.engine.forget(int(slot))
                stream = station.residents.pop(request)
                if request in self._live:
                    stream.take(int(output_tokens), worst_lateness_s, first_token_at, at)
                    if output_tokens < stream.output_tokens:  # the rest is made elsewhere
                        stream.source = station.id
                        station.sending[request] = stream
                        continue
                    self._answer(stream, "finished")
                    seen.append(Finished(at, request, station.id, int(output_tokens)))
            elif kind == turns.FIRST_TOKEN:
                request = station.engine.name(int(slot))
                alone = output_tokens >= station.residents[request].output_tokens  # and its end is told at once
                if station.role is not Role.PREFILL or not alone:
                    seen.append(FirstToken(at, request, station.id))
            else:
                request = station.engine.name(int(slot))
                station.residents[request].outcome.preemptions += 1
                seen.append(Preempted(at, request, station.id))
        return seen

    def _see(self, seen: list[Event]) -> None:
        for event in seen:
            self._step(event)

    # ------------------------------------------------------------------------------------------------- looks

    def _look(self, every: float) -> None:
        now = self.loop.now
        for station in self._stations.values():
            load = station.load(now, self._tightest_s)
            tier = station.tier or _label(station.role)
            self._looks.append(Look(now, station.id, tier, station.engine.residents, load))
        if self._on_look is not None:
            self._on_look(now, self._arrived)
        self.loop.at(now + every, Rank.SAMPLE, self._look, every)
