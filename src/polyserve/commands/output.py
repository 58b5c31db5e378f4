"""What commands print: columns of text, and JSON to a file or stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def columns(rows: Sequence[Sequence[Any]], *, to_stderr: bool = False) -> None:
    """Print rows in columns, the first to the left and the others to the right."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [str(row[0]).ljust(widths[0]), *(str(c).rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip(), file=sys.stderr if to_stderr else sys.stdout)


def write_json(to: str, plain: object) -> None:
    """Write plain values as JSON, `-` being stdout."""
    text = json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False)
    if to == "-":
        print(text)
    else:
        Path(to).write_text(text + "\n", encoding="utf-8")
