"""Reads a journal from outside and holds every line of it to the contract between the core and its bodies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from polyserve.core.types import (
    Action,
    Arrived,
    Broken,
    Cancel,
    Cancelled,
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
    InstanceId,
    Joined,
    Lost,
    Progressed,
    Ready,
    Received,
    Refuse,
    RequestId,
    Role,
    SetRole,
    Start,
    Stop,
)
from polyserve.journal import Step

Fate = Literal["waits", "runs", "finished", "refused", "cancelled"]
Life = Literal["asked", "joined", "ready", "draining"]


@dataclass
class Referee:
    """State after the lines read so far; `read` raises `AssertionError` at the first line that breaks the rules."""

    fates: dict[RequestId, Fate] = field(default_factory=dict)
    places: dict[RequestId, InstanceId] = field(default_factory=dict)
    first_dispatch: dict[RequestId, float] = field(default_factory=dict)
    lives: dict[InstanceId, Life] = field(default_factory=dict)
    begun: set[RequestId] = field(default_factory=set)
    roles: dict[InstanceId, Role] = field(default_factory=dict)
    computed: set[RequestId] = field(default_factory=set)  # on an instance that makes no more of them
    sources: dict[RequestId, InstanceId] = field(default_factory=dict)  # where KV is on its way from
    budget: int = 0
    now: float = 0.0

    def read(self, steps: Iterable[Step]) -> Referee:
        for line, (now, event, actions) in enumerate(steps, 1):
            try:
                assert now >= self.now, "time runs one way"
                assert event.at <= now, "news of the future"
                self.now = now
                self._happens(event)
                for action in actions:
                    self._is_done(action)
                self._look_over()
            except AssertionError as error:
                raise AssertionError(f"line {line}, {event}: {error}") from error
        return self

    def _happens(self, event: Event) -> None:
        match event:
            case Configured():
                budget = event.settings["max_instances"]
                assert isinstance(budget, int)
                self.budget = budget
            case Arrived():
                assert event.request.id not in self.fates, "arrives twice"
                self.fates[event.request.id] = "waits"
            case Cancelled():
                self.fates[event.request] = "cancelled"
            case Finished():
                assert self.fates[event.request] == "runs", f"finished, but it {self.fates[event.request]}"
                self.fates[event.request] = "finished"
                del self.places[event.request]
                self.sources.pop(event.request, None)
            case FirstToken():
                if self.roles.get(event.instance) is Role.PREFILL and self.places.get(event.request) == event.instance:
                    self.computed.add(event.request)
            case Received():
                if self.places.get(event.request) == event.instance:
                    self.sources.pop(event.request, None)
            case Broken():
                self._goes_back(event.request)
            case Progressed():
                self.begun |= event.tokens.keys()
            case Joined():
                self.lives[event.instance.id] = "joined"
                self.roles[event.instance.id] = event.instance.role
            case Ready():
                if event.instance in self.lives:
                    self.lives[event.instance] = "ready"
            case Lost() | Failed():
                self.lives.pop(event.instance, None)
                for request, instance in list(self.places.items()):
                    if event.instance in (instance, self.sources.get(request)):
                        self._goes_back(request)
                for request in [r for r, source in self.sources.items() if source == event.instance]:
                    del self.sources[request]
            case DrainAsked() | _:
                pass

    def _goes_back(self, request: RequestId) -> None:
        self.places.pop(request, None)
        if self.fates[request] == "runs":
            self.fates[request] = "waits"

    def _is_done(self, action: Action) -> None:
        match action:
            case Dispatch():
                assert self.fates[action.request] == "waits", f"{action}: it {self.fates[action.request]}"
                assert self.lives.get(action.instance) == "ready", f"{action}: {self.lives.get(action.instance)}"
                assert self.roles[action.instance] is not Role.DECODE, f"{action}: makes no prompts"
                self.computed.discard(action.request)
                self.sources.pop(action.request, None)
                self.fates[action.request] = "runs"
                self.places[action.request] = action.instance
                self.first_dispatch.setdefault(action.request, self.now)
            case HandOver():
                lies = self.sources.get(action.request, self.places.get(action.request))
                assert lies == action.source, f"{action}: its KV is on {lies}"
                assert self.lives.get(action.instance) == "ready", f"{action}: {self.lives.get(action.instance)}"
                assert (self.roles[action.source], self.roles[action.instance]) == (Role.PREFILL, Role.DECODE), action
                assert lies in self.sources.values() or action.request in self.computed, f"{action}: not computed yet"
                self.computed.discard(action.request)
                self.fates[action.request] = "runs"
                self.places[action.request] = action.instance
                self.sources[action.request] = action.source
            case Refuse():
                assert self.fates[action.request] == "waits", f"{action}: it {self.fates[action.request]}"
                assert action.request not in self.begun, f"{action}: its stream has begun"
                self.fates[action.request] = "refused"
            case Cancel():
                assert self.fates[action.request] == "cancelled", f"{action}: it {self.fates[action.request]}"
                assert self.places.pop(action.request) == action.instance
                self.sources.pop(action.request, None)
            case Evict():
                assert action.instance in (self.places.get(action.request), self.sources.get(action.request))
                self._goes_back(action.request)
                self.sources.pop(action.request, None)
            case Start():
                assert action.instance not in self.lives, f"{action}: it exists"
                self.lives[action.instance] = "asked"
                assert len(self.lives) <= self.budget, f"{action}: beyond the budget"
            case Drain():
                self.lives[action.instance] = "draining"
            case Stop():
                self._holds_nothing(action)
                self.lives.pop(action.instance, None)
            case SetRole():
                self._holds_nothing(action)
                self.roles[action.instance] = action.role
            case _:
                assert action.instance in self.lives, f"{action}: no such instance"

    def _holds_nothing(self, action: Stop | SetRole) -> None:
        there = (*self.places.values(), *self.sources.values())
        assert action.instance not in there, f"{action}: ends a stream"

    def _look_over(self) -> None:
        for request, instance in self.places.items():
            assert instance in self.lives, f"{request} runs on {instance}, which has gone"
