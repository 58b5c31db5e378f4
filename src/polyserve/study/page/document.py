"""The page itself: what was asked, tables of what was found, pictures, and the commands that find it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from polyserve.study.page.drawing import Style, styles
from polyserve.study.page.figures import Illustration, Made, across, of_case
from polyserve.study.page.markup import element, picture, swatch, table, text
from polyserve.study.table import AGAINST, choice

Json = dict[str, Any]
NONE = "–"  # in a cell: nobody measured it

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .6rem; border-top: 2px solid #1a1a1a; }
h3 { font-size: 1.05rem; margin: 0 0 .4rem; }
p, dl, ul { margin: .4rem 0; }
a { color: #00568a; }
nav ul { padding-left: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .82em/1.4 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; background: #f3f3f3;
       padding: .05em .3em; border-radius: 3px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
thead th { vertical-align: bottom; border-bottom: 2px solid #1a1a1a; white-space: normal; min-width: 5.5rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 500; }
thead th, thead th:first-child { font-weight: 600; }
td:nth-child(2) { text-align: left; }
thead th:nth-child(2) { text-align: left; }
tbody th.group { font-weight: 600; padding-top: 1rem; white-space: normal; }
figure { margin: 1.6rem 0; padding: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .6rem 1.2rem;
          align-items: start; }
.panels svg { width: 100%; max-width: 30rem; height: auto; display: block; overflow: visible; }
.panels svg text { font-family: "DejaVu Sans", Verdana, "Segoe UI", Roboto, Arial, sans-serif !important; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; font-size: .875rem; }
.swatch { width: 34px; height: 10px; margin-right: .4rem; }
figcaption { font-size: .875rem; color: #333; max-width: 60rem; }
details { font-size: .8rem; margin-top: .3rem; }
summary { cursor: pointer; }
details li { margin: .2rem 0; }
@media (max-width: 40rem) {
  body { padding: .8rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; }
}
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; }
  table { font-size: 6.5pt; }
  th, td { padding: .15rem .3rem; }
  thead th { min-width: 0; }
  th:first-child { position: static; }
  .panels { grid-template-columns: repeat(2, 1fr); }
  .panels svg, tr { break-inside: avoid; }
  h2, h3, .legend { break-after: avoid; }
  nav, details { display: none; }
  code { background: none; padding: 0; }
}
""".strip()


def page(result: Json) -> str:
    """The report of a result as `polyserve.study.result` makes it: HTML that refers to nothing outside itself."""
    labels = dict.fromkeys(entry["label"] for case in result["cases"] for entry in case["entries"])
    looks = styles(list(labels))
    title = f"{result['setting']}: {result['asks']}"
    numbered = _Numbers()
    parts = [text("h1", title), _asked(result), _contents(result), text("h2", "Summary", id="summary")]
    parts += [_summary(result), _means(result)]
    parts += [numbered.figure(each) for each in across(result, looks)]
    for number, case in enumerate(result["cases"], 1):
        parts.append(text("h2", case["case"], id=f"case-{number}"))
        parts += [*_known(case), *(numbered.figure(each) for each in of_case(case, result, looks))]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>PolyServe study, {escape(title)}</title><style>{STYLE}</style>"
    )
    body = element("body", "\n".join(filter(None, parts)))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{body}</html>\n'


def _asked(result: Json) -> str:
    facts = {
        "Command": element("code", escape(result["command"])),
        "Effort": escape(
            f"{result['mode']}, seeds {', '.join(map(str, result['seeds']))}, resolution "
            f"{100 * result['resolution']:g} % of the optimal rate; {result['simulated_requests']:,} requests in "
            f"{result['simulated_s']:,.0f} s of simulation"
        ),
        "Code": escape(", ".join(result["code"])),
    }
    listed = [element("dt", name) + element("dd", told) for name, told in facts.items()]
    notes = [text("li", note) for note in result["notes"]]
    return element("dl", *listed) + (element("ul", *notes) if notes else "")


