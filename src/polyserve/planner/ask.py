"""What a plan is asked, and how people write it.

A load is the demand the user described, or a shift of it: other shares of the tiers, longer prompts or answers, more
of everything. A plan asks how many instances each load needs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from polyserve.core.types import ChunkRule
from polyserve.demand import Arrivals
from polyserve.report import tier_key

# What "the mix shifts" means unless the user says otherwise.
USUAL_FACTOR = 1.5
# Shares written as 0.1 or as 10 %: their sum may be off by what rounding to two digits costs.
SUMS, SUM_TOLERANCE = (1.0, 100.0), 0.011
# A tier that grows leaves the others at least this much together, else there would be no mix.
MOST_OF_ALL = 0.95

# With fewer in a run a single late one decides.
LEAST_REQUESTS = 100

Shares = tuple[tuple[float, float], ...]  # TPOT in seconds and its share, tightest first


class PlanError(ValueError):
    """A question that cannot be answered; the message names the option and what would do."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a fleet, relative to the trace and the rate of the question."""

    tpots: Shares
    rate_by: float = 1.0
    prompts_by: float = 1.0
    outputs_by: float = 1.0


@dataclass(frozen=True, slots=True)
class Shift:
    """A way in which demand may change: factors on the shares of tiers (by name), on lengths and on the rate."""

    name: str
    tiers: tuple[tuple[str, float], ...] = ()
    rate_by: float = 1.0
    prompts_by: float = 1.0
    outputs_by: float = 1.0

    def of(self, load: Load) -> Load:
        """The load after the shift."""
        return Load(
            tpots=_grown(load.tpots, dict(self.tiers)),
            rate_by=load.rate_by * self.rate_by,
            prompts_by=load.prompts_by * self.prompts_by,
            outputs_by=load.outputs_by * self.outputs_by,
        )


def _grown(tpots: Shares, factors: Mapping[str, float]) -> Shares:
    """Some tiers' shares multiplied, the others scaled so that all sum to 1 again."""
    if not factors:
        return tpots
    named = [tier_key(tpot_s) in factors for tpot_s, _ in tpots]
    grown = [share * factors.get(tier_key(tpot_s), 1.0) for tpot_s, share in tpots]
    inside = sum(share for share, mine in zip(grown, named, strict=True) if mine)
    outside = sum(share for share, mine in zip(grown, named, strict=True) if not mine)
    if not outside:
        return tuple((tpot_s, share / inside) for (tpot_s, _), share in zip(tpots, grown, strict=True))
    kept = min(inside, MOST_OF_ALL)
    scales = [kept / inside if mine else (1.0 - kept) / outside for mine in named]
    return tuple((tpot_s, share * by) for (tpot_s, _), share, by in zip(tpots, grown, scales, strict=True))


@dataclass(frozen=True, slots=True)
class Rival:
    """A policy to plan for as well; without a chunk a baseline gets the best of a few."""

    policy: str
    chunk: ChunkRule | None = None


@dataclass(frozen=True)
class Ask:
    """The question. Rates in requests per second; the target is a share that every tier is to attain."""

    tpots: Shares
    ttfts: tuple[float, ...]
    target: float
    profiles: tuple[str, ...]
    trace: str = "azure-conv"
    columns: Mapping[str, str] = field(default_factory=dict)
    rate: float | None = None  # None: as recorded
    arrivals: Arrivals = field(default_factory=Arrivals)
    prices: Mapping[str, float] = field(default_factory=dict)  # of an instance-hour, by profile
    policy: str = "polyserve"
    values: Mapping[str, object] = field(default_factory=dict)  # settings other than the policy's own
    compare: tuple[Rival, ...] = ()
    shifts: tuple[Shift, ...] = ()
    seed: int = 0
    seeds: int = 3  # how many confirm the plan
    search_seeds: int = 2  # at most, where a search or a side question judges a fleet; at least one, at most `seeds`
    requests: int = 10_000  # about as many at most are measured in one run, unless they stay longer
    warm: float = 0.95  # of the requests that a fleet will hold at once, as many are there when measuring begins
    residencies: float = 3.0  # mean ones, that a run measures at least
    tolerance: float = 0.02  # of the headroom
    max_instances: int | None = None  # None: several times the bound

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            never = ": no number of instances promises that nobody is ever late" if self.target == 1 else ""
            raise PlanError(f"target: a percentage above 0 and below 100, not {100 * self.target:g}{never}")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise PlanError(f"rate: a positive number of requests per second, or recorded, not {self.rate:g}")
        if not self.profiles:
            raise PlanError("profiles: at least one")
        if twice := next((p for p in self.profiles if self.profiles.count(p) > 1), None):
            raise PlanError(f"profiles: {twice} is there twice")
        if strange := next((p for p in self.prices if p not in self.profiles), None):
            raise PlanError(f"price: {strange} is not among the profiles, which are {', '.join(self.profiles)}")
        if self.prices and (missing := next((p for p in self.profiles if p not in self.prices), None)):
            raise PlanError(f"price: {missing} has none; give one for each profile, or none at all")
        if self.requests < LEAST_REQUESTS:
            raise PlanError(f"requests: at least {LEAST_REQUESTS} in a run, not {self.requests}")
        if not 1 <= self.seeds <= 100:
            raise PlanError(f"seeds: from 1 to 100, not {self.seeds}")
        if self.max_instances is not None and self.max_instances < 1:
            raise PlanError(f"max-instances: at least 1, not {self.max_instances}")

    @property
    def load(self) -> Load:
        """The demand as described."""
        return Load(self.tpots)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Those under which the plan is confirmed."""
        return tuple(range(self.seed, self.seed + self.seeds))


def usual_shifts(tpots: Shares) -> tuple[Shift, ...]:
    """Each tier half as much again, then prompts and answers half as long again."""
    by = USUAL_FACTOR
    tiers = [tier_key(tpot_s) for tpot_s, _ in tpots] if len(tpots) > 1 else []
    return (
        *(Shift(f"{tier} ms x{by:g}", ((tier, by),)) for tier in tiers),
        Shift(f"prompts x{by:g}", prompts_by=by),
        Shift(f"outputs x{by:g}", outputs_by=by),
    )


# -------------------------------------------------------------------------------------- what the user writes


def parse_shift(text: str, tpots: Shares) -> Shift:
    """`20=1.5,prompts=2`: factors on a tier's share (by its TPOT in ms), on `prompts`, `outputs` and `rate`."""
    tiers = {tier_key(tpot_s) for tpot_s, _ in tpots}
    lengths = ("prompts", "outputs", "rate")
    factors: dict[str, float] = {}
    for item in text.split(","):
        key, sign, value = (part.strip() for part in item.partition("="))
        name = key if key in lengths else plain_ms(key)
        if not sign or (name not in lengths and name not in tiers):
            known = ", ".join((*sorted(tiers, key=float), *lengths))
            raise PlanError(f"shift {text!r}: expected WHAT=FACTOR with WHAT one of {known}")
        factors[name] = _positive(f"shift {text!r}", value)
    return Shift(
        name=", ".join(f"{k if k in lengths else f'{k} ms'} x{v:g}" for k, v in factors.items()),
        tiers=tuple((k, v) for k, v in factors.items() if k in tiers),
        rate_by=factors.get("rate", 1.0),
        prompts_by=factors.get("prompts", 1.0),
        outputs_by=factors.get("outputs", 1.0),
    )


