"""What the gateway costs beside a relay that does nothing else, and beside other people's, in one run.

    python benchmarks/gateway.py [--only bare,gateway] [--seconds 3] [--json FILE]     (make bench-gateway)

One core has the relay under test and nothing else of ours; the other has the engine (upstream.c, which costs next to
nothing) and the load: wrk for requests, streams.c for streams. Every relay gets the same jobs:

    memory      resident memory that each of 2,000 streams (LiteLLM: 500) adds which gave one chunk and then nothing
    requests    wrk, 64 connections, answers of one chunk: how many a second, and processor time of each
    delay       what 1, 64 and 512 streams see of the relay, at a pace of 20 chunks a second (1 stream: 200) and of one
                second each (1 stream: 0.1 s): milliseconds from asking to the first chunk, and of every chunk from the
                engine's socket to the client's; each less what it is without any relay
    chunks      512 streams of 50 and of 100 chunks a second: processor time per chunk that reached the client, and the
                share of the chunks that did (a relay that cannot keep up holds its engine back)

Processor time is of the relay's processes, user and system; it hardly depends on what else the machine does, while
delays and requests per second do. `1/cpu` is the requests a second that one core of processor time makes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gateway_peers import PEERS, Peer, UnavailableError
from gateway_rig import (
    PATH,
    answers,
    body,
    compiled,
    cores,
    cpu_s,
    fetched,
    free_ports,
    in_child,
    last_line,
    process,
    resident,
)

CONNECTIONS = 64
WRK_WARM_S = 1.0
# (streams, chunks a second of each, chunks of each)
DELAYS = ((1, 200, 20), (64, 20, 20), (512, 20, 20))
CHUNKS = ((512, 50), (512, 100))
# A relay rests between two jobs; the gateway on 1,000 instances never quite does, since it looks after them.
QUIET_LOOKS, QUIET_LOOK_S = 150, 0.2
DIRECT = "direct"  # what the client sees without a relay

Result = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- the jobs


@dataclass(frozen=True)
class Target:
    """What is measured: where it listens, its process, and its engine's first port."""

    port: int
    pid: int
    engine: int


