"""One line a request, for people or for programs, without anything that is the client's own business."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine
from test_gateway import CHAT, over, post

from polyserve.serve import logs
from polyserve.serve.plan import LogPlan


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What request lines look like to a handler, formatted as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    logs.requests.addHandler(handler)
    logs.requests.setLevel(logging.INFO)
    yield stream
    logs.requests.setLevel(logging.NOTSET)
    logs.requests.removeHandler(handler)


async def test_a_request_is_one_line_at_its_end(lines: io.StringIO) -> None:
    async with over(FakeEngine()) as live:
        await post(live, CHAT, x_request_id="one", x_polyserve_tier="fast")
        await post(live, CHAT, x_request_id="two", x_slo_tpot_ms="0.1")
        await live.quiet()
    one, two = map(json.loads, lines.getvalue().splitlines())
    assert (one["request"], one["model"], one["tier"], one["outcome"]) == ("one", "tiny", "fast", "ok")
    assert (one["instances"], one["output_tokens"], one["promoted"]) == (["e0"], 5, False)
    assert 0 <= one["queue_s"] <= one["ttft_s"] < 1
    assert one["predicted_ttft_s"] > 0
    assert one["late_s"] < 0
    assert (two["outcome"], two["code"]) == ("refused", "slo_infeasible")
    assert "instances" not in two
    assert "How many tokens" not in lines.getvalue(), "a prompt is in the log"


def test_lines_are_readable_too() -> None:
    record = logging.LogRecord("polyserve.requests", logging.INFO, "", 0, "request %s", ("ok",), None)
    record.fields = {"request": "r1", "instances": ["a", "b"], "ttft_s": 0.5}
    assert logs.ReadableFormatter().format(record).endswith(" INFO request ok request=r1 instances=a,b ttft_s=0.5")


def test_an_exception_is_part_of_its_line() -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("polyserve", logging.ERROR, "", 0, "failed", (), info)
    line = json.loads(logs.JsonFormatter().format(record))
    assert (line["level"], line["message"]) == ("error", "failed")
    assert line["exception"].endswith("ValueError: wrong")


def test_requests_are_silent_unless_asked_for() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.set_up(LogPlan())
        assert not logs.requests.isEnabledFor(logging.INFO)
        logs.set_up(LogPlan("json", "warning", requests=True))
        assert logs.requests.isEnabledFor(logging.INFO)
    finally:
        root.handlers[:], root.level = before, level
        logs.requests.setLevel(logging.NOTSET)
