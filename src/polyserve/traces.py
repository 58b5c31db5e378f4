"""Request traces: prompt and output lengths, with or without arrival times, from a shipped id or a file.

Columns are found by the names that public traces use; `columns` overrides them. The simulator and the live
replay read them alike.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Blocks = tuple[tuple[int, ...], ...]
Table = dict[str, Sequence[object]]

SHIPPED = resources.files("polyserve") / "data" / "traces"
UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
FORMATS = (".csv", ".jsonl", ".parquet")

# Lower-case names under which public traces keep the lengths, in order of preference.
PROMPT_NAMES = (
    "prompt_tokens", "input_tokens", "contexttokens", "input_length", "num_prefill_tokens", "prompt_length",
    "prompt_len", "input_len", "prefill_tokens", "request tokens", "input_toks", "isl",
)  # fmt: skip
OUTPUT_NAMES = (
    "output_tokens", "completion_tokens", "generatedtokens", "output_length", "num_decode_tokens",
    "output_len", "decode_tokens", "response tokens", "output_toks", "osl",
)  # fmt: skip
# Arrival columns and their unit; `timestamp` is milliseconds in Mooncake's format, seconds elsewhere.
TIME_NAMES = {
    "arrived_s": "s", "arrival_s": "s", "arrived_at": "s", "arrival_time": "s", "timestamp_ms": "ms",
    "starttimeoffset": "ns", "timestamp": "s",
}  # fmt: skip
MOONCAKE_BLOCK_TOKENS = 512


class TraceError(ValueError):
    """A trace that cannot be used; the message names the file, the column or row, and what would do."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests as a service saw them, in order of arrival where times are known."""

    name: str
    prompt_tokens: Ints
    output_tokens: Ints
    arrived_s: Floats | None = None  # from the first arrival, which is at 0
    blocks: Blocks | None = None  # ids of the prompt's prefix blocks; equal ids are shared prefixes
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    dropped: int = 0  # rows without a prompt or an output token, left out

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def recorded_rate(self) -> float:
        """Requests per second of the recording; 0 when no times are known or all are equal."""
        if self.arrived_s is None or len(self) < 2 or self.arrived_s[-1] <= 0:
            return 0.0
        return (len(self) - 1) / float(self.arrived_s[-1])


def trace_ids() -> list[str]:
    """Ids of the traces that come with the product, sorted."""
    return sorted(f.name.removesuffix(".csv.gz") for f in SHIPPED.iterdir() if f.name.endswith(".csv.gz"))


def read_trace(id_or_path: str | Path, columns: Mapping[str, str] | None = None) -> Trace:
    """A shipped trace, `uniform:P/D`, or a CSV, JSONL (both perhaps gzipped) or Parquet file.

    `columns` maps any of `prompt`, `output`, `arrived`, `blocks` to the file's own name; `arrived` may end in
    a unit (`"when:ms"`). Raises `TraceError`.
    """
    name = str(id_or_path)
    if name.startswith("uniform:"):
        return _uniform(name)
    if name in trace_ids():
        return _trace(name, _table(SHIPPED / f"{name}.csv.gz", name), dict(columns or {}))
    path = Path(name)
    if not path.is_file():
        raise TraceError(
            f"unknown trace {name!r}; there are: {', '.join(trace_ids())}, uniform:P/D, "
            f"or the path of a file ({', '.join(FORMATS)}; .gz as well)"
        )
    return _trace(name, _table(path, name), dict(columns or {}))


def _uniform(name: str) -> Trace:
    match = re.fullmatch(r"uniform:(\d{1,9})/(\d{1,9})", name)
    if match is None or not int(match[1]) or not int(match[2]):
        raise TraceError(f"trace {name!r}: uniform traces are uniform:P/D with whole P and D of at least 1")
    return Trace(name, np.array([int(match[1])], np.int64), np.array([int(match[2])], np.int64))


# ------------------------------------------------------------------------------------------ file to table


def _table(file: Traversable | Path, name: str) -> Table:
    """The file's columns by name, all of the same length, at least one row."""
    kind = file.name.lower().removesuffix(".gz")
    try:
        if kind.endswith(".parquet"):
            table = _parquet(file.read_bytes())
        elif kind.endswith(FORMATS):
            data = file.read_bytes()
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
            table = _csv(text, name) if kind.endswith(".csv") else _json_lines(text, name)
        else:
            raise TraceError(f"{name}: a trace file ends in {', '.join(FORMATS)} (or .gz behind the first two)")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{name}: cannot be read: {error}") from None
    if not table or not len(next(iter(table.values()))):
        raise TraceError(f"{name}: the file holds no requests")
    return table


def _csv(text: str, name: str) -> Table:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if not rows:
        return {}
    header = [cell.strip() for cell in rows[0]]
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise TraceError(f"{name}: row {number} has {len(row)} fields where the header has {len(header)}")
    return dict(zip(header, zip(*rows[1:], strict=True), strict=False)) if len(rows) > 1 else {}