class Bench:
    """The upstream at work, and the jobs that a relay is given."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self.relay_core, self.load_core = cores()
        self.upstream, self.streams = compiled("upstream", folder), compiled("streams", folder)
        self.wrk = shutil.which("wrk")
        self.direct: Result = {}

    def measure(self, peer: Peer) -> Result:
        """All jobs of one peer, its process fresh; raises `UnavailableError`."""
        ports = free_ports(peer.instances + 1)
        command = peer.prepare(ports[0], ports[1:], self.folder)
        with (
            self._engine(ports[1], peer.instances),
            process(command, self._cores(peer), self.folder / f"{peer.name}.log", **peer.environment) as child,
        ):
            try:
                answers(ports[0], child, peer.start_s)
                settle(ports[0], peer)
                return self._jobs(peer, Target(ports[0], child.pid, ports[1]))
            except UnavailableError as error:
                raise UnavailableError(f"{error}: {last_line(self.folder / f'{peer.name}.log')}") from None

    def without_relay(self) -> Result:
        """What the client sees of the engine itself."""
        ports = free_ports(1)
        with self._engine(ports[0], 1) as child:
            answers(ports[0], child, 5.0)
            target = Target(ports[0], child.pid, ports[0])
            return {"delays": {str(count): self._delay(target, count, *job) for count, *job in DELAYS}}

    def _engine(self, first_port: int, count: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return process([str(self.upstream), str(first_port), str(count)], self.load_core, self.folder / "engine.log")

    def _cores(self, peer: Peer) -> tuple[int, ...]:
        return (self.relay_core, self.load_core) if peer.relays else (self.relay_core,)

    def _jobs(self, peer: Peer, target: Target) -> Result:
        result: Result = {"delays": {}, "chunks": {}}

        def job(what: str, do: Callable[[], Result]) -> Result:
            say(peer.name, what)
            try:
                return do()
            except UnavailableError as why:
                print(f"{peer.name}: {what}: {why}", flush=True)
                return {}

        if not peer.only_requests:
            count = peer.idle_streams
            result |= job(f"memory of {count:,} idle streams", partial(self._memory, target, count))
        result |= job("requests of one chunk", lambda: self._requests(target))
        if peer.name.startswith("gateway"):
            result["decision_us"] = decision_us(target.port)
        if peer.only_requests:
            return result
        for count, rate, chunks in DELAYS:
            measure = partial(self._added, target, count, rate, chunks)
            result["delays"][str(count)] = job(f"delay at {count} streams", measure)
        for count, rate in CHUNKS:
            measure = partial(self._chunks, target, count, rate)
            result["chunks"][str(rate)] = job(f"{count} streams of {rate} chunks/s", measure)
        return result

    def _memory(self, target: Target, count: int) -> Result:
        """KiB per stream, after a second in which every part has been used once."""
        self._stream(target, 64, body(20, 0.01), 0.5, 0.5)
        before = resident(target.pid)
        taken: list[int] = []
        told = self._stream(
            target, count, body(2, 600.0), 4.0, 0.5, at_begin=lambda: taken.append(resident(target.pid))
        )
        if told["open"] < count:
            raise UnavailableError(f"only {told['open']} of {count} streams could be opened")
        return {"idle_stream_kib": (taken[0] - before) / count / 1024}

    def _requests(self, target: Target) -> Result:
        if self.wrk is None:
            raise SystemExit("bench-gateway: wrk is not installed (Debian: apt-get install wrk)")
        script = self.folder / "post.lua"
        quoted = json.dumps(body(1, 0.001).decode())
        script.write_text(
            f'wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\nwrk.body = {quoted}\n',
            encoding="utf-8",
        )

        def run(seconds: float) -> str:
            length = [f"-d{max(1, round(seconds))}s", "-t1", f"-c{CONNECTIONS}", "--timeout", "10s"]
            command = [str(self.wrk), *length, "-s", str(script), f"http://127.0.0.1:{target.port}{PATH}"]
            ended = subprocess.run(
                command, capture_output=True, text=True, check=True, preexec_fn=in_child(self.load_core)
            )
            return ended.stdout

        run(WRK_WARM_S)
        used, first = cpu_s(target.pid), cpu_s(target.pid, alone=True)
        told = run(self.seconds)
        used, first = cpu_s(target.pid) - used, cpu_s(target.pid, alone=True) - first
        done, rate = requests_of(told)
        per_request = {"request_cpu_us": used / done * 1e6, "request_first_cpu_us": first / done * 1e6}
        return {"requests_per_s": rate, "failed": failures_of(told), **per_request}

    def _added(self, target: Target, count: int, rate: int, chunks: int) -> Result:
        return added(self._delay(target, count, rate, chunks), self.direct["delays"][str(count)])

    def _delay(self, target: Target, count: int, rate: int, chunks: int) -> Result:
        return self._stream(target, count, body(chunks, 1.0 / rate), 1.5, self.seconds)

    def _chunks(self, target: Target, count: int, rate: int) -> Result:
        # Longer than the job, so that no stream ends in it.
        told = self._stream(target, count, body(round(rate * (self.seconds + 20.0)), 1.0 / rate), 3.0, self.seconds)
        if not told["chunks"]:
            raise UnavailableError("no chunk arrived")
        return {
            "cpu_us": told["cpu_s"] / told["chunks"] * 1e6,
            "first_cpu_us": told["first_cpu_s"] / told["chunks"] * 1e6,
            "in_time": told["chunks"] / (told["seconds"] * rate * count),
            "errors": told["errors"],
        }

    def _stream(
        self,
        target: Target,
        count: int,
        ask: bytes,
        warm_s: float,
        seconds: float,
        at_begin: Callable[[], None] = lambda: None,
    ) -> Result:
        """What streams.c tells of a job, and `cpu_s` that the relay took for it."""
        client = subprocess.Popen(
            [str(self.streams), str(target.port), PATH, str(count), str(warm_s), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=in_child(self.load_core),
        )
        assert client.stdin is not None, "a pipe was asked for"
        assert client.stdout is not None, "a pipe was asked for"
        client.stdin.write(ask)
        client.stdin.close()
        client.stdout.readline()
        at_begin()
        used, first = cpu_s(target.pid), cpu_s(target.pid, alone=True)
        client.stdout.readline()
        used, first = cpu_s(target.pid) - used, cpu_s(target.pid, alone=True) - first
        told: Result = json.loads(client.stdout.readline())
        client.wait()
        client.stdout.close()
        quiet(target)
        return told | {"cpu_s": used, "first_cpu_s": first}


def quiet(target: Target) -> None:
    """End all streams, also those whose relay goes on though its client has left, and wait until it rests."""
    fetched(target.engine, "/end")
    for _ in range(QUIET_LOOKS):
        used = cpu_s(target.pid)
        time.sleep(QUIET_LOOK_S)
        if cpu_s(target.pid) - used < 0.1 * QUIET_LOOK_S:
            return
        fetched(target.engine, "/end")


def requests_of(told: str) -> tuple[int, float]:
    """(requests, requests per second) of what wrk prints."""
    found = re.search(r"(\d+) requests in ", told)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", told)
    if found is None or rate is None or not int(found[1]):
        raise UnavailableError("wrk got no answer")
    return int(found[1]), float(rate[1])


def failures_of(told: str) -> int:
    """Answers that wrk did not like: not 2xx, or none at all."""
    lost = re.search(r"Non-2xx or 3xx responses: (\d+)", told)
    socket_errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", told)
    return (int(lost[1]) if lost else 0) + (sum(map(int, socket_errors.groups())) if socket_errors else 0)


def added(through: Result, direct: Result) -> Result:
    """Milliseconds that a relay adds, per percentile."""
    keys = ("request_p50", "request_p99", "chunk_p50", "chunk_p99")
    return {f"{key}_ms": (through[f"{key}_us"] - direct[f"{key}_us"]) / 1e3 for key in keys} | {
        "errors": through["errors"],
        "cpu_share": through["cpu_s"] / through["seconds"],
    }


def settle(port: int, peer: Peer) -> None:
    """Wait until a gateway knows its whole fleet."""
    deadline = time.monotonic() + peer.start_s
    while peer.name.startswith("gateway") and time.monotonic() < deadline:
        if len(re.findall(r'"state":\s*"ready"', fetched(port, "/admin/fleet"))) >= peer.instances:
            return
        time.sleep(0.2)


def decision_us(port: int) -> float:
    """Mean time that a decision took, as the gateway counts it."""
    named = r"^polyserve_decision_seconds_(sum|count)(?:\{\S*\})? (\S+)$"
    told = dict(re.findall(named, fetched(port, "/metrics"), re.MULTILINE))
    return float(told["sum"]) / float(told["count"]) * 1e6


# ------------------------------------------------------------------------------------------------------------ telling


def say(name: str, what: str) -> None:
    print(f"{name:13} {what}", file=sys.stderr, flush=True)


def table(results: dict[str, Result]) -> str:
    """A row per relay; ratios are to the bare one."""
    base = results.get("bare", {})
    lines = [
        f"{'one-chunk requests':19} requests/s   cpu us    1/cpu  of bare  failed  decision us",
        *(_request_row(name, result, base) for name, result in results.items()),
        "",
        f"{'streams of chunks':19} cpu us at 50/s  of bare  in time   at 100/s  of bare  in time   KiB/idle stream",
        *(_chunk_row(name, result, base) for name, result in results.items() if result.get("chunks")),
        "",
        f"{'added ms, p50 p99':19} "
        + "".join(f"{f'first chunk, {n}':>18}{f'each chunk, {n}':>18}" for n, *_ in DELAYS),
        *(_delay_row(name, result) for name, result in results.items() if result.get("delays")),
        *_relay_rows(results),
    ]
    return "\n".join(lines)


def _ratio(value: float, base: float | None) -> str:
    return f"{value / base:6.2f}x" if base else f"{'-':>7}"


def _request_row(name: str, result: Result, base: Result) -> str:
    if "request_cpu_us" not in result:
        return f"{name:19} {'-':>10}"
    cpu = result["request_cpu_us"]
    decision = f"{result['decision_us']:9.0f}" if "decision_us" in result else f"{'-':>9}"
    return (
        f"{name:19} {result['requests_per_s']:10,.0f} {cpu:8.0f} {1e6 / cpu:8,.0f}  "
        f"{_ratio(cpu, base.get('request_cpu_us'))} {result['failed']:7} {decision}"
    )


def _chunk_row(name: str, result: Result, base: Result) -> str:
    row = f"{name:19} "
    for (_, rate), width in zip(CHUNKS, (14, 10), strict=True):
        if one := result["chunks"][str(rate)]:
            of_bare = base.get("chunks", {}).get(str(rate), {}).get("cpu_us")
            row += f"{one['cpu_us']:{width}.1f}  {_ratio(one['cpu_us'], of_bare)} {one['in_time']:8.0%}"
        else:
            row += f"{'-':>{width}}{'':18}"
    return row + (f" {result['idle_stream_kib']:12.1f}" if "idle_stream_kib" in result else f"{'-':>13}")


def _delay_row(name: str, result: Result) -> str:
    row = f"{name:19} "
    for count, *_ in DELAYS:
        one = result["delays"][str(count)]
        for kind in ("request", "chunk"):
            pair = f"{one[f'{kind}_p50_ms']:.2f} {one[f'{kind}_p99_ms']:.2f}" if one else "-"
            row += f"{pair:>18}"
    return row


def _relay_rows(results: dict[str, Result]) -> list[str]:
    """Of gateways with relays, what the process that decides takes: it bounds how many relays there can be."""
    rows = []
    for name, result in results.items():
        if "relay" not in name or "request_first_cpu_us" not in result:
            continue
        chunks = result["chunks"].get(str(CHUNKS[0][1]))
        per_chunk = f", {chunks['first_cpu_us']:.1f} us of {chunks['cpu_us']:.1f} per chunk" if chunks else ""
        brain, whole = result["request_first_cpu_us"], result["request_cpu_us"]
        rows.append(f"{name}: the brain takes {brain:.0f} us of {whole:.0f} per request{per_chunk}; on both cores")
    return ["", *rows] if rows else []


def main() -> None:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each job")
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    chosen = list(filter(None, options.only.split(","))) or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--only: no relay {unknown[0]!r}; there are: {', '.join(names)}")
    if options.seconds < 1.0:
        parser.error("--seconds: at least 1")
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seconds)
        os.sched_setaffinity(0, {bench.load_core})
        say(DIRECT, "delays without a relay")
        bench.direct = bench.without_relay()
        for peer in (one for one in PEERS if one.name in chosen):
            try:
                results[peer.name] = bench.measure(peer)
            except UnavailableError as why:
                print(f"{peer.name} skipped: {why}", flush=True)
    print(table(results))
    if options.json:
        report = {"seconds": options.seconds, "direct": bench.direct, "relays": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
