"""A plan for people (tables) and for programs (JSON; docs/planning.md has the schema)."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from polyserve.core.types import ChunkRule
from polyserve.planner.ask import Ask, Load
from polyserve.planner.bench import SPARE, Window
from polyserve.planner.plan import Compared, Headroom, Kind, Plan, Shifted, Sized, most_instances
from polyserve.planner.saying import fleet_of
from polyserve.planner.trial import Fleet, Tally, Trial
from polyserve.report import tier_key

SCHEMA = "polyserve.plan/1"
HOUR_S = 3600.0
# So many requests that only an idle instance can serve in time, over those that may be late, are worth a line.
BARELY = 0.5


# -------------------------------------------------------------------------------------------------- arithmetic


def costs(instances: int, trial: Trial, price: float = 1.0) -> dict[str, float | None]:
    """What a fleet costs, by the price of an instance-hour; at a price of 1 it is instance-hours."""
    per_second = instances * price / HOUR_S
    return {
        "per_hour": instances * price,
        "per_million_output_tokens": per_second / trial.token_rate * 1e6 if trial.tokens else None,
        "per_thousand_requests": per_second / trial.attained_rate * 1e3 if trial.attained_rate else None,
    }


def why_not(sized: Sized, target: float) -> str:
    """Why no fleet that was tried attains the target, by what became of the requests of the best one's worst tier."""
    tier, attainment = sized.trial.worst
    tally = sized.trial.tiers.get(tier, Tally())
    unanswered = tally.requests - tally.attained - tally.refused - tally.late_first - tally.late_after
    fates = {
        "refused": tally.refused,
        "with a late first token": tally.late_first,
        "late after the first token": tally.late_after,
        "without a whole answer": unanswered,
    }
    missed = ", ".join(f"{percent(n / max(tally.requests, 1), 2)} {how}" for how, n in fates.items() if n)
    return (
        f"no fleet of up to {fleet_of(sized.most)} has every tier at {percent(target, 2)}: the best of those tried, "
        f"{sized.fleet.instances}, has {percent(attainment, 2)} of tier {tier} ms in time"
        f" ({missed or 'nothing arrived'})"
    )


def command(ask: Ask, fleet: Fleet, window: Window, rate: float, seed: int) -> str:
    """The simulation behind one seed of the planned fleet."""
    words = ["polyserve", "simulate", "--trace", ask.trace]
    if ask.columns:
        words += ["--columns", ",".join(f"{key}={value}" for key, value in ask.columns.items())]
    words += ["--profile", fleet.profile, "--instances", str(fleet.instances)]
    if ask.rate is not None or ask.arrivals.kind != "recorded":
        words += ["--rate", f"{rate:.10g}"]
    words += ["--duration", f"{window.measured_s:.10g}", "--warm-up", f"{window.warm_up_s:.10g}"]
    words += ["--tpot", ",".join(f"{tpot_s * 1e3:.10g}:{share:.10g}" for tpot_s, share in ask.tpots)]
    words += ["--ttft", ",".join(f"{ttft_s * 1e3:.10g}" for ttft_s in ask.ttfts)]
    if ask.arrivals.kind != "poisson":
        words += ["--arrivals", "recorded" if ask.arrivals.kind == "recorded" else f"gamma:{ask.arrivals.cv:g}"]
    words += ["--policy", fleet.policy, *(f"--set={key}={value}" for key, value in ask.values.items())]
    return shlex.join([*words, "--seed", str(seed)])


# -------------------------------------------------------------------------------------------------------- JSON


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    ask = plan.ask
    return {
        "schema": SCHEMA,
        "question": {
            "trace": ask.trace,
            "rate": ask.rate,
            "arrivals": dataclasses.asdict(ask.arrivals),
            "tpot_ms": _shares(ask.load),
            "ttft_ms": [round(ttft_s * 1e3, 6) for ttft_s in ask.ttfts],
            "target": ask.target,
            "policy": ask.policy,
            "settings": dict(ask.values),
            "seeds": list(ask.all_seeds),
            "prices_per_instance_hour": dict(ask.prices) or None,
        },
        "best": plan.best.profile if plan.best is not None else None,
        "kinds": [_kind(plan, kind) for kind in plan.kinds],
        "wall_s": round(plan.wall_s, 3),
    }


