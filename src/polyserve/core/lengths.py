"""What is known of output lengths: per tier and prompt-length band a survival function, learned as requests finish.

Lengths are unknown until a request ends, and the long ones end last, so counting finished requests alone would learn
short lengths first. The estimator is Kaplan-Meier's: in each bin of output lengths the hazard is those that ended
there over those that reached it, and residents still running count among those that reached theirs. A band with few
observations leans on its tier, a tier on all traffic, and all traffic on a geometric law with the prior mean.

What the forecast needs is conditional: a resident with g tokens is there h iterations later with probability
S(g + h) / S(g). `LengthModel.table` holds that for every (band, bin of g, grid point h).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Iterations ahead that a forecast looks at: geometric, since a distant peak needs no exact date.
GRID: NDArray[np.float64] = np.array(
    [0, 1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192], float
)
PROMPT_BANDS = (512, 2048)  # upper bounds; longer prompts are the last band
BANDS = len(PROMPT_BANDS) + 1
# Weight of the coarser estimate in a finer one, in requests: about what makes a hazard worth having.
PARENT_WEIGHT = 16.0
# Requests after which an observation counts half: long enough to smooth, short enough to follow a change of traffic.
HALF_LIFE = 2000.0


def _edges() -> NDArray[np.float64]:
    fine = {int(2 ** (i / 4)) for i in range(4 * 17)}
    return np.array([0, *sorted(fine)], float)


EDGES = _edges()  # bin i holds lengths in [EDGES[i], EDGES[i + 1])
_EDGES = EDGES.tolist()  # for one look-up: an array takes five times as long


def prompt_band(prompt_tokens: int) -> int:
    """Which prompt-length band a prompt falls into."""
    return bisect_right(PROMPT_BANDS, prompt_tokens)


class LengthModel:
    """Output lengths of `tiers` tiers (and one more row for requests without a tier)."""

    def __init__(self, tiers: int, prior_tokens: int, estimator: Literal["survival", "average"] = "survival"):
        self._groups = tiers + 1
        self._prior = float(prior_tokens)
        self._estimator = estimator
        self._ended = np.zeros((self._groups * BANDS, len(EDGES)))
        self._sum = np.zeros(self._groups * BANDS)
        self._tokens = np.zeros(len(EDGES))  # of those that ended in each bin
        self._expected = np.zeros(self._groups * BANDS)
        self._unlearned = 0
        self.version = 0.0  # of the table
        self.table: NDArray[np.float64] = np.zeros((self._groups * BANDS, len(EDGES), len(GRID)))
        self.mean = np.full(self._groups, self._prior)
        self.refresh(())

    def row(self, tier_index: int | None, prompt_tokens: int) -> int:
        """The table row of a request; `tier_index` None is best effort."""
        return (self._groups - 1 if tier_index is None else tier_index) * BANDS + prompt_band(prompt_tokens)

    def expected(self, row: int) -> float:
        """Output tokens that a request is expected to have, those that run still being counted among what is known."""
        return float(self._expected[row])

    def ended(self, row: int, output_tokens: int) -> None:
        """Learn one finished request; takes effect at the next `refresh`."""
        at = _bin(output_tokens)
        self._ended[row, at] += 1.0
        self._tokens[at] += output_tokens
        self._sum[row] += output_tokens
        self._unlearned += 1

    def regroup(self, into: Sequence[int], tiers: int) -> None:
        """Other tiers: what was seen of tier i goes to tier `into[i]` of `tiers`; `refresh` is to follow."""
        rows = np.arange(BANDS) + BANDS * np.array([*into, tiers])[:, None]  # best effort is the last group
        for name in ("_ended", "_sum"):
            was = getattr(self, name)
            now = np.zeros(((tiers + 1) * BANDS, *was.shape[1:]))
            np.add.at(now, rows.ravel(), was)
            setattr(self, name, now)
        self._groups = tiers + 1
        self.table = np.zeros((len(self._ended), len(EDGES), len(GRID)))

    @property
    def unlearned(self) -> int:
        """Requests that ended since the last refresh."""
        return self._unlearned

    def refresh(self, residents: ArrayLike) -> None:
        """Recompute the table; `residents` are (row, tokens made) of everybody still running."""
        self.version += 1.0
        reached = np.cumsum(self._ended[:, ::-1], axis=1)[:, ::-1]
        running = np.zeros_like(reached)
        rows, made = np.asarray(residents, float).reshape(-1, 2).T
        np.add.at(running, (rows.astype(int), np.searchsorted(EDGES, made, side="right") - 1), 1.0)
        # A resident in bin i has been at risk in the bins before it, and not yet ended in its own.
        passed = np.cumsum(running[:, ::-1], axis=1)[:, ::-1] - running
        at_risk = reached + passed
        self._average(reached)
        if self._estimator == "average":
            self.table = self._mean_table()
            self._expected = np.repeat(self.mean, BANDS)
        else:
            survival = self._survival(self._ended, at_risk)
            self.table = _conditional(survival)
            self._expected = self._means(survival)
        fade = 0.5 ** (self._unlearned / HALF_LIFE)
        self._ended *= fade
        self._sum *= fade
        self._tokens *= fade
        self._unlearned = 0

    def _average(self, reached: NDArray[np.float64]) -> None:
        counts = reached[:, 0].reshape(self._groups, BANDS).sum(axis=1)
        sums = self._sum.reshape(self._groups, BANDS).sum(axis=1)
        overall = (sums.sum() + self._prior) / (counts.sum() + 1.0)
        self.mean = (sums + overall) / (counts + 1.0)

    def _survival(self, ended: NDArray[np.float64], at_risk: NDArray[np.float64]) -> NDArray[np.float64]:
        """S at every edge, per row: hazards shrunk from band to tier to all traffic to the prior."""
        widths = np.diff(EDGES, append=2 * EDGES[-1])
        hazard = 1.0 - np.exp(-widths / self._prior)  # the prior: geometric with the prior mean
        hazard = _shrunk(ended.sum(axis=0), at_risk.sum(axis=0), hazard)
        shape = (self._groups, BANDS, len(EDGES))
        tier = _shrunk(ended.reshape(shape).sum(axis=1), at_risk.reshape(shape).sum(axis=1), hazard)
        band = _shrunk(ended, at_risk, np.repeat(tier, BANDS, axis=0))
        survive = np.cumprod(1.0 - np.minimum(band, 1.0 - 1e-9), axis=1)
        return np.concatenate([np.ones((len(survive), 1)), survive[:, :-1]], axis=1)

    def _means(self, survival: NDArray[np.float64]) -> NDArray[np.float64]:
        """Per row: the mean length of each bin, where nobody ended in it its middle, weighted by who ends there."""
        middle = EDGES + 0.5 * np.diff(EDGES, append=2 * EDGES[-1])
        means = (self._tokens + middle) / (self._ended.sum(axis=0) + 1.0)
        ends = survival - np.concatenate([survival[:, 1:], np.zeros((len(survival), 1))], axis=1)
        return np.asarray(ends @ means)

    def _mean_table(self) -> NDArray[np.float64]:
        """The paper's estimator: everybody makes exactly the tier's average (and those beyond it one more)."""
        table = np.zeros_like(self.table)
        ahead = EDGES[:, None] + GRID[None, :]
        for group in range(self._groups):
            there = (ahead < math.ceil(self.mean[group])) | (GRID[None, :] == 0)
            table[group * BANDS : (group + 1) * BANDS] = there
        return table


def _bin(tokens: int) -> int:
    return bisect_right(_EDGES, tokens) - 1


def _shrunk(
    ended: NDArray[np.float64], at_risk: NDArray[np.float64], parent: NDArray[np.float64]
) -> NDArray[np.float64]:
    return (ended + PARENT_WEIGHT * parent) / (at_risk + PARENT_WEIGHT)


def _conditional(survival: NDArray[np.float64]) -> NDArray[np.float64]:
    """S(g + h) / S(g) for g at each edge and h at each grid point; log-linear between edges."""
    log = np.log(np.maximum(survival, 1e-300))
    ahead = (EDGES[:, None] + GRID[None, :]).ravel()
    at = np.minimum(np.searchsorted(EDGES, ahead, side="right") - 1, len(EDGES) - 2)
    share = (ahead - EDGES[at]) / (EDGES[at + 1] - EDGES[at])
    value = log[:, at] + (log[:, at + 1] - log[:, at]) * share
    value = value.reshape(len(survival), len(EDGES), len(GRID)) - log[:, :, None]
    return np.asarray(np.exp(np.minimum(value, 0.0)))
