"""What the core is shown of a simulated instance.

A gateway's view is what `polyserve.progress` would say of the same streams, which a test holds it to, without
visiting tokens: in a simulated engine every decoding resident is in every iteration, so an iteration with a decode in
it began when the one before it ended. When a report is due, and what it holds, is noted by the compiled loop
(`turns.gateway_sees`, `turns.note_report`), since the engine goes on before anybody reads it.
"""

from __future__ import annotations

import math

from polyserve.core.types import Iteration, Progressed, RequestId
from polyserve.sim import turns as t
from polyserve.sim.bank import Bank
from polyserve.sim.engine import Engine

SIGHTS = {"gateway": t.GATEWAY, "perfect": t.PERFECT}


def report(bank: Bank, engine: Engine, sight: int) -> Progressed:
    """The report on an engine that the bank has just noted, by a gateway or with perfect sight."""
    _, decoding, queued, prefill, decodes, kv, held = bank.heading.tolist()
    at, instance = bank.last_at, engine.instance.id
    tokens = _counts(bank, engine, t.R_SLOTS, decoding)
    if sight == t.GATEWAY:
        seen = None if math.isnan(bank.seconds) else Iteration(at, bank.seconds, None, decodes, None, True)
        return Progressed(at, instance, tokens, iteration=seen)
    iteration = Iteration(at, bank.seconds, prefill, decodes, kv)
    return Progressed(at, instance, tokens, _counts(bank, engine, t.R_QUEUED, queued), iteration, held)


def _counts(bank: Bank, engine: Engine, row: int, count: int) -> dict[RequestId, int]:
    """A row of slots and the row of numbers below it, by request."""
    return dict(zip(engine.named(bank.report[row, :count]), bank.report[row + 1, :count].tolist(), strict=True))
