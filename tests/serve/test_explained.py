"""Decisions told in words, and what was foreseen beside what became of it."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import Any

import pytest
from fake_engine import FakeEngine
from live import Live, listening, make_plan, until
from test_gateway import CHAT, over, post

from polyserve.core.forecast import Forecast
from polyserve.core.routing import Refusal
from polyserve.core.types import Dispatch, Refuse, Slo
from polyserve.serve import wording
from polyserve.serve.audit import KEPT, Record, quantiles

SLO = Slo(0.5, 0.02)
FITS = Forecast(12_345.0, 50.0, 0.006, 0.38, 0.39, 1.0, math.inf, 10.12, 0.014)


async def get(live: Live, path: str) -> Any:
    async with live.http.get(live.url + path) as answer:
        return await (answer.text() if "text" in path else answer.json())


def test_a_dispatch_is_said_with_its_margins() -> None:
    dispatch = Dispatch("r", "e0", "fast", "fast", SLO, predicted_ttft_s=0.12)
    assert wording.why(dispatch, FITS, 10.0, 10.0) == (
        "sent to e0 of tier fast: first token foreseen 120 ms after its arrival, 380 ms before it is due; "
        "longest iteration to come 14 ms, 6 ms within the pace; "
        "12,345 tokens of KV to spare at the fullest moment to come"
    )


def test_a_guest_who_waited_and_goes_on_is_said_to() -> None:
    dispatch = Dispatch("r", "e0", "slow", "fast", SLO, resume_from=7)
    said = wording.why(dispatch, FITS, 8.0, 10.0)
    assert "as a guest of a tighter tier than its own (slow), to go on from token 7 after 2 s in the queue" in said


def test_a_refusal_says_why_and_when_to_come_again() -> None:
    said = wording.why(Refuse("r", "overloaded", "fast", 2.5), None, 1.0, 1.0)
    assert said == "refused: no instance could have given it its tokens in time any more; told to come back in 2.5 s"


@pytest.mark.parametrize(
    ("margins", "says"),
    [
        ({"memory_tokens": -1234.0}, "short of 1,234 tokens of KV at the fullest moment to come"),
        ({"seqs": -1.0}, "no free sequence"),
        ({"pace_s": -0.0042}, "its iterations would be 4.2 ms longer than the pace allows"),
        ({"prefill_s": -0.21}, "its first token 210 ms late"),
        ({"prefill_s": -math.inf}, "its first token would not be in sight"),
        ({"token1_s": -1.5}, "its second token 1.5 s late"),
        ({"queued_s": -0.1}, "somebody queued there would become 100 ms late"),
        ({"decodes_s": -0.1}, "an answer running there would become 100 ms late"),
        ({"seqs": -1.0, "pace_s": -0.001}, "no free sequence; its iterations would be 1 ms longer"),
        ({"prefill_s": math.nan}, "would have done"),
    ],
)
def test_what_an_instance_lacked_is_said_in_seconds_and_tokens(margins: dict[str, float], says: str) -> None:
    fine = dict.fromkeys(("memory_tokens", "seqs", "pace_s", "prefill_s", "token1_s", "queued_s", "decodes_s"), 1.0)
    forecast = Forecast(**(fine | margins), first_token_at=1.0, peak_s=0.01)
    assert wording.lacked(Refusal("e1", "fast", 0.973, forecast)).startswith(f"e1 (tier fast, load 0.97): {says}")


async def test_a_placement_names_the_chosen_and_what_others_lacked() -> None:
    engines = [FakeEngine(tokens=100, every_s=0.01) for _ in range(2)]
    async with engines[0].running(), engines[1].running():
        instances = [{"id": f"e{n}", "url": engine.url, "max_num_seqs": 1} for n, engine in enumerate(engines)]
        async with listening(make_plan([], instances=instances)) as live:
            await live.ready(2)
            first = asyncio.create_task(post(live, CHAT | {"stream": True}, x_polyserve_tier="fast"))
            await until(lambda: len(live.gateway.inflight) == 1)
            second = asyncio.create_task(post(live, CHAT | {"stream": True}, x_polyserve_tier="fast"))
            await until(lambda: len(live.gateway.inflight) == 2)
            third = asyncio.create_task(post(live, CHAT, x_slo_ttft_ms="300", x_slo_tpot_ms="20"))
            await asyncio.gather(first, second, third)
            refused, other, _ = (await get(live, "/admin/decisions"))["decisions"]
    assert other["instance"] == "e1"
    assert [line.split(": ")[1] for line in other["others"]] == ["no free sequence"]
    assert other["others"][0].startswith("e0 (tier fast, load")
    assert other["considered"][0]["margins"]["seqs"] == -1.0
    assert refused["why"].startswith("refused after")
    assert sorted(line.split(" ")[0] for line in refused["others"]) == ["e0", "e1"]


async def test_decisions_are_told_in_words_of_a_request_and_as_text() -> None:
    async with over(FakeEngine()) as live:
        await post(live, CHAT, x_polyserve_tier="fast", x_request_id="one")
        await post(live, CHAT, x_request_id="two")
        (one,) = (await get(live, "/admin/decisions?request=one"))["decisions"]
        assert one["why"].startswith("sent to e0 of tier fast: first token foreseen")
        assert (one["others"], one["not_asked"]) == ([], None)
        text = await get(live, "/admin/decisions?format=text")
        assert [line.split(" s  ")[1].split(":")[0] for line in text.splitlines() if not line.startswith(" ")] == [
            "two (slow)",
            "one (fast)",
        ]
        assert (await get(live, "/admin/decisions?request=three"))["decisions"] == []


async def test_what_is_foreseen_is_compared_with_what_is_seen() -> None:
    async with over(FakeEngine(tokens=5, every_s=0.005)) as live:
        for _ in range(3):
            await post(live, CHAT, x_polyserve_tier="slow")
        await live.quiet()
        audit = (await get(live, "/admin/audit"))["tiny"]
        slow = audit["tiers"]["slow"]
        assert (slow["requests"], slow["coverage"], slow["ttft"]["requests"], slow["tpot"]["requests"]) == (
            3,
            1.0,
            3,
            3,
        )
        assert 0.0 < slow["ttft"]["p5"] <= slow["ttft"]["p50"] <= slow["ttft"]["p95"]
        assert audit["instances"]["e0"]["requests"] == 3
        assert audit["instances"]["e0"]["safety_margin"] >= 0.0
        assert (audit["confidence"], audit["ttft_margin"]) == (0.9, 0.2)
        text = await (await live.http.get(live.url + "/metrics")).text()
        assert 'polyserve_forecast_coverage_ratio{model="tiny",tier="slow"} 1.0' in text
        assert 'polyserve_forecast_error_ratio_count{kind="tpot",model="tiny"} 3.0' in text
        assert 'polyserve_arrived_requests_total{model="tiny",tier="slow"} 3.0' in text


async def test_late_answers_and_engines_that_fail_lower_the_coverage() -> None:
    async with over(FakeEngine(first_after_s=0.1, tokens=2)) as live:
        await post(live, CHAT, x_slo_ttft_ms="90", x_slo_tpot_ms="100")
        await live.quiet()
        assert (await get(live, "/admin/audit"))["tiny"]["tiers"]["slow"]["coverage"] == 0.0


async def test_clients_that_leave_are_not_audited() -> None:
    async with over(FakeEngine(tokens=500, every_s=0.01)) as live:
        asked = asyncio.create_task(post(live, CHAT | {"stream": True}))
        await until(lambda: len(live.gateway.inflight) == 1)
        asked.cancel()
        await live.quiet()
        assert (await get(live, "/admin/audit"))["tiny"]["tiers"] == {}


def test_a_record_keeps_the_latest_and_its_quantiles() -> None:
    record = Record()
    record.ratios["ttft"].extend(n / 100 for n in range(KEPT * 2))
    assert record.ratios["ttft"] == deque((n / 100 for n in range(KEPT, KEPT * 2)), maxlen=KEPT)
    assert [round(value, 2) for _, value in quantiles(record.ratios["ttft"])] == [5.25, 7.5, 9.75]
    assert record.to_dict()["coverage"] is None
    assert quantiles([]) == []
