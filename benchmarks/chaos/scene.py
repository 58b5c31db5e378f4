"""What is on the stage: the emulated engines' profile, the tiers, and the gateway's config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from polyserve.core.profile import Limits, Profile
from polyserve.profiles import store

MODEL = "chaos"
ENGINES = 6
# Slow iterations of small batches: six engines, the gateway and the clients are to fit on two cores with room for
# the faults. What six of these hold is about 2,000 tokens per second.
PROFILE = Profile(
    "chaos",
    (0, 512),
    (0.022, 0.060),
    0.0004,
    1e-7,
    0.0,
    Limits(kv_tokens=12_000, max_num_seqs=16, max_num_batched_tokens=512, context_tokens=4096),
)
# name, TPOT and TTFT in milliseconds
TIERS = (("fast", 50, 1_500), ("medium", 100, 3_000), ("slow", 200, 6_000))
# A stream that is silent for so long is broken; best effort that was begun waits as long for a place to go on at.
SILENCE_S = 60.0


def write_profile(folder: Path) -> Path:
    """The profile as the file that engines and gateway read."""
    path = folder / "chaos.json"
    store.save(PROFILE, path)
    return path


def config(folder: Path, port: int, urls: Sequence[str], **more: Any) -> dict[str, Any]:
    """The gateway's config as plain values."""
    plain: dict[str, Any] = {
        "model": MODEL,
        "listen": {"host": "127.0.0.1", "port": port},
        "profile": str(write_profile(folder)),
        "tiers": [{"name": name, "tpot_ms": tpot, "ttft_ms": ttft} for name, tpot, ttft in TIERS],
        "default_tier": "slow",
        "instances": [{"id": f"e{n}", "url": url} for n, url in enumerate(urls)],
        "journal": str(folder / "journal.jsonl"),
        "limits": {"probe_s": 0.25, "silence_s": SILENCE_S, "shutdown_s": 20, "attempts": 5},
    }
    return plain | more


def write_config(folder: Path, plain: dict[str, Any]) -> Path:
    """The config as the file that the gateway reads."""
    path = folder / "gateway.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return path
