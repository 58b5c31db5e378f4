"""A plan: for each kind of instance how many it takes, how much more they bear, and what changes if demand does.

The search for a size judges each candidate by as many seeds as it takes to tell, then the answer and the next smaller
size are simulated under every seed: the plan is the smallest size at which, all seeds together, every tier attains the
target, next to a size at which some tier does not. One seed alone may still miss it, and the plan says by how much.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from polyserve.core.settings import policy
from polyserve.core.types import ChunkRule, TierName
from polyserve.demand import DemandError
from polyserve.planner.ask import Ask, Load, PlanError, Rival, Shift
from polyserve.planner.bench import Bench, Window
from polyserve.planner.crew import Task, crew
from polyserve.planner.saying import Quiet, Saying, fleet_of
from polyserve.planner.search import largest, smallest
from polyserve.planner.trial import Fleet, Trial
from polyserve.profiles.store import load as load_profile
from polyserve.profiles.store import shipped_names

# The largest fleet that is tried, unless the user says otherwise: so many times the bound, and some for small loads.
MOST_TIMES, MOST_MORE = 6, 12
# What a search begins with, over the bound: about what the default policy needs at 99 %.
GUESS = 1.2
# Fleets smaller than this share of the bound are not tried: those they leave out are far more than any target allows.
# It is not the whole bound, since a target below 100 % lets the longest requests be missed, and luck varies.
HOPELESS = 0.8
# Baselines have no rule of their own for prefill chunks: each gets the best of these, found at one size.
CHUNKS, TUNED_AT = (256, 512, 2048), 1.5
# Headroom beyond this is "several times the load".
MOST_HEADROOM = 4.0
# Sizes that a picture shows, as shares of the plan, so that its curves have no holes.
PICTURED = (0.6, 0.75, 0.9, 1.15, 1.3)


@dataclass(frozen=True)
class Sized:
    """The smallest fleet that attains the target; where none does, the best that was found."""

    fleet: Fleet
    found: bool
    bound: float  # instances of the fluid optimum
    trial: Trial  # of the fleet, all seeds together
    by_seed: list[Trial]
    most: int  # the largest size that might have been tried

    @property
    def worst_seed(self) -> Trial:
        return min(self.by_seed, key=lambda trial: trial.worst[1])


@dataclass(frozen=True)
class Headroom:
    """How much more of the same load the planned fleet bears."""

    factor: float  # of the planned rate; the largest one tried at which every tier attains the target
    unbroken: bool  # nothing broke at the largest factor that is tried
    breaks: TierName | None  # the tier that fares worst just above


@dataclass(frozen=True)
class Shifted:
    """What a shift of the demand asks for, and what it does to the planned fleet."""

    shift: Shift
    load: Load
    problem: str | None = None  # why no instance of this kind can serve it; then the rest is not known
    bound: float = 0.0
    instances: int | None = None  # None: no size attains the target
    best: tuple[int, Trial] | None = None  # that fleet, or the best tried
    planned: Trial | None = None  # the planned fleet under the shift
    infeasible_share: float = 0.0


@dataclass(frozen=True)
class Compared:
    """How many instances another policy needs for the same."""

    policy: str
    chunk: ChunkRule | None  # the best of those tried; None: the policy has its own rule
    instances: int | None
    best: Trial  # of that fleet, or of the best found
    best_instances: int


Answer = Headroom | Shifted | Compared


@dataclass
class Kind:
    """The plan for one kind of instance."""

    profile: str
    problem: str | None = None  # why there is no plan
    rate: float = 0.0
    window: Window | None = None
    infeasible_share: float = 0.0
    barely_share: float = 0.0  # of the requests: those that only an instance that is nearly idle can serve in time
    other_bounds: dict[str, float] = field(default_factory=dict)  # in instances, by the profile that believes otherwise
    sized: Sized | None = None
    smaller: Trial | None = None  # the planned fleet without one of its instances; None: it has but one
    curve: dict[int, Trial] = field(default_factory=dict)  # every size tried
    headroom: Headroom | None = None
    shifts: list[Shifted] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)

    @property
    def planned(self) -> Sized | None:
        """The planned fleet, if there is one."""
        return self.sized if self.sized is not None and self.sized.found else None


@dataclass(frozen=True)
class Plan:
    """The answer."""

    ask: Ask
    kinds: list[Kind]
    wall_s: float

    @property
    def best(self) -> Kind | None:
        """The cheapest kind by the prices given; without prices only a kind without a rival is the best."""
        planned = [kind for kind in self.kinds if kind.planned is not None]
        if len(planned) == 1 and len(self.kinds) == 1:
            return planned[0]
        if not planned or not self.ask.prices:
            return None
        return min(planned, key=lambda kind: self.per_hour(kind.planned) or math.inf)

    def per_hour(self, sized: Sized | None) -> float | None:
        """What a fleet costs in an hour; None without a price."""
        if sized is None or sized.fleet.profile not in self.ask.prices:
            return None
        return sized.fleet.instances * self.ask.prices[sized.fleet.profile]


# ---------------------------------------------------------------------------------------------- the questions


def size(bench: Bench, fleet: Fleet, load: Load) -> Sized:
    """The smallest fleet of this kind, policy and chunk rule; the number of instances of `fleet` is not looked at."""
    ask, least = bench.ask, bench.least(fleet.profile, load)
    most = most_instances(ask, least)
    found = smallest_fleet(bench, fleet, load, math.ceil(GUESS * least))
    if found is not None:
        found = confirmed(lambda count: bench.over(fleet.of(count), load, ask.all_seeds), found, most, ask.target)
    best = fleet.of(found or best_tried(bench.tried(fleet, load)))
    by_seed = [bench.trial(best, load, seed) for seed in ask.all_seeds]
    return Sized(best, found is not None, least, bench.over(best, load, ask.all_seeds), by_seed, most)


def smallest_fleet(bench: Bench, fleet: Fleet, load: Load, guess: int) -> int | None:
    """How many instances attain the target, each size judged by as many seeds as it takes; None: none tried does."""
    least = bench.least(fleet.profile, load)
    most = most_instances(bench.ask, least)
    return smallest(
        lambda count: bench.holds(fleet.of(count), load), guess, most, below=min(int(HOPELESS * least), most - 1)
    )


def best_tried(tried: dict[int, Trial]) -> int:
    """The size whose worst tier fares best, the smallest of them."""
    return max(tried, key=lambda count: (tried[count].worst[1], -count))


def confirmed(over: Callable[[int], Trial], count: int, most: int, target: float) -> int | None:
    """The size next to `count` that attains the target under all seeds together while one less does not."""
    while not over(count).attains(target):
        count += 1
        if count > most:
            return None
    while count > 1 and over(count - 1).attains(target):
        count -= 1
    return count


def most_instances(ask: Ask, least: float) -> int:
    """The largest fleet worth trying."""
    return ask.max_instances or max(MOST_TIMES * math.ceil(least), math.ceil(least) + MOST_MORE)


def planned(bench: Bench, profile: str, pictured: bool) -> Kind:
    """The plan for a kind of instance, without what may change."""
    ask, load = bench.ask, bench.ask.load
    kind = Kind(
        profile,
        rate=bench.rate(profile, load),
        window=bench.window(profile, load),
        infeasible_share=bench.infeasible_share(profile, load),
        barely_share=bench.barely_share(profile, load),
        other_bounds=other_bounds(bench, profile),
    )
    assert kind.window is not None
    simulated = round(kind.rate * kind.window.whole_s)
    bench.saying.done(f"{profile}: about {simulated} requests a run")
    fleet = Fleet(profile, 0, ask.policy)
    kind.sized = sized = size(bench, fleet, load)
    count = sized.fleet.instances
    if sized.found and count > 1:
        kind.smaller = bench.over(fleet.of(count - 1), load, ask.all_seeds)
    if pictured:
        near = {round(share * count) for share in PICTURED}
        for each in sorted(n for n in near if HOPELESS * sized.bound < n <= sized.most):
            bench.trial(fleet.of(each), load, ask.seed)
    kind.curve = bench.tried(fleet, load)
    return kind


def other_bounds(bench: Bench, profile: str) -> dict[str, float]:
    """The bound by the same engine's profile with the other assumption about mixed batches, where one is shipped."""
    plain = profile.removesuffix("-mixed")
    bounds = {}
    for name in {plain, f"{plain}-mixed"} & set(shipped_names()) - {profile}:
        with suppress(PlanError, DemandError):  # it holds no such pace, so there is no bound
            bounds[name] = bench.least(name, bench.ask.load)
    return bounds


