"""Requests with an SLO each, drawn from a trace: the same ones for the simulator and for a live replay.

Each purpose (arrivals, lengths, pace, TTFT, best effort) has its own random stream, derived from the seed,
and every draw is an inverse CDF of a uniform number. So request i has the same lengths and SLO at every rate,
and arrivals at two rates are the same unit gaps, scaled: comparisons see the same luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from polyserve.core.bound import TierMix, tier_mix
from polyserve.core.types import Request, Slo, to_microsecond
from polyserve.traces import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Whether an idle instance could serve requests of these prompt and output tokens under that SLO, elementwise.
Feasible = Callable[[Ints, Ints, Slo], Bools]

# One random stream per purpose. The numbers are part of what a seed means: never reuse one.
ARRIVALS, LENGTHS, REPLACEMENTS, PACES, TTFTS, BEST_EFFORT = range(6)


class DemandError(ValueError):
    """A demand that cannot be drawn; the message names the option and what would do."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How requests are spread over time: `gamma` gaps have coefficient of variation `cv`."""

    kind: Literal["poisson", "gamma", "recorded"] = "poisson"
    cv: float = 1.0


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival with the output tokens each will really make."""

    requests: list[Request]
    output_tokens: list[int]
    rows: Ints  # the trace row behind each request
    infeasible: int  # drawn, but no TTFT choice was feasible: left out
    duration_s: float

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[tuple[Request, int]]:
        return zip(self.requests, self.output_tokens, strict=True)

    @property
    def rate(self) -> float:
        """Requests per second offered."""
        return len(self.requests) / self.duration_s

    def mixes(self) -> list[TierMix]:
        """The means per pace, tightest first, as `core.bound` wants them; best effort is not among them."""
        by_pace: dict[float, list[tuple[int, int]]] = {}
        for request, output in self:
            if request.slo is not None:
                by_pace.setdefault(request.slo.tpot_s, []).append((request.prompt_tokens, output))
        total = sum(map(len, by_pace.values()))
        lengths = {pace: np.array(pairs, np.int64) for pace, pairs in sorted(by_pace.items())}
        return [tier_mix(pace, len(v) / total, v[:, 0], v[:, 1]) for pace, v in lengths.items()]


def draw_requests(
    trace: Trace,
    *,
    rate: float | None,
    duration_s: float | None,
    tpots: Sequence[tuple[float, float]],
    ttfts: Sequence[float],
    feasible: Feasible,
    arrivals: Arrivals = Arrivals(),
    best_effort: float = 0.0,
    seed: int = 0,
) -> Workload:
    """Requests over `duration_s` seconds at `rate` per second, with paces (seconds) by their shares.

    TTFT is drawn evenly from the choices that are feasible for the request. One without any is counted and,
    for drawn arrivals, another takes its place; recorded arrivals lose it. Recorded arrivals are stretched so
    that what is left comes at `rate` (None: as recorded) and start again when the trace ends before
    `duration_s` (None: once through). `best_effort` is the share of requests that ask for no SLO. Raises
    `DemandError`.
    """
    for name, value in (("rate", rate), ("duration", duration_s)):
        if value is not None and not 0 < value < math.inf:
            raise DemandError(f"{name} is a positive number, not {value:g}")
    if not 0 <= best_effort < 1:
        raise DemandError(f"the best-effort share is from 0 to below 1, not {best_effort:g}")
    menu = _menu(trace, tpots, ttfts, feasible, best_effort, seed)
    if arrivals.kind == "recorded":
        return _recorded(menu, rate, duration_s)
    if rate is None or duration_s is None:
        raise DemandError(f"{arrivals.kind} arrivals want a {'rate' if rate is None else 'duration'}")
    return _drawn(menu, arrivals, rate, duration_s)


@dataclass(frozen=True, eq=False)
class _Menu:
    """What a request may ask for."""

    trace: Trace
    tpots: Sequence[tuple[float, float]]
    ttfts: Sequence[float]  # rising
    choices: Ints  # how many TTFTs, the last ones, are feasible: paces by trace rows
    best_effort: float
    seed: int

    def nothing_at(self, tpot_s: float) -> DemandError:
        return DemandError(
            f"no request of trace {self.trace.name} is feasible at TPOT {tpot_s * 1e3:g} ms and TTFT up to "
            f"{self.ttfts[-1] * 1e3:g} ms: an idle instance would be late"
        )

    def paces(self, count: int) -> Ints:
        """Which pace each request asks for; -1 is best effort."""
        pace = _by_share(_uniform(self.seed, PACES, count), self.tpots)
        return np.where(_uniform(self.seed, BEST_EFFORT, count) < self.best_effort, -1, pace)

    def feasible_ttfts(self, pace: Ints, rows: Ints) -> Ints:
        """How many TTFTs each request may ask for; best effort asks for none and may always come."""
        return np.where(pace < 0, 1, self.choices[pace, rows])

    def ttft_of(self, count: Ints) -> Ints:
        """The TTFT drawn evenly among the last `count`, as an index."""
        nth = np.floor(_uniform(self.seed, TTFTS, len(count)) * count).astype(np.int64)
        return np.asarray(len(self.ttfts) - count + nth)


def _menu(
    trace: Trace,
    tpots: Sequence[tuple[float, float]],
    ttfts: Sequence[float],
    feasible: Feasible,
    best_effort: float,
    seed: int,
) -> _Menu:
    choices = np.zeros((len(tpots), len(trace)), np.int64)
    for k, (tpot_s, _) in enumerate(tpots):
        for ttft_s in ttfts:
            choices[k] += feasible(trace.prompt_tokens, trace.output_tokens, Slo(ttft_s, tpot_s))
    return _Menu(trace, tpots, sorted(ttfts), choices, best_effort, seed)


def _drawn(menu: _Menu, arrivals: Arrivals, rate: float, duration_s: float) -> Workload:
    """Poisson or gamma arrivals, lengths with replacement."""
    arrived = _arrival_times(arrivals, rate, duration_s, menu.seed)
    pace = menu.paces(len(arrived))
    rows = _scaled(_uniform(menu.seed, LENGTHS, len(arrived)), len(menu.trace))
    bad = menu.feasible_ttfts(pace, rows) == 0
    again = _uniform(menu.seed, REPLACEMENTS, len(arrived))
    for k, (tpot_s, _) in enumerate(menu.tpots):
        mine, able = bad & (pace == k), np.flatnonzero(menu.choices[k])
        if mine.any():
            if not len(able):
                raise menu.nothing_at(tpot_s)
            rows[mine] = able[_scaled(again[mine], len(able))]
    ttft = menu.ttft_of(menu.feasible_ttfts(pace, rows))
    return _workload(menu, arrived, rows, pace, ttft, int(bad.sum()), duration_s)


def _recorded(menu: _Menu, rate: float | None, duration_s: float | None) -> Workload:
    """The trace's own times and order."""
    trace, recorded = menu.trace, menu.trace.recorded_rate
    if trace.arrived_s is None or recorded <= 0:
        raise DemandError(f"trace {trace.name} has no arrival times; ask for poisson or gamma:CV arrivals")
    total = sum(share for _, share in menu.tpots)
    able = sum(share * float((menu.choices[k] > 0).mean()) for k, (_, share) in enumerate(menu.tpots)) / total
    served = menu.best_effort + (1 - menu.best_effort) * able
    if served <= 0:
        raise menu.nothing_at(menu.tpots[0][0])
    stretch = 1.0 if rate is None else recorded * served / rate
    period = len(trace) / recorded * stretch  # one mean gap between the last request and the first again
    until = period if duration_s is None else duration_s
    turn, rows = np.divmod(np.arange(math.ceil(until / period) * len(trace)), len(trace))
    arrived = turn * period + trace.arrived_s[rows] * stretch
    pace = menu.paces(len(rows))
    count = menu.feasible_ttfts(pace, rows)
    ttft = menu.ttft_of(count)
    inside = arrived < until
    kept = np.flatnonzero(inside & (count > 0))
    if not len(kept):
        raise DemandError(f"no request of trace {trace.name} arrives within {until:g} s")
    left_out = int(inside.sum()) - len(kept)
    return _workload(menu, arrived[kept], rows[kept], pace[kept], ttft[kept], left_out, until)


