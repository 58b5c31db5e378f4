"""Small questions that are answered in about a second."""

from __future__ import annotations

from typing import Any

from polyserve.planner.ask import Ask

TPOTS = ((0.03, 0.5), (0.1, 0.5))
PROFILE = "a100-llama-3-8b"


def small(**values: Any) -> Ask:
    """A few requests a second with long prompts: a fleet of two or three."""
    usual: dict[str, Any] = {
        "trace": "uniform:6000/10",
        "rate": 4.0,
        "tpots": TPOTS,
        "ttfts": (1.0, 2.0),
        "target": 0.9,
        "profiles": (PROFILE,),
        "requests": 100,
        "seeds": 2,
        "search_seeds": 1,
        "tolerance": 0.3,
        "max_instances": 6,
    }
    return Ask(**{**usual, **values})