def headroom(bench: Bench, fleet: Fleet) -> Headroom:
    """Raise the rate until a tier breaks."""
    load = bench.ask.load
    broken: dict[float, TierName] = {}

    def holds(factor: float) -> bool:
        more = dataclasses.replace(load, rate_by=factor)
        if held := bench.holds(fleet, more):
            return held
        broken[factor] = bench.judged(fleet, more).worst[0]
        return False

    factor = largest(holds, 1.0, MOST_HEADROOM, bench.ask.tolerance)
    return Headroom(factor, not broken, broken[min(broken)] if broken else None)


def shifted(bench: Bench, fleet: Fleet, shift: Shift) -> Shifted:
    """What the planned fleet attains after the shift, and the fleet that would be needed."""
    load = shift.of(bench.ask.load)
    before = bench.least(fleet.profile, bench.ask.load)
    try:
        least = bench.least(fleet.profile, load)
    except (PlanError, DemandError) as error:
        return Shifted(shift, load, problem=str(error))
    found = smallest_fleet(bench, fleet, load, round(fleet.instances * least / before))
    tried = bench.tried(fleet, load)
    best = found or best_tried(tried)
    return Shifted(
        shift=shift,
        load=load,
        bound=least,
        instances=found,
        best=(best, tried[best]),
        planned=bench.judged(fleet, load),
        infeasible_share=bench.infeasible_share(fleet.profile, load),
    )


