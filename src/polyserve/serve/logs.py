"""Log lines, readable or JSON, and one a request at its end; never a prompt, an answer or a key."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from polyserve.serve.inflight import Ticket
from polyserve.serve.plan import LogPlan

# Silent unless a config asks for it: formatting a line costs about as much as a chunk.
requests = logging.getLogger("polyserve.requests")


def set_up(plan: LogPlan) -> None:
    """Log to stderr as the plan says."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if plan.format == "json" else ReadableFormatter())
    logging.basicConfig(level=plan.level.upper(), handlers=[handler], force=True)
    requests.setLevel(logging.INFO if plan.requests else logging.WARNING)


def answered(model: str, ticket: Ticket) -> None:
    """Say how a request went, if anybody wants to know."""
    if requests.isEnabledFor(logging.INFO):
        requests.info("request %s", ticket.outcome, extra={"fields": fields(model, ticket)})


def fields(model: str, ticket: Ticket) -> dict[str, Any]:
    """What there is to say of a request that is over; durations in seconds, what nobody knows left out."""
    dispatch, request, foreseen = ticket.dispatch, ticket.request, ticket.foreseen
    first_at = ticket.first_at
    told = {
        "request": request.id,
        "model": model,
        "tenant": request.tenant or None,
        "tier": dispatch.tier if dispatch is not None else ticket.refused_by,
        "instances": ticket.path or None,
        "outcome": ticket.outcome,
        "code": ticket.code,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": ticket.tokens * request.n,
        "queue_s": _short(ticket.queue_s),
        "ttft_s": None if first_at is None else _short(first_at - request.arrived_at),
        "tpot_s": _short(ticket.tpot_s),
        "late_s": _short(ticket.lateness_s) if request.slo is not None and first_at is not None else None,
        "predicted_ttft_s": _short(foreseen.ttft_s) if foreseen is not None else None,
        "promoted": dispatch.promoted if dispatch is not None else None,
        "continuations": ticket.continuations or None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _short(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and whatever fields the record carries."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class ReadableFormatter(logging.Formatter):
    """Time, level, message, and the record's fields as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return " ".join([super().formatMessage(record), *(f"{k}={_plain(v)}" for k, v in _fields(record).items())])


def _utc(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{record.msecs:03.0f}Z"


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(record, "fields", {})
    return found


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