def _kind(plan: Plan, kind: Kind) -> dict[str, Any]:
    sized, ask = kind.sized, plan.ask
    if sized is None:
        return {"profile": kind.profile, "instances": None, "problem": kind.problem}
    assert kind.window is not None, "what was tried had a window"
    trial, count = sized.trial, sized.fleet.instances
    price = ask.prices.get(kind.profile)
    return {
        "profile": kind.profile,
        "instances": count if sized.found else None,
        "problem": None if sized.found else why_not(sized, ask.target),
        "rate": kind.rate,
        "infeasible_share": kind.infeasible_share,
        "barely_share": kind.barely_share,
        "window": dataclasses.asdict(kind.window),
        "bound_instances": sized.bound,
        "other_bounds": kind.other_bounds,
        "best_instances": count,
        "utilisation": trial.utilisation,
        "share_of_optimal": sized.bound / count,
        "worst": {**_worst(trial), "interval": list(trial.interval)},
        "worst_seed": {"seed": sized.worst_seed.seeds[0], **_worst(sized.worst_seed)},
        "tiers": {
            name: {**dataclasses.asdict(tally), "attainment": tally.attainment, "instances": _counts(trial, name)}
            for name, tally in trial.tiers.items()
        },
        "unassigned_instances": _counts(trial, None),
        "instance_hours": costs(count, trial),
        "cost": None if price is None else costs(count, trial, price),
        "one_less": None if kind.smaller is None else {"instances": count - 1, **_attained(kind.smaller)},
        "headroom": None if kind.headroom is None else dataclasses.asdict(kind.headroom),
        "sizes": [{"instances": size, **_attained(tried)} for size, tried in kind.curve.items()],
        "shifts": [_shift(shifted, price) for shifted in kind.shifts],
        "compared": [_compared(each) for each in kind.compared],
        "command": command(ask, sized.fleet, kind.window, kind.rate, ask.seed),
    }


def _shift(shifted: Shifted, price: float | None) -> dict[str, Any]:
    load = shifted.load
    return {
        "name": shifted.shift.name,
        "tpot_ms": _shares(load),
        "rate_by": load.rate_by,
        "prompts_by": load.prompts_by,
        "outputs_by": load.outputs_by,
        "problem": shifted.problem,
        "infeasible_share": shifted.infeasible_share,
        "bound_instances": shifted.bound or None,
        "instances": shifted.instances,
        "cost_per_hour": None if price is None or shifted.instances is None else price * shifted.instances,
        "planned_fleet": None if shifted.planned is None else _attained(shifted.planned),
    }


def _compared(each: Compared) -> dict[str, Any]:
    return {
        "policy": each.policy,
        "chunk": None if each.chunk is None else dataclasses.asdict(each.chunk),
        "instances": each.instances,
        "best_instances": each.best_instances,
        **_attained(each.best),
    }


def _attained(trial: Trial) -> dict[str, Any]:
    tiers = {name: tally.attainment for name, tally in trial.tiers.items()}
    return {"seeds": list(trial.seeds), "worst": _worst(trial), "attainment": tiers}


def _worst(trial: Trial) -> dict[str, Any]:
    return dict(zip(("tier", "attainment"), trial.worst, strict=True))


def _counts(trial: Trial, tier: str | None) -> dict[str, float]:
    counts = trial.instances.get(tier) or [0]
    return {"mean": float(np.mean(counts)), "p90": float(np.percentile(counts, 90))}


def _shares(load: Load) -> dict[str, float]:
    return {tier_key(tpot_s): round(share, 6) for tpot_s, share in load.tpots}


# ------------------------------------------------------------------------------------------------------ tables


def tables(plan: Plan) -> Group:
    """The plan for people: the kinds side by side, then each by itself."""
    parts: list[RenderableType] = [_summary(plan)]
    for kind in plan.kinds:
        parts += [Text(), *_about(plan, kind)]
    parts += [Text(), *(Text(line) for line in _closing(plan))]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left", overflow="fold")
    return table