def _contents(result: Json) -> str:
    if len(result["cases"]) < 2:
        return ""
    links = [
        element("li", text("a", case["case"], href=f"#case-{number}")) for number, case in enumerate(result["cases"], 1)
    ]
    return element("nav", element("ul", *links), aria_label="Cases")


# ------------------------------------------------------------------------------------------------------------- tables


def _summary(result: Json) -> str:
    """Every policy of every case: rates and shares, and how they compare."""
    cases = [case for case in result["cases"] if not case["day"]]
    days = [case for case in result["cases"] if case["day"]]
    told = ""
    if cases:
        entries = [entry for case in cases for entry in case["entries"]]
        measures = list(dict.fromkeys(name for entry in entries for name in entry["goodput"]))
        against = _against(entries, measures)
        heads = ["Policy", "Tuned"]
        for name in measures:
            heads += [f"{name}, share of optimal", f"{name}, requests/s"]
            heads += [f"{name} over {AGAINST[other]}" for other in against[name]]
        heads.append(f"Attained at {100 * result['overload_at']:.0f} %, share of optimal")
        groups = [(_heading(case), [_row(entry, measures, against) for entry in case["entries"]]) for case in cases]
        told += table(heads, groups, "What each policy holds, per case")
    if days:
        heads = ["Policy", "Tuned", "Worst tier", "Overall", "Instances, mean", "Instance-seconds"]
        heads += ["per attained request", "of the best static fleet", "of the best baseline with queue scaler"]
        rows = [(case["case"], [_day(entry) for entry in case["entries"] if entry["day"]]) for case in days]
        told += table(heads, rows, "What each way of scaling costs, per case")
    return told


def _heading(case: Json) -> str:
    ceiling = case["bounds"]["ceiling"]
    bound = "" if ceiling is None else f", ceiling {ceiling:.3f}x"
    return f"{case['case']}: optimal {case['bounds']['optimal_rate']:.4g} requests/s{bound}"


def _against(entries: Sequence[Json], measures: Sequence[str]) -> dict[str, list[str]]:
    """With whom each measure is compared; with ourselves only where variants of us are."""
    variants = any(entry["role"] == "variant" for entry in entries)
    held = {name: [entry["goodput"][name] for entry in entries if name in entry["goodput"]] for name in measures}
    return {
        name: [o for o in AGAINST if (o != "polyserve" or variants) and any(o in h["over"] for h in held[name])]
        for name in measures
    }


def _row(entry: Json, measures: Sequence[str], against: Mapping[str, Sequence[str]]) -> list[str]:
    cells = [entry["label"], choice(entry)]
    for name in measures:
        if held := entry["goodput"].get(name):
            least = "≥ " if held["at_least"] else ""
            cells += [f"{least}{_share(held)}", f"{least}{held['rate']:.4g}"]
            cells += [_ratio(held["over"].get(other)) for other in against[name]]
        else:
            cells += [NONE] * (2 + len(against[name]))
    return [*cells, _share(entry["attained_at_150"])]


def _day(entry: Json) -> list[str]:
    day = entry["day"]
    knob = "" if day["knob"] is None else f"{day['knob'].replace('_', ' ')} {day['value']:g}"
    cost = NONE if day["cost_per_attained_s"] is None else f"{day['cost_per_attained_s']:.4g}"
    return [
        entry["label"],
        ", ".join(filter(None, (choice(entry), knob))),
        f"{100 * day['worst_tier']:.1f} %{'' if day['holds'] else ' (short)'}",
        f"{100 * day['overall']:.1f} %",
        f"{day['mean_instances']:.2f}",
        f"{day['instance_seconds']:,.0f}",
        cost,
        *(_ratio(day["over"].get(name)) for name in ("best_static", "best_queue_baseline")),
    ]


def _share(held: Json | None) -> str:
    if held is None:
        return NONE
    spread = "" if held["interval"] is None else f" ± {100 * (held['interval'][1] - held['load']):.1f}"
    return f"{100 * held['load']:.1f}{spread} %"


