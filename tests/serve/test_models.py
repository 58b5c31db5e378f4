"""Several models behind one gateway: each has a brain and a fleet, all have one listener and one API."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from live import PROFILE, TIERS, Live, listening, until

from polyserve.config import Config, plan

MESSAGES: Any = [{"role": "user", "content": "hello"}]


@contextlib.asynccontextmanager
async def two(folder: Path | None = None, **values: Any) -> AsyncIterator[tuple[Live, FakeEngine, FakeEngine]]:
    """A gateway for `small`, also called `mini`, and for `large`, each over an instance named e0."""
    small, large = FakeEngine(models=("small",)), FakeEngine(models=("large",))
    async with small.running(), large.running():
        plain = {
            "profile": PROFILE,
            "tiers": TIERS,
            "limits": {"probe_s": 0.05, "shutdown_s": 1},
            "models": [
                {
                    "name": "small",
                    "aliases": ["mini"],
                    "instances": [{"id": "e0", "url": small.url}],
                    "journal": folder and folder / "small.jsonl",
                },
                {
                    "name": "large",
                    "tiers": [{"name": "calm", "tpot_ms": 100, "ttft_ms": 2000}],
                    "instances": [{"id": "e0", "url": large.url}],
                    "journal": folder and folder / "large.jsonl",
                },
            ],
        }
        made = plan(Config.model_validate(plain | values), "test.yaml")
        async with listening(made) as live:
            await until(lambda: all(gateway.fleet.ready for gateway in live.house.gateways.values()))
            yield live, small, large


async def get(live: Live, path: str) -> Any:
    async with live.http.get(live.url + path) as answer:
        return await answer.json()


async def test_each_model_is_served_by_its_own_fleet_in_its_own_tiers() -> None:
    async with two() as (live, small, large):
        for model, tier in (("small", "slow"), ("large", "calm")):
            answer = await live.openai.chat.completions.with_raw_response.create(model=model, messages=MESSAGES)
            assert answer.headers["x-polyserve-tier"] == tier
        assert [body["model"] for _, _, body in small.seen] == ["small"]
        assert [body["model"] for _, _, body in large.seen] == ["large"]


async def test_an_alias_is_a_name_of_ours_that_no_engine_gets() -> None:
    async with two() as (live, small, _):
        answer = await live.openai.chat.completions.create(model="mini", messages=MESSAGES)
        assert answer.choices[0].message.content
        stream = await live.openai.chat.completions.create(
            model="mini", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        assert [chunk async for chunk in stream]
        assert [body["model"] for _, _, body in small.seen] == ["small", "small"]


async def test_all_names_are_listed_and_an_unknown_one_is_told_them() -> None:
    async with two() as (live, _, _):
        assert [model.id async for model in live.openai.models.list()] == ["small", "mini", "large"]
        assert (await live.openai.models.retrieve("mini")).id == "mini"
        with pytest.raises(openai.NotFoundError, match="there are: 'small', 'mini', 'large'") as caught:
            await live.openai.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError, match="there are: 'small', 'mini', 'large'"):
            await live.openai.models.retrieve("gpt-9")


async def test_metrics_carry_the_model() -> None:
    async with two() as (live, _, _):
        await live.openai.chat.completions.create(model="mini", messages=MESSAGES)
        async with live.http.get(f"{live.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        assert 'polyserve_requests_total{model="small",outcome="ok",tier="slow"} 1.0' in lines
        assert {f'polyserve_open_requests{{model="{name}"}} 0.0' for name in ("small", "large")} <= set(lines)
        families = [line for line in lines if line.startswith("# TYPE ")]
        assert len(families) == len(set(families))


async def test_admin_answers_carry_the_model_and_may_be_asked_for_one() -> None:
    async with two() as (live, _, _):
        for model in ("small", "large"):
            await live.openai.chat.completions.create(model=model, messages=MESSAGES)
        instances = (await get(live, "/admin/fleet"))["instances"]
        assert [(one["model"], one["id"]) for one in instances] == [("small", "e0"), ("large", "e0")]
        assert [one["model"] for one in (await get(live, "/admin/fleet?model=large"))["instances"]] == ["large"]
        assert [one["model"] for one in (await get(live, "/admin/decisions"))["decisions"]] == ["large", "small"]
        assert [one["model"] for one in (await get(live, "/admin/decisions?limit=1"))["decisions"]] == ["large"]
        tiers = (await get(live, "/admin/tiers"))["tiers"]
        assert [(one["model"], one["name"]) for one in tiers] == [
            ("small", "fast"),
            ("small", "slow"),
            ("large", "calm"),
        ]
        assert (await get(live, "/admin/tiers?model=none"))["error"]["code"] == "model_not_found"


async def test_an_instance_that_two_models_have_is_not_guessed() -> None:
    async with two() as (live, small, _):
        async with live.http.post(f"{live.url}/admin/instances/e0/drain") as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["param"] == "model"
        async with live.http.post(f"{live.url}/admin/instances", json={"id": "e1", "url": small.url}) as answer:
            assert (answer.status, (await answer.json())["error"]["param"]) == (400, "model")
        spec = {"id": "e1", "url": small.url, "model": "small"}
        async with live.http.post(f"{live.url}/admin/instances", json=spec) as answer:
            assert (answer.status, (await answer.json())["model"]) == (202, "small")
        async with live.http.delete(f"{live.url}/admin/instances/e0?model=large") as answer:
            assert answer.status == 204
        instances = (await get(live, "/admin/fleet"))["instances"]
        assert [(one["model"], one["id"]) for one in instances] == [("small", "e0"), ("small", "e1")]


async def test_a_model_without_an_instance_leaves_the_other_alone() -> None:
    async with two() as (live, _, _):
        async with live.http.delete(f"{live.url}/admin/instances/e0?model=large") as answer:
            assert answer.status == 204
        assert (await get(live, "/ready"))["models"] == {"small": True, "large": False}
        with pytest.raises(openai.InternalServerError) as caught:
            await live.openai.chat.completions.create(model="large", messages=MESSAGES)
        assert caught.value.code == "no_instances"
        assert (await live.openai.chat.completions.create(model="small", messages=MESSAGES)).choices


async def test_each_model_has_a_journal(tmp_path: Path) -> None:
    async with two(tmp_path) as (live, _, _):
        await live.openai.chat.completions.create(model="small", messages=MESSAGES)
    assert b"Arrived" in (tmp_path / "small.jsonl").read_bytes()
    large = (tmp_path / "large.jsonl").read_bytes()
    assert b"Arrived" not in large
    assert b"Configured" in large
