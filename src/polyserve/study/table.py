"""What a study found, as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

Json = dict[str, Any]
AGAINST = {
    "best_baseline": "best baseline",
    "hindsight": "static",
    "best_untuned": "best untuned",
    "polyserve": "polyserve",
}


def tables(result: Json) -> Group:
    """A table per case, then the means over all cases."""
    parts: list[Table | Text] = [Text(f"{result['setting']}: {result['asks']}", style="bold")]
    for case in result["cases"]:
        drawn = _day(case) if case["day"] else _case(case, result)
        parts += [drawn, *map(Text, _lines(case))]
    if len(result["cases"]) > 1 and not result["cases"][0]["day"]:
        parts.append(_summary(result))
    parts += [Text(line) for line in _closing(result)]
    return Group(*parts)


def _columns(table: Table, entries: Sequence[Json]) -> list[str]:
    """Head the columns; which measures and comparisons there are."""
    measures = list(dict.fromkeys(name for entry in entries for name in entry["goodput"]))
    for name in measures:
        table.add_column(f"{name}\nrate, share", justify="right", no_wrap=True)
    return measures


def _case(case: Json, result: Json) -> Table:
    title = f"{case['case']}: optimal {case['bounds']['optimal_rate']:.4g} requests/s"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("policy", no_wrap=True)
    table.add_column("tuned")
    measures = _columns(table, case["entries"])
    headline = measures[min(1, len(measures) - 1)] if measures else None
    against = _against(case["entries"], headline)
    for name in against:
        table.add_column(f"{headline or 'attained'} over\n{AGAINST[name]}", justify="right")
    table.add_column(f"attained at\n{100 * result['overload_at']:.0f} %, share", justify="right", no_wrap=True)
    for entry in case["entries"]:
        held = [_goodput(entry["goodput"].get(name)) for name in measures]
        of = entry["goodput"].get(headline) if headline else entry["attained_at_150"]
        ratios = [_ratio((of or {}).get("over", {}).get(name)) for name in against]
        table.add_row(entry["label"], choice(entry), *held, *ratios, _attained(entry["attained_at_150"]))
    return table


def _day(case: Json) -> Table:
    table = Table(title=case["case"], title_justify="left", title_style="bold")
    table.add_column("policy", no_wrap=True)
    table.add_column("tuned")
    for heading in ("worst tier", "overall", "instances,\nmean", "instance-seconds\nper attained request"):
        table.add_column(heading, justify="right")
    for name in ("static fleet", "baseline +\nqueue scaler"):
        table.add_column(f"of the best\n{name}", justify="right")
    for entry in case["entries"]:
        if (day := entry["day"]) is None:
            continue
        knob = "" if day["knob"] is None else f"{day['knob'].replace('_', ' ')} {day['value']:g}"
        cost = "-" if day["cost_per_attained_s"] is None else f"{day['cost_per_attained_s']:.3f}"
        table.add_row(
            entry["label"],
            ", ".join(part for part in (choice(entry), knob) if part),
            f"{100 * day['worst_tier']:.1f} %{'' if day['holds'] else ' (short)'}",
            f"{100 * day['overall']:.1f} %",
            f"{day['mean_instances']:.2f}",
            cost,
            *(_ratio(day["over"].get(name)) for name in ("best_static", "best_queue_baseline")),
        )
    return table


def _against(entries: Sequence[Json], measure: str | None) -> list[str]:
    held = [entry["goodput"].get(measure) if measure else entry["attained_at_150"] for entry in entries]
    names = [name for name in AGAINST if any(h and name in h["over"] for h in held)]
    return [name for name in names if name != "polyserve" or any(entry["role"] == "variant" for entry in entries)]


def choice(entry: Json) -> str:
    chunk = [] if entry["chunk"] is None else [f"chunk {entry['chunk']}"]
    values = (
        [] if entry["role"] == "variant" else [f"{key.replace('_', ' ')} {v}" for key, v in entry["values"].items()]
    )
    return ", ".join([*chunk, *values])


def _goodput(held: Json | None) -> str:
    if held is None:
        return "-"
    sign = "≥" if held["at_least"] else ""
    return f"{sign}{held['rate']:.4g}, {sign}{held['load']:.3f}{_spread(held['interval'], held['load'])}"


def _attained(held: Json | None) -> str:
    return "-" if held is None else f"{held['rate']:.4g}, {held['load']:.3f}{_spread(held['interval'], held['load'])}"


def _ratio(over: Json | None) -> str:
    if over is None or over["ratio"] is None:
        return "-"
    return f"{over['ratio']:.3f}{_spread(over['interval'], over['ratio'])}"


def _spread(interval: Sequence[float] | None, middle: float) -> str:
    return "" if interval is None else f" ±{interval[1] - middle:.3f}"


def _lines(case: Json) -> Iterator[str]:
    bounds = case["bounds"]
    shown = {
        "additive": bounds["additive_rate"],
        "mixed": bounds["mixed_rate"],
        "every iteration within the pace": bounds["strict_rate"],
    }
    optimal = ", ".join(f"{name} {rate:.4g}" for name, rate in shown.items() if rate is not None)
    ceiling = "-" if bounds["ceiling"] is None else f"{bounds['ceiling']:.3f}"
    yield f"bounds (requests/s): {optimal}; binning can win {ceiling}x at most"
    yield (
        f"window {case['window_s']:g} s after {case['warm_up_s']:g} s, p99 residency {case['residency_p99_s']:.1f} s; "
        f"{100 * case['infeasible_share']:.1f} % of requests replaced, since no idle instance could serve them in time"
    )
    for entry in case["entries"]:
        if sweep := entry["sweep"]:
            yield _sweep(entry["label"], sweep)
    yield ""


def _sweep(label: str, sweep: Json) -> str:
    line = f"{label}: attained at most {sweep['peak']:.3f} of optimal, at {100 * sweep['peak_load']:.0f} % load"
    if sweep["at_150_over_peak"] is not None:
        gap = 100 * sweep["widest_tier_gap_at_150"]
        line += (
            f"; at 150 % {sweep['at_150_over_peak']:.3f} of that, no tier further than {gap:.1f} points off the mean"
        )
    return line


def _summary(result: Json) -> Table:
    table = Table(title="mean over all cases", title_justify="left", title_style="bold")
    table.add_column("policy", no_wrap=True)
    rows = result["summary"]
    names = list(dict.fromkeys(key for row in rows for key in row if key not in ("label", "role", "cases")))
    variants = any(row["role"] == "variant" for row in rows)
    against = {name: _compared(rows, name, variants) for name in names}
    for name in names:
        table.add_column(f"{name.replace('_', ' ')}\nshare", justify="right")
        for other in against[name]:
            table.add_column(f"over\n{AGAINST[other]}", justify="right")
    for row in rows:
        cells = [row["label"] if row["cases"] == len(result["cases"]) else f"{row['label']} ({row['cases']} cases)"]
        for name in names:
            held = row.get(name)
            cells.append("-" if held is None else f"{held['share']:.3f}")
            ratios = [None if held is None else held["over"].get(other) for other in against[name]]
            cells += ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        table.add_row(*cells)
    return table


def _compared(rows: Sequence[Json], name: str, variants: bool) -> list[str]:
    """With whom a column is compared: at overload with nobody, as ratios to nearly nothing say nothing."""
    if name == "attained_at_150":
        return []
    there = [other for other in AGAINST if any(other in row.get(name, {"over": {}})["over"] for row in rows)]
    return [other for other in there if other != "polyserve" or variants]


def _closing(result: Json) -> Iterator[str]:
    yield from result["notes"]
    seeds = ", ".join(map(str, result["seeds"]))
    yield (
        f"shares are of the optimal rate; resolution {100 * result['resolution']:g} % of it; seeds {seeds}"
        f"{'; ± is a 95 % confidence interval' if len(result['seeds']) > 1 else ''}"
    )
    yield (
        f"{result['simulated_requests']:,} requests in {result['simulated_s']:,.0f} s of simulation; "
        f"again with: {result['command']}"
    )
