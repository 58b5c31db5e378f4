"""`polyserve validate`: a recorded engine run replayed through the simulated engine, and how far off that is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from polyserve.sim.validate import Prediction


def validate(
    requests: Annotated[Path, typer.Option(metavar="LOG.csv[.gz]", help="One row per request, with vLLM's times.")],
    profile: Annotated[str, typer.Option(help="Profile id or a .json file.")],
    max_batched_tokens: Annotated[int, typer.Option(min=1, help="As the recorded engine was started.")],
    max_seqs: Annotated[int, typer.Option(min=1, help="As the recorded engine was started.")],
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="Default the profile's.")] = None,
    synchronous: Annotated[
        bool, typer.Option("--synchronous", help="The engine schedules between iterations (vLLM before 0.14).")
    ] = False,
    json_to: Annotated[str, typer.Option("--json", metavar="FILE|-", help="Write the comparison as JSON.")] = "",
) -> None:
    """Predict a recorded engine run from a profile, and compare."""
    from polyserve.commands.output import columns, write_json
    from polyserve.profiles.store import digest, load
    from polyserve.sim.validate import Limits, predict, read_log, without_host_overhead

    limits = Limits(max_batched_tokens, max_seqs, kv_tokens, not synchronous)
    rows, read = read_log(requests), load(profile)
    given, bare = predict(rows, read, limits), predict(rows, without_host_overhead(read), limits)
    overhead = read.notes.get("host_overhead", f"{read.host_overhead_s * 1e3:g} ms an iteration: source not said")
    quiet = json_to == "-"
    say = sys.stderr if quiet else sys.stdout
    print(f"{len(rows)} requests of {requests}, predicted from {read.name}: first come, first served,", file=say)
    print(f"{max_batched_tokens} tokens and {max_seqs} sequences an iteration, {given.iterations} iterations", file=say)
    for what, prediction in (
        (f"host overhead {overhead}", given),
        ("the same without host overhead", bare),
    ):
        print(f"\n{what}", file=say)
        columns(table(prediction), to_stderr=quiet)
    if given.extrapolated:
        print(f"\n{given.extrapolated} iterations lie outside what the profile was measured on", file=say)
    if json_to:
        facts: dict[str, Any] = {
            "requests": len(rows),
            "profile": read.name,
            "profile_digest": digest(read),
            "max_batched_tokens": max_batched_tokens,
            "max_seqs": max_seqs,
            "kv_tokens": kv_tokens or read.limits.kv_tokens,
            "async_scheduling": not synchronous,
            "host_overhead_s": read.host_overhead_s,
            "host_overhead_source": overhead,
        }
        write_json(json_to, facts | given.to_dict() | {"without_host_overhead": bare.to_dict()})


def table(prediction: Prediction) -> list[list[str]]:
    """A row per metric: means recorded and predicted, and the errors of mean and percentiles."""
    rows = [["", "recorded", "predicted", "mean", "p50", "p90", "p99"]]
    for name in ("ttft", "tpot", "latency"):
        each = getattr(prediction, name)
        if not each.recorded_s:
            continue
        unit, scale = ("ms", 1e3) if name == "tpot" else ("s", 1.0)
        means = [f"{side['mean'] * scale:.2f} {unit}" for side in (each.recorded_s, each.predicted_s)]
        label = "latency" if name == "latency" else name.upper()
        rows.append([label, *means, *(f"{error:+.1%}" for error in each.errors.values())])
    return rows
