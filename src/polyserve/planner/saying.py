"""How a plan says how far it is: a bar on a terminal, lines in a pipe, nothing in a worker. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

# Between two lines that say only that something goes on.
QUIET_S = 10.0


class Saying(Protocol):
    """What a plan tells while it runs."""

    def stage(self, text: str) -> None:
        """Something is begun."""

    def done(self, text: str) -> None:
        """Something was found."""

    def run(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Around one simulation of so many requests; what it gives takes the number simulated so far."""

    def tried(self, instances: int, worst: tuple[str, float]) -> None:
        """One simulation came out: how its worst tier fared."""


class Quiet:
    """Says nothing."""

    def stage(self, text: str) -> None: ...

    def done(self, text: str) -> None: ...

    def run(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda _: None)

    def tried(self, instances: int, worst: tuple[str, float]) -> None: ...


class Lines:
    """A line for what was found, and one now and then for what was tried."""

    def __init__(self) -> None:
        self._stage = ""
        self._said_at = time.monotonic()

    def _say(self, text: str) -> None:
        self._said_at = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def stage(self, text: str) -> None:
        self._stage = text

    def done(self, text: str) -> None:
        self._say(text)

    def run(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        def advance(done: int) -> None:
            if time.monotonic() - self._said_at >= QUIET_S:
                self._say(f"{self._stage}: {what}, {done} of {total} requests simulated")

        return nullcontext(advance)

    def tried(self, instances: int, worst: tuple[str, float]) -> None:
        if time.monotonic() - self._said_at >= QUIET_S:
            self._say(f"{self._stage}: {outcome(instances, worst)}")


class Bar:
    """One bar that shows the running simulation, and what was found above it."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._stage = ""
        self._last = ""
        self._task: TaskID = bar.add_task("", total=None)

    def stage(self, text: str) -> None:
        self._stage, self._last = text, ""
        self._bar.update(self._task, description=text, total=None)

    def done(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    @contextmanager
    def run(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        last = f" (last: {self._last})" if self._last else ""
        self._bar.update(self._task, description=f"{self._stage}: {what}{last}", total=total, completed=0)
        yield lambda done: self._bar.update(self._task, completed=done)

    def tried(self, instances: int, worst: tuple[str, float]) -> None:
        self._last = outcome(instances, worst)


def fleet_of(instances: int) -> str:
    """So many instances, in words."""
    return f"{instances} instance{'' if instances == 1 else 's'}"


def outcome(instances: int, worst: tuple[str, float]) -> str:
    """One trial in words."""
    return f"{fleet_of(instances)}: {100 * worst[1]:.1f} % at {worst[0]} ms"


@contextmanager
def saying() -> Iterator[Saying]:
    """A bar on a terminal, else lines."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Bar(bar)