def _workload(
    menu: _Menu, arrived: Floats, rows: Ints, pace: Ints, ttft: Ints, infeasible: int, duration_s: float
) -> Workload:
    slos: list[list[Slo | None]] = [[Slo(t, tpot_s) for t in menu.ttfts] for tpot_s, _ in menu.tpots]
    slos.append([None] * len(menu.ttfts))  # index -1: best effort
    columns = (arrived, menu.trace.prompt_tokens[rows], pace, ttft)
    requests = [
        Request(f"r{i}", to_microsecond(at), prompt, slos[k][t])
        for i, (at, prompt, k, t) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
    ]
    return Workload(requests, menu.trace.output_tokens[rows].tolist(), rows, infeasible, duration_s)


# -------------------------------------------------------------------------------------------------- chance


def _uniform(seed: int, purpose: int, count: int) -> Floats:
    return np.random.default_rng([seed, purpose]).random(count)


def _by_share(uniform: Floats, shares: Sequence[tuple[float, float]]) -> Ints:
    """Index into `shares` by inverse CDF."""
    upto = np.cumsum([share for _, share in shares])
    return np.minimum(np.searchsorted(upto / upto[-1], uniform, side="right"), len(shares) - 1).astype(np.int64)


def _scaled(uniform: Floats, count: int) -> Ints:
    """A whole number below `count` for each uniform one."""
    return np.floor(uniform * count).astype(np.int64)


