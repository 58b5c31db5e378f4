"""What to compare PolyServe with, and the router that settings name.

Each class says which system it imitates and where it differs; `docs/policies.md` has the sources and how each is
tuned. Whatever a real system needs beyond what it decides (a trained predictor, prefix caches, migration) is left
out, or stands in as the better: predictions come from the believed profile, corrected live.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from polyserve.core.fleet import Books, Fleet, Job
from polyserve.core.forecast import Forecaster
from polyserve.core.latency import Latency, Predictor, compile_latency
from polyserve.core.pending import Pending
from polyserve.core.routing import Ladder, Placement, Refusal, Router
from polyserve.core.scaling import Demand
from polyserve.core.settings import SettingError, Settings, outside
from polyserve.core.types import Tier, TierName


@dataclass(frozen=True, slots=True)
class Given:
    """What a policy decides from: its constructor gets one of these, also that of a policy from outside."""

    settings: Settings
    tiers: list[Tier]  # tightest first
    fleet: Fleet  # to be read only: a policy answers, the controller does
    forecaster: Forecaster
    demand: Demand
    random: Random  # the policy's own, from the run's seed


class OnePool:
    """The whole fleet as one pool: every request goes somewhere at once, whatever that does to others.

    A policy of this kind overrides `choose`; nothing is ever refused, and requests wait only while no instance is
    ready.
    """

    wants_progress = False  # counting residents needs no report

    def __init__(self, given: Given) -> None:
        self._given = given
        self._fleet = given.fleet
        self._random = given.random
        self.considered: list[Refusal] = []

    def place(self, now: float, job: Job) -> Placement | None:
        ready = self._fleet.ready()
        if job.avoid:
            ready = [b for b in ready if b.id not in job.avoid]
        return Placement(job, self.choose(now, job, ready)) if ready else None

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        """One of the instances, of which there is at least one."""
        raise NotImplementedError

    def refill(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        for job in _waiting(pending):
            if placement := self.place(now, job):
                yield placement

    def pace_s(self, books: Books) -> float:
        return math.inf


def _waiting(pending: Pending) -> list[Job]:
    """Everybody who waits: by tier, each in deadline order, then best effort."""
    return [*(job for queue in pending.queues.values() for job in queue), *pending.best_effort.values()]


def first(pending: Pending, count: int) -> list[Job]:
    """The first of every queue, together in deadline order, then those without an SLO."""
    heads = [job for queue in pending.queues.values() for job in queue.head(count)]
    heads.sort(key=lambda job: (job.behind, job.due_at))
    return [*heads, *islice(pending.best_effort.values(), count)]


def requests(books: Books) -> int:
    """Running and waiting requests of an instance, those that others sent included."""
    return len(books.jobs) + books.foreign


# ------------------------------------------------------------------------------------------------- that count


class RandomChoice(OnePool):
    """Any instance, evenly: the paper's Random."""

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        return ready[self._random.randrange(len(ready))]


class RoundRobin(OnePool):
    """One after the other: what a plain load balancer does."""

    _next = 0

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        self._next += 1
        return ready[(self._next - 1) % len(ready)]


class LeastRequests(OnePool):
    """The instance with the fewest residents: the usual default of LLM gateways."""

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        return min(ready, key=lambda b: (requests(b), b.id))


class PowerOfTwo(OnePool):
    """The one with fewer residents of two drawn at random: what balancers without a shared view do."""

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        drawn = self._random.sample(ready, min(2, len(ready)))
        return min(drawn, key=lambda b: (requests(b), b.id))


class SharedSlack(OnePool):
    """Engines shared by all tiers, each of which does its best with the slack of whom it has: QoServe's way.

    What is QoServe's is in the engine: the chunk spends the slack of the decodes, prompts go by deadline, and one
    that can no longer be in time goes behind all that can. Among replicas it takes turns; `balance` says.
    Differs: prompts are ordered by deadline alone (its alpha of 0), not by deadline plus alpha times remaining tokens.
    """

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self._balance = balance(given)

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        return self._balance.choose(now, job, ready)


def balance(given: Given) -> OnePool:
    """How equals share requests, by the settings."""
    return LeastRequests(given) if given.settings.balance == "least-requests" else RoundRobin(given)


