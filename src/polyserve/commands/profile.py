"""`polyserve profile`: compose one from kernel tables, show what one says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Compose a profile from kernel tables, or show one.", no_args_is_help=True)


class ProfileOptionError(ValueError):
    """An option that cannot be used; the message names it and what would do."""


@app.command()
def compose(
    files: Annotated[list[Path], typer.Argument(help="One GPU's tables, in any order; known by their columns.")],
    model: Annotated[str, typer.Option(help="Model shape, such as llama-3-8b or llama-3-70b.")],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="The profile to write.")],
    tp: Annotated[int, typer.Option(min=1, help="GPUs an instance is split over.")] = 1,
    name: Annotated[str, typer.Option(help="Default: the file's name.")] = "",
    dtype: Annotated[str, typer.Option(help="Of the linear layers: bfloat16 or fp8.")] = "bfloat16",
    host_overhead: Annotated[
        float | None, typer.Option(help="Seconds of an iteration that no kernel accounts for; default a published one.")
    ] = None,
    host_overhead_source: Annotated[str, typer.Option(help="Where that number is from.")] = "",
    max_seqs: Annotated[int | None, typer.Option(min=1, help="Default: 1024, or what was measured.")] = None,
    max_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Default: 8192, or what was measured.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="Default: what fits into the GPU's memory.")] = None,
    memory_gib: Annotated[
        float | None, typer.Option(min=1, help="The GPU's memory, where no data sheet says it.")
    ] = None,
    assume_mixed: Annotated[
        bool, typer.Option("--assume-mixed", help="Decodes dearer beside a chunk, where that was not measured.")
    ] = False,
) -> None:
    """Build a profile from kernel tables: AIConfigurator's or LLMServingSim's."""
    from polyserve.profiles import store
    from polyserve.profiles.compose import HOST_OVERHEAD_S, HOST_OVERHEAD_SOURCE, mixed
    from polyserve.profiles.compose import compose as composed
    from polyserve.profiles.kernels import Engine, model_named
    from polyserve.profiles.layers import LayerTables
    from polyserve.profiles.sources import read_sources

    if host_overhead is None:
        host_overhead, host_overhead_source = HOST_OVERHEAD_S, host_overhead_source or HOST_OVERHEAD_SOURCE
    elif not 0 <= host_overhead < 1:
        raise ProfileOptionError(f"--host-overhead: seconds from 0 to 1, not {host_overhead:g}")
    elif host_overhead > 0 and not host_overhead_source:
        raise ProfileOptionError("--host-overhead-source: say where the host overhead is from")
    shape, tables = model_named(model), read_sources(files, memory_gib)
    layers = tables if isinstance(tables, LayerTables) else None
    engine = Engine(
        tensor_parallel=tp,
        max_num_seqs=max_seqs or (layers.largest_batch if layers else 1024),
        max_num_batched_tokens=max_batched_tokens or (layers.largest_chunk if layers else 8192),
        kv_tokens=kv_tokens,
        dtype=dtype,
    )
    made = composed(
        tables,
        shape,
        engine,
        name or out.stem,
        host_overhead_s=host_overhead,
        host_overhead_source=host_overhead_source or "none, as asked for",
    )
    profile = made.profile
    if assume_mixed:
        if layers:
            raise ProfileOptionError("--assume-mixed: these tables have mixed batches measured")
        profile = mixed(profile, shape, profile.name)
    store.save(profile, out)
    print(f"{out}: {profile.name}, fitted to {profile.notes['fit']}")
    print(f"host overhead {profile.notes['host_overhead']}")


@app.command()
def show(
    profile: Annotated[str, typer.Argument(help="Profile id or a .json file.")],
    plot: Annotated[str, typer.Option(metavar="FILE.png", help="Draw it.")] = "",
    json_to: Annotated[str, typer.Option("--json", metavar="FILE|-", help="Write it as JSON.")] = "",
) -> None:
    """Say what an iteration costs, and how many decodes each pace holds."""
    from polyserve.commands.output import columns, write_json
    from polyserve.profiles import describe
    from polyserve.profiles.store import load

    read = load(profile)
    if plot:
        from polyserve.profiles.picture import draw_profile

        draw_profile(read, plot)
    if json_to:
        write_json(json_to, describe.to_dict(read))
        if json_to == "-":
            return
    print(read.name)
    for what, how_much in describe.words(read):
        print(f"  {what:18} {how_much}")
    print("\nlargest batch of decodes that keeps a pace, by context")
    columns([["  pace", *(f"{c:,}" for c in describe.CONTEXTS)], *([f"  {p}", *n] for p, n in describe.batches(read))])
    print()
    for what, text in read.notes.items():
        print(f"  {what}: {text}")
