"""What the demo prints: the live fleet's scores beside the simulator's, and which tier each instance served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from polyserve.core.types import InstanceId, Tier, TierName
from polyserve.report import Percentiles, Score, TierScore, tier_key

# One letter and one colour per tier, tightest first; more tiers than these begin again.
LETTERS, COLOURS = "abcdefgh", ("red", "yellow", "green", "cyan", "blue", "magenta", "white", "bright_black")
POOL, AWAY = "·", " "


@dataclass(frozen=True, slots=True)
class Seen:
    """The tier of every instance that was there at one time, in seconds from the start; None: in the pool."""

    at: float
    tiers: Mapping[InstanceId, TierName | None]


def comparison(scores: Mapping[str, Score], tiers: Sequence[Tier]) -> Table:
    """One row per tier and teller; each teller scored the very same requests."""
    rows = Table(box=box.SIMPLE, padding=(0, 0, 0, 1))
    rows.add_column("tier", no_wrap=True)
    for heading in ("requests", "who", "attained", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", "promoted", "refused"):
        rows.add_column(heading, justify="left" if heading == "who" else "right", no_wrap=True)
    for tier in tiers:
        key = tier_key(tier.tpot_s)
        _add_tier(rows, f"{tier.name} {key} ms", {who: score.tiers[key] for who, score in scores.items()})
    _add_tier(rows, "all", {who: score.overall for who, score in scores.items()})
    return rows


def _add_tier(rows: Table, name: str, tellers: Mapping[str, TierScore]) -> None:
    rows.add_section()
    for number, (teller, tier) in enumerate(tellers.items()):
        rows.add_row(
            *(("", "") if number else (name, str(tier.share.requests))),
            teller,
            _share(tier),
            *_ms(tier.ttft_s, 0),
            *_ms(tier.tpot_s, 1),
            str(tier.promoted),
            str(tier.refused),
            style=None if number else "bold",
        )


def _share(tier: TierScore) -> str:
    attained = tier.share.attainment
    return "-" if attained is None else f"{100 * attained:.1f} %"


def _ms(of: Percentiles, digits: int) -> tuple[str, str]:
    p50, p99 = ("-" if value is None else f"{value * 1e3:.{digits}f}" for value in (of.p50, of.p99))
    return p50, p99


def timeline(looks: Sequence[Seen], tiers: Sequence[TierName], seconds: float, columns: int = 90) -> list[Text]:
    """A row per instance and a letter per stretch of time: the tier that it served at the start of the stretch."""
    step = seconds / columns
    letter = {tier: LETTERS[i % len(LETTERS)] for i, tier in enumerate(tiers)}
    colour = {tier: COLOURS[i % len(COLOURS)] for i, tier in enumerate(tiers)}
    instances = sorted({instance for look in looks for instance in look.tiers}, key=lambda i: (len(i), i))
    width = max(map(len, instances), default=0)
    rows = []
    for instance in instances:
        row = Text(f"  {instance:<{width}} ")
        for look in _at_each(looks, columns, step):
            if look is None or instance not in look.tiers:
                row.append(AWAY)
            elif (tier := look.tiers[instance]) is None:
                row.append(POOL, "dim")
            else:
                row.append(letter.get(tier, "?"), colour.get(tier, ""))
        rows.append(row)
    legend = Text("  ")
    for tier in tiers:
        legend.append(f"{letter[tier]} {tier}   ", colour[tier])
    legend.append(f"{POOL} in the pool", "dim")
    return [*rows, Text(f"  {'':<{width}} {_scale(seconds, columns)}", "dim"), legend]


def _at_each(looks: Sequence[Seen], columns: int, step: float) -> list[Seen | None]:
    """The latest look at the end of each stretch, None before the first."""
    found: list[Seen | None] = []
    last, index = None, 0
    for column in range(columns):
        while index < len(looks) and looks[index].at <= (column + 1) * step:
            last, index = looks[index], index + 1
        found.append(last)
    return found


def _scale(seconds: float, columns: int) -> str:
    line, every = "", 15 if seconds >= 45 else 5
    for mark in range(0, int(seconds) + 1, every):
        at = round(mark / seconds * columns)
        line = f"{line:<{at}}|{mark} s"
    return line
