"""`polyserve dashboard`: the Grafana dashboard that goes with the metrics."""

from __future__ import annotations

from importlib import resources


def dashboard() -> None:
    """Print the Grafana dashboard for the gateway's metrics, to be imported: Dashboards, New, Import."""
    print((resources.files("polyserve") / "data" / "grafana" / "polyserve.json").read_text(encoding="utf-8"), end="")
