"""The compiled loops of the forecast again, over lists and a `Profile`: what `kernels` is held to, and reads like.

Residents are objects here and lines of a gauge are lists; names and units are those of the columns in `kernels`.
Nothing in the product calls these: they are for tests, and for whoever wants to know what the kernels do.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from polyserve.core import kernels as k
from polyserve.core.chunking import ChunkLaw, Prefill, fit_chunks, is_pressed, plan_prefill
from polyserve.core.profile import Profile, attention_work

Line = list[float]  # one value per point of the grid
Table = Sequence[Sequence[Sequence[float]]]  # chance to be there still, by (band, bin of tokens made, grid point)


@dataclass(eq=False, slots=True)
class Resident:
    """One row of the books."""

    prompt: float
    left: float  # prompt tokens still to compute; 0: decodes; below: its KV is still to come
    made: float
    cap: float  # most output tokens
    band: int  # row of the length table
    due: float  # of token 0
    tpot: float
    key: float  # by which the engine orders its prefills
    base: float  # output tokens that earlier dispatches had delivered
    seen: float  # output tokens reported since the request arrived
    since: float = 0.0  # iterations that began before leave it out
    running: float = 0.0  # prompt tokens of the running iteration's chunk
    solo: float = 0.0  # seconds of the whole prompt on an idle instance
    less: float = 0.0  # seconds of its deadline that are kept for what follows elsewhere

    @staticmethod
    def of(row: Sequence[float]) -> Resident:
        return Resident(
            row[k.R_PROMPT], row[k.R_LEFT], row[k.R_MADE], row[k.R_CAP], int(row[k.R_BAND]),
            row[k.R_DUE], row[k.R_TPOT], row[k.R_KEY], row[k.R_BASE], row[k.R_SEEN], row[k.R_FROM],
            row[k.R_RUN], row[k.R_SOLO], row[k.R_LESS],
        )  # fmt: skip

    @property
    def decodes(self) -> bool:
        return self.left <= 0.0


@dataclass(frozen=True, slots=True)
class Station:
    """One instance, as the forecast sees it."""

    kind: int
    tokens: float  # most tokens of one iteration
    spend: int
    floor: float
    pace: float
    kv: float
    seqs: float
    block: float
    scale: float  # on believed iteration times
    free: float  # when the running iteration ends
    sigma: float
    margin: float  # share of a predicted wait that is added to it
    began: float  # when the running iteration did

    @staticmethod
    def of(inst: Sequence[float]) -> Station:
        return Station(
            int(inst[k.I_KIND]), inst[k.I_TOKENS], int(inst[k.I_SPEND]), inst[k.I_FLOOR], inst[k.I_PACE],
            inst[k.I_KV], inst[k.I_SEQS], inst[k.I_BLOCK], inst[k.I_SCALE], inst[k.I_FREE], inst[k.I_SIGMA],
            inst[k.I_MARGIN], inst[k.I_BEGAN],
        )  # fmt: skip


@dataclass(slots=True)
class Gauge:
    """Expected batch and KV over the grid: of all residents, and of those that decode now."""

    batch: Line
    kv: Line
    variance: Line  # of the KV
    most: Line  # KV if nobody ends before its cap
    decodes: Line
    decode_kv: Line


@dataclass(slots=True)
class Outlook:
    """What following a queue showed; inf: not in sight."""

    first_at: float = math.inf  # the candidate's token 0
    second_at: float = math.inf  # and its token 1
    slack: float = math.inf  # the smallest that a decode keeps
    finish: dict[Resident, float] = field(default_factory=dict)  # token 0 of everybody queued


def tally(residents: Sequence[Resident]) -> tuple[int, float, int, float]:
    """Decodes and the KV they read, queued prompts and the tokens they lack."""
    decoding, queue = [r for r in residents if r.left == 0.0], [r for r in residents if not r.decodes]
    return len(decoding), sum(r.prompt + r.made for r in decoding), len(queue), sum(r.left for r in queue)


def take_in(reported: Sequence[tuple[Resident, float]]) -> None:
    """Note how many output tokens each resident has been seen to have."""
    for resident, count in reported:
        resident.left, resident.seen, resident.made = 0.0, count, max(count - resident.base, 1.0)


def bin_of(edges: Sequence[float], made: float) -> int:
    """The bin of output lengths that `made` tokens fall into."""
    return max(bisect_right(edges, made) - 1, 0)


def alive(table: Table, edges: Sequence[float], resident: Resident, point: int, ahead: float) -> float:
    """Probability that a resident is still there at grid point `point`, `ahead` iterations on."""
    if resident.made + ahead >= resident.cap:
        return 0.0
    return table[resident.band][bin_of(edges, resident.made)][point]


def gauge(residents: Sequence[Resident], table: Table, edges: Sequence[float], grid: Sequence[float]) -> Gauge:
    """Expected batch and KV of the residents over the grid of future iterations."""
    result = Gauge(*([0.0] * len(grid) for _ in range(k.G_ROWS)))
    for resident in residents:
        for p, ahead in enumerate(grid):
            share = alive(table, edges, resident, p, ahead)
            held = resident.prompt + resident.made + ahead
            result.batch[p] += share
            result.kv[p] += share * held
            result.variance[p] += share * (1.0 - share) * held * held
            result.most[p] += held if share > 0.0 else 0.0
            if resident.decodes:
                result.decodes[p] += share
                result.decode_kv[p] += share * held
    return result


def at_iteration(line: Line, grid: Sequence[float], ahead: float) -> float:
    """A line of a gauge at an iteration between grid points."""
    if ahead >= grid[-1]:
        return line[-1]
    p = bisect_right(grid, ahead) - 1
    return line[p] + (line[p + 1] - line[p]) * (ahead - grid[p]) / (grid[p + 1] - grid[p])


def peak_s(profile: Profile, gauged: Gauge, scale: float) -> float:
    """The longest pure-decode iteration over the grid."""
    pairs = zip(gauged.batch, gauged.kv, strict=True)
    return scale * max((profile.iteration_s(0, batch, kv) for batch, kv in pairs if batch > 0.0), default=0.0)


def run_queue(
    profile: Profile,
    station: Station,
    residents: Sequence[Resident],
    gauged: Gauge,
    grid: Sequence[float],
    candidate: Resident | None,
    grow: bool,
    now: float,
    until: float,
) -> Outlook:
    """Follow an instance's prefill queue, chunk by chunk as its rule makes them.

    Stops early once the candidate has no token 0 by `until`.
    """
    outlook = Outlook()
    done = [r for r in residents if 0.0 < r.left <= r.running]
    outlook.finish = dict.fromkeys(done, station.free)
    queue = [r for r in residents if r.left > r.running]
    queue = sorted([*queue, candidate] if candidate else queue, key=lambda r: r.key)
    running = {r: 0.0 if r is candidate else r.running for r in queue}
    prefills = {r: Prefill(int(r.left - running[r]), int(r.prompt - r.left + running[r])) for r in queue}
    bank = _Bank.of(residents, now)
    t, made = station.free, 0
    stays = [r for r in done if grow and r.cap > 1.0]  # the others leave with their first token
    joined, joined_kv = float(len(stays)), sum(r.prompt for r in stays)
    purse = _Purse(bank.next_due - t, bank.tightest if bank.next_due < math.inf else math.inf)
    for resident in stays:
        purse.joins(resident, t)
    while made < k.LONGEST_RUN and (queue or (candidate and outlook.second_at == math.inf)):
        if candidate and min(outlook.first_at, t) > until:
            break
        ahead = float(made + 1) if grow else 0.0
        batch = at_iteration(gauged.decodes, grid, ahead) + joined
        kv = at_iteration(gauged.decode_kv, grid, ahead) + joined_kv
        waiting = [prefills[r] for r in queue]
        head_due = queue[0].due if queue else math.inf
        chunks = _chunks(profile, station, batch, kv, purse.left, head_due - t, waiting)
        work = sum(attention_work(c, w.past) for c, w in zip(chunks, waiting, strict=True))
        step = profile.iteration_s(sum(chunks), batch, kv, work) * station.scale
        t += step
        purse.left += purse.credit - step
        outlook.slack = min(outlook.slack, bank.slack(made, t))
        made += 1
        if outlook.first_at < math.inf and outlook.second_at == math.inf:
            outlook.second_at = t
        for resident, chunk in zip(list(queue), chunks, strict=True):
            before = prefills[resident]
            after = prefills[resident] = Prefill(before.remaining - chunk, before.past + chunk)
            if after.remaining:
                continue
            queue.remove(resident)
            outlook.finish[resident] = t
            if resident is candidate:
                outlook.first_at = t
            if grow and resident.cap > 1.0:
                joined, joined_kv = joined + 1.0, joined_kv + after.past
                purse.joins(resident, t)
    return outlook


@dataclass(frozen=True, slots=True)
class _Bank:
    """When the next token of some decode that is not late yet is due, and the tightest of their paces."""

    next_due: float
    tightest: float

    @staticmethod
    def of(residents: Sequence[Resident], now: float) -> _Bank:
        decodes = [(r.due + r.made * r.tpot, r.tpot) for r in residents if r.decodes]
        on_time = [(due, tpot) for due, tpot in decodes if now <= due < math.inf]
        if not on_time:
            return _Bank(math.inf, 0.0)
        return _Bank(min(due for due, _ in on_time), min(tpot for _, tpot in on_time))

    def slack(self, made: int, t: float) -> float:
        """What they have left at `t`, `made` iterations on."""
        return self.next_due + made * self.tightest - t


@dataclass(slots=True)
class _Purse:
    """The smallest slack of all that decode by then, and what they gain by an iteration."""

    left: float
    credit: float

    def joins(self, resident: Resident, at: float) -> None:
        """A first token was made; one that is late by then spends nobody's slack."""
        due = resident.due + resident.tpot
        if at <= due < math.inf:
            self.left, self.credit = min(self.left, due - at), min(self.credit, resident.tpot)


