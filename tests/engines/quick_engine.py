"""A running emulated engine, in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from polyserve.core.profile import Limits, Profile
from polyserve.engines.server import EngineOptions, serve_engine
from polyserve.profiles import store

# Iterations of 2 ms: quick enough to wait for.
QUICK = Profile(
    "quick",
    (0, 1000),
    (0.002, 0.012),
    1e-6,
    0.0,
    0.0,
    Limits(kv_tokens=20_000, max_num_seqs=8, max_num_batched_tokens=500, context_tokens=4096),
)


@contextlib.asynccontextmanager
async def running(folder: Path, instances: int = 1, **options: Any) -> AsyncIterator[list[str]]:
    """Engines of the quick profile, by their URLs; they end with the block."""
    file = folder / "quick.json"
    store.save(QUICK, file)
    lines: asyncio.Queue[str] = asyncio.Queue()
    serving = asyncio.create_task(
        serve_engine(EngineOptions(str(file), port=0, instances=instances, **options), lines.put_nowait)
    )
    try:
        yield [(await lines.get()).split()[-1] for _ in range(instances)]
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