def _summary(plan: Plan) -> Table:
    ask, priced = plan.ask, bool(plan.ask.prices)
    rate = next((kind.rate for kind in plan.kinds if kind.rate), ask.rate or 0.0)
    unit = "" if priced else "instance-h "
    table = _table(
        f"{ask.trace} at {number(rate)} requests/s, {percent(ask.target, 2)} of every tier in time, {ask.policy}",
        *("kind", "instances", "bound", "worst tier", "worst seed", "headroom"),
        *(["per hour"] if priced else []),
        *(f"{unit}per\n1M tokens", f"{unit}per\n1,000 requests"),
    )
    for kind in plan.kinds:
        table.add_row(kind.profile, *_summary_cells(plan, kind, priced))
    return table


def _summary_cells(plan: Plan, kind: Kind, priced: bool) -> list[str]:
    sized = kind.sized
    if sized is None:
        return ["none", *["-"] * (7 if priced else 6)]
    count, price = sized.fleet.instances, plan.ask.prices.get(kind.profile, 1.0)
    cost = costs(count, sized.trial, price)
    if not sized.found:
        return ["none", number(sized.bound), worst(sized.trial), *["-"] * (5 if priced else 4)]
    return [
        str(count),
        number(sized.bound),
        worst(sized.trial),
        f"{worst(sized.worst_seed)} (seed {sized.worst_seed.seeds[0]})",
        more(kind.headroom),
        *([number(cost["per_hour"])] if priced else []),
        number(cost["per_million_output_tokens"]),
        number(cost["per_thousand_requests"]),
    ]


def _about(plan: Plan, kind: Kind) -> Iterator[RenderableType]:
    sized = kind.sized
    if sized is None or kind.window is None:
        yield Text(kind.problem or "")
        return
    if not sized.found:
        yield Text(f"{kind.profile}: {why_not(sized, plan.ask.target)}")
    yield _tiers(plan, kind, sized)
    yield from map(Text, _lines(plan, kind, sized))
    # In one line, so that it can be copied.
    again = command(plan.ask, sized.fleet, kind.window, kind.rate, plan.ask.seed)
    yield Text(f"again: {again}", no_wrap=True, overflow="ignore")
    if kind.shifts:
        yield Text()
        yield _shifts(plan, kind, sized)
        yield from (Text(f"{each.shift.name}: {line}") for each in kind.shifts if (line := _unreached(plan, each)))
    if kind.compared:
        yield Text()
        yield _compared_table(kind, sized)


def _tiers(plan: Plan, kind: Kind, sized: Sized) -> Table:
    table = _table(
        f"{sized.fleet.instances} x {kind.profile}",
        *("TPOT ms", "share", "instances\nmean / p90", "requests", "in time", "refused", "late first\ntoken"),
        *("late\nafter", "in time with\none less"),
    )
    shares = _shares(plan.ask.load)
    for name, tally in sized.trial.tiers.items():
        one_less = kind.smaller.tiers[name].attainment if kind.smaller is not None else None
        table.add_row(
            name,
            percent(shares[name], 1),
            pair(_counts(sized.trial, name)),
            str(tally.requests),
            percent(tally.attainment, 2),
            str(tally.refused),
            str(tally.late_first),
            str(tally.late_after),
            percent(one_less, 2),
        )
    table.add_section()
    table.add_row("no tier", "", pair(_counts(sized.trial, None)), *[""] * 6)
    return table


def _lines(plan: Plan, kind: Kind, sized: Sized) -> Iterator[str]:
    window, count = kind.window, sized.fleet.instances
    assert window is not None, "what was tried had a window"
    yield (
        f"utilisation {percent(sized.trial.utilisation, 0)} (mean load of an instance), "
        f"{percent(sized.bound / count, 0)} of what the fluid optimum would do"
    )
    yield (
        f"each run {window.measured_s:.0f} s after {window.warm_up_s:.0f} s of warm-up, "
        f"{len(sized.trial.seeds)} seeds; requests stay up to {window.residency_s:.0f} s on average"
    )
    if window.cut:
        yield "a run measures fewer requests than tell such a target from luck: --requests gives it more"
    if kind.infeasible_share >= 0.0005:
        how = "left out" if plan.ask.arrivals.kind == "recorded" else "replaced by others"
        yield (
            f"{percent(kind.infeasible_share, 1)} of the requests drawn were {how}: even an idle instance of this "
            "kind would serve them too late, or they do not fit into it"
        )
    if kind.barely_share >= BARELY * (1 - plan.ask.target):
        yield (
            f"{percent(kind.barely_share, 1)} of the requests leave even an idle instance of this kind less than "
            f"{percent(SPARE, 0)} of their TTFT to spare: what they need decides the size"
        )
    for name, other in kind.other_bounds.items():
        yield (
            f"the bound is {number(other)} with {name}: the two differ in whether prefill makes the decodes "
            "beside it dearer, which was not measured on this GPU"
        )
    low, high = sized.trial.interval
    if sized.found and low < plan.ask.target:
        yield (
            f"what luck leaves open: tier {sized.trial.worst[0]} ms has from {percent(low, 1)} to {percent(high, 1)} "
            "in time (95 % interval); more --seeds or --requests narrow it"
        )
    if sized.found and count == 1:
        yield "with its only instance lost nothing is served"
    if kind.headroom is not None and kind.headroom.breaks is not None:
        yield f"beyond the headroom of {more(kind.headroom)} tier {kind.headroom.breaks} ms breaks first"