def _chunks(
    profile: Profile,
    station: Station,
    batch: float,
    kv: float,
    banked: float,
    head_slack: float,
    queue: Sequence[Prefill],
) -> list[int]:
    """The chunks of one iteration as `chunking.plan_prefill` makes them, for a batch that is an expectation.

    A forced chunk is taken to be the floor.
    """
    if not queue:
        return []
    budget = int(station.tokens - batch)
    if station.kind == k.FIXED or batch < 0.5:
        return fit_chunks(profile, math.inf, budget, batch, kv, queue)
    alone = profile.iteration_s(0, batch, kv)
    # Whoever cannot be on time is no bound; what the others have is not known then, and not counted on.
    spent, banked = banked - station.pace, banked if banked >= alone else math.inf
    paced = banked if station.spend == k.ALWAYS else min(station.pace, banked)
    for bound in (paced, banked):
        chunks = fit_chunks(profile, bound, budget, batch, kv, queue)
        if station.spend == k.IF_NEEDED and spent > bound and is_pressed(bound, chunks[0], queue[0], head_slack):
            chunks = fit_chunks(profile, spent, budget, batch, kv, queue)
        if sum(chunks) >= min(station.floor, queue[0].remaining):
            return chunks
    whole = max(min(queue[0].remaining, budget), 0)
    whole_s = profile.iteration_s(whole, batch, kv, attention_work(whole, queue[0].past))
    forced = head_slack <= whole_s + alone
    return [min(int(station.floor), whole) if forced else 0, *[0] * (len(queue) - 1)]


