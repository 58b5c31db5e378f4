"""The last dispatches and refusals, each with the reasons for it, in numbers and in words."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any, NamedTuple

from polyserve.core.controller import Controller, Explanation
from polyserve.core.forecast import Forecast
from polyserve.core.types import Action, Dispatch, Refuse, RequestId
from polyserve.serve import wording
from polyserve.serve.inflight import Inflight

DECISIONS_KEPT = 1000


class Decision(NamedTuple):
    """One of them, as it was made."""

    at: float
    action: Dispatch | Refuse
    arrived_at: float | None
    forecast: Forecast | None  # of the instance that was chosen
    instances: int  # ready at that time


class Decisions:
    """Keeps what one brain has decided; what it thought of other instances is there where `explain` is on."""

    def __init__(self, brain: Controller, inflight: Inflight) -> None:
        self.brain = brain
        self._inflight = inflight
        self._kept: deque[Decision] = deque(maxlen=DECISIONS_KEPT)

    def observe(self, now: float, actions: list[Action]) -> None:
        """Keep the decisions among a step's actions, and tell tickets what was foreseen of them."""
        for action in actions:
            if not isinstance(action, Dispatch | Refuse):
                continue
            placement = self.brain.placed.get(action.request) if isinstance(action, Dispatch) else None
            forecast = placement.forecast if placement is not None else None
            ticket = self._inflight.get(action.request)
            if ticket is not None:
                ticket.decided(now, action, forecast)
            arrived_at = ticket.request.arrived_at if ticket else None
            self._kept.append(Decision(now, action, arrived_at, forecast, len(self.brain.fleet.ready())))

    def last(self, limit: int, request: RequestId | None = None) -> list[dict[str, Any]]:
        """The latest first, as plain values; of one request only where one is named."""
        reasons: dict[RequestId, list[Explanation]] = {}
        for one in self.brain.explanations:
            reasons.setdefault(one.request, []).append(one)
        chosen = [one for one in self._kept if request in (None, one.action.request)]
        return [_plain(one, reasons.get(one.action.request, ())) for one in chosen[::-1][:limit]]


def _plain(decision: Decision, reasons: list[Explanation] | tuple[()]) -> dict[str, Any]:
    action = decision.action
    then = next((one for one in reversed(reasons) if one.at <= decision.at), None)
    others = [] if then is None else [one for one in then.considered if one.instance != _instance(action)]
    return {
        "at": decision.at,
        "request": action.request,
        "tier": action.tier,
        "waited_s": None if decision.arrived_at is None else round(decision.at - decision.arrived_at, 6),
        **_outcome(action),
        "why": wording.why(action, decision.forecast, decision.arrived_at, decision.at),
        "others": [wording.lacked(one) for one in others],
        "not_asked": wording.not_asked(decision.instances, len(others), isinstance(action, Dispatch), then is not None),
        "considered_at": then.at if then is not None else None,
        "forecast": _margins(decision.forecast),
        "considered": [
            {"instance": one.instance, "tier": one.tier, "load": round(one.load, 4), "lacks": one.forecast.lacks}
            | {"margins": _margins(one.forecast)}
            for one in others
        ],
    }


def _instance(action: Dispatch | Refuse) -> str | None:
    return action.instance if isinstance(action, Dispatch) else None


def _outcome(action: Dispatch | Refuse) -> dict[str, Any]:
    if isinstance(action, Refuse):
        return {"decision": "refuse", "code": action.code, "retry_after_s": action.retry_after_s}
    return {
        "decision": "dispatch",
        "instance": action.instance,
        "host": action.host,
        "promoted": action.promoted,
        "resume_from": action.resume_from,
        "predicted_ttft_s": action.predicted_ttft_s,
        "slo": None if action.slo is None else {"ttft_s": action.slo.ttft_s, "tpot_s": action.slo.tpot_s},
    }


def _margins(forecast: Forecast | None) -> dict[str, float | None] | None:
    """Seconds, tokens or sequences that were left; null where that was not asked, or there is no end to it."""
    if forecast is None:
        return None
    return {
        name: round(value, 6) if abs(value) < 1e12 else None for name, value in dataclasses.asdict(forecast).items()
    }
