"""Shadow mode: an incumbent rule routes, and PolyServe says what it would have done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from live import Live, listening, make_plan
from test_gateway import CHAT, post

from polyserve.core.observing import Observed, OverRoundRobin
from polyserve.serve import observe


@contextlib.asynccontextmanager
async def watching(incumbent: str, *engines: FakeEngine, **values: Any) -> AsyncIterator[Live]:
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine.running())
        plan = observe.watching(make_plan([engine.url for engine in engines], **values), incumbent)
        live = await stack.enter_async_context(listening(plan))
        await live.ready(len(engines))
        yield live


async def get(live: Live, path: str) -> Any:
    async with live.http.get(live.url + path) as answer:
        return await answer.json()


async def test_the_incumbent_routes_and_polyserve_says_what_it_would_have_done() -> None:
    engines = [FakeEngine(tokens=20, every_s=0.01) for _ in range(2)]
    async with watching("round-robin", *engines) as live:
        answers = await asyncio.gather(*(post(live, CHAT, x_polyserve_tier="fast") for _ in range(6)))
        assert [status for status, _, _ in answers] == [200] * 6
        assert [len(engine.seen) for engine in engines] == [3, 3]
        assert {node.pace_s for node in live.gateway.fleet} == {None}
        await live.quiet()
        told = (await get(live, "/admin/observe"))["tiny"]
        fast = told["tiers"]["fast"]
        assert (told["incumbent"], fast["requests"]) == ("round-robin", 6)
        assert fast["agreed"] + fast["elsewhere"] + fast["placed_later"] + fast["refused"] <= 6
        assert fast["attained_as_served"] is not None
        text = await (await live.http.get(live.url + "/metrics")).text()
        assert 'polyserve_observed_in_time_total{model="tiny",router="incumbent",tier="fast"}' in text
        shadow = observe.observed(live.gateway.brain)
        assert shadow is not None
        first, line = observe.summary("tiny", shadow, live.gateway.audit)
        assert first == "tiny: routed by round-robin; PolyServe would have, by its forecast:"
        assert line.startswith("  fast: 6 requests, in time ")


async def test_nothing_is_refused_though_polyserve_would_have() -> None:
    engine = FakeEngine(first_after_s=0.05)
    refuses = [{"name": "fast", "tpot_ms": 20, "ttft_ms": 500, "on_late": "refuse"}]
    async with watching("least-requests", engine, tiers=refuses) as live:
        for headers in ({"x_slo_ttft_ms": "1", "x_slo_tpot_ms": "20"}, {"x_slo_ttft_ms": "9", "x_slo_tpot_ms": "0.1"}):
            assert (await post(live, CHAT, **headers))[0] == 200
        fast = (await get(live, "/admin/observe"))["tiny"]["tiers"]["fast"]
        assert fast["requests"] == 2
        assert fast["foreseen_in_time_as_routed"] == 0.0


async def test_a_gateway_that_routes_itself_has_nothing_to_say() -> None:
    engine = FakeEngine()
    async with engine.running(), listening(make_plan([engine.url])) as live:
        assert (await get(live, "/admin/observe"))["error"]["code"] == "not_observing"


@pytest.mark.parametrize("incumbent", observe.INCUMBENTS)
def test_a_plan_is_watched_with_nothing_left_to_refuse(incumbent: str) -> None:
    plan = make_plan(["http://127.0.0.1:1"], settings={"queue_limit": 3, "on_late": "refuse"})
    settings = observe.watching(plan, incumbent).sole.configured.settings
    assert (settings["on_late"], settings["queue_limit"], settings["autoscaler"]) == ("never", 0, "off")
    assert issubclass(OverRoundRobin, Observed)
