"""Pictures of a run: the load of every instance over time, coloured by tier, so that the gradient can be seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from polyserve.core.types import InstanceId, TierName
from polyserve.report import Facts

# From hot to cold, tight to loose; told apart by people who see few colours as well (Okabe and Ito's palette).
HUES = ("#D55E00", "#E69F00", "#009E73", "#0072B2")
MORE_HUES = ("#D55E00", "#E69F00", "#8C6D31", "#009E73", "#56B4E9", "#0072B2", "#5B3A8C", "#CC79A7")
POOL_HUE = "#7F7F7F"
EMPTY = 0.12  # of its hue is what an empty instance shows, so that its tier can be seen


class PlotError(ValueError):
    """A run of which there is no picture."""


class Look(Protocol):
    """One instance at one time, as `polyserve.sim.world` and the gateway note them."""

    @property
    def at(self) -> float: ...
    @property
    def instance(self) -> InstanceId: ...
    @property
    def tier(self) -> TierName | None: ...
    @property
    def load(self) -> float: ...


def draw_loads(looks: Iterable[Look], tiers: Sequence[TierName], path: str | Path, facts: Facts) -> None:
    """Write a PNG of two panels: instances ranked within their tier at every moment, and each instance by itself.

    In the upper panel a tier is a band as high as it has instances, its fullest on top: a gradient fades downwards.
    In the lower one a row is one instance for good, so that its changes of tier can be followed.
    """
    moments, instances = _moments(looks)
    rows = {instance: row for row, instance in enumerate(instances)}
    height = min(max(0.16 * len(instances), 1.6), 6.0)
    figure = Figure(figsize=(11, 2 * height + 2.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _paint(upper, [ranked(moment, tiers) for moment in moments.values()], list(moments), len(instances), tiers)
    _paint(lower, [_placed(moment, rows) for moment in moments.values()], list(moments), len(instances), tiers)
    upper.set_title("Ranked by load within each tier", loc="left", fontsize=10)
    upper.set_ylabel("instances")
    upper.yaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_title("Each instance", loc="left", fontsize=10)
    lower.set_xlabel("seconds")
    _label_rows(lower, instances)
    _legend(figure, tiers)
    figure.suptitle(_title(facts), x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=130)


def draw_ranked(axes: Axes, looks: Iterable[Look], tiers: Sequence[TierName]) -> None:
    """Draw the upper panel of `draw_loads` alone: the gradient within each tier, over time."""
    moments, instances = _moments(looks)
    _paint(axes, [ranked(moment, tiers) for moment in moments.values()], list(moments), len(instances), tiers)
    axes.set_ylabel("instances")
    axes.set_xlabel("seconds")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _moments(looks: Iterable[Look]) -> tuple[dict[float, list[Look]], list[InstanceId]]:
    """Looks by time, in order, and all instances."""
    by_time: dict[float, list[Look]] = defaultdict(list)
    for look in looks:
        by_time[look.at].append(look)
    if not by_time:
        raise PlotError("nothing to draw: the run was too short for a single look")
    instances = sorted({look.instance for moment in by_time.values() for look in moment}, key=_natural)
    return dict(sorted(by_time.items())), instances


def _paint(
    axes: Axes,
    columns: Sequence[Sequence[Look | None]],
    times: Sequence[float],
    height: int,
    tiers: Sequence[TierName],
) -> None:
    extent = (times[0], times[-1], height - 0.5, -0.5)
    axes.imshow(carpet(columns, height, tiers), extent=extent, aspect="auto", interpolation="nearest")
    axes.spines[["top", "right"]].set_visible(False)


def ranked(looks: Sequence[Look], tiers: Sequence[TierName]) -> list[Look]:
    """Tightest tier first, the fullest instance of each on top; the pool comes last."""
    order = {tier: rank for rank, tier in enumerate(tiers)}
    last = len(order)
    return sorted(
        looks,
        key=lambda look: (last if look.tier is None else order[look.tier], -look.load, _natural(look.instance)),
    )


def _placed(looks: Sequence[Look], rows: dict[InstanceId, int]) -> list[Look | None]:
    placed: list[Look | None] = [None] * len(rows)
    for look in looks:
        placed[rows[look.instance]] = look
    return placed


def carpet(columns: Sequence[Sequence[Look | None]], height: int, tiers: Sequence[TierName]) -> NDArray[np.float64]:
    """The picture: a column per moment, a row per place; white where there is no instance."""
    picture = np.ones((height, len(columns), 3))
    shades = {tier: _shades(hue) for tier, hue in tier_hues(tiers).items()}
    pool = _shades(POOL_HUE)
    for x, column in enumerate(columns):
        for y, look in enumerate(column):
            if look is not None:
                shade = pool if look.tier is None else shades[look.tier]
                picture[y, x] = shade(min(look.load, 1.0))[:3]
    return picture


def tier_hues(tiers: Sequence[TierName]) -> dict[TierName, str]:
    """The colour of each tier, tightest first."""
    if len(tiers) > len(HUES):
        return {tier: MORE_HUES[i % len(MORE_HUES)] for i, tier in enumerate(tiers)}
    step = (len(HUES) - 1) / max(len(tiers) - 1, 1)
    return {tier: HUES[round(i * step)] for i, tier in enumerate(tiers)}


def _shades(hue: str) -> LinearSegmentedColormap:
    """From nearly white, through the hue, to a dark shade of it."""
    red, green, blue = to_rgb(hue)
    pale = (1 - EMPTY + EMPTY * red, 1 - EMPTY + EMPTY * green, 1 - EMPTY + EMPTY * blue)
    dark = (0.4 * red, 0.4 * green, 0.4 * blue)
    return LinearSegmentedColormap.from_list(hue, [(0.0, pale), (0.65, (red, green, blue)), (1.0, dark)])


def _label_rows(axes: Axes, instances: Sequence[InstanceId]) -> None:
    step = max(1, len(instances) // 24)
    axes.set_yticks(range(0, len(instances), step), instances[::step], fontsize=7)


def _legend(figure: Figure, tiers: Sequence[TierName]) -> None:
    swatches = [Patch(color=hue, label=f"{tier} ms") for tier, hue in tier_hues(tiers).items()]
    swatches.append(Patch(color=POOL_HUE, label="no tier"))
    figure.legend(handles=swatches, loc="outside lower left", ncols=len(swatches), frameon=False, fontsize=9)
    figure.text(0.99, 0.012, "pale: empty   dark: pace, memory or seats are full", ha="right", fontsize=9)


def _title(facts: Facts) -> str:
    fleet = f"{facts.instances} x {facts.profile}" if facts.instances and facts.profile else facts.profile
    return ", ".join(str(part) for part in (facts.policy, fleet, facts.trace) if part)


def _natural(name: str) -> tuple[int, str]:
    """i2 before i10."""
    return len(name), name
