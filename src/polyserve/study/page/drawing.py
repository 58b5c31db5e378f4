"""Charts of the report, each small enough for the width of a phone, with words for those who cannot see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from polyserve.plot import POOL_HUE, draw_ranked, tier_hues

Points = Sequence[tuple[float, float]]
INK, MUTED, PALE = "#1A1A1A", "#666666", "#DDDDDD"
WIDTH = 4.6  # inches
# Told apart by people who see few colours as well (after Okabe and Ito); ours come first.
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D31", "#56B4E9", "#5B3A8C", "#E69F00")
# One after the other when the hues are used up; in line widths.
DASHES: tuple[tuple[float, ...], ...] = ((), (4.0, 1.6), (1.2, 1.2))
FAINT = 0.35
LETTER = 0.067  # inches, in the mean, of the labels beside bars


@dataclass(frozen=True, slots=True)
class Style:
    """How a policy's line looks, in every figure."""

    hue: str
    dash: tuple[float, ...]
    width: float


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart and what it says in words."""

    figure: Figure
    alt: str


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float
    text: str
    hue: str
    interval: tuple[float, float] | None = None
    faint: bool = False


class Seen(NamedTuple):
    """One instance at one time."""

    at: float
    instance: str
    tier: str | None
    load: float


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A look for each policy; as many as there are hues and dashes can be told apart."""
    return {
        label: Style(HUES[n % len(HUES)], DASHES[n // len(HUES) % len(DASHES)], 2.4 if n == 0 else 1.6)
        for n, label in enumerate(labels)
    }


def curves(
    title: str,
    lines: Mapping[str, Points],
    looks: Mapping[str, Style],
    *,
    x: str,
    y: str,
    span: tuple[float, float] | None = None,
    levels: Mapping[str, float] | None = None,
    doubling: bool = False,
) -> Panel:
    """A line per policy.

    `span` cuts the vertical axis, `levels` are named marks on it, `doubling` spaces powers of two evenly.
    """
    figure, axes = _canvas(title, 3.2)
    for name, level in (levels or {}).items():
        axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), xytext=(2, 0), va="center",
                      textcoords="offset points", fontsize=7, color=MUTED)  # fmt: skip
    for rank, (label, points) in enumerate(lines.items()):
        look = looks[label]
        axes.plot(*zip(*points, strict=True), color=look.hue, linewidth=look.width, marker="o", markersize=3,
                  linestyle=(0, look.dash) if look.dash else "-", zorder=len(lines) + 2 - rank)  # fmt: skip
    if span:
        axes.set_ylim(*span)
    if doubling:
        sizes = sorted({at for points in lines.values() for at, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=PALE, linewidth=0.5)
    told = "; ".join(
        f"{label} from {points[0][1]:.4g} at {points[0][0]:g} to {points[-1][1]:.4g} at {points[-1][0]:g}"
        for label, points in lines.items()
    )
    return Panel(figure, f"{title}: {y} over {x}. {told}")


def bars(title: str, rows: Sequence[Bar], *, x: str, marks: Mapping[str, float] | None = None) -> Panel:
    """A bar per row, its figure beside it; `marks` are named places on the horizontal axis."""
    marks = marks or {}
    left = 0.15 + LETTER * max((len(row.label) for row in rows), default=0)
    right = 0.15 + LETTER * max((len(row.text) for row in rows), default=0)
    figure, axes = _canvas(title, 0.26 * len(rows) + 0.8 + 0.16 * len(marks), left, right)
    for place, row in enumerate(rows):
        axes.barh(place, row.value, height=0.66, color=row.hue, alpha=FAINT if row.faint else 1.0, zorder=2)
        if row.interval:
            axes.plot(row.interval, (place, place), color=INK, linewidth=1.2, zorder=3)
        axes.annotate(row.text, (1, place), xycoords=("axes fraction", "data"), xytext=(4, 0), va="center",
                      textcoords="offset points", fontsize=8, color=INK)  # fmt: skip
    ends = [0.0, *marks.values(), *(row.value for row in rows), *(end for row in rows for end in row.interval or ())]
    room = max(ends) - min(ends) or 1.0
    axes.set_xlim(min(ends) - (0.03 * room if min(ends) < 0 else 0.0), max(ends) + 0.04 * room)
    axes.set_ylim(len(rows) - 0.4, -0.6 - 0.6 * len(marks))
    for step, (name, at) in enumerate(marks.items()):
        axes.axvline(at, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=4)
        axes.annotate(name, (at, -0.55 - 0.6 * step), xytext=(-3, 0), textcoords="offset points", ha="right",
                      va="bottom", fontsize=7, color=INK)  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(x)
    told = "; ".join(f"{row.label} {row.text}" for row in rows)
    marked = "".join(f"; mark: {name} at {at:.4g}" for name, at in marks.items())
    return Panel(figure, f"{title}: {x}. {told}{marked}")


def gradient(shown: Mapping[str, Any], tiers: Sequence[str]) -> Panel:
    """Load of every instance over time, ranked within its tier."""
    seen = [
        Seen(at, row["instance"], tier, load)
        for row in shown["instances"]
        for at, tier, load in zip(shown["at_s"], row["tier"], row["load"], strict=True)
        if load is not None
    ]
    count = len(shown["instances"])
    figure, axes = _canvas("Load, ranked within each tier", min(max(0.11 * count, 1.4), 5.0) + 0.9)
    draw_ranked(axes, seen, tiers)
    alt = f"Load of {count} instances over {shown['at_s'][-1]:g} seconds, in bands from tight to loose tier"
    return Panel(figure, f"{alt}, the fullest of each on top; the darker the fuller")


def sizes(shown: Mapping[str, Any], tiers: Sequence[str]) -> Panel:
    """Instances per tier over time, on top of each other, the tightest tier on top as in the gradient."""
    figure, axes = _canvas("Instances per tier", 2.9)
    hues = tier_hues(tiers)
    held = {row["tier"]: row["instances"] for row in reversed(shown["instances_per_tier"])}
    axes.stackplot(
        shown["at_s"], *held.values(), colors=[hues.get(tier, POOL_HUE) for tier in held], step="post", linewidth=0
    )
    axes.set_xlim(shown["at_s"][0], shown["at_s"][-1])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("seconds")
    axes.set_ylabel("instances")
    last = "; ".join(f"{'none' if tier is None else f'{tier} ms'} {held[tier][-1]}" for tier in [*tiers, None])
    return Panel(figure, f"Instances per tier over time; at the end: {last}")


def _canvas(title: str, height: float, left: float = 0.62, right: float = 0.55) -> tuple[Figure, Axes]:
    """An empty chart; inches. Margins are given, since to find the least ones takes as long as to draw."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    figure.subplots_adjust(left / WIDTH, 0.45 / height, 1 - right / WIDTH, 1 - 0.27 / height)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
