"""Who does what a plan consists of: this process, one task after another, or several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

from polyserve.planner.ask import Ask
from polyserve.planner.bench import Bench

Task = tuple[str, Callable[[Bench], Any]]  # its name, and what to do: a function that can be pickled
Crew = Callable[[Sequence[Task]], list[Any]]  # does tasks; the answers are in their order

_bench: Bench | None = None  # a worker process's own


def _begin(ask: Ask) -> None:
    global _bench
    _bench = Bench(ask)


def _work(task: Callable[[Bench], Any]) -> Any:
    assert _bench is not None, "a worker is begun before it works"
    return task(_bench)


@contextmanager
def crew(bench: Bench, jobs: int, in_words: Callable[[Any], str], total: int) -> Iterator[Crew]:
    """`jobs` processes, or this one at its bench; `total` tasks are expected altogether, for what is said."""
    saying, done = bench.saying, 0

    def tell(name: str, answer: Any) -> None:
        nonlocal done
        done += 1
        saying.done(f"[{done}/{total}] {name}: {in_words(answer)}")

    def one_by_one(tasks: Sequence[Task]) -> list[Any]:
        answers = []
        for name, task in tasks:
            saying.stage(f"[{done + 1}/{total}] {name}")
            answers.append(task(bench))
            tell(name, answers[-1])
        return answers

    if jobs == 1:
        yield one_by_one
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (bench.ask,)) as pool:

        def together(tasks: Sequence[Task]) -> list[Any]:
            saying.stage(f"{jobs} processes")
            under_way = {pool.submit(_work, task): n for n, (_, task) in enumerate(tasks)}
            answers: list[Any] = [None] * len(tasks)
            for finished in as_completed(under_way):
                n = under_way[finished]
                answers[n] = finished.result()
                tell(tasks[n][0], answers[n])
            return answers

        yield together
