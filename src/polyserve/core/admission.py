"""What a request becomes before anything is decided about it: binned, checked against what is possible, a job."""

from __future__ import annotations

from collections.abc import Mapping

from polyserve.core.bound import largest_solo_chunk
from polyserve.core.fleet import Books, Job
from polyserve.core.kernels import Vector, one_solo_ttft_s
from polyserve.core.lengths import LengthModel
from polyserve.core.profile import Profile
from polyserve.core.settings import Settings
from polyserve.core.types import ChunkRule, RefuseCode, Request, Slo, Tier, to_microsecond


class Admission:
    """Bins requests into tiers (tightest first) and refuses what even an idle instance could not do."""

    def __init__(
        self, settings: Settings, tiers: list[Tier], profiles: Mapping[str, Profile], lengths: LengthModel
    ) -> None:
        self._settings = settings
        self._tiers = tiers
        self._index = {tier.name: i for i, tier in enumerate(tiers)}
        self._lengths = lengths
        self._kinds: dict[tuple[str, ChunkRule], Profile] = {}  # of instances that ever joined
        self._tightest_s = 0.0
        self._link: tuple[float, float] | None = None  # in PD: what handing KV over takes, and that per token
        if settings.disaggregated:
            bytes_ = max(profile.kv_bytes_per_token for profile in profiles.values())
            self._link = (settings.kv_latency_s, bytes_ / settings.kv_bandwidth)
        self.counts_only = False  # nobody forecasts and nobody is refused for being late: no need to know when one is
        self._solo: list[tuple[Vector, int]] = []  # of each kind: its packed profile and largest chunk
        self._context = max(_context(profile) for profile in profiles.values())

    def retier(self, tiers: list[Tier]) -> None:
        """Bin into other tiers from now on."""
        self._tiers = tiers
        self._index = {tier.name: i for i, tier in enumerate(tiers)}

    def rebin(self, job: Job) -> None:
        """The tier of a job among those of now, by the SLO it has; one tighter than all: the tightest."""
        if job.slo is not None:
            job.tier = (self.bin(job.slo) or self._tiers[0]).name
        job.length_row = self._lengths.row(None if job.tier is None else self._index[job.tier], job.prompt_tokens)

    def joined(self, books: Books) -> None:
        """Learn what kind of instance there is."""
        if not self._kinds:
            self._context = 0
        self._kinds[books.instance.profile, books.instance.chunk] = books.profile
        kinds = self._kinds.items()
        self._tightest_s = min(profile.tightest_pace_s for profile in self._kinds.values())
        self._solo = [(profile.packed, largest_solo_chunk(profile.limits, chunk)) for (_, chunk), profile in kinds]
        self._context = max(self._context, min(books.profile.limits.context_tokens, books.kv_tokens))

    def admit(self, request: Request) -> Job | RefuseCode:
        """The request as a job, or why it can never be one."""
        if request.prompt_tokens + (request.max_tokens or 1) > self._context:
            return "context_length_exceeded"
        if request.slo is None:
            return self.job(request, *self._without_slo())
        if self._settings.router != "tiers":
            return self.job(request, self.bin(request.slo) or self._tiers[0], request.slo)
        tier = self.bin(request.slo)
        solo_s = self.solo_ttft_s(request.prompt_tokens)
        less_s = self._least_less_s(request.prompt_tokens, request.slo) if self._link is not None else 0.0
        slo = self._reachable(request.slo, tier, solo_s, less_s)
        return "slo_infeasible" if slo is None else self.job(request, tier or self._tiers[0], slo, solo_s)

    def _without_slo(self) -> tuple[Tier | None, Slo | None]:
        if self._settings.best_effort or self._settings.router != "tiers":
            return None, None
        loosest = self._tiers[-1]
        return loosest, Slo(loosest.ttft_s, loosest.tpot_s)

    def bin(self, slo: Slo) -> Tier | None:
        """The loosest tier that is no looser than asked; None when even the tightest is too loose."""
        bound_s = slo.tpot_s * (1 + 1e-9)
        return next((tier for tier in reversed(self._tiers) if tier.tpot_s <= bound_s), None)

    def _least_less_s(self, prompt_tokens: int, slo: Slo) -> float:
        """Seconds of a first token's deadline that the second one needs on idle instances: PD's hand-over."""
        assert self._link is not None
        return max(self._link[0] + self._link[1] * prompt_tokens + self._tightest_s - slo.tpot_s, 0.0)

    def _reachable(self, slo: Slo, tier: Tier | None, best_s: float, less_s: float) -> Slo | None:
        """The SLO, if an idle instance would meet it; else the best possible one, or None by the settings."""
        paced = tier is not None and self._holds(tier)
        best_s += less_s
        if paced and best_s <= slo.ttft_s:
            return slo
        if self._settings.infeasible == "refuse" and self._settings.on_late == "refuse":
            return None
        return Slo(max(slo.ttft_s, best_s), slo.tpot_s if tier is not None else self._tiers[0].tpot_s)

    def _holds(self, tier: Tier) -> bool:
        """Whether some instance can keep a tier's pace at all."""
        return not self._kinds or self._tightest_s <= tier.tpot_s

    def solo_ttft_s(self, prompt_tokens: int) -> float:
        """Time to first token on the fastest instance there is, were it idle; 0 while none is known."""
        return min((one_solo_ttft_s(packed, size, prompt_tokens) for packed, size in self._solo), default=0.0)

    def job(self, request: Request, tier: Tier | None, slo: Slo | None, solo_s: float | None = None) -> Job:
        """The job of a request; `tier` None is best effort. `solo_s`: what its prompt takes alone, where known."""
        index = None if tier is None else self._index[tier.name]
        row = self._lengths.row(index, request.prompt_tokens)
        job = Job(request, tier.name if tier else None, slo, request.prompt_tokens, row, link=self._link)
        self.set_latest(job, solo_s)
        return job

    def correct(self, job: Job, prompt_tokens: int) -> None:
        """Replace an estimate of a waiting job's prompt, and what follows from it."""
        job.prompt_tokens = prompt_tokens
        job.length_row = self._lengths.row(None if job.tier is None else self._index[job.tier], prompt_tokens)
        self.set_latest(job)

    def set_latest(self, job: Job, solo_s: float | None = None) -> None:
        """Note what the job's prompt takes on an idle instance, and when it is too late even for that."""
        if job.slo is not None and not self.counts_only:
            job.solo_s = self.solo_ttft_s(job.prefill_tokens) if solo_s is None else solo_s
            less_s = self._least_less_s(job.prefill_tokens, job.slo) if self._link is not None else 0.0
            job.latest_at = to_microsecond(job.due_at - job.solo_s - less_s)


def _context(profile: Profile) -> int:
    return min(profile.limits.context_tokens, profile.limits.kv_tokens)
