"""The `polyserve` command. Each command imports what it needs when it runs, so that `--help` is quick.

What the user got wrong is one line on stderr and exit code 2; a traceback is always our mistake.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyserve.commands import profile as profile_command
from polyserve.commands.dashboard import dashboard
from polyserve.commands.key import key
from polyserve.commands.plan import plan
from polyserve.commands.study import study
from polyserve.commands.validate import validate

if TYPE_CHECKING:
    from polyserve.core.types import ChunkRule
    from polyserve.report import Facts, Score
    from polyserve.sim.scenario import Prepared, Result

app = typer.Typer(
    name="polyserve",
    help="Multi-SLO scheduling for LLM serving: simulate, plan and serve with one decision core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class UsageError(ValueError):
    """An option that cannot be used; the message names it and what would do."""


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors of the user's making end it with code 2."""
    if "" not in sys.path:
        sys.path.append("")  # a policy from outside may lie in the folder that one works in; last, so it hides nothing
    try:
        code = app(args=args, prog_name="polyserve", standalone_mode=False)
    except Exception as error:
        if (line := _users_mistake(error)) is None:
            raise
        print(f"polyserve: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(code or 0)


def _users_mistake(error: Exception) -> str | None:
    """One line to say about an error of the user's making; None for one of ours."""
    if hasattr(error, "format_message"):  # the command line's own
        return " ".join(str(error.format_message()).replace("Value error, ", "").split())
    ours = type(error).__module__.startswith("polyserve.")
    if ours and isinstance(error, ValueError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


# ---------------------------------------------------------------------------------------------------------- simulate


@app.command()
def simulate(
    trace: Annotated[str, typer.Option(help="Trace id, uniform:P/D, or a CSV, JSONL or Parquet file.")] = "azure-conv",
    columns: Annotated[str, typer.Option(help="The file's own column names: prompt=A,output=B,arrived=C:ms")] = "",
    profile: Annotated[str, typer.Option(help="Profile id or a .json file.")] = "a100-llama-3-8b",
    instances: Annotated[int, typer.Option(help="Instances at the start.")] = 20,
    pd: Annotated[
        str, typer.Option(help="PD: how many of them compute prompts, the others answer; auto: as the load asks.")
    ] = "",
    rate: Annotated[str, typer.Option(help="Requests per second, or a share of the optimum: 90%.")] = "",
    duration: Annotated[
        float | None, typer.Option(help="Seconds measured; default 300, recorded: once through.")
    ] = None,
    warm_up: Annotated[
        float | None, typer.Option(help="Seconds before that; default 60, or half the duration.")
    ] = None,
    tpot: Annotated[str, typer.Option(help="TPOT in ms and their shares.")] = "20:.1,30:.2,50:.3,100:.4",
    ttft: Annotated[str, typer.Option(help="TTFT in ms, drawn evenly among the feasible.")] = "300,500,1000",
    arrivals: Annotated[str, typer.Option(help="poisson, gamma:CV or recorded.")] = "poisson",
    best_effort: Annotated[float, typer.Option(help="Share of requests without an SLO.")] = 0.0,
    policy: Annotated[
        str, typer.Option(help="Policy id (see `polyserve policies`), or their.module:Policy.")
    ] = "polyserve",
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE: a setting of the policy.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same run.")] = 0,
    chunk: Annotated[str, typer.Option(help="dynamic or fixed:N; default by policy.")] = "",
    order: Annotated[
        Literal["deadline", "fcfs"] | None, typer.Option(help="How engines queue; default by policy.")
    ] = None,
    jitter: Annotated[float, typer.Option(help="Spread of true iteration times, as a share.")] = 0.0,
    bias: Annotated[float, typer.Option(help="True iterations take 1 + BIAS times what is believed.")] = 0.0,
    sight: Annotated[Literal["gateway", "perfect"], typer.Option(help="What the controller sees.")] = "gateway",
    lag: Annotated[float, typer.Option(help="Seconds until the controller sees something.")] = 0.0,
    network: Annotated[float, typer.Option(help="Seconds until a dispatch arrives.")] = 0.0,
    start_up: Annotated[float, typer.Option(help="Seconds an instance takes to get ready.")] = 0.0,
    min_instances: Annotated[int | None, typer.Option(help="Fewest instances of an elastic fleet.")] = None,
    max_instances: Annotated[int | None, typer.Option(help="Most instances: makes the fleet elastic.")] = None,
    lose: Annotated[int, typer.Option(help="Instances that die in the window.")] = 0,
    leaving: Annotated[float, typer.Option(help="Share of clients that leave early.")] = 0.0,
    failing_starts: Annotated[float, typer.Option(help="Share of starts that fail.")] = 0.0,
    json_to: Annotated[str, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON.")] = "",
    journal: Annotated[str, typer.Option(metavar="FILE", help="Write every step; .gz is compressed.")] = "",
    plot: Annotated[str, typer.Option(metavar="FILE.png", help="Draw the load of every instance over time.")] = "",
) -> None:
    """Run a policy on a trace in virtual time and print how many requests were on time."""
    from polyserve.demand import parse_arrivals, parse_tpot, parse_ttft
    from polyserve.sim.scenario import Scenario, prepare

    drawn = parse_arrivals(arrivals)
    values: dict[str, object] = {}
    if min_instances is not None:
        values["min_instances"] = min_instances
    if max_instances is not None:
        values["max_instances"] = max_instances
    per_second, of_optimal = _rate(rate)
    scenario = Scenario(
        trace=trace,
        columns=_pairs("--columns", columns.split(",") if columns else []),
        profile=profile,
        instances=instances,
        pd=_pd(pd),
        rate=per_second,
        of_optimal=of_optimal,
        duration_s=300.0 if duration is None and drawn.kind != "recorded" else duration,
        warm_up_s=warm_up,
        tpots=tuple(parse_tpot(tpot)),
        ttfts=tuple(parse_ttft(ttft)),
        arrivals=drawn,
        best_effort=best_effort,
        policy=policy,
        values={**values, **_pairs("--set", setting or [])},
        seed=seed,
        chunk=_chunk(chunk),
        order=order,
        jitter=jitter,
        bias=bias,
        sight=sight,
        lag_s=lag,
        network_s=network,
        start_up_s=start_up,
        lost_instances=lose,
        leaving=leaving,
        failing_starts=failing_starts,
    )
    if plot and not plot.lower().endswith(".png"):
        raise UsageError(f"--plot: a file that ends in .png, not {plot!r}")
    _folders({"--json": json_to, "--journal": journal, "--plot": plot})
    prepared = prepare(scenario)
    _tell(_simulated(prepared, journal), prepared, json_to, plot)


def _simulated(prepared: Prepared, journal: str) -> Result:
    """Run it, with progress on stderr."""
    from polyserve.journal import JournalWriter
    from polyserve.sim.scenario import evaluate

    total = len(prepared.spec.requests)
    writing = JournalWriter(journal) if journal else nullcontext()
    with writing as writer, _progress("requests simulated", total) as advance:
        return evaluate(prepared, writer, lambda _, arrived: advance(arrived))


def _tell(result: Result, prepared: Prepared, json_to: str, plot: str) -> None:
    _print_report(result.score, result.facts, json_to)
    if plot:
        from polyserve.plot import draw_loads

        draw_loads(result.run.looks, [t.name for t in prepared.spec.tiers], plot, result.facts)


def _print_report(result: Score, facts: Facts, json_to: str) -> None:
    """The table on stdout, or on stderr when stdout is for JSON."""
    import json

    from rich.console import Console

    from polyserve import report

    console = Console(stderr=json_to == "-", highlight=False)
    if not console.is_terminal:
        console = Console(stderr=json_to == "-", highlight=False, width=150)
    console.print(report.table(result, facts))
    if json_to:
        text = json.dumps(report.to_dict(result, facts), indent=2, allow_nan=False)
        if json_to == "-":
            print(text)
        else:
            Path(json_to).write_text(text + "\n", encoding="utf-8")


def _folders(files: dict[str, str]) -> None:
    """Say now that a file cannot be written, not after minutes of work."""
    for option, path in files.items():
        if not (parent := Path(path).parent).is_dir():
            raise UsageError(f"{option}: there is no folder {str(parent)!r} for {path!r}")


def _rate(text: str) -> tuple[float | None, float | None]:
    """Requests per second, or a share of the optimum."""
    if not text:
        return None, None
    try:
        if text.endswith("%"):
            return None, float(text[:-1]) / 100
        return float(text), None
    except ValueError:
        raise UsageError(f"--rate: requests per second (100) or a share of the optimum (90%), not {text!r}") from None


def _pd(text: str) -> int | Literal["auto"] | None:
    if not text:
        return None
    if text == "auto":
        return "auto"
    if re.fullmatch(r"\d{1,6}", text):
        return int(text)
    raise UsageError(f"--pd: auto, or how many instances compute prompts (6), not {text!r}")


def _pairs(option: str, items: list[str]) -> dict[str, str]:
    """KEY=VALUE items as a dict."""
    pairs: dict[str, str] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not key or not sign:
            raise UsageError(f"{option}: KEY=VALUE, not {item!r}")
        pairs[key.strip()] = value.strip()
    return pairs


def _chunk(text: str) -> ChunkRule | None:
    from polyserve.core.types import ChunkRule

    if not text:
        return None
    if text == "dynamic":
        return ChunkRule()
    if (match := re.fullmatch(r"fixed:(\d{1,9})", text)) and int(match[1]) > 0:
        return ChunkRule("fixed", int(match[1]))
    raise UsageError(f"--chunk: dynamic or fixed:N with N of at least 1, not {text!r}")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far we are: a bar on a terminal, else a line every few seconds; both on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    said_at = time.monotonic()

    def say(done: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= 5.0:
            said_at = time.monotonic()
            print(f"{done} of {total} {what}", file=sys.stderr, flush=True)

    yield say


# ------------------------------------------------------------------------------------------------------------- replay


@app.command()
def replay(
    url: Annotated[str, typer.Option(help="An OpenAI endpoint: http://HOST:PORT, with /v1 or without.")],
    trace: Annotated[str, typer.Option(help="Trace id, uniform:P/D, or a CSV, JSONL or Parquet file.")] = "azure-conv",
    columns: Annotated[str, typer.Option(help="The file's own column names: prompt=A,output=B,arrived=C:ms")] = "",
    model: Annotated[str, typer.Option(help="Default: the one that is served there.")] = "",
    profile: Annotated[str, typer.Option(help="Leave out what no idle instance of this profile could do.")] = "",
    rate: Annotated[float | None, typer.Option(help="Requests per second; default as recorded.")] = None,
    duration: Annotated[float, typer.Option(help="Seconds.")] = 90.0,
    tpot: Annotated[str, typer.Option(help="TPOT in ms and their shares.")] = "20:.1,30:.2,50:.3,100:.4",
    ttft: Annotated[str, typer.Option(help="TTFT in ms, drawn evenly among the feasible.")] = "300,500,1000",
    arrivals: Annotated[str, typer.Option(help="poisson, gamma:CV or recorded.")] = "recorded",
    best_effort: Annotated[float, typer.Option(help="Share of requests without an SLO.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 0,
    api: Annotated[Literal["completions", "chat"], typer.Option(help="chat: prompts of about that length.")] = (
        "completions"
    ),
    max_tokens: Annotated[
        Literal["exact", "none"],
        typer.Option(help="exact: sent as max_tokens; none: hidden where only an emulated engine looks."),
    ] = "exact",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Sent as bearer token.")] = "",
    patience: Annotated[float, typer.Option(help="Seconds to wait for answers after the last request.")] = 120.0,
    json_to: Annotated[str, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON.")] = "",
    requests: Annotated[str, typer.Option(metavar="FILE", help="Write what became of each request, as JSONL.")] = "",
) -> None:
    """Replay a trace against any OpenAI endpoint and score what the client saw."""
    import json
    from functools import partial

    import uvloop

    from polyserve import report
    from polyserve.core import bound
    from polyserve.core.types import ChunkRule
    from polyserve.demand import draw_requests, parse_arrivals, parse_tpot, parse_ttft
    from polyserve.profiles.store import load
    from polyserve.serve import replay as replays
    from polyserve.traces import read_trace

    _folders({"--json": json_to, "--requests": requests})
    read = read_trace(trace, _pairs("--columns", columns.split(",") if columns else []))
    paces = parse_tpot(tpot)
    workload = draw_requests(
        read,
        rate=rate,
        duration_s=duration,
        tpots=paces,
        ttfts=parse_ttft(ttft),
        feasible=partial(bound.feasible, load(profile), ChunkRule()) if profile else replays.anything,
        arrivals=parse_arrivals(arrivals),
        best_effort=best_effort,
        seed=seed,
    )
    endpoint = replays.Endpoint(url, model, api, max_tokens, api_key or None, patience)
    with _progress("requests answered", len(workload)) as advance:
        seen = uvloop.run(replays.replay(workload, replays.Prompts(read, workload, seed), endpoint, advance))
    facts = report.Facts(
        policy=f"live at {url}",
        trace=trace,
        seed=seed,
        infeasible=workload.infeasible,
        wall_s=seen.wall_s,
        notes=[replays.lag_note(seen.lag)],
    )
    result = report.score(seen.outcomes, replays.window(workload, seen), [tpot_s for tpot_s, _ in paces])
    _print_report(result, facts, json_to)
    if requests:
        rows = replays.to_rows(seen.outcomes)
        Path(requests).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- engine


@app.command()
def engine(
    profile: Annotated[str, typer.Option(help="Profile id or a .json file: how long iterations take.")],
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    instances: Annotated[int, typer.Option(help="Instances of this process, on consecutive ports.")] = 1,
    chunk: Annotated[str, typer.Option(help="dynamic or fixed:N.")] = "dynamic",
    order: Annotated[
        Literal["deadline", "fcfs"] | None, typer.Option(help="Default: deadline with a dynamic chunk, else fcfs.")
    ] = None,
    chunk_bound: Annotated[
        Literal["pace", "slack", "need"], typer.Option(help="What a dynamic chunk keeps within.")
    ] = "need",
    jitter: Annotated[float, typer.Option(help="Spread of iteration times, as a share.")] = 0.0,
    bias: Annotated[float, typer.Option(help="Iterations take 1 + BIAS times what the profile says.")] = 0.0,
    believed: Annotated[str, typer.Option(help="Profile that the chunk rule believes; default the same.")] = "",
    model_name: Annotated[str, typer.Option(help="Model it serves; default the profile's name.")] = "",
    max_num_seqs: Annotated[int | None, typer.Option(help="Default the profile's.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Default the profile's.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="Default the profile's.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same answers.")] = 0,
) -> None:
    """Emulate engines in real time behind vLLM's HTTP API."""
    from polyserve.engines.server import EngineOptions, run_engine

    options = EngineOptions(
        profile=profile,
        port=port,
        host=host,
        instances=instances,
        chunk=chunk,
        order=order,
        chunk_bound=chunk_bound,
        jitter=jitter,
        bias=bias,
        believed=believed,
        model_name=model_name,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_tokens=kv_tokens,
        seed=seed,
    )
    run_engine(options, lambda line: print(line, flush=True))


# ------------------------------------------------------------------------------------------------------------ gateway


_ConfigFile = Annotated[Path, typer.Argument(help="A YAML file; examples/demo/fleet.yaml is one.")]
_Supervise = Annotated[
    bool, typer.Option("--supervise", help="Under a small parent that holds the sockets: see `polyserve restart`.")
]


class Incumbent(StrEnum):
    """Rules that may route while PolyServe watches."""

    LEAST_REQUESTS = "least-requests"
    ROUND_ROBIN = "round-robin"


@app.command()
def serve(
    config: _ConfigFile,
    supervise: _Supervise = False,
    observe: Annotated[
        bool, typer.Option("--observe", help="Only say what would have been done: see --incumbent.")
    ] = False,
    incumbent: Annotated[Incumbent, typer.Option(help="With --observe: who routes.")] = Incumbent.LEAST_REQUESTS,
) -> None:
    """Serve one model or several over the instances that the config lists."""
    _run_gateway(config, launch=False, supervise=supervise, incumbent=incumbent.value if observe else None)


@app.command()
def up(config: _ConfigFile, supervise: _Supervise = False) -> None:
    """Serve one model or several, and start and stop the instances of the config's launchers."""
    _run_gateway(config, launch=True, supervise=supervise)


def _run_gateway(config: Path, launch: bool, supervise: bool, incumbent: str | None = None) -> None:
    if supervise:
        from polyserve.serve import supervisor

        watching = [] if incumbent is None else ["--observe", "--incumbent", incumbent]
        command = [sys.executable, "-m", "polyserve", "up" if launch else "serve", str(config), *watching]
        raise typer.Exit(supervisor.run(command))
    from polyserve.config import GatewayError, run_gateway

    try:
        run_gateway(config, launch, incumbent)
    except GatewayError as error:
        print(f"polyserve: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def restart(
    pid: Annotated[int, typer.Option(min=2, help="Of `polyserve serve --supervise`.")],
) -> None:
    """Replace the process that a supervised gateway serves with by a new one; no request is lost."""
    try:
        os.kill(pid, signal.SIGUSR2)
    except (ProcessLookupError, PermissionError) as error:
        raise UsageError(f"--pid: process {pid}: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------------------ journals


@app.command("replay-journal")
def replay_journal(file: Annotated[Path, typer.Argument(help="A journal, .gz or not.")]) -> None:
    """Feed a journal's events to the core again; exit 1 and name the first line where a decision differs."""
    from polyserve.journal import replay

    result = replay(file)
    if result.mismatch is not None:
        print(f"{file}: {result.mismatch}")
        raise typer.Exit(1)
    torn = "; the last line is cut off and was left out" if result.torn else ""
    print(f"{file}: {result.steps} steps, every decision the same{torn}")


# ------------------------------------------------------------------------------------------- commands of their own file

app.command()(dashboard)
app.command()(key)
app.command()(plan)
app.command()(study)
app.command()(validate)
app.add_typer(profile_command.app, name="profile")

# -------------------------------------------------------------------------------------------------------------- lists


@app.command()
def policies(name: Annotated[str, typer.Argument(help="One policy: all its settings.")] = "") -> None:
    """List the policies, each with the settings in which it differs from `polyserve`."""
    from polyserve.core.settings import POLICIES, Settings, policy

    if name:
        for key, value in policy(name).to_dict().items():
            print(f"{key} = {value}")
        return
    usual = Settings().to_dict()
    for each, settings in POLICIES.items():
        other = [f"{key}={value}" for key, value in settings.to_dict().items() if value != usual[key]]
        print(f"{each:18} {' '.join(other) or '(the defaults)'}")


@app.command()
def profiles() -> None:
    """List the shipped profiles."""
    from polyserve.profiles.store import load, shipped_names

    rows: list[list[Any]] = [["profile", "KV tokens", "sequences", "batched tokens", "mixed batches"]]
    for name in shipped_names():
        each = load(name)
        mixed = each.mixed_kv_factor > 1 or each.mixed_per_decode_s > 0
        limits = each.limits
        rows.append(
            [
                name,
                limits.kv_tokens,
                limits.max_num_seqs,
                limits.max_num_batched_tokens,
                "dearer" if mixed else "as apart",
            ]
        )
    _columns(rows)


@app.command()
def traces() -> None:
    """List the shipped traces."""
    from polyserve.traces import read_trace, trace_ids

    rows: list[list[Any]] = [["trace", "requests", "mean prompt", "mean output", "recorded rate"]]
    for name in trace_ids():
        each = read_trace(name)
        rate = f"{each.recorded_rate:.3g}/s" if each.recorded_rate else "-"
        rows.append([name, len(each), round(each.prompt_tokens.mean()), round(each.output_tokens.mean()), rate])
    rows.append(["uniform:P/D", "-", "P", "D", "-"])
    _columns(rows)


def _columns(rows: list[list[Any]]) -> None:
    """Print rows in columns, numbers to the right."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [str(row[0]).ljust(widths[0]), *(str(c).rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
