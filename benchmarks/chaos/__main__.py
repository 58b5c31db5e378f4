"""Breaks a fleet under load and holds the gateway to its word.

    make chaos MINUTES=30 [SEED=n]

Six emulated engines (processes of their own), the gateway before them, and clients that ask in every way there is, at
80 % of what the engines hold, while engines are killed, frozen, slowed, drained, removed and joined. At the end every
request is accounted for: completed with exactly the tokens that a fault-free run gives, refused with a right error,
ended by an error event where continuing cannot be exact, or left by its own client. Exit 1 if any is not, or if the
gateway holds anything afterwards. Faults and requests are the seed's; when exactly they meet is the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from pathlib import Path

from chaos.run import Options, StageError, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None, help="printed where it is drawn")
    parser.add_argument("--load", type=float, default=0.8, help="share of what the engines hold")
    parser.add_argument("--every", type=float, default=4.0, help="seconds between faults on average; 0: none")
    parser.add_argument("--keep", type=Path, default=None, help="a folder for logs and journal, kept")
    parser.add_argument("--json", action="store_true", help="the account as JSON")
    args = parser.parse_args()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    if not args.json:
        print(f"chaos: seed {seed}, {args.minutes:g} minutes, {args.load:.0%} load", flush=True)
    try:
        account = asyncio.run(run(Options(args.minutes, seed, args.load, args.every, args.keep)))
    except StageError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(account.plain(), indent=1))
    else:
        print(account.table())
        print("the law holds" if account.lawful else "THE LAW IS BROKEN")
    return 0 if account.lawful else 1


if __name__ == "__main__":
    sys.exit(main())
