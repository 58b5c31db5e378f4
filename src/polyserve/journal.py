"""One line per step of the controller: log, audit, replay input and regression test at once.

A line is `{"now": us, "event": {"type": "Arrived", ...}, "actions": [{"type": "Dispatch", ...}, ...]}`. The
codec is derived from the annotations of `core/types.py`: the class name is the tag, a float field is a time
or a duration and is written as whole microseconds (`"inf"`: no bound), everything else as it is.
`Configured` and `Reconfigured` keep their settings, profiles, tiers and tenants as written, since their floats are no
times. A path that ends in `.gz` is compressed.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec

from polyserve.core import types as nouns
from polyserve.core.controller import Controller
from polyserve.core.types import Action, Configured, Event, Reconfigured

Plain = dict[str, Any]
_Code = Callable[[Any], Any]

_TAGGED: dict[str, type[Any]] = {cls.__name__: cls for cls in (*get_args(Event), *get_args(Action))}
_AS_WRITTEN = {
    (Configured, "settings"), (Configured, "profiles"), (Configured, "tiers"), (Reconfigured, "profiles"),
    (Reconfigured, "tiers"), (Configured, "tenants"), (Reconfigured, "tenants"),
}  # fmt: skip


class JournalError(ValueError):
    """A journal that cannot be read; the message names file, line and what is wrong."""


class Step(NamedTuple):
    """One line: what happened at `now`, and what the controller answered."""

    now: float
    event: Event
    actions: list[Action]


# ----------------------------------------------------------------------------------------------------- codec


def to_plain(value: Event | Action) -> Plain:
    """The event or action as plain JSON values, tagged with its class name."""
    cls: Any = type(value)
    return {"type": cls.__name__, **_encoder(cls)(value)}


def from_plain(plain: Any) -> Any:
    """The event or action that `to_plain` wrote; raises `ValueError` naming the field at fault."""
    if not isinstance(plain, dict):
        raise ValueError(f"wants an object with a type, got {plain!r}")
    fields = dict(plain)
    tag = fields.pop("type", None)
    cls: Any = _TAGGED.get(tag) if isinstance(tag, str) else None
    if cls is None:
        raise ValueError(f"unknown type {tag!r}; there are: {', '.join(sorted(_TAGGED))}")
    return _decoder(cls)(fields)


def _to_us(seconds: float) -> int | str:
    return "inf" if seconds == math.inf else round(seconds * 1e6)


def _from_us(us: Any) -> float:
    if us == "inf":
        return math.inf
    if not isinstance(us, int) or isinstance(us, bool):
        raise ValueError(f"wants whole microseconds, got {us!r}")
    return us / 1e6


@cache
def _encoder(hint: Any) -> _Code:
    if hint is float:
        return _to_us
    if inner := _optional(hint):
        encode = _encoder(inner)
        return lambda value: None if value is None else encode(value)
    if not dataclasses.is_dataclass(hint):
        return _unchanged
    hints = get_type_hints(hint, vars(nouns))
    names = [
        (f.name, _unchanged if (hint, f.name) in _AS_WRITTEN else _encoder(hints[f.name]))
        for f in dataclasses.fields(hint)
    ]
    converted = [(name, encode) for name, encode in names if encode is not _unchanged]

    def encode_fields(value: Any) -> Plain:
        plain = {name: getattr(value, name) for name, _ in names}
        for name, encode in converted:
            plain[name] = encode(plain[name])
        return plain

    return encode_fields


@cache
def _decoder(hint: Any) -> _Code:
    if hint is float:
        return _from_us
    if inner := _optional(hint):
        decode = _decoder(inner)
        return lambda plain: None if plain is None else decode(plain)
    if not dataclasses.is_dataclass(hint):
        return _converter(hint)
    assert isinstance(hint, type)
    hints = get_type_hints(hint, vars(nouns))
    fields = dataclasses.fields(hint)
    decoders = {
        f.name: _converter(hints[f.name]) if (hint, f.name) in _AS_WRITTEN else _decoder(hints[f.name]) for f in fields
    }
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]

    def decode_fields(plain: Any) -> Any:
        if not isinstance(plain, dict):
            raise ValueError(f"{hint.__name__} wants an object, got {plain!r}")
        for name in required:
            if name not in plain:
                raise ValueError(f"{hint.__name__} has no field {name!r}")
        values = {}
        for name, value in plain.items():
            decode = decoders.get(name)
            if decode is None:
                raise ValueError(f"{hint.__name__} has a field {name!r} too many")
            try:
                values[name] = decode(value)
            except ValueError as error:
                raise ValueError(f"{hint.__name__}.{name}: {error}") from None
        return hint(**values)

    return decode_fields


def _converter(hint: Any) -> _Code:
    """Checks a value against a type without floats of ours in it."""
    if hint in (int, str, bool):

        def check(value: Any) -> Any:
            if type(value) is not hint:
                raise ValueError(f"wants {hint.__name__}, got {value!r}")
            return value

        return check
    assert get_origin(hint) in (Literal, dict, tuple) or issubclass(hint, Enum), f"no codec for {hint}"
    # msgspec's ValidationError is a ValueError whose message names the place.
    return lambda value: msgspec.convert(value, hint)


def _optional(hint: Any) -> Any:
    """X of `X | None`, else None."""
    if get_origin(hint) not in (types.UnionType, typing.Union):
        return None
    inner = [arg for arg in get_args(hint) if arg is not types.NoneType]
    assert len(inner) == 1, f"no codec for {hint}"
    return inner[0]


def _unchanged(value: Any) -> Any:
    return value


# -------------------------------------------------------------------------------------------- write and read


class JournalWriter:
    """Appends steps to a file; a context manager. Bodies that can crash call `flush` now and then."""

    def __init__(self, target: str | Path | IO[bytes]) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._owned: list[IO[bytes]] = []
        self._file: IO[bytes]
        if isinstance(target, str | Path):
            self._file = self._open(Path(target))
        else:
            self._file = target

    def _open(self, path: Path) -> IO[bytes]:
        file: IO[bytes] = path.open("wb")
        self._owned.append(file)
        if path.suffix == ".gz":
            # No name and no time of day in the header: the same run gives the same bytes.
            file = typing.cast(IO[bytes], gzip.GzipFile("", "wb", fileobj=file, mtime=0, compresslevel=6))
            self._owned.append(file)
        return file

    def write(self, now: float, event: Event, actions: Iterable[Action]) -> None:
        """Append one step."""
        line = {"now": _to_us(now), "event": to_plain(event), "actions": [to_plain(a) for a in actions]}
        self._file.write(self._encode(line) + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Close what this writer opened; a file that was handed in stays open."""
        while self._owned:
            self._owned.pop().close()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JournalReader:
    """Iterates over a journal's steps; then `torn` tells whether a crash cut the last line short.

    `line` is the number of the line last read. Raises `JournalError` at anything else that is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.line = 0
        self.torn = False

    def __iter__(self) -> Iterator[Step]:
        decode = msgspec.json.Decoder().decode
        try:
            with self._open() as file:
                for raw in self._lines(file):
                    self.line += 1
                    try:
                        yield self._step(decode(raw))
                    except ValueError as error:
                        if not raw.endswith(b"\n"):
                            self.torn = True
                            return
                        raise JournalError(f"{self.path}:{self.line}: {error}") from None
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror or error}") from None
        if self.line == 0 and not self.torn:
            raise JournalError(f"{self.path}: the journal is empty")

    def _open(self) -> IO[bytes]:
        if self.path.suffix == ".gz":
            return typing.cast(IO[bytes], gzip.open(self.path, "rb"))
        return self.path.open("rb")

    def _lines(self, file: IO[bytes]) -> Iterator[bytes]:
        """The lines; a compressed file that was cut off ends where its last whole line ended."""
        try:
            yield from file
        except (EOFError, zlib.error):
            self.torn = True

    @staticmethod
    def _step(plain: Any) -> Step:
        if not isinstance(plain, dict) or set(plain) != {"now", "event", "actions"}:
            raise ValueError("a step is an object with now, event and actions")
        if not isinstance(plain["actions"], list):
            raise ValueError("actions wants a list")
        return Step(_from_us(plain["now"]), from_plain(plain["event"]), [from_plain(a) for a in plain["actions"]])


def read_journal(path: str | Path) -> JournalReader:
    """The steps of a journal: `for now, event, actions in read_journal(path)`."""
    return JournalReader(path)


# ---------------------------------------------------------------------------------------------------- replay


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first line where the core decides otherwise than the journal says."""

    line: int
    now: float
    event: Event
    recorded: list[Plain]
    replayed: list[Plain]

    def __str__(self) -> str:
        at = f"line {self.line}, now {self.now:.6f}, {type(self.event).__name__}"
        return f"{at}\n  recorded: {_shown(self.recorded)}\n  replayed: {_shown(self.replayed)}"


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of replaying a journal: `mismatch` None means that every decision was the same."""

    steps: int
    torn: bool
    mismatch: Mismatch | None


def replay(path: str | Path) -> Replay:
    """Feed a journal's events to a new controller and compare actions; stops at the first that differs."""
    controller = Controller()
    journal = read_journal(path)
    steps, then = 0, -math.inf
    for now, event, actions in journal:
        where = f"{journal.path}:{journal.line}"
        if (steps == 0) != isinstance(event, Configured):
            raise JournalError(f"{where}: Configured is the first event, and comes once")
        if now < then:
            raise JournalError(f"{where}: now is {now:.6f} after {then:.6f}")
        steps, then = steps + 1, now
        replayed = [to_plain(action) for action in controller.step(now, event)]
        recorded = [to_plain(action) for action in actions]
        if replayed != recorded:
            return Replay(steps, False, Mismatch(journal.line, now, event, recorded, replayed))
    return Replay(steps, journal.torn, None)


def _shown(actions: list[Plain]) -> str:
    return msgspec.json.encode(actions).decode() if actions else "nothing"