def _json_lines(text: str, name: str) -> Table:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TraceError(f"{name}: row {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise TraceError(f"{name}: row {number} is not a JSON object")
        rows.append(row)
    return {key: [row.get(key) for row in rows] for key in rows[0]} if rows else {}


def _parquet(data: bytes) -> Table:
    import pyarrow as pa  # here, because it costs 40 MB that no other format needs
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise OSError(str(error)) from None
    return {name: table[name].to_pylist() for name in table.column_names}


# ----------------------------------------------------------------------------------------- table to trace


def _trace(name: str, table: Table, columns: dict[str, str]) -> Trace:
    if unknown := sorted(set(columns) - {"prompt", "output", "arrived", "blocks"}):
        raise TraceError(f"{name}: columns maps prompt, output, arrived and blocks, not {unknown[0]!r}")
    prompt = _counts(name, table, _column(name, table, columns, "prompt", PROMPT_NAMES))
    output = _counts(name, table, _column(name, table, columns, "output", OUTPUT_NAMES))
    arrived = _arrived(name, table, columns)
    blocks = _blocks(name, table, columns)
    kept = np.flatnonzero((prompt > 0) & (output > 0))
    if not len(kept):
        raise TraceError(f"{name}: no request has both a prompt and an output token")
    if arrived is not None:
        kept = kept[np.argsort(arrived[kept], kind="stable")]
        arrived = arrived[kept] - arrived[kept[0]]
    return Trace(
        name=name,
        prompt_tokens=prompt[kept],
        output_tokens=output[kept],
        arrived_s=arrived,
        blocks=tuple(blocks[i] for i in kept) if blocks is not None else None,
        dropped=len(prompt) - len(kept),
    )


def _column(name: str, table: Table, columns: dict[str, str], field: str, usual: tuple[str, ...]) -> str:
    """The file's name of a field that must be there."""
    if field in columns:
        return _present(name, table, columns[field])
    by_lower = {column.lower(): column for column in reversed(table)}
    found = next((by_lower[u] for u in usual if u in by_lower), None)
    if found is None:
        raise TraceError(f"{name}: no column of {field} tokens (such as {usual[0]!r}); there are: {', '.join(table)}")
    return found


def _present(name: str, table: Table, column: str) -> str:
    if column not in table:
        raise TraceError(f"{name}: no column {column!r}; there are: {', '.join(table)}")
    return column


def _numbers(name: str, column: str, cells: Sequence[object]) -> Floats:
    """The column as finite floats; the error names the first row that is none."""
    try:
        values = np.array(cells, dtype=np.float64)
        if values.ndim == 1 and np.isfinite(values).all():
            return values
    except (TypeError, ValueError):
        pass
    for row, cell in enumerate(cells, 1):
        try:
            finite = math.isfinite(float(cell))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise TraceError(f"{name}: column {column!r}, row {row}: {_shown(cell)} is not a number")
    raise AssertionError("unreachable: every cell is a finite number")  # pragma: no cover


def _counts(name: str, table: Table, column: str) -> Ints:
    values = _numbers(name, column, table[column])
    bad = np.flatnonzero((values < 0) | (values != np.floor(values)) | (values >= 2**53))
    if len(bad):
        row, cell = int(bad[0]), table[column][int(bad[0])]
        raise TraceError(f"{name}: column {column!r}, row {row + 1}: {_shown(cell)} is not a count of tokens")
    return values.astype(np.int64)


def _arrived(name: str, table: Table, columns: dict[str, str]) -> Floats | None:
    """Arrival times in seconds, from any origin; None when the file has none."""
    if "arrived" in columns:
        column, _, unit = columns["arrived"].rpartition(":")
        if unit not in UNITS_S or not column:
            column, unit = columns["arrived"], "s"
        return _seconds(name, _present(name, table, column), table[column], unit)
    by_lower = {column.lower(): column for column in reversed(table)}
    found = next((t for t in TIME_NAMES if t in by_lower), None)
    if found is None:
        return None
    unit = "ms" if found == "timestamp" and "input_length" in by_lower else TIME_NAMES[found]
    return _seconds(name, by_lower[found], table[by_lower[found]], unit)


def _seconds(name: str, column: str, cells: Sequence[object], unit: str) -> Floats:
    first = str(cells[0])
    if re.match(r"\d{4}-\d\d-\d\d", first) is None:
        return _numbers(name, column, cells) * UNITS_S[unit]
    try:  # NumPy reads ISO dates without a zone, so one that means UTC is cut off
        plain = [re.sub(r"(Z|\+00:?00)$", "", str(cell)) for cell in cells]
        stamps = np.array(plain, dtype="datetime64[ns]").astype(np.int64)
    except ValueError as error:
        raise TraceError(f"{name}: column {column!r}: {error}") from None
    seconds: Floats = (stamps - stamps.min()) / 1e9
    return seconds


def _blocks(name: str, table: Table, columns: dict[str, str]) -> Blocks | None:
    """Prefix block ids, given as lists or as numbers with spaces between."""
    column = columns.get("blocks", "hash_ids")
    if column not in table:
        if "blocks" in columns:
            _present(name, table, column)
        return None
    blocks = []
    for row, cell in enumerate(table[column], 1):
        try:
            blocks.append(tuple(int(i) for i in (cell.split() if isinstance(cell, str) else cell)))  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            raise TraceError(f"{name}: column {column!r}, row {row}: {_shown(cell)} is no list of block ids") from None
    return tuple(blocks)


def _shown(cell: object) -> str:
    text = repr(cell)
    return text if len(text) <= 40 else f"{text[:37]}..."
