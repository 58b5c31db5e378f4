"""How fast the simulated engine goes: microseconds per iteration, at several batch sizes, one core.

    python benchmarks/engine_speed.py [--iterations 20000]

The engine alone, kept at so many residents of a chat's lengths; submits included, a controller not. Then 20 engines in
one bank, each with so many residents that decode: what a world's engines take while nobody has to be told anything.
"""

from __future__ import annotations

import argparse
import time
from random import Random

from polyserve.core.settings import Settings
from polyserve.core.types import Instance, Slo
from polyserve.profiles import store
from polyserve.sim.bank import Bank
from polyserve.sim.engine import Engine, Job
from polyserve.sim.turns import BLIND


def per_iteration_us(residents: int, iterations: int) -> tuple[float, float]:
    """Microseconds per iteration in `begin` and `end`, and with the submits that keep the batch full."""
    profile = store.load("h200-llama-3-8b")
    engine = Engine(Instance("i", profile.name), profile, profile, settings=Settings())
    dice, serial, now = Random(1), 0, 0.0
    inside = 0.0
    for iteration in range(-iterations // 10, iterations):
        if iteration == 0:
            inside, began = 0.0, time.perf_counter()
        while engine.residents < residents:
            serial += 1
            lengths = dice.randint(10, 1500), dice.randint(1, 400)
            engine.submit(now, Job(str(serial), *lengths, Slo(1.0, 0.05), now))
        entered = time.perf_counter()
        now = engine.begin(now) or now
        engine.end(now)
        inside += time.perf_counter() - entered
    whole = time.perf_counter() - began
    return inside / iterations * 1e6, whole / iterations * 1e6


def in_a_bank_us(residents: int, iterations: int, engines: int = 20) -> float:
    """Microseconds per iteration of engines in one compiled loop, decoding alone."""
    profile = store.load("h200-llama-3-8b")
    bank = Bank(engines)
    fleet = [
        Engine(Instance(f"i{n}", profile.name), profile, profile, settings=Settings(), bank=bank)
        for n in range(engines)
    ]
    for engine in fleet:
        for serial in range(residents):
            engine.submit(0.0, Job(str(serial), 100, 2 * iterations, None, 0.0))
        bank.wake(engine.row)
    now, made, took = 0.0, 0, 0.0
    while made < iterations:
        before = sum(engine.iterations for engine in fleet)
        began = time.perf_counter()
        bank.advance(now, now + 1.0, inclusive=True, wake=True, quiet_until=now + 1.0, sight=BLIND)
        took += (time.perf_counter() - began) if now else 0.0  # the first second computes prompts
        made += sum(engine.iterations for engine in fleet) - before if now else 0
        now += 1.0
    return took / made * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=20_000)
    iterations = parser.parse_args().iterations
    print("residents  us/iteration  with submits  iterations/s  20 in a bank, us")
    for residents in (1, 20, 100, 250):
        inside, whole = per_iteration_us(residents, iterations)
        print(
            f"{residents:9}  {inside:12.1f}  {whole:12.1f}  {1e6 / whole:12,.0f}"
            f"  {in_a_bank_us(residents, iterations):16.1f}"
        )


if __name__ == "__main__":
    main()