def parse_rival(text: str) -> Rival:
    """`minimal`, or `minimal@512` with that fixed chunk."""
    name, sign, tokens = text.partition("@")
    if not sign:
        return Rival(name)
    if not tokens.isdecimal() or not int(tokens):
        raise PlanError(
            f"compare {text!r}: expected POLICY or POLICY@TOKENS, a whole number of tokens for the fixed chunk"
        )
    return Rival(name, ChunkRule("fixed", int(tokens)))


def parse_prices(text: str, profiles: Sequence[str]) -> dict[str, float]:
    """`a100-llama-3-8b=2.5,...` per instance-hour; with one profile a number alone will do."""
    if not text:
        return {}
    if len(profiles) == 1 and "=" not in text:
        text = f"{profiles[0]}={text}"
    prices: dict[str, float] = {}
    for item in text.split(","):
        name, sign, value = (part.strip() for part in item.rpartition("="))
        if not sign or not name:
            raise PlanError(f"price {item.strip()!r}: expected PROFILE=PER_HOUR")
        prices[name] = _positive(f"price {item.strip()!r}", value)
    return prices


def parse_target(text: str) -> float:
    """`99` or `99%`, as a share."""
    return _positive("target", text.strip().removesuffix("%")) / 100


def parse_rate(text: str) -> float:
    """Requests per second."""
    try:
        return _positive("rate", text)
    except PlanError:
        raise PlanError(f"rate: a positive number of requests per second, or recorded, not {text!r}") from None


def parse_pairs(option: str, items: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE items as a dict."""
    pairs: dict[str, str] = {}
    for item in items:
        key, sign, value = (part.strip() for part in item.partition("="))
        if not sign or not key:
            raise PlanError(f"{option}: KEY=VALUE, not {item!r}")
        pairs[key] = value
    return pairs


def plain_ms(text: str) -> str:
    """Durations as `20ms`, `1s` or `20`, in milliseconds without a unit; anything else is left as it is."""

    def plain(match: re.Match[str]) -> str:
        return f"{float(match[1]) * (1e3 if match[2] == 's' else 1.0):g}"

    return re.sub(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)\s*(ms|s)\b", plain, text.strip())


def check_shares(text: str) -> None:
    """Shares given for every tier sum to 1, or to 100; `text` is as `demand.parse_tpot` takes it."""
    items = [item.partition(":") for item in text.split(",")]
    if not any(colon for _, colon, _ in items):
        return  # no shares at all: the same for each
    if bare := next((pace for pace, colon, _ in items if not colon), None):
        raise PlanError(f"tpot {text!r}: {bare.strip()} ms has no share; give one for each tier, or none at all")
    total = sum(_positive(f"tpot {text!r}", share) for _, _, share in items)
    if not any(abs(total / whole - 1) <= SUM_TOLERANCE for whole in SUMS):
        raise PlanError(f"tpot {text!r}: the shares sum to {total:g}; they want 1, or 100")


def _positive(what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise PlanError(f"{what}: expected a positive number, not {text!r}")
    return value
