"""`polyserve study`: the goodput of policies, found by simulation, with one command."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyserve.study.study import Progress

# Between two lines of progress in a pipe.
EVERY_S = 10.0


def study(
    setting: Annotated[str, typer.Option(help="Which question; `--setting list` names them all.")] = "list",
    policies: Annotated[str, typer.Option(help="Instead of the setting's: polyserve,minimal,random@512")] = "",
    workloads: Annotated[str, typer.Option(help="Instead of the setting's: trace ids, uniform:P/D or files.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="One seed, 2 % tolerance, fewer cases: minutes.")] = False,
    jobs: Annotated[int, typer.Option(help="Worker processes; 0: one per core.")] = 0,
    json_to: Annotated[str, typer.Option("--json", metavar="FILE|-", help="Write the result as JSON.")] = "",
    out: Annotated[str, typer.Option(metavar="DIR", help="Keep runs, result and a report of it in this folder.")] = "",
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    requests: Annotated[
        int | None, typer.Option(help="Fewest requests in a window at the optimum; default by setting.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make runs of earlier code again.")] = False,
) -> None:
    """Find the highest load that policies hold, against the optimum and the best baseline."""
    from rich.console import Console

    from polyserve.commands.output import write_json
    from polyserve.study.result import result
    from polyserve.study.settings import SETTINGS, StudyError, setting_named
    from polyserve.study.store import Store
    from polyserve.study.study import carry_out, planned
    from polyserve.study.table import tables

    if setting == "list":
        for each in SETTINGS.values():
            print(f"{each.name:14} {each.asks}")
        return
    if jobs < 0:
        raise StudyError(f"--jobs: 0 for one per core, or a number of processes, not {jobs}")
    if json_to and not (parent := Path(json_to).parent).is_dir():
        raise StudyError(f"--json: there is no folder {str(parent)!r} for {json_to!r}")
    plan = planned(
        setting_named(setting),
        quick=quick,
        policies=_split(policies),
        workloads=_split(workloads),
        seed=seed,
        requests=requests,
    )
    path = Path(out) / "runs.jsonl" if out else _kept(setting)
    store = Store(path, fresh)
    try:
        with _progress() as on_progress:
            found = carry_out(plan, store, jobs or _cores(), on_progress)
    except KeyboardInterrupt:
        print(f"polyserve: stopped; {path} keeps every run: the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        store.close()
    told = result(plan, found, _command(setting, policies, workloads, quick, seed, requests))
    for to in (json_to, str(Path(out) / "results.json") if out else ""):
        if to:
            write_json(to, told)
    console = Console(stderr=json_to == "-", highlight=False)
    if not console.is_terminal:
        console = Console(stderr=json_to == "-", highlight=False, width=170)
    console.print(tables(told))
    if out:
        report = _reported(told, Path(out))
        console.print(f"report: {report}", markup=False, soft_wrap=True)


def _reported(told: dict[str, Any], folder: Path) -> Path:
    """Write the report of a result beside it."""
    from polyserve.study.page.document import page

    path = folder / "report.html"
    path.write_text(page(told), encoding="utf-8")
    return path


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _kept(setting: str) -> Path:
    """Where runs are kept when nobody says where."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "polyserve" / "study" / f"{setting}.jsonl"


def _command(setting: str, policies: str, workloads: str, quick: bool, seed: int, requests: int | None) -> str:
    """The command that finds the same, without where it keeps it."""
    words = ["polyserve", "study", "--setting", setting]
    words += ["--policies", policies] if policies else []
    words += ["--workloads", workloads] if workloads else []
    words += ["--quick"] if quick else []
    words += [] if requests is None else ["--requests", str(requests)]
    return shlex.join([*words, "--seed", str(seed)])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Shows how far we are, on stderr: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda told: bar.update(task, completed=told.ended, total=told.tracks, description=_line(told))
        return
    said_at = time.monotonic()

    def say(told: Progress) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= EVERY_S:
            said_at = time.monotonic()
            print(f"{told.ended} of {told.tracks} searches ended, {_line(told)}", file=sys.stderr, flush=True)

    yield say


def _line(told: Progress) -> str:
    kept = f" and {told.kept} kept" if told.kept else ""
    now = "; ".join(
        f"{job.policy}{f'@{job.chunk}' if job.chunk else ''} on {job.case.name} at {100 * job.load:.0f} %"
        for job in told.running
    )
    return f"{told.runs} runs made{kept}{f', now {now}' if now else ''}"
