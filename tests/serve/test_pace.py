"""Every way to ask for a pace, and which of them wins."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core.types import Slo, Tier
from polyserve.serve.errors import ApiError
from polyserve.serve.pace import BEST_EFFORT, Paces

FAST, SLOW = Tier("fast", 0.02, 0.3), Tier("slow", 0.1, 1.0)
PACES = Paces((FAST, SLOW), {"priority": "fast", "flex": BEST_EFFORT}, "slow")


@pytest.mark.parametrize(("headers", "body", "slo"), [
    ({}, {}, Slo(1.0, 0.1)),
    ({"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "40.5"}, {}, Slo(0.25, 0.0405)),
    ({"x-llm-d-slo-ttft-ms": "250", "x-llm-d-slo-tpot-ms": "40"}, {}, Slo(0.25, 0.04)),
    ({"x-sgl-ttft-slo-ms": "250", "x-sgl-tps-slo": "40"}, {}, Slo(0.25, 0.025)),
    ({}, {"nvext": {"router": {"ttft_target": 250, "itl_target": 40}}}, Slo(0.25, 0.04)),
    ({}, {"vllm_xargs": {"slo_ttft_ms": "250", "slo_tpot_ms": 40.0}}, Slo(0.25, 0.04)),
    ({"x-polyserve-tier": "fast"}, {}, Slo(0.3, 0.02)),
    ({"x-polyserve-tier": BEST_EFFORT}, {}, None),
    ({}, {"service_tier": "priority"}, Slo(0.3, 0.02)),
    ({}, {"service_tier": "flex"}, None),
    ({}, {"service_tier": "auto"}, Slo(1.0, 0.1)),
    # First found wins: ours, llm-d's, SGLang's, the body's, the tier.
    ({"x-slo-tpot-ms": "30", "x-llm-d-slo-tpot-ms": "40", "x-slo-ttft-ms": "9"}, {}, Slo(0.009, 0.03)),
    ({"x-llm-d-slo-tpot-ms": "40", "x-llm-d-slo-ttft-ms": "9", "x-sgl-tps-slo": "9"}, {}, Slo(0.009, 0.04)),
    ({"x-slo-tpot-ms": "30", "x-slo-ttft-ms": "9"}, {"vllm_xargs": {"slo_tpot_ms": 5}}, Slo(0.009, 0.03)),
    ({"x-polyserve-tier": "fast"}, {"vllm_xargs": {"slo_tpot_ms": 50, "slo_ttft_ms": 9}}, Slo(0.009, 0.05)),
    ({"x-polyserve-tier": "slow"}, {"service_tier": "priority"}, Slo(1.0, 0.1)),
    # What a client leaves open its tier says: the named one, or the one that holds the pace.
    ({"x-slo-ttft-ms": "250"}, {}, Slo(0.25, 0.1)),
    ({"x-slo-ttft-ms": "250", "x-polyserve-tier": "fast"}, {}, Slo(0.25, 0.02)),
    ({"x-slo-tpot-ms": "50"}, {}, Slo(0.3, 0.05)),
    ({"x-slo-tpot-ms": "500"}, {}, Slo(1.0, 0.5)),
    ({"x-slo-tpot-ms": "5"}, {}, Slo(0.3, 0.005)),
    # Fields of the same objects that are not about pace.
    ({}, {"nvext": {"annotations": []}, "vllm_xargs": {"top_a": 1}}, Slo(1.0, 0.1)),
])  # fmt: skip
def test_the_first_way_found_decides(headers: dict[str, str], body: dict[str, Any], slo: Slo | None) -> None:
    assert PACES.asked({name.encode(): value.encode() for name, value in headers.items()}, body) == slo


@pytest.mark.parametrize("value", ["", "0", "0.0", "-1", "nan", "inf", "1e3", "1,5", "5ms", "0x10", "٣", "1" * 40])
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-sgl-tps-slo"])
def test_a_pace_that_is_no_positive_number_is_refused_by_its_header(name: str, value: str) -> None:
    with pytest.raises(ApiError, match=name) as caught:
        PACES.asked({name.encode(): value.encode("utf-8")}, {})
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_slo", name)


@pytest.mark.parametrize("value", [0, -3, True, [], {}, "fast", float("nan"), float("inf"), 10**40])
def test_a_pace_in_the_body_that_is_no_positive_number_is_refused_by_its_path(value: Any) -> None:
    for body in ({"vllm_xargs": {"slo_tpot_ms": value}}, {"nvext": {"router": {"itl_target": value}}}):
        with pytest.raises(ApiError) as caught:
            PACES.asked({}, body)
        assert caught.value.param in ("vllm_xargs.slo_tpot_ms", "nvext.router.itl_target")


@pytest.mark.parametrize(("headers", "body"), [
    ({"x-slo-ttft-ms": "250", "x-sgl-tps-slo": "many"}, {}),
    ({"x-slo-ttft-ms": "250"}, {"nvext": {"router": {"itl_target": "soon"}}}),
    ({}, {"nvext": {"router": {"itl_target": 40}}, "vllm_xargs": {"slo_ttft_ms": -1}}),
    ({"x-polyserve-tier": "fast"}, {"service_tier": "gold"}),
])  # fmt: skip
def test_a_malformed_way_is_told_though_another_one_wins(headers: dict[str, str], body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        PACES.asked({name.encode(): value.encode() for name, value in headers.items()}, body)
    assert caught.value.status == 400


@pytest.mark.parametrize("router", [5, "fast", [], True])
def test_a_router_of_nvext_that_is_no_object_is_refused(router: Any) -> None:
    with pytest.raises(ApiError, match="an object") as caught:
        PACES.asked({}, {"nvext": {"router": router}})
    assert (caught.value.code, caught.value.param) == ("invalid_slo", "nvext.router")


@given(st.binary(max_size=12), st.sampled_from([b"x-slo-ttft-ms", b"x-sgl-tps-slo", b"x-polyserve-tier"]))
def test_no_header_value_makes_anything_but_an_slo_or_a_refusal(value: bytes, name: bytes) -> None:
    with contextlib.suppress(ApiError):
        slo = PACES.asked({name: value}, {})
        assert slo is None or (0.0 < slo.ttft_s <= 86_400 and 0.0 < slo.tpot_s <= 1e6)
