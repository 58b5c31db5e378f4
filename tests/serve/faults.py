"""A gateway, engines and clients in virtual time, and faults drawn from a seed.

Law: every request that a client sent is answered once, completed with the tokens of a run without faults or refused
with a right error, and afterwards nobody has anything of it in their books.

    PYTHONPATH=src python tests/serve/faults.py --seeds 5000
    PYTHONPATH=src python tests/serve/faults.py --first 1234 --seeds 1 --tell
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

from live import make_plan
from memory_engine import GARBAGE, MODEL, STEP_S, MemoryEngine, asked, text
from virtual import StandstillError, VirtualLoop, session, virtual_time

from polyserve.serve.app import Front
from polyserve.serve.gateway import Gateway
from polyserve.serve.plan import EngineSpec, Plan

BEGINS_S = 2.0  # all clients have come and all faults begun by then
ATTEMPTS = 3
ENDS_S = 400.0  # by then everybody has been answered
TIERS = [
    {"name": "fast", "tpot_ms": 30, "ttft_ms": 10_000},
    {"name": "slow", "tpot_ms": 200, "ttft_ms": 60_000},
]
# What a request may be refused with before its answer has begun.
REFUSED = {429: {"overloaded"}, 503: {"no_instances"}, 502: {"upstream_error"}}


class LawBrokenError(AssertionError):
    """What a run did that it must not."""


@dataclass
class Client:
    """One request and what its client sees."""

    name: str
    path: str
    body: dict[str, Any]
    comes_s: float
    tier: str
    leaves_s: float | None = None
    stalls_s: float = 0.0  # before it reads on, once
    status: int = 0
    head: dict[bytes, bytes] = field(default_factory=dict)
    got: bytes = b""
    ended: bool = False
    left: bool = False

    @property
    def raw(self) -> bytes:
        return json.dumps(self.body).encode()

    @property
    def continuable(self) -> bool:
        return not {"n", "logprobs", "tools"} & self.body.keys()

    async def ask(self, front: Front) -> None:
        """Send the request, and take in its answer."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.comes_s)
        gone = loop.create_future()
        said = False

        async def receive() -> Any:
            nonlocal said
            if said:
                await gone
                return {"type": "http.disconnect"}
            said = True
            return {"type": "http.request", "body": self.raw, "more_body": False}

        async def send(message: Any) -> None:
            if self.stalls_s and self.got:
                self.stalls_s, wait_s = 0.0, self.stalls_s
                await asyncio.sleep(wait_s)
            if not self.left:
                self._take(message)

        headers = [(b"x-request-id", self.name.encode()), (b"x-polyserve-tier", self.tier.encode())]
        scope = {"type": "http", "method": "POST", "path": self.path, "headers": headers}
        if self.leaves_s is not None:
            loop.call_later(self.leaves_s, self._leave, gone)
        await front(scope, receive, send)
        if not gone.done():
            gone.set_result(None)

    def _leave(self, gone: asyncio.Future[None]) -> None:
        if not self.ended and not gone.done():
            self.left = True
            gone.set_result(None)

    def _take(self, message: Any) -> None:
        if self.ended:
            raise LawBrokenError(f"{self.name} is sent {message} after the end")
        if message["type"] == "http.response.start":
            if self.status:
                raise LawBrokenError(f"{self.name} is answered twice")
            self.status, self.head = message["status"], dict(message["headers"])
        else:
            self.got += message.get("body", b"")
            self.ended = not message.get("more_body", False)

    # -- the law

    def verdict(self, most_failures: int) -> str:
        """What became of it, where so many engines may fail; raises `LawBrokenError`."""
        if self.left:
            return "left"
        if not self.ended:
            raise LawBrokenError(f"{self.name} was never answered: {self.status} {self.got!r}")
        if self.status != 200:
            return self._refused(most_failures)
        return self._streamed(most_failures) if self.body.get("stream") else self._whole()

    def _refused(self, most_failures: int) -> str:
        code = json.loads(self.got)["error"]["code"]
        if code == "upstream_error" and most_failures < ATTEMPTS:
            raise LawBrokenError(f"{self.name} was given up with a sound engine left: {self.got!r}")
        if code not in REFUSED.get(self.status, ()):
            raise LawBrokenError(f"{self.name} is refused with {self.status} {code}: {self.got!r}")
        if self.status in (429, 503) and int(self.head[b"retry-after-ms"]) <= 0:
            raise LawBrokenError(f"{self.name} is not told when to come back")
        return f"refused {code}"

    def _streamed(self, most_failures: int) -> str:
        *events, last, rest = self.got.decode().split("\n\n")
        if rest:
            raise LawBrokenError(f"{self.name} ends in {rest!r}")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        if last != "data: [DONE]":
            return self._broken(chunks, last, most_failures)
        self._check({c["index"]: "" for c in self._choices(chunks)}, chunks)
        return "completed"

    def _choices(self, chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [choice for chunk in chunks for choice in chunk["choices"]]

    def _check(self, said: dict[int, str], chunks: list[dict[str, Any]]) -> None:
        wanted = asked(self.path, self.raw)
        reasons: dict[int, list[str]] = {}
        for choice in self._choices(chunks):
            part = choice.get("delta", choice)
            said[choice["index"]] += part.get("content") or part.get("text") or ""
            if choice.get("finish_reason"):
                reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
        self._same("text", said, {answer.index: text(answer) for answer in wanted.answers})
        self._same("finish_reason", reasons, {answer.index: [answer.reason] for answer in wanted.answers})
        self._same("ids", len({(chunk["id"], chunk["created"]) for chunk in chunks}), 1)
        roles = [choice for choice in self._choices(chunks) if "role" in choice.get("delta", {})]
        self._same("roles", len(roles), len(wanted.answers) if wanted.chat else 0)
        usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
        self._same("usage", usage, [self._usage()] if "stream_options" in self.body else [])

    def _usage(self) -> dict[str, int]:
        wanted = asked(self.path, self.raw)
        made = sum(answer.output_tokens for answer in wanted.answers)
        prompt = wanted.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def _same(self, what: str, is_: object, wanted: object) -> None:
        if is_ != wanted:
            raise LawBrokenError(f"{self.name}: {what} is {is_!r}, not {wanted!r}\n{self.body}\n{self.got.decode()}")

    def _broken(self, chunks: list[dict[str, Any]], last: str, most_failures: int) -> str:
        error = json.loads(last.removeprefix("data: "))["error"]
        self._same("error", error["code"], "upstream_error")
        if self.continuable and most_failures < ATTEMPTS:
            raise LawBrokenError(f"{self.name} could have been continued: {error}")
        wanted = {answer.index: text(answer) for answer in asked(self.path, self.raw).answers}
        said = dict.fromkeys(wanted, "")
        for choice in self._choices(chunks):
            part = choice.get("delta", choice)
            said[choice["index"]] += part.get("content") or part.get("text") or ""
        self._same("beginning", [wanted[at].startswith(said[at]) for at in said], [True] * len(said))
        return "told of the loss"

    def _whole(self) -> str:
        answer = json.loads(self.got)
        wanted = asked(self.path, self.raw)
        said = {c["index"]: c["message"]["content"] if wanted.chat else c["text"] for c in answer["choices"]}
        self._same("text", said, {a.index: text(a) for a in wanted.answers})
        self._same("finish_reason", [c["finish_reason"] for c in answer["choices"]], [a.reason for a in wanted.answers])
        self._same("usage", answer["usage"], self._usage())
        return "completed"


@dataclass
class Run:
    """One seed, played."""

    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    chores: list[asyncio.Task[None]] = field(default_factory=list)

    def tell(self, what: str) -> None:
        self.told.append(f"{asyncio.get_running_loop().time() - 1000:8.3f} {what}")


class _Complaints(logging.Handler):
    """Whatever is logged as an error is one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


def play(seed: int) -> Run:
    """One run; raises `LawBrokenError` saying how to play it again."""
    complaints = _Complaints()
    root = logging.getLogger("polyserve")
    root.addHandler(complaints)
    run = Run(seed)
    try:
        with virtual_time() as runner:
            runner.run(_play(run))
        if complaints.said:
            raise LawBrokenError("\n".join(complaints.said))
    except (LawBrokenError, StandstillError) as error:
        again = f"PYTHONPATH=src python tests/serve/faults.py --first {seed} --seeds 1 --tell"
        raise LawBrokenError(f"{error}\n{again}") from error
    finally:
        root.removeHandler(complaints)
    return run


@contextlib.asynccontextmanager
async def scene(plan: Plan) -> AsyncIterator[tuple[Gateway, Front]]:
    """A gateway at work on the loop's network, whose engines are all ready."""
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    async with session() as http:
        gateway = Gateway(plan.sole, plan.bounds, http, None, clock=loop.time)
        front = Front([gateway], plan.bounds, cast(Any, None), clock=loop.time)
        gateway.open()
        while not all(node.state == "ready" for node in gateway.fleet):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        try:
            yield gateway, front
        finally:
            await gateway.close()


async def _play(run: Run) -> None:
    random = Random(run.seed)
    loop = cast(VirtualLoop, asyncio.get_running_loop())
    engines = [MemoryEngine(loop, number) for number in range(random.choice((2, 3, 3, 4)))]
    async with scene(_plan(random, engines)) as (gateway, front):
        clients = [_client(random, f"r{number}") for number in range(random.randint(6, 14))]
        asking = [loop.create_task(client.ask(front)) for client in clients]
        for engine in engines[1:]:  # the first is sound
            _draw_faults(run, random, engine, gateway)
        try:
            async with asyncio.timeout(ENDS_S):
                await asyncio.gather(*asking)
                await _quiet(gateway, engines)
        except TimeoutError:
            raise LawBrokenError(f"after {ENDS_S} s: {_held(gateway, engines)}, {clients}") from None
        finally:
            for task in [*asking, *run.chores]:
                task.cancel()
    if gateway.driver.failed.done():
        raise LawBrokenError(f"the controller failed: {gateway.driver.failed.result()!r}")
    for client in clients:
        run.outcomes[client.verdict(len(engines) - 1)] += 1


def _plan(random: Random, engines: list[MemoryEngine]) -> Plan:
    settings: dict[str, Any] = {}
    if random.random() < 0.3:
        settings["on_late"] = random.choice(("serve_late", "never"))
    if random.random() < 0.2:
        settings["placement"] = "fill"
    return make_plan(
        [engine.url for engine in engines],
        tiers=TIERS,
        settings=settings,
        limits={"probe_s": 0.5, "silence_s": random.choice((5, 30, 300)), "connect_s": 1, "attempts": ATTEMPTS},
        seed=random.randint(0, 1000),
    )


def _client(random: Random, name: str) -> Client:
    chat = random.random() < 0.5
    body: dict[str, Any] = {"model": MODEL, "max_tokens": random.randint(1, 24)}
    prompt = " ".join(f"w{random.randint(0, 99)}" for _ in range(random.randint(1, 40)))
    if chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = random.choice((prompt, [prompt], [random.randint(0, 999) for _ in range(9)]))
    if random.random() < 0.3:
        body["vllm_xargs"] = {"output_tokens": random.randint(1, 24)}
    if random.random() < 0.75:
        body["stream"] = True
        if random.random() < 0.4:
            body["stream_options"] = {"include_usage": True}
    if random.random() < 0.2:
        body |= random.choice(
            ({"n": 2}, {"tools": [{"type": "function", "function": {"name": "f"}}]} if chat else {"n": 3})
        )
    return Client(
        name,
        "/v1/chat/completions" if chat else "/v1/completions",
        body,
        comes_s=random.uniform(0.0, BEGINS_S),
        tier=random.choice(("fast", "slow", "slow", "best-effort")),
        leaves_s=random.uniform(0.0, 3.0) if random.random() < 0.15 else None,
        stalls_s=random.uniform(0.0, 8.0) if random.random() < 0.1 else 0.0,
    )


TOOL = {"type": "function", "function": {"name": "f"}}
FAULTS = ("kill", "restart", "freeze", "stuck", "slow", "5xx", "garbage", "drain", "remove", "replaced")


def _draw_faults(run: Run, random: Random, engine: MemoryEngine, gateway: Gateway) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        kind = random.choice(FAULTS)
        at_s, for_s = random.uniform(0.0, BEGINS_S), random.choice((0.05, 0.5, 2.0, 8.0, 20.0, 100.0))
        run.faults[kind] += 1

        loop.call_later(at_s, _befall, run, kind, for_s, Random(random.random()), engine, gateway)


def _befall(run: Run, kind: str, for_s: float, random: Random, engine: MemoryEngine, gateway: Gateway) -> None:
    loop = asyncio.get_running_loop()
    run.tell(f"{kind} of {engine.id} for {for_s} s")
    match kind:
        case "kill":
            engine.kill()
            loop.call_later(for_s, _start, engine)
        case "restart":
            engine.kill()
            engine.start()
        case "replaced":  # behind a proxy that keeps the connections open
            engine.streams.clear()
            engine.start()
        case "freeze":
            engine.freeze()
            loop.call_later(for_s, engine.thaw)
        case "stuck":
            engine.stuck = True
            loop.call_later(for_s, setattr, engine, "stuck", False)
        case "slow":
            engine.step_s = STEP_S * random.choice((3, 10, 50))
            loop.call_later(for_s, setattr, engine, "step_s", STEP_S)
        case "5xx":
            engine.status = random.choice((500, 502, 503, 429))
            loop.call_later(for_s, setattr, engine, "status", 200)
        case "garbage":
            left = [random.randint(1, 6)]

            def wrong() -> Any:
                left[0] -= 1
                return (random.choice(GARBAGE), random.randint(0, 12)) if left[0] >= 0 else None

            engine.next_wrong = wrong
        case "drain":
            gateway.drain(engine.id)
        case "remove":
            if gateway.fleet.get(engine.id) is not None:
                run.chores.append(loop.create_task(_remove(gateway, engine, for_s)))
        case _:
            raise AssertionError(kind)


def _start(engine: MemoryEngine) -> None:
    engine.kill()  # another fault may have begun it meanwhile
    engine.start()


async def _remove(gateway: Gateway, engine: MemoryEngine, for_s: float) -> None:
    await gateway.remove(engine.id)
    await asyncio.sleep(for_s)
    if gateway.fleet.get(engine.id) is None and gateway.accepting():
        gateway.join(EngineSpec(engine.id, engine.url, next(iter(gateway.plan.configured.profiles))))


def _held(gateway: Gateway, engines: list[MemoryEngine]) -> list[str]:
    brain = gateway.decisions.brain
    held = [repr(ticket) for node in gateway.fleet for ticket in node.tickets.values()]
    held += [f"{job} on {instance.id}" for instance in brain.fleet for job in instance.jobs]
    held += [f"{len(brain.pending)} wait"] if len(brain.pending) else []
    held += [f"{stream.id} on {engine.id}" for engine in engines for stream in engine.streams]
    return held + ([repr(gateway.inflight)] if len(gateway.inflight) else [])


async def _quiet(gateway: Gateway, engines: list[MemoryEngine]) -> None:
    while _held(gateway, engines):  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--tell", action="store_true")
    options = parser.parse_args()
    if options.tell:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    began, broken = time.process_time(), []
    for seed in range(options.first, options.first + options.seeds):
        try:
            run = play(seed)
        except Exception as error:
            broken.append(seed)
            if len(broken) <= 3:
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            continue
        outcomes += run.outcomes
        faults += run.faults
        if options.tell:
            print("\n".join(run.told))
    took_s = time.process_time() - began
    print(f"{options.seeds} seeds, {1e3 * took_s / options.seeds:.0f} ms each of processor time")
    print(f"faults: {dict(faults.most_common())}")
    print(f"requests: {dict(outcomes.most_common())}")
    print(f"broken: {len(broken)} {broken[:20]}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
