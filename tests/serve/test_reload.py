"""A config that changes while the gateway serves: what can change does, and nothing is lost over it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_engine import FakeEngine
from live import TIERS, Live, listening, make_plan, until
from test_serve import free_port

from polyserve.config import load
from polyserve.serve.access import hashed
from polyserve.serve.house import House, serve
from polyserve.serve.plan import Address, PlanError
from polyserve.serve.reload import Source

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}
BATCH = {"name": "batch", "tpot_ms": 500, "ttft_ms": 5000}


class File:
    """A config file, written anew by `say`."""

    def __init__(self, path: Path, engines: list[FakeEngine]) -> None:
        self.path = path
        self.instances = [{"id": f"e{n}", "url": engine.url} for n, engine in enumerate(engines)]
        self.source = Source(path, lambda: load(path))
        self.say()

    def say(self, **values: Any) -> None:
        plain = {
            "model": "tiny",
            "listen": {"port": 0},
            "profile": "a100-llama-3-8b",
            "tiers": TIERS,
            "instances": self.instances,
            "limits": {"probe_s": 0.05, "shutdown_s": 1},
        }
        self.path.write_text(yaml.safe_dump(plain | values))


@contextlib.asynccontextmanager
async def over(tmp_path: Path, *engines: FakeEngine, **values: Any) -> AsyncIterator[tuple[Live, File]]:
    """A gateway over a config file."""
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine.running())
        file = File(tmp_path / "fleet.yaml", list(engines))
        file.say(**values)
        live = await stack.enter_async_context(listening(load(file.path), file.source))
        await live.ready(len(file.instances))
        yield live, file


async def call(live: Live, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with live.http.request(method, live.url + path, json=body) as answer:
        return answer.status, json.loads(await answer.text())


async def stream(live: Live, tier: str = "slow") -> str:
    """A whole streamed answer."""
    async with live.http.post(
        live.url + "/v1/chat/completions", json=CHAT, headers={"x-polyserve-tier": tier}
    ) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.text()


async def test_tiers_come_and_go_while_their_requests_are_served(tmp_path: Path) -> None:
    async with over(tmp_path, FakeEngine(tokens=40, every_s=0.01)) as (live, file):
        running = [asyncio.create_task(stream(live)) for _ in range(5)]
        await until(lambda: len(live.gateway.inflight) == 5)
        file.say(tiers=[TIERS[0], BATCH], default_tier="batch")
        status, told = await call(live, "POST", "/admin/reload")
        assert status == 200
        assert told["changed"] == [
            "tiny: tier slow has gone, its requests keep their deadlines",
            "tiny: tier batch is new",
            "tiny: default_tier is batch",
        ]
        assert told["restart_needed"] == []
        assert [answer.count("data: ") for answer in await asyncio.gather(*running)] == [42] * 5
        assert (await stream(live, "batch")).endswith("data: [DONE]\n\n")
        names = [tier["name"] for tier in (await call(live, "GET", "/admin/tiers"))[1]["tiers"]]
        assert names == ["fast", "batch"]


async def test_a_bad_file_keeps_the_old_config_and_says_why(tmp_path: Path, caplog: Any) -> None:
    async with over(tmp_path, FakeEngine()) as (live, file):
        file.say(tiers=[{"name": "fast", "tpot_ms": "quick", "ttft_ms": 1}])
        status, told = await call(live, "POST", "/admin/reload")
        assert (status, told["error"]["code"]) == (400, "invalid_config")
        assert "fleet.yaml: tiers.0.tpot_ms: input should be a valid number" in told["error"]["message"]
        assert "the old one stays" in caplog.text
        metrics = await (await live.http.get(live.url + "/metrics")).text()
        assert 'polyserve_config_reloads_total{outcome="refused"} 1.0' in metrics
        assert "polyserve_config_last_reload_successful 0.0" in metrics
        assert (await stream(live)).endswith("[DONE]\n\n")
        file.path.unlink()
        status, told = await call(live, "POST", "/admin/reload")
        assert (status, "cannot be read" in told["error"]["message"]) == (400, True)


async def test_a_setting_that_does_not_fit_the_tiers_is_found_before_anything_changes(tmp_path: Path) -> None:
    async with over(tmp_path, FakeEngine(), policy="static", settings={"static_sizes": "1,1"}) as (live, file):
        file.say(policy="static", settings={"static_sizes": "1,1"}, tiers=[*TIERS, BATCH])
        status, told = await call(live, "POST", "/admin/reload")
        assert (status, told["error"]["code"]) == (400, "invalid_config")
        assert "one number for each of the 3 tiers" in told["error"]["message"]
        assert len(live.gateway.tiers) == 2
        assert (await stream(live)).endswith("[DONE]\n\n")


async def test_instances_join_and_are_drained(tmp_path: Path) -> None:
    first, second = FakeEngine(tokens=40, every_s=0.01), FakeEngine()
    async with over(tmp_path, first) as (live, file), second.running():
        running = asyncio.create_task(stream(live))
        await until(lambda: first.streams == 1)
        file.say(instances=[{"id": "new", "url": second.url, "profile": "h200-llama-3-8b"}])
        _, told = await call(live, "POST", "/admin/reload")
        assert told["changed"] == [
            "tiny: profile h200-llama-3-8b is known",
            "tiny: instance e0 is drained",
            "tiny: instance new joins",
        ]
        await until(lambda: live.gateway.fleet.get("new") and live.gateway.fleet.ready)
        assert (await stream(live)).count("data: ") == 7
        assert (await running).count("data: ") == 42, "a drain ends no stream"
        await until(lambda: live.gateway.fleet.get("e0") is None)


async def test_an_instance_that_never_answered_goes_at_once(tmp_path: Path) -> None:
    dead = {"id": "dead", "url": f"http://127.0.0.1:{free_port()}"}
    async with over(tmp_path, FakeEngine()) as (live, file):
        file.say(instances=[*file.instances, dead])
        await call(live, "POST", "/admin/reload")
        await until(lambda: live.gateway.fleet.get("dead"))
        file.say()
        await call(live, "POST", "/admin/reload")
        await until(lambda: live.gateway.fleet.get("dead") is None)


async def test_tenants_change_their_keys_and_rates(tmp_path: Path) -> None:
    def tenant(name: str, **values: Any) -> dict[str, Any]:
        return {"name": name, "keys": [hashed(f"key-of-{name}")], **values}

    async def status(live: Live, name: str) -> int:
        headers = {"authorization": f"Bearer key-of-{name}"}
        async with live.http.post(live.url + "/v1/chat/completions", json=CHAT, headers=headers) as answer:
            await answer.read()
            return answer.status

    engine = FakeEngine(tokens=60, every_s=0.01)
    async with over(tmp_path, engine, tenants=[tenant("shop"), tenant("lab", concurrency=2)]) as (live, file):
        running = [asyncio.create_task(status(live, "lab")) for _ in range(2)]
        await until(lambda: engine.streams == 2)
        file.say(tenants=[tenant("lab", concurrency=3), tenant("new")])
        _, told = await call(live, "POST", "/admin/reload")
        assert told == {
            "changed": ["tenant lab: tenant", "tenant new is new", "tenant shop has gone"],
            "restart_needed": [],
        }
        third = asyncio.create_task(status(live, "lab"))
        await until(lambda: engine.streams == 3)
        assert await status(live, "lab") == 429, "those that were let in before count"
        assert await status(live, "shop") == 401
        assert await status(live, "new") == 200
        assert await asyncio.gather(*running, third) == [200] * 3
        file.say()
        _, told = await call(live, "POST", "/admin/reload")
        assert told == {"changed": [], "restart_needed": ["tenants differs"]}
        assert await status(live, "nobody") == 401


async def test_what_cannot_change_is_named_and_stays(tmp_path: Path) -> None:
    async with over(tmp_path, FakeEngine()) as (live, file):
        before = live.house.plan
        file.say(
            listen={"port": 1}, policy="round-robin", seed=3, journal=str(tmp_path / "j"),
            instances=[{"id": "e0", "url": "http://127.0.0.1:1"}], limits={"probe_s": 9, "attempts": 7},
        )  # fmt: skip
        _, told = await call(live, "POST", "/admin/reload")
        assert told["changed"] == ["limits: attempts is 7"]
        needed = "; ".join(told["restart_needed"])
        for what in (
            "listen differs", "settings differ", "seed differ", "journal differs", "instance e0: url differs",
            "probe_s differs", "shutdown_s differs",
        ):  # fmt: skip
            assert what in needed
        after = live.house.plan
        assert (after.listen, after.sole.engines) == (before.listen, before.sole.engines)
        assert (after.bounds.probe_s, after.bounds.attempts) == (0.05, 7)
        assert (await stream(live)).endswith("[DONE]\n\n")


async def test_limits_hold_from_the_reload_on(tmp_path: Path) -> None:
    async with over(tmp_path, FakeEngine()) as (live, file):
        file.say(limits={"probe_s": 0.05, "shutdown_s": 1, "body_mib": 0.00001})
        await call(live, "POST", "/admin/reload")
        status, told = await call(live, "POST", "/v1/chat/completions", CHAT)
        assert (status, told["error"]["code"]) == (413, "request_too_large")


async def test_a_file_that_is_watched_is_taken_in_by_itself(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("polyserve.serve.reload.WATCH_S", 0.02)
    async with over(tmp_path, FakeEngine(), watch=True) as (live, file):
        file.say(watch=True, tiers=[*TIERS, BATCH])
        await until(lambda: len(live.gateway.tiers) == 3)
        file.path.write_text("model: [")
        reloader = live.house.reloader
        assert reloader is not None
        await until(lambda: reloader.registry.get_sample_value("polyserve_config_last_reload_successful") == 0.0)
        file.say(watch=False)
        await until(lambda: len(live.gateway.tiers) == 2)
        assert not live.house.plan.watch


async def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    houses: list[House] = []
    engine = FakeEngine()
    async with engine.running():
        file = File(tmp_path / "fleet.yaml", [engine])
        plan = replace(load(file.path), listen=Address("127.0.0.1", free_port()))
        serving = asyncio.create_task(serve(plan, lambda house, _: houses.append(house), file.source))
        try:
            await until(lambda: houses)
            file.say(tiers=[*TIERS, BATCH])
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: len(houses[0].gateways["tiny"].tiers) == 3)
            file.path.write_text("nonsense")
            os.kill(os.getpid(), signal.SIGHUP)
            reloader = houses[0].reloader
            assert reloader is not None
            await until(lambda: reloader.registry.get_sample_value("polyserve_config_last_reload_successful") == 0.0)
            assert not serving.done()
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def test_tiers_can_be_put_without_a_file(tmp_path: Path) -> None:
    async with over(tmp_path, FakeEngine()) as (live, _):
        tiers = (await call(live, "GET", "/admin/tiers"))[1]["tiers"]
        status, told = await call(live, "PUT", "/admin/tiers", {"tiers": [*tiers, BATCH]})
        assert (status, told["changed"]) == (200, ["tiny: tier batch is new"])
        assert (await stream(live, "batch")).endswith("[DONE]\n\n")


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ([], "at least one"),
        ([TIERS[0]], "default_tier is 'slow'"),
        ([*TIERS, TIERS[0]], "no two with the same name"),
        ([TIERS[0] | {"tpot_ms": 0}, TIERS[1]], "tiers.0.tpot_ms is above 0"),
        ([TIERS[0] | {"tpot_ms": "a"}, TIERS[1]], "Expected `float`, got `str`"),
        ([TIERS[0] | {"pace": 3}, TIERS[1]], "unknown field"),
        ([TIERS[0] | {"name": "a b"}, TIERS[1]], "tiers.0.name"),
    ],
)
async def test_tiers_that_cannot_be_are_refused(tmp_path: Path, tiers: list[Any], says: str) -> None:
    async with over(tmp_path, FakeEngine()) as (live, _):
        status, told = await call(live, "PUT", "/admin/tiers", {"tiers": tiers})
        assert (status, told["error"]["code"]) == (400, "invalid_tiers")
        assert says in told["error"]["message"]
        assert [tier.name for tier in live.gateway.tiers] == ["fast", "slow"]


async def test_a_gateway_without_a_file_says_so() -> None:
    async with FakeEngine().running() as engine, listening(make_plan([engine.url])) as live:
        status, told = await call(live, "POST", "/admin/reload")
        assert (status, told["error"]["code"]) == (409, "no_config_file")


async def test_a_reload_while_another_runs_comes_after_it(tmp_path: Path) -> None:
    async with over(tmp_path, FakeEngine()) as (live, file):
        reloader = live.house.reloader
        assert reloader is not None
        file.say(tiers=[*TIERS, BATCH])
        first, second = await asyncio.gather(reloader.reload("one"), reloader.reload("two"))
        assert (first.changed, second.changed) == (["tiny: tier batch is new", "tiny: default_tier is batch"], [])
        file.say(tiers=[])
        with pytest.raises(PlanError, match="tiers"):
            await reloader.reload("three")
