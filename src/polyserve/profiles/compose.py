"""Compose a profile from public kernel tables: the sum of a transformer's layers, then the law fitted to it.

`polyserve.profiles.kernels` has the tables and the sum. No CPU or scheduler time is in it; that is
`host_overhead_s`, an input here whose source the notes give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyserve.core.profile import Limits, Profile, ProfileError
from polyserve.profiles import store
from polyserve.profiles.fit import Law, Shapes, fit_law
from polyserve.profiles.kernels import BYTES, Engine, Kernels, Model, Tables, model_named, read_tables
from polyserve.profiles.layers import LayerKernels, LayerTables

KNOTS = (0, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384)
PREFILLS = (0, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
PASTS = (0, 512, 2048, 8192)
DECODES = (0, 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
CONTEXTS = (64, 256, 512, 1024, 2048, 4096, 8192, 16384)

# Decode attention beside a prefill chunk costs more than alone. Measured on one RTX PRO 6000 under vLLM 0.19 with
# Llama-3.1-8B (github.com/casys-kaist/LLMServingSim, MIT): least squares give 1.76 on the KV slope and about 15 us
# per decode over 32 layers, single ratios spread from 0.6 to 5.8. On any other GPU this is an assumption.
MIXED_KV_FACTOR = 1.76
MIXED_PER_DECODE_AND_LAYER_S = 15e-6 / 32

# Seconds of one iteration that no kernel accounts for, and where the number comes from.
HOST_OVERHEAD_S = 0.65e-3
HOST_OVERHEAD_SOURCE = (
    "what a whole vLLM engine took beyond its composed kernels at batch 1 (Llama-3.1-8B FP8 on one H200, median of "
    "6; ai-dynamo/dynamo: components/src/dynamo/planner/tests/data/profiling_results/H200_TP1P_TP1D, Apache-2.0); "
    "assumed for other GPUs. Not included: the same runs took about 15 % longer than composed at larger batches, "
    "and about 15 ms a prompt before its prefill"
)

# What ships, with the limits that vLLM gives each GPU by default.
SHIPPED = {
    "h200-llama-3-8b": ("h200_sxm", "llama-3-8b", Engine()),
    "a100-llama-3-8b": ("a100_sxm", "llama-3-8b", Engine(max_num_seqs=256, max_num_batched_tokens=2048)),
    "h200-llama-3-70b-tp4": ("h200_sxm", "llama-3-70b", Engine(tensor_parallel=4)),
}


@dataclass(frozen=True, slots=True)
class Composed:
    """A profile and the grid it was fitted to, for whoever wants to see the errors."""

    profile: Profile
    law: Law
    shapes: Shapes


def kv_tokens(gpu: Mapping[str, Any], model: Model, engine: Engine) -> int:
    """Tokens of KV that fit: the engine's share of memory less weights, NCCL and activations, in whole blocks."""
    tp = engine.tensor_parallel
    if not gpu:
        raise ProfileError("the GPU's memory is not known: say --memory-gib or --kv-tokens")
    misc = gpu.get("misc", {})
    reserve = misc.get("other_mem", 0) + misc.get("nccl_mem", {}).get(tp, 0)
    weight_bytes = model.parameters * (1 if engine.dtype.startswith("fp8") else BYTES) / tp
    free = gpu["gpu"]["mem_capacity"] * engine.memory_share - weight_bytes - reserve
    blocks = int(free // (model.kv_bytes_per_token / tp * engine.block_size))
    if blocks < 1:
        raise ProfileError(f"{model.name} leaves no memory for KV on {tp} GPU")
    return blocks * engine.block_size


def shapes_of(kernels: Kernels | LayerKernels, limits: Limits) -> Shapes:
    """The composed times of a grid of batch shapes within the engine's limits."""
    grid = np.array(np.meshgrid(PREFILLS, PASTS, DECODES, CONTEXTS, indexing="ij"), float).reshape(4, -1)
    chunk, past, decodes, context = grid
    kept = (chunk + decodes > 0) & (chunk + decodes <= limits.max_num_batched_tokens)
    kept &= (decodes <= limits.max_num_seqs) & (decodes * context <= limits.kv_tokens)
    kept &= (chunk > 0) | (past == 0)
    kept &= (decodes > 0) | (context == CONTEXTS[0])
    chunk, past, decodes, context = grid[:, kept]
    seconds = kernels.iteration_s(chunk, past, decodes, context)
    return Shapes(chunk, decodes, decodes * context, chunk * (past + chunk / 2), seconds)


def compose(
    tables: Tables | LayerTables,
    model: Model,
    engine: Engine,
    name: str,
    *,
    host_overhead_s: float = 0.0,
    host_overhead_source: str = "none known",
) -> Composed:
    """The profile of one model on one GPU type.

    Where the tables have prefill and decode attention apart, their sum: decode attention as if it ran alone. Raises
    `ProfileError` where the tables lack what the model needs.
    """
    kernels = (Kernels if isinstance(tables, Tables) else LayerKernels)(tables, model, engine)  # type: ignore[arg-type]
    limits = Limits(
        kv_tokens=engine.kv_tokens or kv_tokens(tables.gpu, model, engine),
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        context_tokens=engine.context_tokens,
    )
    shapes = shapes_of(kernels, limits)
    knots = tuple(float(x) for x in KNOTS if x <= limits.max_num_batched_tokens)
    law = fit_law(shapes, knots, mixed=kernels.mixed)
    profile = Profile(
        name=name,
        knots=law.knots,
        knot_s=tuple(_rounded(s) for s in law.knot_s),
        per_decode_s=_rounded(law.per_decode_s),
        per_kv_token_s=_rounded(law.per_kv_token_s),
        per_attention_s=_rounded(law.per_attention_s),
        limits=limits,
        mixed_kv_factor=_rounded(law.mixed_kv_factor),
        mixed_per_decode_s=_rounded(law.mixed_per_decode_s),
        host_overhead_s=host_overhead_s,
        kv_bytes_per_token=model.kv_bytes_per_token,
        measured_to=kernels.measured_to(),
        notes=kernels.notes()
        | _notes(engine, law, len(shapes), tables)
        | {"host_overhead": f"{host_overhead_s * 1e3:g} ms an iteration: {host_overhead_source}"},
    )
    return Composed(profile, law, shapes)


def mixed(profile: Profile, model: Model, name: str) -> Profile:
    """The same profile with decode attention dearer beside a chunk, as an assumption that its notes name."""
    return dataclasses.replace(
        profile,
        name=name,
        mixed_kv_factor=MIXED_KV_FACTOR,
        mixed_per_decode_s=_rounded(MIXED_PER_DECODE_AND_LAYER_S * model.layers),
        notes=dict(profile.notes)
        | {
            "mixed": "an assumption here: factor 1.76 on the KV slope and 15 us per decode per 32 layers beside a "
            "chunk were measured on one RTX PRO 6000 under vLLM 0.19 with Llama-3.1-8B "
            "(casys-kaist/LLMServingSim: profiler/perf, MIT); single ratios spread from 0.6 to 5.8"
        },
    )


def compose_shipped(directory: str | Path, out: str | Path) -> list[Composed]:
    """Write the profiles that ship with the product, each as composed and with the mixed penalty assumed.

    The same tables always give the same files.
    """
    made = []
    for name, (gpu, model_name, engine) in SHIPPED.items():
        model = model_named(model_name)
        composed = compose(
            read_tables(directory, gpu),
            model,
            engine,
            name,
            host_overhead_s=HOST_OVERHEAD_S,
            host_overhead_source=HOST_OVERHEAD_SOURCE,
        )
        store.save(composed.profile, Path(out) / f"{name}.json")
        store.save(mixed(composed.profile, model, f"{name}-mixed"), Path(out) / f"{name}-mixed.json")
        made.append(composed)
    return made


def _rounded(seconds: float) -> float:
    """Six significant digits: what a fit is worth, and what keeps files readable."""
    return float(f"{seconds:.6g}")


def _notes(engine: Engine, law: Law, count: int, tables: Tables | LayerTables) -> dict[str, str]:
    measured = isinstance(tables, LayerTables)
    memory = (
        tables.memory
        if isinstance(tables, LayerTables)
        else "memory and reserves from the GPU's data sheet in the same repository"
    )
    return {
        "fit": f"{count} batch shapes within the limits: relative error mean {law.mean_error:.1%}, "
        f"99 % below {law.p99_error:.1%}, largest {law.max_error:.1%}",
        "mixed": f"measured: x{law.mixed_kv_factor:.3g} on the KV slope and {law.mixed_per_decode_s * 1e6:.3g} us a "
        "decode more beside a chunk, least squares over batches of both"
        if measured
        else "factor 1: prefill and decode attention were measured apart and are added",
        "kv_tokens": "as given"
        if engine.kv_tokens
        else f"(GPU memory x {engine.memory_share:g} - weights - NCCL - 3.5 GiB for activations and CUDA "
        f"graphs) / KV bytes per token; {memory}",
        "context": f"{engine.context_tokens} tokens as Llama 3.1; kv_tokens may hold less",
    }
