"""`make demo`, `make up` and `make down`: the emulated fleet of `examples/demo/fleet.yaml`, live and simulated."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from polyserve import config as configs
from polyserve.demo.fleet import Fleet, FleetError, instances_of
from polyserve.demo.show import run_demo

CURL = """\
curl -N {url}/v1/completions -H 'content-type: application/json' \\
  -H 'x-slo-ttft-ms: 500' -H 'x-slo-tpot-ms: 50' \\
  -d '{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": 32, "stream": true}}'"""
SDK = """\
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "Once upon a time"}}],
    max_tokens=32,
    stream=True,
    extra_headers={{"x-slo-ttft-ms": "300", "x-slo-tpot-ms": "20"}},
)
for event in answer:
    if event.choices:
        print(event.choices[0].delta.content or "", end="", flush=True)
print()"""


def main() -> int:
    options = _options()
    # Ended by a signal is ended in order: what was started is stopped on the way out.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=120)
    try:
        if options.command == "run":
            run_demo(console, options.config, options.run, options.seconds, options.seed, options.patience)
        elif options.command == "up":
            _up(console, options.config, options.run, options.patience)
        else:
            _down(console, options.run)
    except (FleetError, configs.ConfigError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m polyserve.demo", description=__doc__)
    parser.add_argument("command", choices=("run", "up", "down"))
    parser.add_argument("--config", type=Path, default=Path("examples/demo/fleet.yaml"))
    parser.add_argument("--run", type=Path, default=Path("run"), help="folder for logs and records")
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to replay")
    parser.add_argument("--seed", type=int, default=1)
    # A first start compiles what later ones find in the cache.
    parser.add_argument("--patience", type=float, default=180.0, help="seconds that the fleet may take to start")
    return parser.parse_args()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _up(console: Console, config: Path, run: Path, patience_s: float) -> None:
    """Leave the fleet running, and say how to talk to it."""
    plan = configs.load(config, launch=True).sole
    fleet = Fleet.running(run)
    if fleet is not None:
        console.print(f"already running at {fleet.url}/v1; `make down` ends it\n")
    else:
        fleet = Fleet.start(config, run, console.print)
        try:
            with console.status("starting four engines and the gateway"):
                fleet.wait_ready(instances_of(plan.configured), patience_s)
        except BaseException:
            fleet.stop()
            raise
        console.print(f"running at {fleet.url}/v1, log in {run / 'fleet.log'}; `make down` ends it\n")
    for title, text in (("with curl:", CURL), ("with the openai SDK (in .venv it is installed):", SDK)):
        console.print(title, style="bold")
        print(f"\n{text.format(url=fleet.url, model=plan.name)}\n")
    console.print(f"what it decides: curl {fleet.url}/admin/fleet and {fleet.url}/admin/decisions")


def _down(console: Console, run: Path) -> None:
    fleet = Fleet.running(run)
    if fleet is None:
        console.print("nothing is running")
        return
    fleet.stop()
    console.print("ended")


if __name__ == "__main__":
    sys.exit(main())
