"""`polyserve plan`: how many instances of which kind, per tier, at what cost, with what headroom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyserve.planner.ask import Ask
    from polyserve.planner.plan import Plan

# What --quick changes of the question: shorter runs, and fewer seeds.
QUICK = {"requests": 3_000, "seeds": 2, "search_seeds": 1, "tolerance": 0.05, "warm": 0.9, "residencies": 1.5}


def plan(
    rate: Annotated[str, typer.Option(help="Requests per second, or recorded: the trace's own times.")] = "recorded",
    trace: Annotated[str, typer.Option(help="Trace id, uniform:P/D, or a CSV, JSONL or Parquet file.")] = "azure-conv",
    columns: Annotated[str, typer.Option(help="The file's own column names: prompt=A,output=B,arrived=C:ms")] = "",
    tpot: Annotated[
        str, typer.Option(help="TPOT (ms, or with a unit) and their shares: 20ms:10,100ms:90.")
    ] = "20:.1,30:.2,50:.3,100:.4",
    ttft: Annotated[
        str, typer.Option(help="TTFT (ms, or with a unit), drawn evenly among the feasible.")
    ] = "300,500,1000",
    target: Annotated[str, typer.Option(help="Percentage of every tier's requests that is to be in time.")] = "99",
    profiles: Annotated[str, typer.Option(help="Profile ids or .json files, by commas.")] = "a100-llama-3-8b",
    price: Annotated[str, typer.Option(help="Of an instance-hour: PROFILE=2.5,... or a number for one.")] = "",
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma:CV or recorded; default poisson, recorded for --rate recorded.")
    ] = "",
    policy: Annotated[str, typer.Option(help="Policy id; see `polyserve policies`.")] = "polyserve",
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE: a setting of the policy.")] = None,
    shift: Annotated[
        list[str] | None,
        typer.Option(help="WHAT=FACTOR,... of TPOT in ms, prompts, outputs, rate; none: no shifts. Default: 1.5 each."),
    ] = None,
    compare: Annotated[str, typer.Option(help="Policies to plan for as well: minimal,round-robin@512")] = "",
    seed: Annotated[int, typer.Option(help="Same seed, same plan.")] = 0,
    seeds: Annotated[int | None, typer.Option(help="Seeds that confirm the plan; default 3, quick 2.")] = None,
    requests: Annotated[
        int | None, typer.Option(help="Measured in one run at most; default 10000, quick 3000.")
    ] = None,
    max_instances: Annotated[int | None, typer.Option(help="Largest fleet tried; default six times the bound.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter runs and fewer seeds.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes; a kind and a shift can be done by each.")] = 1,
    json_to: Annotated[str, typer.Option("--json", metavar="FILE|-", help="Write the plan as JSON.")] = "",
    out: Annotated[str, typer.Option(metavar="FILE.png", help="Draw attainment and cost over fleet size.")] = "",
) -> None:
    """Find the smallest fleet whose every tier is in time, its cost and headroom, and what shifts would change."""
    from polyserve.planner.ask import PlanError
    from polyserve.planner.plan import make_plan
    from polyserve.planner.saying import saying

    ask = _ask(
        rate=rate,
        trace=trace,
        columns=columns,
        tpot=tpot,
        ttft=ttft,
        target=target,
        profiles=profiles,
        price=price,
        arrivals=arrivals,
        policy=policy,
        settings=setting or [],
        shifts=shift,
        compare=compare,
        seed=seed,
        max_instances=max_instances,
        effort={
            **(QUICK if quick else {}),
            **({} if seeds is None else {"seeds": seeds}),
            **({} if requests is None else {"requests": requests}),
        },
    )
    if out and not out.lower().endswith(".png"):
        raise PlanError(f"out: a file that ends in .png, not {out!r}")
    for option, path in (("json", json_to), ("out", out)):
        if not (parent := Path(path).parent).is_dir():
            raise PlanError(f"{option}: there is no folder {str(parent)!r} for {path!r}")
    if jobs < 1:
        raise PlanError(f"jobs: at least 1, not {jobs}")
    with saying() as says:
        answer = make_plan(ask, says, jobs, bool(out))
    _tell(answer, json_to, out)
    if not any(kind.planned for kind in answer.kinds):
        raise typer.Exit(1)


def _ask(
    *,
    rate: str,
    trace: str,
    columns: str,
    tpot: str,
    ttft: str,
    target: str,
    profiles: str,
    price: str,
    arrivals: str,
    policy: str,
    settings: list[str],
    shifts: list[str] | None,
    compare: str,
    seed: int,
    max_instances: int | None,
    effort: dict[str, Any],
) -> Ask:
    """The question that the options ask; raises `PlanError`, `DemandError`."""
    from polyserve.demand import parse_arrivals, parse_tpot, parse_ttft
    from polyserve.planner import ask as asks

    tpot, ttft = asks.plain_ms(tpot), asks.plain_ms(ttft)
    tpots = tuple(parse_tpot(tpot))
    asks.check_shares(tpot)
    kinds = tuple(_items(profiles))
    per_second = None if rate.strip() == "recorded" else asks.parse_rate(rate)
    if shifts is None:
        chosen = asks.usual_shifts(tpots)
    else:
        chosen = () if shifts == ["none"] else tuple(asks.parse_shift(text, tpots) for text in shifts)
    return asks.Ask(
        tpots=tpots,
        ttfts=tuple(parse_ttft(ttft)),
        target=asks.parse_target(target),
        profiles=kinds,
        trace=trace,
        columns=asks.parse_pairs("columns", _items(columns)),
        rate=per_second,
        arrivals=parse_arrivals(arrivals or ("recorded" if per_second is None else "poisson")),
        prices=asks.parse_prices(price, kinds),
        policy=policy,
        values=asks.parse_pairs("set", settings),
        compare=tuple(asks.parse_rival(item) for item in _items(compare)),
        shifts=chosen,
        seed=seed,
        max_instances=max_instances,
        **effort,
    )


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _tell(answer: Plan, json_to: str, out: str) -> None:
    """The tables on stdout, or on stderr when stdout is for JSON."""
    from rich.console import Console

    from polyserve.commands.output import write_json
    from polyserve.planner.picture import draw_plan
    from polyserve.planner.tell import tables, to_dict

    console = Console(stderr=json_to == "-", highlight=False)
    if not console.is_terminal:
        console = Console(stderr=json_to == "-", highlight=False, width=150)
    console.print(tables(answer), crop=False)
    if out:
        draw_plan(answer, out)
    if json_to:
        write_json(json_to, to_dict(answer))
