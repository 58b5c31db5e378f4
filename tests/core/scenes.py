"""Small fleets made by hand: what the tests of the core put on stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from polyserve.core.fleet import Books, Fleet, Job, State
from polyserve.core.forecast import Forecaster
from polyserve.core.kernels import I_ENDS, R_FROM, R_RUN
from polyserve.core.lengths import LengthModel
from polyserve.core.pending import Pending
from polyserve.core.profile import Limits, Profile
from polyserve.core.routing import Ladder
from polyserve.core.scaling import Demand
from polyserve.core.settings import Settings
from polyserve.core.types import ChunkRule, Instance, Request, Slo, Tier

# Tokens cost 0.1 ms each above a floor of 10 ms; round figures, to be checked by hand.
STEADY = Profile("steady", (0, 1000), (0.01, 0.11), 0.0, 0.0, 0.0, Limits(100_000, 64, 512, block_size=1))
TIERS = (Tier("tight", 0.02, 1.0), Tier("middle", 0.05, 1.0), Tier("loose", 0.1, 1.0))
CERTAIN = 10**14  # mean output tokens of a prior that lets nobody end before `max_tokens`


def request(
    id: str, prompt: int = 100, ttft_s: float = 1.0, tpot_s: float = 0.1, at: float = 0.0, most: int = 200
) -> Request:
    return Request(id, at, prompt, Slo(ttft_s, tpot_s), max_tokens=most)


def job(request: Request, tier: str | None = "t", row: int = 0) -> Job:
    """The job of a request; without a tier it is best effort."""
    return Job(request, tier, request.slo if tier else None, request.prompt_tokens, row)


PACED = ChunkRule()


class Stage:
    """One instance whose output lengths are certain, and forecasts on it."""

    def __init__(
        self,
        profile: Profile = STEADY,
        chunk: ChunkRule = PACED,
        pace_s: float = math.inf,
        instance: Instance | None = None,
        switches: Mapping[str, object] = {},
    ) -> None:
        self.settings = Settings().replaced({"length_prior_tokens": CERTAIN, "ttft_margin": 0, **switches})
        self.lengths = LengthModel(1, CERTAIN)
        self.books = Books(instance or Instance("i", profile.name, chunk), profile, self.settings, self.lengths)
        self.books.state, self.books.pace_s = State.READY, pace_s
        self.forecaster = Forecaster(self.settings, self.lengths)

    def queue(self, request: Request) -> None:
        """A resident whose prompt is still to be computed."""
        self.books.add(job(request), 0.0)
        self._stand_between_iterations()

    def decode(self, request: Request, made: int = 1) -> None:
        """A resident that decodes."""
        self.queue(request)
        self.books.progressed({request.id: made}, {}, None, 0.0)
        self._stand_between_iterations()

    def _stand_between_iterations(self) -> None:
        """No iteration runs: the next one begins at once, with everybody."""
        self.books.numbers[0][I_ENDS] = -1.0
        self.books.rows[:, (R_FROM, R_RUN)] = 0.0


class Crew:
    """A fleet of tiers, the ladder over it, and what waits."""

    def __init__(
        self, tiers: Sequence[Tier] = TIERS, profile: Profile = STEADY, switches: Mapping[str, object] = {}
    ) -> None:
        self.settings = Settings().replaced({"length_prior_tokens": CERTAIN, "ttft_margin": 0, **switches})
        self.tiers = list(tiers)
        self.lengths = LengthModel(len(tiers), CERTAIN)
        self.fleet = Fleet([tier.name for tier in tiers])
        self.pending = Pending([tier.name for tier in tiers])
        self.demand = Demand(tiers, 256)
        self.profile = profile
        self.router = Ladder(
            self.settings, self.tiers, self.fleet, Forecaster(self.settings, self.lengths), self.demand
        )

    def tier(self, name: str) -> Tier:
        return next(tier for tier in self.tiers if tier.name == name)

    def instance(self, id: str, tier: str | None = None, residents: int = 0, chunk: ChunkRule = PACED) -> Books:
        """A ready instance of a tier, or of the pool, with so many decodes of the tier's own."""
        books = Books(Instance(id, self.profile.name, chunk), self.profile, self.settings, self.lengths)
        books.state, books.tier = State.READY, tier
        books.pace_s = self.tier(tier).tpot_s if tier else self.tiers[-1].tpot_s
        self.fleet.add(books)
        for n in range(residents):
            self.resident(books, f"{id}/{n}", tier)
        return books

    def resident(self, books: Books, id: str, tier: str | None, prompt: int = 10) -> Job:
        """A decode on an instance; best effort without a tier."""
        made = self.job(id, tier, prompt=prompt)
        books.add(made, 0.0)
        books.progressed({id: 1}, {}, None, 0.0)
        return made

    def job(self, id: str, tier: str | None, prompt: int = 10, ttft_s: float = 1.0, at: float = 0.0) -> Job:
        """A request as the controller bins it."""
        tpot_s = self.tier(tier).tpot_s if tier else 1.0
        return job(request(id, prompt, ttft_s, tpot_s, at), tier)
