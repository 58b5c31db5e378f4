"""A policy from outside: long prompts keep to a lane of their own, so that short ones are not stuck behind them.

    polyserve simulate --policy examples.policies.long_lane:LongLane --rate 60% --duration 60

What routers call bucketing by request length. It takes the fewest requests inside each lane, and refuses nothing.
"""

from collections.abc import Sequence
from typing import ClassVar

from polyserve.core.baselines import OnePool, requests
from polyserve.core.fleet import Books, Job
from polyserve.core.settings import EngineWish


class LongLane(OnePool):
    """Prompts from `long_tokens` on go to the last `share` of the instances, all others to the rest."""

    long_tokens = 2000
    share = 0.25

    wants_progress = False  # who is there is enough: how far they are is not looked at
    settings: ClassVar[dict[str, object]] = {"target_requests": 40}  # where it differs from the usual ones
    engine = EngineWish("fixed", "fcfs", tunes=("chunk",))

    def choose(self, now: float, job: Job, ready: Sequence[Books]) -> Books:
        others = len(ready) - max(1, round(self.share * len(ready)))
        lane = ready[others:] if job.prompt_tokens >= self.long_tokens else ready[:others]
        return min(lane or ready, key=lambda books: (requests(books), books.id))
