"""Another config while requests are served: what can change does, what cannot is named, a bad file changes nothing.

A new plan is compared with the one in force field by field. Each field that can change has a function in `_MODEL` or
`_PLAN`; any other that differs is kept as it was and named as in need of a restart, so that nothing is dropped in
silence. Requests on their way are not touched: tiers change by an event of the core, instances that go are drained.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from polyserve.core.controller import Controller
from polyserve.core.settings import SettingError
from polyserve.core.types import Configured, Reconfigured, Tier
from polyserve.serve import logs
from polyserve.serve.gateway import Gateway
from polyserve.serve.pace import BEST_EFFORT, Paces
from polyserve.serve.plan import Bounds, ModelPlan, Plan, PlanError, TenantPlan

log = logging.getLogger(__name__)

WATCH_S = 1.0
# Bounds that sockets, servers and clients were made with.
_MADE_WITH = (
    "connect_s", "connections", "head_bytes", "head_s", "probe_s", "retire_s", "shutdown_s", "stall_s",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where plans come from; `read` raises `PlanError`."""

    path: Path
    read: Callable[[], Plan]

    def signature(self) -> tuple[int, ...] | None:
        """Changes when the file does; None when it is not there."""
        try:
            seen = self.path.stat()
        except OSError:
            return None
        return seen.st_mtime_ns, seen.st_size, seen.st_ino


@dataclass(slots=True)
class Report:
    """What came of a new plan, in sentences."""

    changed: list[str] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)  # differs, and stays as it was until a restart


class Door(Protocol):
    """Where clients come in."""

    def know(self, tenants: Sequence[TenantPlan]) -> None: ...


class House(Protocol):
    """What is reloaded."""

    plan: Plan
    gateways: dict[str, Gateway]

    @property
    def front(self) -> Door: ...

    def rebound(self, bounds: Bounds) -> None: ...


class Reloader:
    """Takes new plans for a house from its file."""

    def __init__(self, house: House, source: Source) -> None:
        self._house = house
        self._source = source
        self._lock = asyncio.Lock()
        self._seen = source.signature()
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "polyserve", "registry": self.registry}
        self._count = Counter("config_reloads", "Configs taken in while serving, by outcome.", ["outcome"], **own)
        for outcome in ("applied", "unchanged", "refused"):
            self._count.labels(outcome)
        self._fine = Gauge("config_last_reload_successful", "Whether the config file's latest state is good.", **own)
        self._at = Gauge("config_last_reload_success_timestamp_seconds", "When a config was last taken in.", **own)
        self._fine.set(1.0)
        self._at.set(time.time())

    async def reload(self, asked_by: str) -> Report:
        """Take in the file as it is now; raises `PlanError` saying what is wrong with it, and nothing has changed."""
        async with self._lock:
            self._seen = self._source.signature()
            try:
                plan = await asyncio.to_thread(self._source.read)
                report = apply(self._house, plan)
            except PlanError as error:
                self._told("refused")
                self._fine.set(0.0)
                log.error("config not reloaded (%s), the old one stays: %s", asked_by, str(error).replace("\n", "; "))
                raise
        self._told("applied" if report.changed else "unchanged")
        self._fine.set(1.0)
        self._at.set(time.time())
        log.info("config reloaded (%s): %s", asked_by, "; ".join(report.changed) or "nothing has changed")
        if report.restart:
            log.warning("config reloaded, but this needs a restart: %s", "; ".join(report.restart))
        return report

    def _told(self, outcome: Literal["applied", "unchanged", "refused"]) -> None:
        self._count.labels(outcome).inc()

    async def watch(self) -> None:
        """Reload whenever the file has changed and stayed so for a moment: half a file is not taken in."""
        before = self._seen
        while True:
            await asyncio.sleep(WATCH_S)
            if not self._house.plan.watch:
                continue
            now = self._source.signature()
            settled, before = now == before, now
            if settled and now is not None and now != self._seen:
                try:
                    await self.reload("the file changed")
                except PlanError:
                    continue  # it was logged and counted


# ------------------------------------------------------------------------------------------------------- a new plan