@dataclass(slots=True)
class Margins:
    """The answer of a forecast, every margin computed."""

    memory: float
    seqs: float
    pace: float
    prefill: float
    token1: float
    queued: float
    decodes: float
    first_at: float
    peak: float

    @property
    def admit(self) -> bool:
        margins = (self.memory, self.seqs, self.pace, self.prefill, self.token1, self.queued, self.decodes)
        return all(margin >= 0.0 for margin in margins)


def forecast(
    profile: Profile,
    station: Station,
    residents: Sequence[Resident],
    table: Table,
    edges: Sequence[float],
    grid: Sequence[float],
    candidate: Resident,
    *,
    grow: bool,
    waive: bool,
    now: float,
) -> Margins:
    """Every margin of one candidate on one instance; `waive`: its own deadline no longer counts."""
    gauged, with_it = (gauge(group, table, edges, grid) for group in (residents, [*residents, candidate]))
    memory = min(
        station.kv - min(kv + station.sigma * math.sqrt(variance), most) - 0.5 * station.block * batch
        for batch, kv, variance, most in zip(with_it.batch, with_it.kv, with_it.variance, with_it.most, strict=True)
    )
    peak = peak_s(profile, with_it, station.scale)
    seqs = station.seqs - len(residents) - 1
    if candidate.decodes:
        at = joins_at(station, candidate, len(residents), peak, now)
        token1 = math.inf if waive or math.isinf(candidate.due) else candidate.due + candidate.tpot - at - peak
        free = math.inf
        return Margins(memory, seqs, station.pace - peak, free, token1, free, free, at, peak)
    joined = run_queue(profile, station, residents, gauged, grid, candidate, grow, now, math.inf)
    prefill = left_s(candidate, candidate.due, joined.first_at, now, station.margin)
    token1 = left_s(candidate, candidate.due + candidate.tpot, joined.second_at, now, station.margin)
    if waive:
        prefill = token1 = math.inf
    elif math.isinf(candidate.due) or candidate.cap <= 1.0:
        token1 = math.inf
    queued, decodes = _others(profile, station, residents, gauged, grid, joined, grow, now)
    return Margins(
        memory, seqs, station.pace - peak, prefill, token1, queued, decodes, joined.first_at, peak,
    )  # fmt: skip