def _ratio(over: Json | None) -> str:
    if over is None or over["ratio"] is None:
        return NONE
    spread = "" if over["interval"] is None else f" ± {over['interval'][1] - over['ratio']:.3f}"
    return f"{over['ratio']:.3f}{spread}"


def _means(result: Json) -> str:
    """The means over all cases, where there are several."""
    rows = result["summary"]
    names = list(dict.fromkeys(key for row in rows for key in row if key not in ("label", "role", "cases")))
    if len(result["cases"]) < 2 or not names:
        return ""
    titles = [
        f"attained at {100 * result['overload_at']:.0f} %" if name == "attained_at_150" else name for name in names
    ]
    heads = ["Policy", "Cases", *(f"{title}, share of optimal" for title in titles)]
    lines = [
        [row["label"], str(row["cases"]), *(f"{100 * row[n]['share']:.1f} %" if n in row else NONE for n in names)]
        for row in rows
    ]
    return text("h3", "Mean over the cases") + table(heads, [("", lines)], "Means over all cases")


def _known(case: Json) -> Iterator[str]:
    bounds = case["bounds"]
    rates = {
        "additive": bounds["additive_rate"],
        "mixed": bounds["mixed_rate"],
        "every iteration within the pace": bounds["strict_rate"],
    }
    told = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items() if rate is not None)
    ceiling = "" if bounds["ceiling"] is None else f"; binning can win {bounds['ceiling']:.3f}x at most (the ceiling)"
    yield text("p", f"Optimal {bounds['optimal_rate']:.4g} requests/s. Bounds (requests/s): {told}{ceiling}.")
    paces = ", ".join(f"{1e3 * pace:g} ms for {100 * share:g} %" for pace, share in case["paces"])
    later = ", ".join(f"{100 * share:g} %" for _, share in case["later_paces"])
    asked = f"Paces: {paces}{f'; from the middle on {later}' if later else ''}."
    asked += f" TTFT: {', '.join(f'{1e3 * ttft:g}' for ttft in case['ttfts'])} ms."
    if case["day"]:
        asked += f" A day of servegen's {case['day']} rates; an instance starts in {case['start_up_s']:g} s."
    if case["jitter"] or case["bias"]:
        asked += f" Iterations vary by {100 * case['jitter']:g} % and take {100 * case['bias']:g} % longer than told."
    yield text("p", asked)
    yield text(
        "p",
        f"Window {case['window_s']:g} s after {case['warm_up_s']:g} s of warm-up; p99 residency "
        f"{case['residency_p99_s']:.1f} s; {100 * case['infeasible_share']:.1f} % of requests replaced, since no idle "
        "instance could serve them in time.",
    )


# ------------------------------------------------------------------------------------------------------------ pictures


class _Numbers:
    """Numbers figures as they come."""

    def __init__(self) -> None:
        self._last = 0

    def figure(self, shown: Illustration) -> str:
        self._last += 1
        panels = [
            element("div", picture(panel.figure, panel.alt, f"f{self._last}p{n}"))
            for n, panel in enumerate(shown.panels)
        ]
        caption = element("figcaption", text("p", shown.caption), *map(_made, shown.made), _points(shown.points))
        title = text("h3", f"Figure {self._last}. {shown.title}")
        return element("figure", title, _legend(shown.legend), element("div", *panels, class_="panels"), caption)


def _legend(legend: Mapping[str, Style]) -> str:
    rows = [element("li", swatch(look.hue, look.dash, look.width), text("span", name)) for name, look in legend.items()]
    return element("ul", *rows, class_="legend") if rows else ""


def _made(made: Made) -> str:
    seeds = f"seeds {made.seed}" if "," in made.seed else f"seed\N{NO-BREAK SPACE}{made.seed}"
    return element("p", f"Made by {element('code', escape(made.command))}, {escape(seeds)}.", class_="made")


def _points(points: Sequence[Made]) -> str:
    if not points:
        return ""
    rows = [element("li", escape(f"{each.what}: "), text("code", each.command)) for each in points]
    return element("details", text("summary", f"The command of each run ({len(points)})"), element("ul", *rows))
