"""The openai SDK for JavaScript against a live gateway, where node and npm are there to run it.

It is installed once, at an exact version, into a folder of the user's cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live import until
from sdk_house import CASES, REJECTED, TOOL, Case, house

pytestmark = pytest.mark.live

SDK = "openai@6.30.1"
SCRIPT = Path(__file__).with_name("sdk_conformance.mjs")
INSTALL_S = 120.0
RUN_S = 90.0


def installed() -> Path:
    """A folder in which node finds the SDK; skips where it cannot be had."""
    if missing := [tool for tool in ("node", "npm") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)}: not installed, so the JS SDK is not tried")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "polyserve-tests" / SDK.replace("@", "-")
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", ".", "--no-audit", "--no-fund", "--ignore-scripts", SDK]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm did not install {SDK} within {INSTALL_S:g} s, so the JS SDK is not tried")
        if done.returncode:
            told = (done.stderr.strip().splitlines() or ["no word"])[-1]
            pytest.skip(f"npm cannot install {SDK}, so the JS SDK is not tried: {told}")
        (folder / "installed").touch()
    return folder


async def ask(folder: Path) -> dict[str, Any]:
    """What the script saw of a live gateway, and whether it left anything on an engine."""
    script = shutil.copy(SCRIPT, folder)  # node looks for modules beside the script
    cases = [{**one._asdict(), "headers": dict(one.headers), "body": dict(one.body)} for one in [*CASES, REJECTED]]
    async with house() as (live, engines):
        node = await asyncio.create_subprocess_exec(
            "node", script, live.url, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            told = json.dumps({"cases": cases, "tool": TOOL}).encode()
            printed, _ = await asyncio.wait_for(node.communicate(told), RUN_S)
        finally:
            if node.returncode is None:
                node.kill()
                await node.wait()
        assert node.returncode == 0, "what it says is on stderr"
        await until(lambda: engines.slow.streams == 0)
        seen: dict[str, Any] = json.loads(printed)
        return seen | {"cut": engines.slow.cut}


@pytest.fixture(scope="module")
def seen() -> Any:
    folder = installed()
    sys.stdout.flush()
    return asyncio.run(ask(folder))


@pytest.mark.parametrize("case", [*CASES, REJECTED], ids=lambda case: case.name)
def test_each_error_is_the_right_exception(seen: Any, case: Case) -> None:
    assert seen["errors"][case.name] == {
        "raised": case.raised, "status": case.status, "code": case.code, "typed": True, "named": True, "right": True,
    }  # fmt: skip


def test_what_may_be_tried_again_is_and_what_may_not_is_not(seen: Any) -> None:
    counts = {name: one["count"] for name, one in seen["attempts"].items()}
    assert counts == {case.name: 2 if case.status >= 429 else 1 for case in [*CASES, REJECTED]}


@pytest.mark.parametrize("case", [case for case in CASES if case.status in (429, 503)], ids=lambda case: case.name)
def test_the_time_to_come_back_is_honoured(seen: Any, case: Case) -> None:
    one = seen["attempts"][case.name]
    assert one["told"] == one["waits"]
    assert one["told"][0] > 0


def test_who_comes_back_in_time_is_served(seen: Any) -> None:
    again = seen["again"]
    assert [(one["status"], one["count"]) for one in again["answers"]] == [(429, "0"), (200, "1")]
    assert again["waits"] == [int(again["answers"][0]["afterMs"])]
    assert again["text"].startswith("t0 t1 ")


def test_the_helpers_gather_text_tools_and_structured_output(seen: Any) -> None:
    text = seen["text"]
    assert text["whole"] == text["deltas"] == text["text"] == "t0 t1 t2 t3 t4 "
    assert text["usage"]["completion_tokens"] == 5
    assert seen["tools"] == {"names": ["weather"], "parsed": {"city": "Bonn"}}
    assert seen["structured"] == {"city": "Bonn"}


def test_an_error_within_a_stream_is_raised_from_it(seen: Any) -> None:
    assert seen["broken"] == {"code": "upstream_error", "right": True}


def test_who_aborts_takes_the_request_off_the_engine(seen: Any) -> None:
    assert seen["aborted"] is True
    assert seen["cut"] in (2, 3)  # two streams after their first token; the third request may not have got there


def test_the_models_are_listed(seen: Any) -> None:
    assert {"good", "gone", "slow"} <= set(seen["models"])
