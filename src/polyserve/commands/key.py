"""`polyserve key`: a fresh API key, and what a config keeps of it."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer


def key(
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Hash the key on standard input in place of a new one.")
    ] = False,
) -> None:
    """Print a fresh API key and its SHA-256: the key is for the client, the hash for the config."""
    from polyserve.serve.access import fresh_key, hashed

    if not stdin:
        made = fresh_key()
        print(f"key:    {made}")
        print(f"sha256: {hashed(made)}")
        return
    given = sys.stdin.readline().strip()
    if not re.fullmatch(r"[\x21-\x7e]+", given):
        print("polyserve: --stdin: a key is printable ASCII without spaces, on one line", file=sys.stderr)
        raise typer.Exit(2)
    print(f"sha256: {hashed(given)}")