def apply(house: House, new: Plan) -> Report:
    """Change over to another plan as far as that goes; raises `PlanError` before anything has changed."""
    old, report = house.plan, Report()
    models = {model.name: model for model in new.models}
    if bool(old.tenants) != bool(new.tenants):  # which listener tells what, and whether keys are asked for at all
        was = {model.name: model.configured.tenants for model in old.models}
        for name in models.keys() & was.keys():
            configured = replace(models[name].configured, tenants=was[name])
            models[name] = replace(models[name], configured=configured)
    for model in new.models:
        if model.name in house.gateways:
            check(model.configured)
    kept = tuple(_apply_model(house.gateways[m.name], models.get(m.name, m), report) for m in old.models)
    bounds = _bounds(house, new.bounds, report)
    gone, come = _names(old.models, new.models), _names(new.models, old.models)
    report.restart += [f"model {name} is not in the file any more" for name in gone]
    report.restart += [f"model {name} is new" for name in come]
    fixed: dict[str, Any] = {"models": kept, "bounds": bounds}
    for name in _differing(old, new):
        if name == "log":
            logs.set_up(new.log)
            report.changed.append(
                f"log: {new.log.format}, {new.log.level}, requests {'on' if new.log.requests else 'off'}"
            )
        elif name == "watch":
            report.changed.append(f"the file is {'' if new.watch else 'not '}watched")
        elif name == "tenants" and old.tenants and new.tenants:
            report.changed += _tenant_changes(old.tenants, new.tenants)
            house.front.know(new.tenants)
        elif name not in fixed:
            fixed[name] = getattr(old, name)
            report.restart.append(f"{name} differs")
    house.plan = replace(new, **fixed)
    return report


def check(configured: Configured) -> None:
    """Have a throwaway brain take a configuration in; raises `PlanError`."""
    try:
        Controller().step(0.0, configured)
    except SettingError as error:
        raise PlanError(f"settings: {error}") from None


def _names(some: Iterable[ModelPlan], others: Iterable[ModelPlan]) -> list[str]:
    """Models of `some` that `others` have not."""
    there = {model.name for model in others}
    return [model.name for model in some if model.name not in there]


def _differing(old: Any, new: Any) -> Iterator[str]:
    """Fields of two dataclasses of a kind that are not equal."""
    return (f.name for f in dataclasses.fields(old) if getattr(old, f.name) != getattr(new, f.name))


def _tenant_changes(old: Sequence[TenantPlan], new: Sequence[TenantPlan]) -> list[str]:
    """What is different about the tenants, keys not shown."""
    was, now = {one.tenant.name: one for one in old}, {one.tenant.name: one for one in new}
    lines = [f"tenant {name} has gone" for name in was if name not in now]
    lines += [f"tenant {name} is new" for name in now if name not in was]
    for name in was.keys() & now.keys():
        if parts := list(_differing(was[name], now[name])):
            lines.append(f"tenant {name}: {', '.join(parts)}")
    return sorted(lines)


def _bounds(house: House, new: Bounds, report: Report) -> Bounds:
    old = house.plan.bounds
    for name in _differing(old, new):
        if name in _MADE_WITH:
            report.restart.append(f"limits: {name} differs")
            new = replace(new, **{name: getattr(old, name)})
        else:
            report.changed.append(f"limits: {name} is {getattr(new, name):g}")
    if new != old:
        house.rebound(new)
    return new


def _apply_model(gateway: Gateway, new: ModelPlan, report: Report) -> ModelPlan:
    """Change one model's gateway over; what it goes by from now on."""
    old = gateway.plan
    own = Report()
    kept = {name: getattr(old, name) for name in _differing(old, new) if name not in _MODEL}
    own.restart += [f"{name} differs" for name in kept]
    changed = replace(new, **kept)
    for name, change in _MODEL.items():
        if getattr(old, name) != getattr(changed, name):
            changed = change(gateway, old, changed, own)
    gateway.plan = changed
    gateway.tiers = changed.configured.tiers
    gateway.profiles = tuple(changed.configured.profiles)
    gateway.paces = Paces(gateway.tiers, changed.service_tiers, changed.default_tier)
    report.changed += [f"{gateway.model}: {line}" for line in own.changed]
    report.restart += [f"{gateway.model}: {line}" for line in own.restart]
    return changed


# Each is given the gateway, its old plan and the new one, and answers what of the new one is in force.
_Change = Callable[[Gateway, ModelPlan, ModelPlan, Report], ModelPlan]


