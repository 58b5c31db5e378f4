"""Which pictures suit a result, what is written under each, and which commands made its data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyserve.plot import POOL_HUE, tier_hues
from polyserve.study.page.drawing import HUES, Bar, Panel, Points, Style, bars, curves, gradient, sizes

Json = dict[str, Any]
# Attainment below is cut off, unless overload is the question: it would flatten what matters.
FLOOR = 50.0
# Costs above so many times the least are cut off.
DEAREST = 3.0
LEVELS = {"90 %": 90.0, "99 %": 99.0}
OURS, THEIRS, BETTER, WORSE = HUES[0], "#9A9A9A", "#0072B2", "#D55E00"


@dataclass(frozen=True, slots=True)
class Made:
    """What makes the data of a figure, or of one point of it."""

    what: str
    command: str
    seed: str


@dataclass(frozen=True, slots=True)
class Illustration:
    """Charts that belong together, with what stands under them."""

    title: str
    panels: Sequence[Panel]
    caption: str
    made: Sequence[Made]
    points: Sequence[Made] = field(default_factory=list)  # every single run, where there are many
    legend: Mapping[str, Style] = field(default_factory=dict)


def across(result: Json, looks: Mapping[str, Style]) -> Iterator[Illustration]:
    """Pictures over several cases: how a policy fares as its fleet grows."""
    fleets: dict[str, list[Json]] = defaultdict(list)
    for case in result["cases"]:
        profiles = "+".join(group["profile"] for group in case["fleet"]["groups"])
        if not case["day"]:
            fleets[f"{profiles}, {case['workload']}"].append(case)
    for name, cases in fleets.items():
        if len({case["fleet"]["instances"] for case in cases}) == len(cases) > 1:
            yield from _scale(name, cases, result, looks)


def of_case(case: Json, result: Json, looks: Mapping[str, Style]) -> Iterator[Illustration]:
    """Pictures of one fleet, workload and world."""
    if case["day"]:
        yield from _day(case, result, looks)
    else:
        yield from _goodput(case, result)
        if any(entry["role"] == "variant" for entry in case["entries"]):
            yield from _ablation(case, result)
        else:
            yield from _over_load(case, result, looks)
    for shown in case["showcase"]:
        if shown["at_s"]:
            yield _showcase(shown, case, result)


# ----------------------------------------------------------------------------------------------------- goodput, scale


def _goodput(case: Json, result: Json) -> Iterator[Illustration]:
    """Bars of every measure against the optimum, with what could be had without binning."""
    marks = {"optimal": 100.0}
    if ceiling := case["bounds"]["ceiling"]:
        marks[f"all at the tightest pace (ceiling {ceiling:.2f}x)"] = 100 / ceiling
    panels = []
    for measure in _measures(case["entries"]):
        rows = [_bar(entry, entry["goodput"].get(measure)) for entry in case["entries"] if entry["role"] != "variant"]
        panels.append(bars(measure, [row for row in rows if row], x="% of the optimal rate", marks=marks))
    overload = [_bar(entry, entry["attained_at_150"]) for entry in case["entries"] if entry["role"] != "variant"]
    if any(overload):
        title = f"Attained at {100 * result['overload_at']:.0f} % load"
        panels.append(bars(title, [row for row in overload if row], x="% of the optimal rate", marks=marks))
    if panels:
        interval = "; lines at the ends of bars are 95 % confidence intervals" if len(result["seeds"]) > 1 else ""
        caption = (
            "The highest load that each policy holds. The ceiling is what binning can win at most: the optimum over "
            f"what could be served at best with everybody at the tightest pace{interval}."
        )
        yield Illustration("Goodput against the optimum", panels, caption, [_study(result)])


def _bar(entry: Json, held: Json | None) -> Bar | None:
    if held is None:
        return None
    interval = None if held["interval"] is None else (100 * held["interval"][0], 100 * held["interval"][1])
    least = "≥ " if held.get("at_least") else ""
    hue = OURS if entry["role"] == "ours" else THEIRS
    return Bar(entry["label"], 100 * held["load"], f"{least}{100 * held['load']:.1f} %", hue, interval)


def _scale(name: str, cases: Sequence[Json], result: Json, looks: Mapping[str, Style]) -> Iterator[Illustration]:
    cases = sorted(cases, key=lambda case: case["fleet"]["instances"])
    entries = [entry for case in cases for entry in case["entries"]]
    panels, drawn = [], set()
    for measure in _measures(entries):
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for case in cases:
            for entry in case["entries"]:
                if held := entry["goodput"].get(measure):
                    count = case["fleet"]["instances"]
                    lines[entry["label"]].append((count, held["rate"] / count))
        per_instance = {case["bounds"]["optimal_rate"] / case["fleet"]["instances"] for case in cases}
        levels = {"optimal": max(per_instance)}
        top = max([*per_instance, *(rate for points in lines.values() for _, rate in points)])
        span = (0.0, 1.08 * top)
        panels.append(
            curves(measure, lines, looks, x="instances", y="requests/s per instance", span=span, levels=levels,
                   doubling=True)
        )  # fmt: skip
        drawn |= set(lines)
    if panels:
        caption = "The highest rate that each policy holds, per instance, as the fleet grows."
        legend = {label: look for label, look in looks.items() if label in drawn}
        title = f"Goodput per instance over the size of the fleet: {name}"
        yield Illustration(title, panels, caption, [_study(result)], legend=legend)


def _ablation(case: Json, result: Json) -> Iterator[Illustration]:
    """What each mechanism is worth: bars to the left lose."""
    (own,) = [entry for entry in case["entries"] if entry["label"] == "polyserve"] or [None]
    if own is None:
        return
    panels = []
    for measure in _measures(case["entries"]):
        base = own["goodput"][measure]["load"]
        rows = []
        for entry in case["entries"]:
            if entry["role"] == "variant" and (held := entry["goodput"].get(measure)):
                points = 100 * (held["load"] - base)
                rows.append(Bar(entry["label"], points, f"{points:+.1f}", BETTER if points >= 0 else WORSE))
        title = f"{measure}; polyserve itself: {100 * base:.1f} %"
        panels.append(bars(title, rows, x="points of the optimal rate, more or less than polyserve"))
    caption = (
        "Each mechanism off in turn, and each alternative on: by how much the highest load that is held changes. "
        f"Differences below {200 * result['resolution']:g} points are within the resolution of two searches."
    )
    points = _points(case, result["seeds"][0])
    yield Illustration("What each mechanism is worth", panels, caption, [_study(result)], points)


# ----------------------------------------------------------------------------------------------------------- over load


def _over_load(case: Json, result: Json, looks: Mapping[str, Style]) -> Iterator[Illustration]:
    """Attainment and cost at every load that was run with the first seed."""
    seed = result["seeds"][0]
    runs = {
        entry["label"]: sorted((run for run in entry["runs"] if run["seed"] == seed), key=lambda run: run["load"])
        for entry in case["entries"]
    }
    runs = {label: of for label, of in runs.items() if of}
    if not runs:
        return
    sweep = any(entry["sweep"] for entry in case["entries"])
    legend = {label: looks[label] for label in runs}
    points = _points(case, seed)

    floor = 0.0 if sweep else FLOOR
    span = (floor - 0.02 * (100 - floor), 100 + 0.02 * (100 - floor))
    tiers = list(next(iter(runs.values()))[0]["attainment"]["tiers"])

    def attainment(title: str, share: Callable[[Json], float | None]) -> Panel:
        lines = _lines(runs, lambda run: None if (value := share(run["attainment"])) is None else 100 * value)
        return curves(title, lines, looks, x="load, % of the optimal rate", y="attained, %", span=span, levels=LEVELS)

    panels = [attainment("Overall", lambda a: a["overall"]), attainment("Worst tier", lambda a: a["worst_tier"])]
    panels += [attainment(f"Tier {tier} ms", lambda a, tier=tier: a["tiers"].get(tier)) for tier in tiers]  # type: ignore[misc]
    cut = "" if sweep else f" Below {FLOOR:g} % the axis is cut off."
    caption = f"The share of requests without one late token. Every point is a run with seed {seed}.{cut}"
    yield Illustration("Attainment over load", panels, caption, [_study(result)], points, legend)
    if sweep:
        rate = case["bounds"]["optimal_rate"]
        lines = _lines(runs, lambda run: 100 * run["attained_rate"] / rate)
        panel = curves("Attained rate", lines, looks, x="load, % of the optimal rate", y="attained, % of optimal",
                       levels={"optimal": 100.0}, span=(0.0, 108.0))  # fmt: skip
        caption = "Requests that attain per second, as more and more come than could be served at best."
        caption += SAME
        yield Illustration("Attained rate over load", [panel], caption, [_study(result)], legend=legend)
    lines = _lines(runs, lambda run: run["cost_per_attained_s"])
    if lines:
        yield Illustration("Cost over load", [_cost(lines, case, looks)], COST + SAME, [_study(result)], legend=legend)


SAME = " The runs are those of attainment over load."
COST = (
    "Instance-seconds per request that attained its SLO. The dashed level is what the optimum would pay at 100 % load; "
    f"the axis is cut off at {DEAREST:g} times that."
)


def _cost(lines: Mapping[str, Points], case: Json, looks: Mapping[str, Style]) -> Panel:
    optimal = case["fleet"]["instances"] / case["bounds"]["optimal_rate"]
    least = min(optimal, *(cost for points in lines.values() for _, cost in points))
    return curves("Cost per attained request", lines, looks, x="load, % of the optimal rate", y="instance-seconds",
                  levels={"optimal": optimal}, span=(0.9 * least, DEAREST * optimal))  # fmt: skip


def _lines(runs: Mapping[str, Sequence[Json]], value: Callable[[Json], float | None]) -> dict[str, Points]:
    """Points of load in per cent and value, for policies that have any."""
    lines = {
        label: [(100 * run["load"], each) for run in of if (each := value(run)) is not None]
        for label, of in runs.items()
    }
    return {label: points for label, points in lines.items() if points}


# ----------------------------------------------------------------------------------------------------- over a day, time


def _day(case: Json, result: Json, looks: Mapping[str, Style]) -> Iterator[Illustration]:
    """What every way of scaling pays, and what its knob buys."""
    held = [entry for entry in case["entries"] if entry["day"]]
    if not held:
        return
    rows = []
    for entry in held:
        day = entry["day"]
        if (cost := day["cost_per_attained_s"]) is not None:
            text = f"{cost:.4g}{'' if day['holds'] else ' (short)'}"
            hue = OURS if entry["role"] == "ours" and day["scaler"] == "own" else THEIRS
            rows.append(Bar(entry["label"], cost, text, hue, faint=not day["holds"]))
    spent = [bars("Cost of the day", rows, x="instance-seconds per attained request")] if rows else []
    lines = {
        entry["label"]: sorted(
            (run["instance_seconds"] / case["window_s"], 100 * run["attainment"]["worst_tier"])
            for run in entry["runs"]
            if run["instance_seconds"] is not None
        )
        for entry in held
    }
    lines = {label: points for label, points in lines.items() if points}
    panel = curves("What instances buy", lines, looks, x="instances in the mean", y="attained in the worst tier, %",
                   levels={"99 %": 99.0}, span=(FLOOR - 1, 101.0))  # fmt: skip
    caption = (
        "First the cheapest value of each knob with which every tier attains 99 % over the whole day; pale bars fall "
        "short of that with any value. Then every value that was tried."
    )
    legend = {label: looks[label] for label in lines}
    points = _points(case, result["seeds"][0])
    yield Illustration("Instance-seconds", [*spent, panel], caption, [_study(result)], points, legend)


def _showcase(shown: Json, case: Json, result: Json) -> Illustration:
    """The fleet over time under one policy."""
    tiers = [row["tier"] for row in shown["instances_per_tier"] if row["tier"] is not None]
    legend = {f"{tier} ms": Style(hue, (), 7.0) for tier, hue in tier_hues(tiers).items()}
    legend["no tier"] = Style(POOL_HUE, (), 7.0)
    count, drawn = case["fleet"]["instances"], len(shown["instances"])
    some = f" {drawn} of {count} instances are drawn." if drawn < count else ""
    caption = (
        f"{shown['label']} at {100 * shown['load']:.0f} % load, of which {100 * shown['attainment']['overall']:.1f} % "
        "attained. In the gradient a tier is a band as high as it has instances, its fullest on top; pale is empty, "
        f"dark full. The first {case['warm_up_s']:g} s are warm-up.{some}"
    )
    seed = str(shown["seed"])
    made = [Made("", shown["command"], seed)] if shown["command"] else [_study(result, seed)]
    title = f"The fleet over time: {shown['label']}"
    return Illustration(title, [gradient(shown, tiers), sizes(shown, tiers)], caption, made, legend=legend)


# ------------------------------------------------------------------------------------------------------------- commands


def _measures(entries: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry["goodput"]))


def _study(result: Json, seed: str = "") -> Made:
    return Made("", result["command"], seed or ", ".join(map(str, result["seeds"])))


def _points(case: Json, seed: int) -> list[Made]:
    """The command of every run with that seed that one command can make."""
    return [
        Made(f"{entry['label']}, {_at(run)}", run["command"], str(run["seed"]))
        for entry in case["entries"]
        for run in entry["runs"]
        if run["seed"] == seed and run["command"]
    ]


def _at(run: Json) -> str:
    return f"{100 * run['load']:.0f} % load" if run.get("value") is None else f"{run['value']:g}"
