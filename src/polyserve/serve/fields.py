"""The top-level fields of a JSON body, values unparsed: read one by one, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

from polyserve.serve.errors import ApiError

_fields = msgspec.json.Decoder(dict[str, Raw])
_any = msgspec.json.Decoder()
_integer = msgspec.json.Decoder(int | None)
_boolean = msgspec.json.Decoder(bool | None)
_string = msgspec.json.Decoder(str | None)
_object = msgspec.json.Decoder(dict[str, Any] | None)


def fields_of(raw: bytes) -> dict[str, Raw]:
    """The fields of a body; raises `ApiError` when it is no JSON object."""
    try:
        if not raw.isascii():
            raw.decode()  # values are passed on unparsed, and would fail the engine
        return _fields.decode(raw)
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except msgspec.ValidationError:
        raise ApiError(400, "invalid_json", "the body is not a JSON object") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None


def rewritten(fields: Mapping[str, Raw], changes: Mapping[str, object]) -> bytes:
    """The body with some top-level fields replaced (None: left out); all other values keep their bytes."""
    changed = dict(fields)
    for key, value in changes.items():
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = Raw(msgspec.json.encode(value))
    return msgspec.json.encode(changed)


def field(fields: Mapping[str, Raw], key: str) -> Any:
    """One field's value, None where it is missing."""
    return _any.decode(fields[key]) if key in fields else None


def read(fields: Mapping[str, Raw], key: str, decoder: msgspec.json.Decoder[Any], what: str) -> Any:
    """One field's value as `decoder` has it, None where it is missing; raises `ApiError` saying `what` it must be."""
    if key not in fields:
        return None
    try:
        return decoder.decode(fields[key])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise wrong(key, what) from None


def string(fields: Mapping[str, Raw], key: str) -> str | None:
    value: str | None = read(fields, key, _string, "a string")
    return value


def boolean(fields: Mapping[str, Raw], key: str) -> bool:
    return bool(read(fields, key, _boolean, "true or false"))


def an_object(fields: Mapping[str, Raw], key: str) -> dict[str, Any] | None:
    value: dict[str, Any] | None = read(fields, key, _object, "an object")
    return value


def count(fields: Mapping[str, Raw], key: str) -> int | None:
    """A number of things, of which there is at least one."""
    what = "a whole number of at least 1"
    value: int | None = read(fields, key, _integer, what)
    if value is not None and not 1 <= value < 2**31:
        raise wrong(key, what)
    return value


def wrong(key: str, what: str) -> ApiError:
    return ApiError(400, "invalid_type", f"field {key!r} of the body must be {what}", key)


def missing(key: str) -> ApiError:
    return ApiError(400, "missing_field", f"field {key!r} of the body is missing", key)
