"""Every switch of every mechanism, and the named policies: an ablation is a table of switches.

A policy that is not ours is named `their.module:Policy`; `docs/policies.md` says what it must offer.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from polyserve.core.types import ChunkBound


class SettingError(ValueError):
    """A setting that does not exist or cannot have that value; the message says what would do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a policy is made of. Units are in the names; the comment says what a field switches."""

    # Who serves a request: the ladder of tiers, a baseline (`ROUTERS`), or their.module:Policy.
    router: str = "tiers"

    # Placement inside a tier: `fill` takes the most loaded instance that admits, so that others empty and can be given
    # back; `spread` the least loaded; `auto` fills where the fleet is elastic and spreads where it is fixed.
    placement: Literal["auto", "fill", "spread"] = "auto"
    # Looser requests on tighter instances: when own instances are full (`lazy`), whenever it admits (`eager`).
    promotion: Literal["off", "lazy", "eager"] = "lazy"
    promotion_order: Literal["nearest", "tightest"] = "nearest"
    guest_reserve: float = 0.1  # share of the host's pace that guests leave free
    tight_on_loose: bool = False  # a tight request may slow a looser instance down to its own pace
    relabel: bool = True  # instances move between tiers by demand; off: only when their hosts have gone
    sizing: Literal["demand", "pending"] = "demand"  # how a tier's share of the fleet is found
    head_walk: int = 6  # further requests tried behind a head that is refused for its deadline

    # The forecast's tests, each with its switch.
    test_memory: bool = True
    test_pace: bool = True
    test_prefill: bool = True
    test_token1: bool = True
    predict_chunks: bool = True  # off: a prompt is assumed to run at the chunk that fits right now
    wait_time: bool = True  # charge the running iteration
    lengths: Literal["survival", "average"] = "survival"
    length_prior_tokens: int = 256  # mean output length believed before anything was seen
    memory_margin_sigma: float = 1.0  # standard deviations of forecast KV kept free
    ttft_margin: float = 0.2  # share of a predicted wait, beyond what the prompt itself takes, that is added to it
    safety_sigma: float = 1.0  # spreads of observed/predicted iteration time added to every forecast
    correction: bool = True  # live correction of the believed profile

    # What happens to requests that cannot be on time.
    on_late: Literal["refuse", "serve_late", "never"] = "refuse"
    confidence: float = 0.9  # refuse when the chance to be on time is below 1 - confidence
    shortage: Literal["demand", "weight", "cost"] = "demand"
    infeasible: Literal["refuse", "best_possible"] = "refuse"
    queue_limit: int = 0  # pending requests per tier; 0: no bound
    queue_timeout_s: float = 0.0  # longest wait of a pending request; 0: no bound

    # Instances that fail (`breaker.py`).
    breaker_errors: float = 0.5  # share of an instance's latest requests that failed, from which it rests; 0: never
    breaker_slowness: float = 2.5  # times slower than the median of the fleet, from which it rests; 0: never
    breaker_s: float = 1.0  # the first rest; each further one is twice as long, up to a minute
    hang_iterations: float = 50.0  # iterations without a byte after which an instance hangs; 0: never
    hang_s: float = 5.0  # but never sooner than this

    # The budget.
    max_instances: int = 0  # 0: the instances that joined, none started or stopped
    min_instances: int = 0
    start_up_s: float = 0.0  # believed
    planned_load: float = 0.85  # share of the fluid optimum that a tier is planned for: the rest is burst and rounding
    start_timeout_s: float = 600.0
    start_step: int = 4  # most instances starting at once
    keep_warm_s: float = 30.0
    look_s: float = 1.0  # between two looks at the tails
    predictive: bool = True  # start instances for the load expected when they are ready

    # Who says how many instances: the ladder's tier sizes (a baseline has none), or the requests per instance.
    autoscaler: Literal["own", "queue", "off"] = "own"
    target_requests: float = 64.0  # of `queue`: running and waiting requests that one instance should have
    scale_down_s: float = 60.0  # of `queue`: fewer instances only when so long no more were needed

    # Prompts on some instances, answers on others (PD).
    disaggregated: bool = False
    kv_bandwidth: float = 40e9  # bytes/s from a prefill to a decode instance: four fifths of a 400 Gb/s link
    kv_latency_s: float = 0.002  # of one hand-over, beside its bytes: asking for blocks, and the news
    prefill_instances: int = 0  # so many of those that join without a role compute prompts; 0: half, to begin with
    promise: bool = True  # a place for the answer is kept from the dispatch on; off: found when the prompt is done
    follow_split: bool = True  # instances change role as the load asks for it; off: only where a role has died out

    # Of single baselines (`docs/policies.md`).
    static_sizes: str = ""  # `static`: instances per tier, tightest first: 3,4,6,7; empty: the same for all
    balance: Literal["least-requests", "round-robin"] = "least-requests"  # `static`, `shared-slack`: among equals
    slo_buffer: float = 1.0  # `least-headroom`, `single-slo`: share of an SLO that a prediction may use

    # Best effort.
    best_effort: bool = True
    best_effort_headroom: float = 0.2  # of KV and pace, left free by best-effort requests
    best_effort_max_age_s: float = 60.0  # older ones get the loosest tier

    # The engine's side, told to engines that ask (`dynamic` chunk rule).
    chunk_bound: ChunkBound = "need"
    chunk_floor_tokens: int = 64
    relegate: bool = False  # a prompt that cannot be in time any more goes behind all that can

    explain: bool = False  # keep every candidate's margins for the last decisions

    def replaced(self, values: dict[str, object]) -> Settings:
        """These settings with some fields replaced, each checked against its type; raises `SettingError`."""
        hints = get_type_hints(Settings)
        unknown = sorted(set(values) - set(hints))
        if unknown:
            raise SettingError(f"unknown setting {unknown[0]!r}; there are: {', '.join(sorted(hints))}")
        return dataclasses.replace(self, **{name: _checked(name, value, hints[name]) for name, value in values.items()})

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def _checked(name: str, value: object, hint: Any) -> Any:
    if hint is str:
        return _CHECKS[name](value)
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        if value not in allowed:
            raise SettingError(f"setting {name!r} is one of {', '.join(map(str, allowed))}, not {value!r}")
        return value
    if get_origin(hint) in (types.UnionType, typing.Union):  # pragma: no cover - no such field today
        raise AssertionError(f"no check for {hint}")
    if hint is bool:
        if isinstance(value, str) and value.lower() in ("true", "on", "yes", "1", "false", "off", "no", "0"):
            return value.lower() in ("true", "on", "yes", "1")
        if isinstance(value, bool):
            return value
        raise SettingError(f"setting {name!r} is true or false, not {value!r}")
    try:
        if isinstance(value, bool):
            raise ValueError
        number = hint(value)
        if hint is int and float(str(value)) != number:
            raise ValueError
    except (TypeError, ValueError):
        kind = "a whole number" if hint is int else "a number"
        raise SettingError(f"setting {name!r} is {kind}, not {value!r}") from None
    if name == "target_requests" and number == 0:
        raise SettingError("setting 'target_requests' is above 0: requests that one instance should have")
    if name == "kv_bandwidth" and number == 0:
        raise SettingError("setting 'kv_bandwidth' is above 0: bytes per second from one instance to another")
    if not 0 <= number < float("inf"):
        raise SettingError(f"setting {name!r} is finite and not negative, not {value!r}")
    return number


# ------------------------------------------------------------------------------------------------------- policies

BASELINES = (
    "random", "round-robin", "least-requests", "power-of-two", "minimal", "static", "least-headroom", "ptokens-batch",
    "shared-slack", "single-slo",
)  # fmt: skip
ROUTERS = ("tiers", *BASELINES)


def _router(value: object) -> str:
    if value in ROUTERS or (isinstance(value, str) and ":" in value):
        return str(value)
    raise SettingError(f"setting 'router' is one of {', '.join(ROUTERS)}, or their.module:Policy, not {value!r}")


def _sizes(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"(\d{1,6}(,\d{1,6})*)?", value.replace(" ", "")):
        return value.replace(" ", "")
    raise SettingError(f"setting 'static_sizes' is instances per tier, tightest first, like 3,4,6,7, not {value!r}")


_CHECKS: dict[str, Callable[[object], str]] = {"router": _router, "static_sizes": _sizes}

# In PD a baseline takes the split as it is, and picks who answers by what it sees when the prompt is done.
_KEPT: dict[str, Any] = {"promise": False, "follow_split": False}

POLICIES: dict[str, Settings] = {
    "polyserve": Settings(),
    # The paper as written: averages, strict pace, most loaded, never refuse, scaling by pending alone. Whether a head
    # that cannot be in time blocks its queue, and what margin predictions get, it leaves open: here the better reading.
    "polyserve-paper": Settings(
        chunk_bound="pace",
        placement="fill",
        guest_reserve=0.0,
        relabel=False,
        sizing="pending",
        lengths="average",
        memory_margin_sigma=0.0,
        safety_sigma=0.0,
        correction=False,
        on_late="never",
        predictive=False,
        keep_warm_s=0.0,
        best_effort=False,
    ),
    **{name: Settings(router=name, on_late="never", autoscaler="queue", **_KEPT) for name in BASELINES},
    "static": Settings(router="static", on_late="never", autoscaler="off", chunk_bound="slack", **_KEPT),
    "shared-slack": Settings(
        router="shared-slack",
        on_late="never",
        autoscaler="queue",
        balance="round-robin",
        chunk_bound="slack",
        relegate=True,
        **_KEPT,
    ),
    "single-slo": Settings(router="single-slo", on_late="refuse", autoscaler="queue", follow_split=False),
}


@dataclass(frozen=True, slots=True)
class EngineWish:
    """Which engines a policy is meant to run on where nobody says otherwise, and what its operator tunes.

    `tunes` names settings, and `chunk` for the tokens of a fixed chunk.
    """

    chunk: Literal["dynamic", "fixed"] = "fixed"
    order: Literal["deadline", "fcfs"] = "fcfs"
    tunes: tuple[str, ...] = ("chunk",)


ENGINES: dict[str, EngineWish] = {
    **{name: EngineWish() for name in BASELINES},
    "tiers": EngineWish("dynamic", "deadline", ()),
    "static": EngineWish("dynamic", "deadline", ("chunk", "chunk_bound", "balance", "static_sizes")),
    "shared-slack": EngineWish("dynamic", "deadline", ("chunk_floor_tokens", "balance")),
    "least-headroom": EngineWish(tunes=("chunk", "slo_buffer")),
    "single-slo": EngineWish(tunes=("chunk", "slo_buffer")),
}


def engine_wish(router: str) -> EngineWish:
    """The engines that a router is meant for; raises `SettingError` when one from outside cannot be imported."""
    if router in ENGINES:
        return ENGINES[router]
    wish = getattr(outside(router), "engine", EngineWish())
    if not isinstance(wish, EngineWish):
        raise SettingError(f"policy {router!r}: its `engine` is an EngineWish, not {wish!r}")
    return wish


def policy(name: str, values: dict[str, object] | None = None) -> Settings:
    """The named policy with some settings replaced; raises `SettingError` naming what exists."""
    if ":" in name:
        own = getattr(outside(name), "settings", {})
        if not isinstance(own, dict):
            raise SettingError(f"policy {name!r}: its `settings` is a dict of setting and value, not {own!r}")
        base = Settings(router=name, on_late="never", autoscaler="queue", **_KEPT).replaced(own)
    elif name in POLICIES:
        base = POLICIES[name]
    else:
        there = ", ".join(POLICIES)
        raise SettingError(f"unknown policy {name!r}; there are: {there}, or their.module:Policy")
    return base.replaced(values or {})


def outside(name: str) -> type[Any]:
    """The class that `their.module:Policy` names; raises `SettingError` saying what is wrong with it."""
    module, _, attribute = name.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise SettingError(f"policy {name!r}: a policy from outside is their.module:Policy")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # theirs: whatever it raises, it cannot be used
        raise SettingError(f"policy {name!r}: cannot import {module}: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        raise SettingError(f"policy {name!r}: {module} has no class {attribute}")
    lacks = [verb for verb in ("place", "refill") if not callable(getattr(found, verb, None))]
    if lacks:
        raise SettingError(f"policy {name!r}: lacks {' and '.join(lacks)}; see docs/policies.md")
    return found
