"""Fit the law of `core/profile.py` to iteration times, whoever measured or composed them.

The law is linear in its numbers once the knots are chosen, and it is monotone exactly when none of them is
negative (the rise from each knot to the next among them). So the fit is one non-negative least squares
problem; rows are divided by their own seconds, which makes the residuals relative errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyserve.core.profile import ProfileError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shapes:
    """Batch shapes and the seconds an iteration of each takes: columns of equal length."""

    prefill: Floats
    decodes: Floats
    kv: Floats
    attention: Floats
    seconds: Floats

    def __len__(self) -> int:
        return len(self.seconds)

    def where(self, mask: NDArray[np.bool_]) -> Shapes:
        """The rows that `mask` keeps."""
        return Shapes(self.prefill[mask], self.decodes[mask], self.kv[mask], self.attention[mask], self.seconds[mask])


@dataclass(frozen=True)
class Law:
    """The numbers of one fitted law, and its relative errors on what it was fitted to.

    `mean_error` is the mean over the kinds of batch (decodes alone, prefill alone, both) of their mean errors.
    """

    knots: tuple[float, ...]
    knot_s: tuple[float, ...]
    per_decode_s: float
    per_kv_token_s: float
    per_attention_s: float
    mean_error: float
    p99_error: float
    max_error: float
    mixed_kv_factor: float = 1.0
    mixed_per_decode_s: float = 0.0


def fit_law(shapes: Shapes, knots: tuple[float, ...], *, mixed: bool = False) -> Law:
    """The monotone law with those knots (rising, from 0) of least mean squared relative error.

    Decodes alone, prefill alone and both together weigh the same, however many rows there are of each. `mixed`:
    batches of both were timed as such, so what a decode costs more beside a chunk is fitted too. Raises
    `ProfileError` when there is nothing to fit.
    """
    slopes = [shapes.decodes, shapes.kv, shapes.attention]
    if mixed:
        beside = shapes.prefill > 0
        slopes += [shapes.decodes * beside, shapes.kv * beside]
    least = len(knots) + len(slopes)
    if len(shapes) < least or not np.all(shapes.seconds > 0):
        raise ProfileError(f"a fit wants at least {least} iterations of positive duration")
    rises = _rises(shapes.prefill + shapes.decodes, np.asarray(knots))
    terms = np.column_stack([rises, *slopes]) / shapes.seconds[:, None]
    scale = np.maximum(np.linalg.norm(terms, axis=0), 1e-300)
    weight = _weights(shapes)
    root = np.sqrt(weight)
    numbers = nonnegative_least_squares(terms / scale * root[:, None], root) / scale
    errors = np.abs(terms @ numbers - 1.0)
    values, (per_decode, per_kv, per_attention, *more) = np.cumsum(numbers[: len(knots)]), numbers[len(knots) :]
    dearer = more if mixed and per_kv > 0 else (0.0, 0.0)
    return Law(
        knots=tuple(float(x) for x in knots),
        knot_s=tuple(float(y) for y in values),
        per_decode_s=float(per_decode),
        per_kv_token_s=float(per_kv),
        per_attention_s=float(per_attention),
        mean_error=float((errors * weight).sum()),
        p99_error=float(np.quantile(errors, 0.99)),
        max_error=float(errors.max()),
        mixed_kv_factor=float(1 + dearer[1] / per_kv) if per_kv > 0 else 1.0,
        mixed_per_decode_s=float(dearer[0]),
    )


def _weights(shapes: Shapes) -> Floats:
    """A weight per row; each kind of batch has the same sum, all together 1."""
    kind = 2 * (shapes.prefill > 0) + (shapes.decodes > 0)
    present, rows = np.unique(kind, return_inverse=True)
    weights: Floats = 1.0 / (len(present) * np.bincount(rows)[rows])
    return weights


def _rises(tokens: Floats, knots: Floats) -> Floats:
    """How much of each segment's rise a batch of `tokens` has climbed, behind a column of ones."""
    share = (tokens[:, None] - knots[None, :-1]) / np.diff(knots)[None, :]
    upper = np.ones(len(knots) - 1)
    upper[-1] = np.inf  # the last segment goes on beyond its knot
    return np.column_stack([np.ones(len(tokens)), np.clip(share, 0.0, upper)])


def nonnegative_least_squares(terms: Floats, target: Floats) -> Floats:
    """The x >= 0 with least |terms @ x - target|, by the active-set method of Lawson and Hanson (1974)."""
    gram, goal = terms.T @ terms, terms.T @ target
    count = len(goal)
    x, free = np.zeros(count), np.zeros(count, dtype=bool)
    tolerance = 1e-11 * max(1.0, float(np.abs(goal).max()))
    for _ in range(10 * count):
        gradient = goal - gram @ x
        gradient[free] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= tolerance:
            break
        free[best] = True
        x = _settled(gram, goal, x, free)
    return x


def _settled(gram: Floats, goal: Floats, x: Floats, free: NDArray[np.bool_]) -> Floats:
    """Least squares over the free numbers, giving up those that would turn negative (edits `free`)."""
    while True:
        trial = np.zeros_like(x)
        trial[free] = np.linalg.lstsq(gram[np.ix_(free, free)], goal[free], rcond=None)[0]
        falling = free & (trial <= 0.0)
        if not falling.any():
            return trial
        step = float(np.min(x[falling] / np.maximum(x[falling] - trial[falling], 1e-300)))
        x = x + step * (trial - x)
        free &= x > 1e-15
        x = np.where(free, x, 0.0)
