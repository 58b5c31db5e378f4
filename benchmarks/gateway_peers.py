"""Who takes part in `gateway.py`: each a command that relays from a port to the upstream, and what it needs for it.

LiteLLM and vLLM's router get an environment of their own under build/peers, at a pinned version, once. Whoever
cannot be had is skipped with a line that says why.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / "build" / "peers"
INSTALL_S = 600.0
COMPILE_S = 300.0  # the core's loops, where they have changed since they were compiled last

# Wheels only: nothing is built from source. The last release before two that were tampered with, 1.82.7 and 1.82.8.
LITELLM = "litellm[proxy]==1.82.6"
# What vLLM's project has on PyPI now is a router in Rust; production-stack's own, in Python, is not there.
VLLM_ROUTER = "vllm-router==0.1.17"


class UnavailableError(Exception):
    """A peer that cannot be had here; the message says why in one line."""


@dataclass(frozen=True)
class Peer:
    """One relay under test; `prepare(port, upstream ports, folder)` gives the command, or raises `UnavailableError`."""

    name: str
    prepare: Callable[[int, range, Path], list[str]]
    instances: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    relays: int = 0  # processes beside the one that decides; they may use both cores
    idle_streams: int = 2000
    only_requests: bool = False  # what streams cost does not depend on what is different about it
    start_s: float = 30.0


def _bare(port: int, upstream: range, folder: Path) -> list[str]:
    return [sys.executable, str(HERE / "bare_relay.py"), str(port), f"http://127.0.0.1:{upstream[0]}"]


def gateway_config(port: int, upstream: range, journal: Path, relays: int = 0) -> dict[str, object]:
    """The gateway as it would be run: brain, books, metrics and journal, and nothing that is refused."""
    urls = [f"http://127.0.0.1:{each}" for each in upstream]
    return {
        "model": "m",
        "listen": {"port": port},
        "profile": "h200-llama-3-8b",
        "tiers": [{"name": "slow", "tpot_ms": 200, "ttft_ms": 60_000}],
        "instances": [{"id": f"e{n}", "url": url, "kind": "openai", "chunk": "dynamic"} for n, url in enumerate(urls)],
        "settings": {"on_late": "never", "placement": "spread"},
        "journal": str(journal),
        "relays": relays,
    }


def _gateway(port: int, upstream: range, folder: Path, relays: int = 0) -> list[str]:
    config = folder / f"gateway-{len(upstream)}.yaml"
    plain = gateway_config(port, upstream, folder / "journal.jsonl", relays)
    config.write_text(json.dumps(plain), encoding="utf-8")
    return [sys.executable, "-m", "polyserve", "serve", str(config)]


def _haproxy(port: int, upstream: range, folder: Path) -> list[str]:
    config = folder / "haproxy.cfg"
    config.write_text(
        f"""global
    nbthread 1
    maxconn 8000
defaults
    mode http
    timeout connect 5s
    timeout client 600s
    timeout server 600s
    http-reuse always
    option http-no-delay
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    server one 127.0.0.1:{upstream[0]}
""",
        encoding="utf-8",
    )
    return [_installed("haproxy"), "-db", "-f", str(config)]


def _nginx(port: int, upstream: range, folder: Path) -> list[str]:
    config = folder / "nginx.conf"
    config.write_text(
        f"""daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 8000; }}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    keepalive_requests 1000000;
    upstream back {{ server 127.0.0.1:{upstream[0]}; keepalive 2048; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://back;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
""",
        encoding="utf-8",
    )
    return [_installed("nginx"), "-e", str(folder / "nginx.log"), "-c", str(config)]


def _litellm(port: int, upstream: range, folder: Path) -> list[str]:
    config = folder / "litellm.yaml"
    model = {"model": "openai/m", "api_base": f"http://127.0.0.1:{upstream[0]}/v1", "api_key": "none"}
    plain = {
        "model_list": [{"model_name": "m", "litellm_params": model}],
        "litellm_settings": {"telemetry": False, "drop_params": True},
    }
    config.write_text(json.dumps(plain), encoding="utf-8")
    program = _environment("litellm", LITELLM) / "litellm"
    return [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]


def _vllm_router(port: int, upstream: range, folder: Path) -> list[str]:
    program = _environment("vllm-router", VLLM_ROUTER) / "vllm-router"
    urls = [f"http://127.0.0.1:{each}" for each in upstream]
    where = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(port + 1000)]
    return [str(program), *where, "--policy", "round_robin", "--log-level", "warning", "--worker-urls", *urls]


def _installed(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise UnavailableError(f"{name} is not installed (Debian: apt-get install {name})")
    return found


def _environment(name: str, package: str) -> Path:
    """The folder of programs of an environment that has the package, made if it is not there yet."""
    folder = ENVIRONMENTS / name
    done = folder / ".installed"
    if done.exists() and done.read_text(encoding="utf-8") == package:
        return folder / "bin"
    print(f"installing {package} into {folder} (once)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "pip"), "install", "--quiet", "--only-binary", ":all:", package],
    ]
    for step in steps:
        try:
            subprocess.run(step, check=True, capture_output=True, text=True, timeout=INSTALL_S)
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"{package} could not be installed within {INSTALL_S:g} s") from None
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise UnavailableError(f"{package} cannot be installed: {said[-1] if said else error}") from None
    done.write_text(package, encoding="utf-8")
    return folder / "bin"


PEERS = (
    Peer("bare", _bare),
    Peer("gateway", _gateway, instances=4, start_s=COMPILE_S),
    Peer("gateway-100", _gateway, instances=100, only_requests=True),
    Peer("gateway-1000", _gateway, instances=1000, only_requests=True, start_s=90.0),
    Peer("gateway-relay-1", partial(_gateway, relays=1), instances=4, relays=1, start_s=60.0),
    Peer("gateway-relay-2", partial(_gateway, relays=2), instances=4, relays=2, start_s=60.0),
    Peer("haproxy", _haproxy),
    Peer("nginx", _nginx),
    # A request takes it milliseconds: 2,000 streams would take it half a minute to open.
    Peer("litellm", _litellm, idle_streams=500, start_s=90.0, environment={"LITELLM_LOG": "ERROR", "NO_PROXY": "*"}),
    Peer("vllm-router", _vllm_router, start_s=60.0, environment={"NO_PROXY": "*"}),
)
