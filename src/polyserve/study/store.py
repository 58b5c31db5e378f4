"""Runs that were made, one JSON line each, in a file that only grows: what an interrupted study goes on from.

A line's key is a digest of everything a run rests on but the code. Each line also says which code made it, so that a
result that mixes codes can say so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import polyserve
from polyserve.study.settings import StudyError

Record = dict[str, Any]
# Whatever changes what a run gives lies below these.
DECIDING = ("core", "sim", "demand.py", "report.py", "traces.py")


def digest(identity: Mapping[str, object]) -> str:
    """Sixteen hex digits that two runs share when everything they rest on is equal."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@cache
def code() -> str:
    """Twelve hex digits that stand for the code that decides what a run gives."""
    root = Path(polyserve.__file__).parent
    files = sorted(p for name in DECIDING for p in ((root / name).rglob("*.py") if "." not in name else [root / name]))
    text = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(text).hexdigest()[:12]


class Store:
    """The runs of one file."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        """Open or make the file; `fresh` reads only what this code made. Raises `StudyError` on a broken line."""
        self.path = path
        self.runs: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole, _, torn = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            record = self._parsed(line, number)
            if not fresh or record["code"] == code():
                self.runs[record["key"]] = record
        if torn:  # what an interruption cut off is run again
            os.truncate(path, len(whole) + 1 if whole else 0)
        self._file = open(path, "ab")  # noqa: SIM115 - open as long as the store is

    def _parsed(self, line: bytes, number: int) -> Record:
        try:
            record: Record = json.loads(line)
            record["key"], record["code"], record["result"]
        except (ValueError, TypeError, KeyError):
            raise StudyError(
                f"{self.path}: line {number} is no run of a study; delete the line, or give --out another folder"
            ) from None
        return record

    def add(self, record: Record) -> None:
        """Keep a run: on disk before anything rests on it."""
        line = json.dumps(record, separators=(",", ":"), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.runs[record["key"]] = record

    def close(self) -> None:
        self._file.close()
