"""A decision of the core said in sentences, for whoever asks why a request went where it went."""

from __future__ import annotations

import math

from polyserve.core.forecast import Forecast
from polyserve.core.routing import Refusal
from polyserve.core.types import Dispatch, Refuse, RefuseCode

_REFUSED: dict[RefuseCode, str] = {
    "overloaded": "no instance could have given it its tokens in time any more",
    "slo_infeasible": "even an idle instance would be late with it",
    "context_length_exceeded": "its prompt and max_tokens together are longer than the model's context",
    "no_instances": "there was no instance, and none was on its way",
    "queue_full": "the queue of its tier was full",
    "queue_timeout": "it had waited as long as the queue allows",
}


def why(action: Dispatch | Refuse, forecast: Forecast | None, arrived_at: float | None, at: float) -> str:
    """Why it was decided so, about the instance itself."""
    waited_s = 0.0 if arrived_at is None else at - arrived_at
    after = f" after {seconds(waited_s)} in the queue" if waited_s >= 0.001 else ""
    if isinstance(action, Refuse):
        again = "" if action.retry_after_s is None else f"; told to come back in {seconds(action.retry_after_s)}"
        reason = _REFUSED.get(action.code, action.code.replace("_", " "))
        return f"refused{after}: {reason}{again}"
    whose = "the pool" if action.host is None else f"tier {action.host}"
    guest = f", as a guest of a tighter tier than its own ({action.tier})" if action.promoted else ""
    goes_on = f", to go on from token {action.resume_from}" if action.resume_from else ""
    sent = f"sent to {action.instance} of {whose}{guest}{goes_on}{after}"
    if forecast is None:
        return f"{sent}: this policy chooses without a forecast"
    return f"{sent}: {'; '.join(_fits(action, forecast, arrived_at))}"


def _fits(action: Dispatch, forecast: Forecast, arrived_at: float | None) -> list[str]:
    """What the forecast says of the instance that was chosen."""
    parts = []
    if math.isfinite(forecast.first_token_at):
        first = "first token foreseen"
        if arrived_at is not None and not action.resume_from:
            first = f"first token foreseen {seconds(forecast.first_token_at - arrived_at)} after its arrival"
        parts.append(first + _spare(forecast.prefill_s, "before it is due", "late"))
    if math.isfinite(forecast.pace_s):
        longest = f"longest iteration to come {seconds(forecast.peak_s)}"
        parts.append(longest + _spare(forecast.pace_s, "within the pace", "beyond the pace"))
    if math.isfinite(forecast.memory_tokens):
        parts.append(f"{forecast.memory_tokens:,.0f} tokens of KV to spare at the fullest moment to come")
    return parts or ["nobody is there who could be late"]


def _spare(margin_s: float, left: str, lacking: str) -> str:
    if not math.isfinite(margin_s):
        return ""
    return f", {seconds(abs(margin_s))} {left if margin_s >= 0.0 else lacking}"


def lacked(refusal: Refusal) -> str:
    """What an instance lacked that was asked and not chosen."""
    where = "in the pool" if refusal.tier is None else f"tier {refusal.tier}"
    lacks = [text for cause, margin in refusal.forecast.margins().items() if (text := _lack(cause, margin))]
    return f"{refusal.instance} ({where}, load {refusal.load:.2f}): {'; '.join(lacks) or 'would have done'}"


def _lack(cause: str, margin: float) -> str | None:
    if margin >= 0.0:
        return None
    much = seconds(-margin) if math.isfinite(margin) else "far"
    match cause:
        case "memory":
            return f"short of {-margin:,.0f} tokens of KV at the fullest moment to come"
        case "seqs":
            return "no free sequence"
        case "pace":
            return f"its iterations would be {much} longer than the pace allows"
        case "prefill":
            return "its first token would not be in sight" if much == "far" else f"its first token {much} late"
        case "token1":
            return "its second token would not be in sight" if much == "far" else f"its second token {much} late"
        case "queued":
            return f"somebody queued there would become {much} late"
        case _:
            return f"an answer running there would become {much} late"


def fits(forecast: Forecast) -> str:
    """Whether everybody there would be in time, in one breath."""
    lacks = [text for cause, margin in forecast.margins().items() if (text := _lack(cause, margin))]
    return "all would be in time" if not lacks else ", ".join(lacks)


def not_asked(ready: int, asked: int, chosen: bool, known: bool) -> str | None:
    """About the instances of which nothing is said."""
    others = ready - asked - chosen
    if others <= 0:
        return None
    them = f"{others} other{'s' if others > 1 else ''}"
    if not known:
        return f"what {them} lacked was not kept (setting `explain`)"
    return f"{them} not asked: the first that admits is taken" if chosen else f"{them} not asked"


def seconds(value: float) -> str:
    """A duration as people write it."""
    return f"{value:.3g} s" if value >= 1.0 else f"{value * 1e3:.3g} ms"