class Static(OnePool):
    """A fixed partition: every tier has its own instances, and uses no others.

    What operators do who know their mix: a deployment per SLO class. Instances are handed out as they are first
    needed, `static_sizes` of them to each tier (one of size 0 shares with the nearest tighter tier, the tightest with
    the next); without sizes all tiers get the same number. An engine with a dynamic chunk keeps its tier's pace.
    """

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        names = [tier.name for tier in given.tiers]
        self._sizes: dict[TierName, int] | None = None
        self._home = {name: name for name in names}
        self._paces = {tier.name: tier.tpot_s for tier in given.tiers}
        self._among = {name: balance(given) for name in names}
        if given.settings.static_sizes:
            self._partition(names, [int(size) for size in given.settings.static_sizes.split(",")])

    def _partition(self, names: list[TierName], sizes: list[int]) -> None:
        if len(sizes) != len(names) or not any(sizes):
            raise SettingError(
                f"setting 'static_sizes': one number for each of the {len(names)} tiers, tightest first, and not all "
                f"0, not {self._given.settings.static_sizes!r}"
            )
        self._sizes = dict(zip(names, sizes, strict=True))
        home = next(name for name in names if self._sizes[name])
        for name in names:
            home = name if self._sizes[name] else home
            self._home[name] = home
        # Whoever shares looser instances still gets its own pace.
        first = self._home[names[0]]
        self._paces[first] = min(self._paces[name] for name in names if self._home[name] == first)

    def place(self, now: float, job: Job) -> Placement | None:
        home = self._home[job.tier or self._given.tiers[-1].name]
        own = [b for b in self._fleet.of_tier(home) if b.id not in job.avoid]
        pool = [b for b in self._fleet.of_tier(None) if b.id not in job.avoid]
        if pool and len(self._fleet.of_tier(home)) < self._size(home):
            return Placement(job, pool[0], takes=True, label=home)
        return Placement(job, self._among[home].choose(now, job, own)) if own else None

    def _size(self, home: TierName) -> int:
        """Instances that a tier may have."""
        if self._sizes is not None:
            return self._sizes[home]
        return math.ceil(len(self._fleet.ready()) / len(self._home))

    def pace_s(self, books: Books) -> float:
        return self._paces[books.tier] if books.tier is not None else math.inf


# ------------------------------------------------------------------------------------------------ that predict


class Minimal(OnePool):
    """The instance whose next iteration is the shortest: the paper's Minimal."""

    wants_progress = True

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        seconds, _ = self._fleet.look(now, ready)
        return min(zip(seconds, ready, strict=True), key=lambda p: (p[0], len(p[1].jobs), p[1].id))[1]


class PromptTokensTimesBatch(OnePool):
    """The smallest product of prompt tokens to compute and requests, both with the newcomer: LMetric's way.

    Without prefix caches its prompt counts in full everywhere, so that the tokens already queued decide.
    """

    wants_progress = True

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        _, left = self._fleet.look(now, ready)

        def score(tokens: float, books: Books) -> float:
            return (tokens + job.prefill_tokens) * (requests(books) + 1)

        return min((score(tokens, b), b.id, b) for tokens, b in zip(left, ready, strict=True))[2]


class LeastHeadroom(OnePool):
    """Among the instances predicted to keep every SLO the one that keeps them by the least: llm-d's way.

    Headroom is SLO minus prediction; for TPOT the SLO is the tighter of the request's and of the tightest resident's.
    Where both are positive, instances are ranked by their mean (TTFT 0.8, TPOT 0.2, each scaled to the largest among
    them) and the least is taken; where none is, by the smallest such mean of what is missing. Nothing is refused.
    Differs: llm-d draws an instance with a chance that falls with its headroom, and one request in a hundred from
    those that are predicted to fail, to learn from it; here the least is taken, which packs better.
    """

    wants_progress = True

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        compile_latency()
        self._buffer = given.settings.slo_buffer

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        predictor = Predictor(self._given.demand, now, job.prefill_tokens)
        predicted = [predictor.of(books) for books in ready]
        if job.slo is None:  # as fast as can be
            return min(zip(predicted, ready, strict=True), key=lambda p: (p[0].ttft_s, p[1].id))[1]
        ttft_s = (job.due_at - now) * self._buffer
        margins = [
            (ttft_s - each.ttft_s, self._tpot_s(job, books) * self._buffer - each.tpot_s, books)
            for each, books in zip(predicted, ready, strict=True)
        ]
        keep = [m for m in margins if m[0] >= 0.0 and m[1] >= 0.0]
        if not keep:
            margins = [(max(-ttft, 0.0), max(-tpot, 0.0), books) for ttft, tpot, books in margins]
        return _least(keep or margins)

    def _tpot_s(self, job: Job, books: Books) -> float:
        """The tighter of the request's pace and the tightest resident's."""
        assert job.slo is not None
        paces = (tier.tpot_s for tier in self._given.tiers if books.by_tier.get(tier.name))  # tightest first
        return min(job.slo.tpot_s, next(paces, math.inf))


