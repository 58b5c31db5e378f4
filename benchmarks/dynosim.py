"""DynoSim (`ai-dynamo` 1.6.1) on a job of ours: the simulator to compare with, in an environment of its own.

    python benchmarks/dynosim.py JOB.csv[.gz]      columns arrived_at, num_prefill_tokens, num_decode_tokens

Its replay is a Rust loop in `ai-dynamo-runtime`; timing is its own polynomial, so it is speed that is compared here and
not what is predicted. `ai-dynamo` also asks for `aisimulate`, a placeholder on PyPI that fetches the real package from
another host; the replay of a job does without it.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = "1.6.1"
ENVIRONMENT = Path(__file__).parent.parent / "build" / "dynosim"
BLOCK = 16  # tokens of KV
PREFIX_BLOCK = 512  # tokens for which a mooncake trace has one hash

Row = tuple[float, int, int]  # arrival in seconds, prompt and output tokens


@dataclass(frozen=True, slots=True)
class Engines:
    """How many replicas serve the job, round robin, and how each is started."""

    replicas: int = 4
    chunk: int = 512
    sequences: int = 128
    kv_tokens: int = 448_000  # what an A100 leaves for Llama-3-8B


class UnavailableError(Exception):
    """DynoSim cannot be had here; the message says why in one line."""


def install() -> Path:
    """The interpreter of an environment that has DynoSim, made once; raises `UnavailableError`."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / f".ai-dynamo-{VERSION}"
    if done.exists():
        return python
    print(f"setting up {ENVIRONMENT} with ai-dynamo {VERSION} (once)", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(ENVIRONMENT)],
        [*pip, f"ai-dynamo-runtime=={VERSION}"],
        [*pip, "--no-deps", f"ai-dynamo=={VERSION}"],
        [str(python), "-c", "from dynamo.replay import run_trace_replay"],
    ):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            why = (ended.stderr.strip() or "no reason given").splitlines()[-1]
            raise UnavailableError(f"ai-dynamo {VERSION} cannot be installed here: {why}")
    done.touch()
    return python


def mooncake(rows: Iterable[Row]) -> str:
    """The job as a mooncake trace, in which no two requests share a block."""
    lines, block = [], 0
    for arrived_at, prompt, output in rows:
        blocks = -(-prompt // PREFIX_BLOCK)
        ids = list(range(block, block + blocks))
        block += blocks
        lines.append(
            json.dumps(
                {
                    "timestamp": round(arrived_at * 1e3, 3),
                    "input_length": prompt,
                    "output_length": output,
                    "hash_ids": ids,
                }
            )
        )
    return "\n".join(lines) + "\n"


def run(rows: Iterable[Row], engines: Engines = Engines()) -> dict[str, Any]:
    """Replay a job once: seconds of loop, call and process, peak memory, and what the simulated fleet did."""
    python = install()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "job.jsonl"
        trace.write_text(mooncake(rows), encoding="utf-8")
        command = [str(python), __file__, str(trace), "--inside", json.dumps(asdict(engines))]
        began = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        whole_s = time.perf_counter() - began
    if ended.returncode:
        raise UnavailableError(f"DynoSim failed: {(ended.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return json.loads(ended.stdout.splitlines()[-1]) | {"whole_s": whole_s}


def inside(trace: str, engines: Engines) -> None:
    """In DynoSim's environment: replay the trace and print what it took."""
    import resource

    began = time.perf_counter()
    from dynamo._core import _normalize_mocker_config  # type: ignore[import-not-found]
    from dynamo.replay import run_trace_replay  # type: ignore[import-not-found]

    engine = {
        "max_num_seqs": engines.sequences,
        "max_num_batched_tokens": engines.chunk,
        "block_size": BLOCK,
        "num_gpu_blocks": engines.kv_tokens // BLOCK,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
    }
    imported, used = time.perf_counter(), time.process_time()
    report = run_trace_replay(
        trace,
        extra_engine_args=_normalize_mocker_config({"engine": engine}),
        num_workers=engines.replicas,
        router_mode="round_robin",
        trace_block_size=PREFIX_BLOCK,
    )
    ended = time.perf_counter()
    summary = report.summary
    print(
        json.dumps(
            {
                "requests": summary["completed_requests"],
                "loop_s": summary["wall_time_ms"] / 1e3,
                "call_s": ended - imported,
                "cpu_s": time.process_time() - used,
                "import_s": imported - began,
                "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "mean_ttft_s": summary["mean_ttft_ms"] / 1e3,
                "mean_tpot_s": summary["mean_tpot_ms"] / 1e3,
            }
        )
    )


def read_job(path: str | Path) -> list[Row]:
    """A job's rows from CSV, by arrival."""
    file = Path(path)
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    table = csv.DictReader(data.decode().splitlines())
    return [(float(row["arrived_at"]), int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])) for row in table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.job, Engines(**json.loads(options.inside)))
        return
    try:
        took = run(read_job(options.job))
    except UnavailableError as why:
        print(f"skipped: {why}")
        return
    rate = took["requests"] / took["loop_s"]
    print(f"DynoSim {VERSION}: {took['requests']:,} requests, loop {took['loop_s']:.2f} s ({rate:,.0f}/s),")
    print(f"  call {took['call_s']:.2f} s, import {took['import_s']:.2f} s, {took['rss_mib']:.0f} MiB at most")


if __name__ == "__main__":
    main()