def _shifts(plan: Plan, kind: Kind, sized: Sized) -> Table:
    priced = kind.profile in plan.ask.prices
    table = _table(
        f"{kind.profile}: if demand shifts",
        *("shift", "shares", "bound", "instances\nneeded", *(["per hour"] if priced else [])),
        f"with {sized.fleet.instances}:\nworst tier",
    )
    for each in kind.shifts:
        needed = "-" if each.instances is None else f"{each.instances} ({each.instances - sized.fleet.instances:+d})"
        cost = None if each.instances is None else plan.ask.prices.get(kind.profile, 1.0) * each.instances
        table.add_row(
            each.shift.name,
            " / ".join(f"{100 * share:.0f}" for share in _shares(each.load).values()),
            number(each.bound or None),
            needed,
            *([number(cost)] if priced else []),
            "-" if each.planned is None else worst(each.planned),
        )
    return table


def _unreached(plan: Plan, each: Shifted) -> str | None:
    """Why no fleet serves a shift."""
    if each.problem is not None or each.instances is not None or each.best is None:
        return each.problem
    count, trial = each.best
    return (
        f"no fleet of up to {fleet_of(most_instances(plan.ask, each.bound))} attains the target; "
        f"the best tried, {count}, has {worst(trial)} ms"
    )


def _compared_table(kind: Kind, sized: Sized) -> Table:
    table = _table(f"{kind.profile}: the same with other policies", "policy", "chunk", "instances", "worst tier")
    table.add_row(sized.fleet.policy, "-", str(sized.fleet.instances), worst(sized.trial))
    for each in kind.compared:
        count = f"none (best tried: {each.best_instances})" if each.instances is None else str(each.instances)
        table.add_row(each.policy, _rule(each.chunk), count, worst(each.best))
    return table


def _closing(plan: Plan) -> Iterable[str]:
    best = plan.best
    if best is not None and best.planned is not None:
        cost = plan.per_hour(best.planned)
        price = "" if cost is None else f", {number(cost)} per hour"
        cheapest = "cheapest: " if len(plan.kinds) > 1 else ""
        yield f"{cheapest}{best.planned.fleet.instances} x {best.profile}{price}"
    elif sum(kind.planned is not None for kind in plan.kinds) > 1:
        yield "which kind is cheapest depends on their prices: give them with --price"
    yield f"took {plan.wall_s:.0f} s"


def _rule(chunk: ChunkRule | None) -> str:
    return "-" if chunk is None else f"{chunk.kind}:{chunk.tokens}"


def worst(trial: Trial) -> str:
    """Attainment of the tier that fares worst, and its name."""
    tier, attainment = trial.worst
    return f"{percent(attainment, 2)} at {tier}"


def more(headroom: Headroom | None) -> str:
    if headroom is None:
        return "-"
    return f"{'over ' if headroom.unbroken else ''}{100 * (headroom.factor - 1):.0f} %"


def pair(counts: dict[str, float]) -> str:
    return f"{counts['mean']:.1f} / {counts['p90']:.0f}"


def percent(share: float | None, digits: int) -> str:
    """At most so many digits, and never rounded up to all."""
    if share is None:
        return "-"
    text = f"{100 * share:.{digits}f}"
    if share < 1 and float(text) >= 100:
        text = f"{100 - 10**-digits:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
