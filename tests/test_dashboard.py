"""The Grafana dashboard asks only for what a gateway tells: every query is parsed and compared with a live scrape."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from polyserve.commands.dashboard import dashboard as print_dashboard

sys.path.append(str(Path(__file__).parent / "serve"))

from fake_engine import FakeEngine
from test_reload import over


@pytest.fixture
def dashboard(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    print_dashboard()
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out)
    return loaded


def queries(dashboard: dict[str, Any]) -> list[str]:
    """Every PromQL expression, Grafana's own variables filled in."""
    texts = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [text.replace("$__rate_interval", "1m") for text in texts]


def selectors(node: Any) -> Iterator[tuple[str, set[str]]]:
    """(metric, labels it is asked for) of an expression; labels it is grouped by count for all below."""
    match type(node).__name__:
        case "VectorSelector":
            yield node.name, {matcher.name for matcher in node.matchers.matchers}
        case "MatrixSelector":
            yield from selectors(node.vector_selector)
        case "Call":
            for arg in node.args:
                yield from selectors(arg)
        case "AggregateExpr":
            grouped = set(node.modifier.labels) if node.modifier is not None else set()
            yield from ((name, labels | grouped) for name, labels in selectors(node.expr))
        case "BinaryExpr":
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case "ParenExpr":
            yield from selectors(node.expr)
        case "NumberLiteral":
            pass
        case other:
            raise AssertionError(f"the test does not know {other}")


async def scrape(tmp_path: Path) -> dict[str, set[str]]:
    """Metrics and their labels of a gateway that has seen everything a dashboard shows."""
    breaks, whole = FakeEngine(hang_up_after=2, every_s=0.01), FakeEngine()
    async with over(tmp_path, breaks, whole, settings={"promotion": "eager", "placement": "fill"}) as (live, _):
        bodies = [
            ({"x-polyserve-tier": "fast"}, {"model": "tiny", "prompt": "once", "stream": True}),
            ({"x-polyserve-tier": "slow"}, {"model": "tiny", "prompt": "once", "stream": True}),
            ({"x-slo-tpot-ms": "0.1"}, {"model": "tiny", "prompt": "once"}),
        ]
        for headers, body in bodies * 2:
            async with live.http.post(live.url + "/v1/completions", json=body, headers=headers) as answer:
                await answer.read()
        text = await (await live.http.get(live.url + "/metrics")).text()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


async def test_every_query_asks_for_what_there_is(dashboard: dict[str, Any], tmp_path: Path) -> None:
    told = await scrape(tmp_path)
    asked = [found for text in queries(dashboard) for found in selectors(promql_parser.parse(text))]
    assert len(asked) > 30
    for metric, labels in asked:
        assert metric in told, f"{metric} is not told"
        assert labels <= told[metric], f"{metric} has {told[metric]}, not {labels - told[metric]}"


async def test_no_metric_is_left_unseen(dashboard: dict[str, Any], tmp_path: Path) -> None:
    unseen = {
        "polyserve_config_reloads_total",
        "polyserve_config_last_reload_success_timestamp_seconds",
        "polyserve_tasks",
    }
    asked = " ".join(queries(dashboard))
    for metric in await scrape(tmp_path):
        base = metric.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
        assert base in asked or metric in unseen, metric


async def test_variables_list_labels_that_there_are(dashboard: dict[str, Any], tmp_path: Path) -> None:
    told = await scrape(tmp_path)
    listed = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    assert len(listed) == 3
    for query in listed:
        metric, label = query.removeprefix("label_values(").removesuffix(")").split(", ")
        assert label in told[metric]


def test_panels_have_their_own_place_and_number(dashboard: dict[str, Any]) -> None:
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        place = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not place & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= place
