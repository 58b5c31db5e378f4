"""A picture of a plan: attainment per tier over the size of the fleet, and what shifts would need beside it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from polyserve.planner.plan import Kind, Plan, Sized
from polyserve.planner.tell import number, percent
from polyserve.plot import tier_hues

INK, MUTED, PALE = "#222222", "#777777", "#C9CED6"
PLANNED, NEEDED, RIVAL = "#0072B2", "#7FB8DA", "#BDBDBD"
# Sizes far below the plan attain next to nothing, and would flatten what matters.
FLOOR = 0.5


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Write a PNG: a row for each kind of instance that was tried."""
    kinds = [kind for kind in plan.kinds if kind.sized is not None]
    bars = max((len(_bars(plan, kind)) for kind in kinds), default=1)
    height = max(3.4, 0.3 * bars + 1.3)
    figure = Figure(figsize=(12.5, height * len(kinds) + 0.8), layout="constrained")
    rows = figure.subplots(len(kinds), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), kind in zip(rows, kinds, strict=True):
        assert kind.sized is not None, "only kinds that were tried are drawn"
        _curves(left, plan, kind, kind.sized)
        _needs(right, plan, kind)
    rate = number(kinds[0].rate)
    title = f"{plan.ask.trace} at {rate} requests/s: {percent(plan.ask.target, 2)} of every tier in time"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path, dpi=130)


def _curves(axes: Axes, plan: Plan, kind: Kind, sized: Sized) -> None:
    """Attainment of each tier over the number of instances, the plan and the bound marked."""
    sizes = list(kind.curve)
    tiers = list(sized.trial.tiers)
    for tier, hue in tier_hues(tiers).items():
        shares = [kind.curve[size].tiers[tier].attainment for size in sizes]
        points = [(size, 100 * share) for size, share in zip(sizes, shares, strict=True) if share is not None]
        axes.plot(*zip(*points, strict=True), "o-", color=hue, markersize=4, linewidth=1.6, label=f"{tier} ms")
    low = min(trial.worst[1] for trial in kind.curve.values())
    target = 100 * plan.ask.target
    bottom = 100 * max(low, min(FLOOR, plan.ask.target - 0.05))
    margin = 0.06 * (100 - bottom) + 0.05
    axes.set_ylim(bottom - margin, 100 + margin)
    axes.axhline(target, color=INK, linewidth=1, linestyle="--")
    axes.annotate(f"target {target:g} %", (1, target), xycoords=("axes fraction", "data"), xytext=(-4, -4),
                  textcoords="offset points", ha="right", va="top", fontsize=8, color=INK)  # fmt: skip
    axes.axvline(sized.bound, color=MUTED, linewidth=1, linestyle=":")
    axes.annotate(f"bound {number(sized.bound)}", (sized.bound, 0), xycoords=("data", "axes fraction"), rotation=90,
                  xytext=(-3, 4), textcoords="offset points", ha="right", va="bottom", fontsize=8,
                  color=MUTED)  # fmt: skip
    if sized.found:
        axes.axvline(sized.fleet.instances, color=PLANNED, linewidth=6, alpha=0.2)
        axes.annotate(f"plan {sized.fleet.instances}", (sized.fleet.instances, 0), xycoords=("data", "axes fraction"),
                      rotation=90, xytext=(5, 4), textcoords="offset points", ha="left", va="bottom",
                      fontsize=9, fontweight="bold", color=PLANNED)  # fmt: skip
    axes.set_title(f"{kind.profile}: in time, by size of the fleet", loc="left", fontsize=10)
    axes.set_xlabel("instances")
    axes.set_ylabel("% of requests in time")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center right", title="TPOT", title_fontsize=8)
    _cost_axis(axes, plan, kind)


def _cost_axis(axes: Axes, plan: Plan, kind: Kind) -> None:
    """The cost of each size above it, where there is a price."""
    price = plan.ask.prices.get(kind.profile)
    axes.spines[["top"]].set_visible(price is not None)
    if price is None:
        return
    above = axes.twiny()
    above.set_xlim(axes.get_xlim())
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    above.xaxis.set_major_locator(FixedLocator(ticks))
    above.xaxis.set_major_formatter(FuncFormatter(lambda size, _: number(size * price)))
    above.spines[["right"]].set_visible(False)
    above.tick_params(labelsize=8, colors=MUTED)
    above.set_xlabel("cost per hour", fontsize=8, color=MUTED)


def _bars(plan: Plan, kind: Kind) -> list[tuple[str, int | None, str]]:
    """What needs how many instances: its name, the number, its colour."""
    if kind.planned is None:
        return []
    return [
        ("as asked", kind.planned.fleet.instances, PLANNED),
        *((each.shift.name, each.instances, NEEDED) for each in kind.shifts),
        *((f"with {each.policy}", each.instances, RIVAL) for each in kind.compared),
    ]


def _needs(axes: Axes, plan: Plan, kind: Kind) -> None:
    """Instances needed as asked, after each shift, and by other policies."""
    bars = _bars(plan, kind)
    axes.set_title("Instances needed", loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if not bars:
        axes.set_axis_off()
        axes.text(0, 0.9, "no size that was tried attains the target", transform=axes.transAxes, fontsize=9)
        return
    names, counts, hues = zip(*bars, strict=True)
    axes.barh(range(len(bars)), [count or 0 for count in counts], color=hues, height=0.68)
    price = plan.ask.prices.get(kind.profile)
    for row, count in enumerate(counts):
        cost = f"  ({number(count * price)} per hour)" if count and price else ""
        axes.annotate(f"{count or 'no size attains the target'}{cost}", (count or 0, row), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=8, color=INK)  # fmt: skip
    axes.axvline(counts[0], color=PLANNED, linewidth=1, alpha=0.5)
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(count or 0 for count in counts))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