def _least(margins: list[tuple[float, float, Books]]) -> Books:
    """The least of the weighted mean, each of both scaled from its smallest, 0, to its largest, 1."""
    ttfts, tpots = [m[0] for m in margins], [m[1] for m in margins]
    ttft_least, ttft_range = min(ttfts), max(ttfts) - min(ttfts) or 1.0
    tpot_least, tpot_range = min(tpots), max(tpots) - min(tpots) or 1.0

    def mean(margin: tuple[float, float, Books]) -> tuple[float, str]:
        ttft, tpot, books = margin
        return 0.8 * (ttft - ttft_least) / ttft_range + 0.2 * (tpot - tpot_least) / tpot_range, books.id

    return min(margins, key=mean)[2]


class SingleSlo(OnePool):
    """The fullest instance that still keeps one pace for everybody, the tightest tier's: Llumnix's way.

    Among those whose predicted TPOT, with the request, is within `slo_buffer` of that pace and whose predicted TTFT is
    in time, the one with the highest TPOT; where there is none the request waits in deadline order, and is refused
    when it cannot be in time any more, as Llumnix's SLO policy refuses what no instance can serve.
    Differs: TTFT is each request's own; no request is moved while it runs.
    """

    wants_progress = True

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        compile_latency()
        self._tpot_s = given.tiers[0].tpot_s
        self._buffer = given.settings.slo_buffer

    def place(self, now: float, job: Job) -> Placement | None:
        predictor = Predictor(self._given.demand, now, job.prefill_tokens)
        ready = [b for b in self._fleet.ready() if b.id not in job.avoid]
        able = [(tpot_s, b.id, b) for b in ready if (tpot_s := self._fits(now, job, b, predictor)) is not None]
        return Placement(job, max(able)[2]) if able else None

    def _fits(self, now: float, job: Job, books: Books, predictor: Predictor) -> float | None:
        """The TPOT predicted with the job; None when that or its TTFT is beyond the SLO."""
        if len(books.jobs) >= books.max_num_seqs:
            return None
        predicted = predictor.of(books)
        # Whoever is late by now has nothing to wait for, where nobody is refused.
        in_time = job.late or now > job.due_at or predicted.ttft_s <= (job.due_at - now) * self._buffer
        return predicted.tpot_s if in_time and self._paced(predicted) else None

    def _paced(self, predicted: Latency) -> bool:
        return predicted.tpot_s <= self._tpot_s * self._buffer

    def refill(self, now: float, books: Books, pending: Pending) -> Iterator[Placement]:
        demand = self._given.demand
        if not self._paced(Predictor(demand, now, 1).of(books)):
            return  # not even the shortest prompt
        refused = 0
        for job in first(pending, 32):
            if books.id in job.avoid:
                continue
            if self._fits(now, job, books, Predictor(demand, now, job.prefill_tokens)) is not None:
                yield Placement(job, books)
            elif (refused := refused + 1) > self._given.settings.head_walk:
                return

    def pace_s(self, books: Books) -> float:
        return self._tpot_s


POOLS: dict[str, type[OnePool]] = {
    "random": RandomChoice,
    "round-robin": RoundRobin,
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "minimal": Minimal,
    "static": Static,
    "least-headroom": LeastHeadroom,
    "ptokens-batch": PromptTokensTimesBatch,
    "shared-slack": SharedSlack,
    "single-slo": SingleSlo,
}


def router(given: Given) -> Router:
    """The router that the settings name; raises `SettingError` for one that cannot be had."""
    name = given.settings.router
    if name == "tiers":
        return Ladder(given.settings, given.tiers, given.fleet, given.forecaster, given.demand)
    made: Router = POOLS[name](given) if name in POOLS else outside(name)(given)
    return made