def _change_core(gateway: Gateway, old: ModelPlan, new: ModelPlan, report: Report) -> ModelPlan:
    """Tiers, tenants' rates, profiles of instances to come: an event of the core; the rest that it was told stays."""
    was, now = old.configured, new.configured
    fresh = {name: plain for name, plain in now.profiles.items() if name not in was.profiles}
    changed = {"tiers", "profiles", "tenants"}
    report.restart += [f"{name} differ" for name in _differing(was, now) if name not in changed]
    report.restart += [
        f"profile {name} has changed" for name, plain in was.profiles.items() if now.profiles.get(name, plain) != plain
    ]
    report.changed += tier_changes(was.tiers, now.tiers)
    report.changed += [f"profile {name} is known" for name in fresh]
    if was.tiers != now.tiers or was.tenants != now.tenants or fresh:
        gateway.driver.post(Reconfigured(gateway.driver.now(), now.tiers, fresh, now.tenants))
    force = replace(was, tiers=now.tiers, tenants=now.tenants, profiles=was.profiles | fresh)
    return replace(new, configured=force)


def tier_changes(old: Sequence[Tier], new: Sequence[Tier]) -> list[str]:
    """What is different about the tiers, in sentences."""
    was, now = {tier.name: tier for tier in old}, {tier.name: tier for tier in new}
    lines = [f"tier {name} has gone, its requests keep their deadlines" for name in was if name not in now]
    for name, tier in now.items():
        if name not in was:
            lines.append(f"tier {name} is new")
        elif was[name] != tier:
            parts = [f"{f} {getattr(was[name], f)} -> {getattr(tier, f)}" for f in _differing(was[name], tier)]
            lines.append(f"tier {name}: {', '.join(parts)}")
    return lines


def _change_engines(gateway: Gateway, old: ModelPlan, new: ModelPlan, report: Report) -> ModelPlan:
    """Instances come, and are drained and go; one that runs stays what it is."""
    was, now = {spec.id: spec for spec in old.engines}, {spec.id: spec for spec in new.engines}
    for id in was.keys() - now.keys():
        report.changed.append(f"instance {id} is drained")
        gateway.let_go(id)
    force = []
    for id, spec in now.items():
        if id in was:
            if spec != was[id]:
                parts = ", ".join(_differing(was[id], spec))
                report.restart.append(f"instance {id}: {parts} differs; give it another id, and it replaces this one")
            force.append(was[id])
        elif gateway.fleet.get(id) is not None:
            report.restart.append(f"instance {id}: there is one of that name still; reload when it has gone")
        else:
            gateway.join(spec)
            report.changed.append(f"instance {id} joins")
            force.append(spec)
    return replace(new, engines=tuple(force))


def _change_default(gateway: Gateway, old: ModelPlan, new: ModelPlan, report: Report) -> ModelPlan:
    """The tier of requests that ask for none: whoever makes paces reads it anew."""
    report.changed.append(f"default_tier is {new.default_tier}")
    return new


def _change_words(gateway: Gateway, old: ModelPlan, new: ModelPlan, report: Report) -> ModelPlan:
    """OpenAI's words for paces."""
    words = ", ".join(f"{word} {name}" for word, name in new.service_tiers.items())
    report.changed.append(f"service_tiers are {words or 'the default'}")
    return new


_MODEL: dict[str, _Change] = {
    "configured": _change_core,
    "engines": _change_engines,
    "default_tier": _change_default,
    "service_tiers": _change_words,
}


# ------------------------------------------------------------------------------------------------- tiers by themselves


def retier(gateway: Gateway, tiers: tuple[Tier, ...]) -> Report:
    """Other tiers for one model, until the next change of its file; raises `PlanError`."""
    plan = gateway.plan
    names = {tier.name for tier in tiers}
    if not tiers or len(names) < len(tiers) or len({tier.tpot_s for tier in tiers}) < len(tiers):
        raise PlanError("tiers: at least one, and no two with the same name or tpot_ms")
    needed = {"default_tier": plan.default_tier} | {f"service_tiers.{k}": v for k, v in plan.service_tiers.items()}
    for key, name in needed.items():
        if name not in names | {BEST_EFFORT}:
            raise PlanError(f"tiers: {key} is {name!r}; it cannot go before that is changed in the file")
    new = replace(plan, configured=replace(plan.configured, tiers=tiers))
    check(new.configured)
    report = Report()
    _apply_model(gateway, new, report)
    return report