def _others(
    profile: Profile,
    station: Station,
    residents: Sequence[Resident],
    gauged: Gauge,
    grid: Sequence[float],
    joined: Outlook,
    grow: bool,
    now: float,
) -> tuple[float, float]:
    """Margins of those queued and, on an engine whose chunks ignore the pace, of those that decode.

    Who is late without the candidate too does not count against it.
    """

    def margin(resident: Resident, outlook: Outlook) -> float:
        at = outlook.finish.get(resident, math.inf)
        return left_s(resident, resident.due, at, now, station.margin)

    queue = [r for r in residents if not r.decodes and r.due < math.inf]
    fixed = station.kind == k.FIXED
    queued = min((margin(r, joined) for r in queue), default=math.inf)
    decodes = joined.slack if fixed else math.inf
    if queued >= 0.0 and decodes >= 0.0:
        return queued, decodes
    alone = run_queue(profile, station, residents, gauged, grid, None, grow, now, math.inf)
    on_time = [r for r in queue if margin(r, alone) >= 0.0]
    queued = min((margin(r, joined) for r in on_time), default=math.inf)
    return queued, math.inf if fixed and alone.slack < 0.0 else decodes


def left_s(resident: Resident, due: float, at: float, now: float, margin: float) -> float:
    """Seconds between a due time and a predicted one, less a margin for what is uncertain of the wait."""
    if at == math.inf:
        return -math.inf
    certain = resident.solo * resident.left / resident.prompt
    return due - resident.less - at - margin * max(at - now - certain, 0.0)


def joins_at(station: Station, candidate: Resident, count: int, peak: float, now: float) -> float:
    """When the first iteration begins that a candidate with its KV is in.

    KV that comes after the running iteration finds another one just begun.
    """
    there = max(candidate.since, now + candidate.solo)
    if there <= station.free:
        return station.free
    return there + peak if count else there


def roll(profile: Profile, station: Station, residents: Sequence[Resident], ends_at: float, now: float) -> float:
    """Move residents on to `now`, each iteration as the engine's rule makes it; returns when the one that runs ends.

    `ends_at` is when the running one does, below 0 when none runs. A prompt whose first token nobody has seen keeps
    one token to compute.
    """
    law = ChunkLaw(station.kind, int(station.tokens), station.spend, int(station.floor))
    began = now if ends_at < 0.0 else station.began
    for turn in range(65):
        began = ends_at if turn > 0 else began
        # An iteration leaves out who joined while it ran: such a row is `since` its end.
        taken = [r for r in residents if ends_at < 0.0 or r.since < ends_at or (turn > 0 and r.since == ends_at)]
        queue = sorted((r for r in taken if not r.decodes), key=lambda r: r.key)
        decoding = [r for r in residents if r.left == 0.0]
        kv = sum(r.prompt + r.made for r in decoding)
        waiting = [Prefill(int(r.left), int(r.prompt - r.left)) for r in queue]
        slacks = [r.due + r.made * r.tpot - began for r in decoding]
        head_slack = queue[0].due - began if queue else math.inf
        chunks, _ = plan_prefill(profile, law, station.pace, kv, slacks, head_slack, waiting)
        for resident in residents:
            resident.running = 0.0
        for resident, chunk in zip(queue, chunks, strict=True):
            resident.running = float(chunk)
        work = sum(attention_work(c, w.past) for c, w in zip(chunks, waiting, strict=True))
        seconds = profile.iteration_s(sum(chunks), len(decoding), kv, work) * station.scale
        if turn > 0:
            ends_at += seconds
        elif ends_at < 0.0:
            ends_at = now + seconds
        if ends_at > now:
            break
        for resident in decoding:
            if resident.made + 1.0 < resident.cap:
                resident.made += 1.0
        for resident, chunk in zip(queue, chunks, strict=True):
            resident.left = max(1.0, resident.left - chunk)
    return max(ends_at, now)


