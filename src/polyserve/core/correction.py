"""How far an instance is off its believed profile, learned live."""

from __future__ import annotations

import math


class Correction:
    """Live ratio of observed to believed iteration times, and its spread.

    An exponentially weighted mean of the ratio: its weight halves every `HALF_LIFE` iterations, and it starts from
    `PRIOR` iterations that were exactly as believed, so that one slow iteration changes little.
    """

    HALF_LIFE = 100.0
    PRIOR = 10.0

    def __init__(self) -> None:
        self._weight = self.PRIOR
        self._mean = 1.0
        self._square = 0.0

    def observe(self, observed_s: float, believed_s: float) -> None:
        """Learn from one iteration; wild ratios (a stall, a clock that jumped) count as the nearest sane one."""
        ratio = min(max(observed_s / believed_s, 0.25), 4.0)
        self._weight = self._weight * 0.5 ** (1.0 / self.HALF_LIFE) + 1.0
        off = ratio - self._mean
        self._mean += off / self._weight
        self._square += (off * (ratio - self._mean) - self._square) / self._weight

    @property
    def ratio(self) -> float:
        """Observed over believed."""
        return self._mean

    @property
    def spread(self) -> float:
        """Standard deviation of single iterations around `ratio`, as a share of it."""
        return math.sqrt(max(self._square, 0.0)) / self._mean