def compared(bench: Bench, fleet: Fleet, other: Rival) -> Compared:
    """How many instances another policy needs, at the chunk asked for or at its best."""
    load, guess = bench.ask.load, math.ceil(TUNED_AT * fleet.instances)
    rival = Fleet(fleet.profile, guess, other.policy, other.chunk)
    if other.chunk is None and policy(other.policy).router != "tiers":
        limit = load_profile(fleet.profile).limits.max_num_batched_tokens
        budgets = sorted({min(tokens, limit) for tokens in CHUNKS})
        rules = [dataclasses.replace(rival, chunk=ChunkRule("fixed", tokens)) for tokens in budgets]
        rival = max(rules, key=lambda each: bench.trial(each, load, bench.ask.seed).worst[1])
    found = smallest_fleet(bench, rival, load, guess)
    tried = bench.tried(rival, load)
    best = found or best_tried(tried)
    return Compared(other.policy, rival.chunk, found, tried[best], best)


# ---------------------------------------------------------------------------------------------- all of them


def make_plan(ask: Ask, saying: Saying | None = None, jobs: int = 1, pictured: bool = False) -> Plan:
    """Answer the question. `pictured`: also try the sizes that a picture wants.

    Raises `PlanError`, `SettingError`, `TraceError` and `ProfileError`, all before anything long is begun.
    """
    began = time.monotonic()
    policy(ask.policy, dict(ask.values))
    for other in ask.compare:
        policy(other.policy)
    bench = Bench(ask, saying or Quiet())
    kinds = {profile: Kind(profile, problem=why_unable(bench, profile)) for profile in ask.profiles}
    able = [kind.profile for kind in kinds.values() if kind.problem is None]
    if not able:
        raise PlanError("; ".join(str(kind.problem) for kind in kinds.values()))
    total = len(able) * (2 + len(ask.shifts) + len(ask.compare))
    with crew(bench, jobs, in_words, total) as do:
        sizes: list[Task] = [(f"{p}: size", partial(planned, profile=p, pictured=pictured)) for p in able]
        kinds |= {kind.profile: kind for kind in do(sizes)}
        about = [(kind, task) for kind in kinds.values() for task in _about(ask, kind)]
        for (kind, _), answer in zip(about, do([task for _, task in about]), strict=True):
            _note(kind, answer)
    return Plan(ask, list(kinds.values()), time.monotonic() - began)


def why_unable(bench: Bench, profile: str) -> str | None:
    """Why no number of instances of this kind can serve the load; None where some may."""
    try:
        bench.least(profile, bench.ask.load)
    except (PlanError, DemandError) as error:
        return f"{profile}: {error}"
    return None


def _about(ask: Ask, kind: Kind) -> Iterator[Task]:
    """What is to be found out about a planned fleet."""
    if kind.planned is None:
        return
    profile, fleet = kind.profile, kind.planned.fleet
    yield f"{profile}: headroom", partial(headroom, fleet=fleet)
    for shift in ask.shifts:
        yield f"{profile}: {shift.name}", partial(shifted, fleet=fleet, shift=shift)
    for other in ask.compare:
        yield f"{profile}: {other.policy}", partial(compared, fleet=fleet, other=other)


def _note(kind: Kind, answer: Answer) -> None:
    match answer:
        case Headroom():
            kind.headroom = answer
        case Shifted():
            kind.shifts.append(answer)
        case Compared():
            kind.compared.append(answer)


def in_words(answer: Kind | Answer) -> str:
    """What was found, in half a line."""
    match answer:
        case Kind(sized=Sized() as sized):
            if not sized.found:
                return f"not reached with up to {fleet_of(sized.most)}"
            return f"{fleet_of(sized.fleet.instances)} (bound {sized.bound:.1f})"
        case Headroom():
            return f"{'more than ' if answer.unbroken else ''}{100 * (answer.factor - 1):.0f} % more load"
        case Shifted() | Compared():
            return fleet_of(answer.instances) if answer.instances else "no number of instances"
    raise AssertionError(answer)  # pragma: no cover - every answer is one of these
