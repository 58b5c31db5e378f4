"""Hundreds of gateways in virtual time, each with faults of its own; thousands by the command in `faults.py`."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from faults import FAULTS, play
from virtual import StandstillError, virtual_time

RUNS, OF = 10, 10


@pytest.mark.parametrize("first", range(0, RUNS * OF, OF))
def test_every_request_is_answered_once_with_the_tokens_of_a_run_without_faults(first: int) -> None:
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for seed in range(first, first + OF):
        run = play(seed)
        outcomes += run.outcomes
        faults += run.faults
    assert outcomes["completed"] > 0.8 * sum(outcomes.values())
    assert len(faults) > len(FAULTS) / 2


def test_the_same_seed_is_the_same_run() -> None:
    assert [play(seed).told for seed in (3, 4)] == [play(seed).told for seed in (3, 4)]
    assert play(3).outcomes == play(3).outcomes


def test_virtual_time_passes_without_waiting_and_a_standstill_is_said() -> None:
    async def sleep() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.sleep(86_400)
        return loop.time() - began

    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    with virtual_time() as runner:
        assert runner.run(sleep()) == pytest.approx(86_400)
    with pytest.raises(StandstillError), virtual_time() as runner:
        runner.run(wait())