@dataclass(eq=False, slots=True)
class Place:
    """One instance of a fleet: what it holds, and where the ladder finds it."""

    profile: Profile
    station: Station
    residents: list[Resident]
    tier: float
    rank: float  # decides between equally loaded ones
    ends_at: float  # of the running iteration; below 0: none runs


def walk(
    places: Sequence[Place],
    table: Table,
    edges: Sequence[float],
    grid: Sequence[float],
    hosts: Sequence[tuple[float, float]],
    pace: float,
    candidate: Resident,
    *,
    least_first: bool,
    grow: bool,
    waive: bool,
    now: float,
) -> list[tuple[Place, Margins]]:
    """Everybody asked, by tier and last known load, up to the one that admits; `hosts`: tiers with their reserves."""
    asked: list[tuple[Place, Margins]] = []
    for tier, reserve in hosts:
        able = [place for place in places if place.tier == tier]
        sign = 1.0 if least_first else -1.0
        for place in sorted(able, key=lambda p: (sign * load(p, table, edges, grid), p.rank)):
            renew(place, now)
            bound = min(place.station.pace, pace) * (1.0 - reserve)
            station = dataclasses.replace(place.station, pace=bound)
            margins = forecast(
                place.profile, station, place.residents, table, edges, grid, candidate, grow=grow, waive=waive, now=now
            )
            asked.append((place, margins))
            if margins.admit:
                return asked
    return asked


def renew(place: Place, now: float) -> None:
    """Bring an instance's residents to `now`, and with them when it is free."""
    if place.residents and place.ends_at <= now:
        place.ends_at = roll(place.profile, place.station, place.residents, place.ends_at, now)
    free = max(place.ends_at, now) if place.residents else now
    place.station = dataclasses.replace(place.station, free=free)


def load(place: Place, table: Table, edges: Sequence[float], grid: Sequence[float]) -> float:
    """Peak forecast iteration over pace, or alone where there is no pace."""
    peak = peak_s(place.profile, gauge(place.residents, table, edges, grid), place.station.scale)
    return peak / place.station.pace if math.isfinite(place.station.pace) else peak


def pick(
    place: Place,
    table: Table,
    edges: Sequence[float],
    grid: Sequence[float],
    queue: Sequence[tuple[Resident, bool]],
    most: int,
    *,
    grow: bool,
    now: float,
) -> int:
    """The place in a queue of the first that an instance admits, past `most` whom their own deadline refuses; or -1.

    With each: whether its deadline no longer counts. Nobody who is late even if it took no time behind those queued
    on the instance is worth a forecast.
    """
    renew(place, now)
    station, there = place.station, [r for r in place.residents if not r.decodes]
    gauged = gauge(place.residents, table, edges, grid)
    finish = run_queue(place.profile, station, place.residents, gauged, grid, None, grow, now, math.inf).finish
    ends = max((finish.get(r, math.inf) for r in there), default=now)
    for at, (candidate, late) in enumerate(queue):
        waive = late or now > candidate.due
        last = all(candidate.key >= r.key for r in there)
        late_s = left_s(candidate, candidate.due, max(ends, now), now, station.margin)
        hopeless = last and not candidate.decodes and late_s < 0.0
        if not (hopeless and not waive):
            margins = forecast(
                place.profile, station, place.residents, table, edges, grid, candidate, grow=grow, waive=waive, now=now
            )
            if margins.admit:
                return at
            its_own = margins.prefill < 0.0 or margins.token1 < 0.0
            if min(margins.memory, margins.seqs, margins.pace) < 0.0 or not its_own:
                return -1
        if at >= most:
            return -1
    return -1