def _arrival_times(arrivals: Arrivals, rate: float, duration_s: float, seed: int) -> Floats:
    """Times below `duration_s`, at least one: partial sums of unit-mean gaps over the rate."""
    expected = rate * duration_s
    count = math.ceil(expected + 8 * max(arrivals.cv, 1.0) * math.sqrt(expected) + 64)
    while True:  # a longer draw begins with the shorter one
        uniform = _uniform(seed, ARRIVALS, count)
        gaps = -np.log1p(-uniform) if arrivals.kind == "poisson" else gamma_gaps(uniform, arrivals.cv)
        times = np.cumsum(gaps) / rate
        if times[-1] >= duration_s:
            break
        count *= 2
    inside = times[times < duration_s]
    if not len(inside):
        raise DemandError(f"nothing arrives in {duration_s:g} s at {rate:g} requests/s; take a longer duration")
    return inside


def gamma_gaps(uniform: Floats, cv: float) -> Floats:
    """Gamma variates of mean 1 and that coefficient of variation, by inverse CDF of uniform numbers.

    The CDF is tabulated once over log x and interpolated in its log odds, where it is smooth: within 1e-5.
    """
    shape = 1.0 / cv**2
    low = max((math.log(1e-15) + math.lgamma(shape + 1)) / shape, -690.0)
    high = math.log(shape + 40.0 + 12.0 * math.sqrt(shape))
    log_x = np.linspace(low, high, 8192)
    below, above = _gamma_cdf(shape, log_x)
    odds = np.log(below) - np.log(above)
    tiny = np.finfo(float).tiny
    wanted = np.log(np.maximum(uniform, tiny)) - np.log1p(-uniform)
    gaps: Floats = np.exp(np.interp(wanted, odds, log_x)) / shape
    return gaps


def _gamma_cdf(shape: float, log_x: Floats) -> tuple[Floats, Floats]:
    """P(X <= x) and P(X > x) of a unit-scale gamma variate (Numerical Recipes, 6.2: series and fraction)."""
    x = np.exp(log_x)
    front = np.exp(shape * log_x - x - math.lgamma(shape))
    split = int(np.searchsorted(x, shape + 1))
    low, high = x[:split], x[split:]
    term = total = np.full_like(low, 1.0 / shape)
    for n in range(1, 2000):
        term = term * low / (shape + n)
        total = total + term
        if np.all(term <= 1e-14 * total):
            break
    fraction = np.zeros_like(high)
    for n in range(200, 0, -1):
        fraction = n * (shape - n) / (high + 2 * n + 1 - shape + fraction)
    below = np.clip(front[:split] * total, 1e-300, 1.0)
    above = np.clip(front[split:] / (high + 1 - shape + fraction), 1e-300, 1.0)
    return np.concatenate([below, 1 - above]), np.concatenate([1 - below, above])


# -------------------------------------------------------------------------------------- what the user writes


def parse_tpot(text: str) -> list[tuple[float, float]]:
    """Paces and shares from `"20:.1,30:.9"` (ms): seconds and shares that sum to 1, tightest first."""
    pairs: list[tuple[float, float]] = []
    for item in text.split(","):
        pace, colon, share = item.partition(":")
        pairs.append((_positive("tpot", pace, item), _positive("tpot", share, item) if colon else 1.0))
    milliseconds = [pace for pace, _ in pairs]
    if twice := next((m for m in milliseconds if milliseconds.count(m) > 1), None):
        raise DemandError(f"tpot {text!r}: {twice:g} ms is there twice; each tier has its own pace")
    total = sum(share for _, share in pairs)
    return sorted((pace / 1e3, share / total) for pace, share in pairs)


def parse_ttft(text: str) -> list[float]:
    """TTFT choices from `"300,500,1000"` (ms), in seconds, rising."""
    values = [_positive("ttft", item, item) for item in text.split(",")]
    if twice := next((v for v in values if values.count(v) > 1), None):
        raise DemandError(f"ttft {text!r}: {twice:g} ms is there twice")
    return sorted(value / 1e3 for value in values)


def parse_arrivals(text: str) -> Arrivals:
    """`poisson`, `gamma:CV` or `recorded`."""
    kind, colon, cv = text.partition(":")
    if text == "poisson":
        return Arrivals("poisson")
    if text == "recorded":
        return Arrivals("recorded")
    if kind == "gamma" and colon:
        value = _positive("arrivals", cv, text)
        if 0.05 <= value <= 10:
            return Arrivals("gamma", value)
        raise DemandError(f"arrivals {text!r}: the coefficient of variation is from 0.05 to 10")
    raise DemandError(f"arrivals {text!r}: there are poisson, gamma:CV and recorded")


def _positive(option: str, text: str, item: str) -> float:
    wants = {"tpot": "MS:SHARE, both positive", "ttft": "a positive number of ms", "arrivals": "gamma:CV"}
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise DemandError(f"{option} {item.strip()!r}: expected {wants[option]}")
    return value
