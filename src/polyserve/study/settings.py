"""The settings of the study as data: which fleets, workloads and policies, and what is asked of them.

A new setting is a row in `SETTINGS`; a new policy to compare with is a row in `ENTRIES`. Everything else follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from polyserve.core.settings import SettingError, engine_wish, policy
from polyserve.core.types import Role
from polyserve.study.search import MEASURES

Pairs = tuple[tuple[str, object], ...]

PACES = ((0.02, 0.1), (0.03, 0.2), (0.05, 0.3), (0.1, 0.4))  # the paper's: seconds per token, share
TTFTS = (0.3, 0.5, 1.0)
SWAPPED = tuple((pace, share) for (pace, _), (_, share) in zip(PACES, PACES[::-1], strict=True))


class StudyError(ValueError):
    """A study that cannot be run; the message names the option and what would do."""


@dataclass(frozen=True, slots=True)
class Group:
    """Instances that are alike."""

    profile: str
    instances: int
    role: Role = Role.MIXED


@dataclass(frozen=True, slots=True)
class Fleet:
    """What serves. `profile` and `instances` are those of a fleet of one kind."""

    name: str
    groups: tuple[Group, ...]
    disaggregated: bool = False  # some instances compute prompts, others answer

    @property
    def profile(self) -> str:
        return self.groups[0].profile

    @property
    def instances(self) -> int:
        return sum(group.instances for group in self.groups)


def fleet(profile: str, instances: int, *others: Group) -> Fleet:
    """So many instances of one profile, and perhaps other groups beside them."""
    groups = (Group(profile, instances), *others)
    return Fleet(" + ".join(f"{group.instances} x {group.profile}" for group in groups), groups)


def in_two_roles(one: Fleet) -> Fleet:
    """The same instances in PD."""
    return replace(one, name=f"{one.name}, PD", disaggregated=True)


@dataclass(frozen=True, slots=True)
class World:
    """What differs from a quiet, steady run with a true profile."""

    jitter: float = 0.0
    bias: float = 0.0
    later: tuple[tuple[float, float], ...] = ()  # shares of the paces from the middle of the window on
    day: str = ""  # the service whose day of rates is run through (`data/rates`); none: a steady rate
    day_s: float = 7200.0  # how long that day is made
    start_up_s: float = 0.0


QUIET = World()

EntryRole = Literal["ours", "baseline", "hindsight", "untuned", "variant"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One policy as its users run it."""

    label: str
    policy: str
    role: EntryRole = "baseline"
    values: Pairs = ()  # settings other than the policy's own
    chunk: int | None = None  # fixed, and not tuned; None: the policy's own rule, or tuned
    tunes: tuple[str, ...] = ()  # what its operator would tune for a workload (`polyserve.study.tuning`)
    scaler: Literal["own", "queue", "static"] | None = None  # where fleets change: who sizes them; None: nobody


@dataclass(frozen=True, slots=True)
class Setting:
    """One question of the study."""

    name: str
    asks: str
    fleets: tuple[Fleet, ...]
    workloads: tuple[str, ...]
    quick_workloads: tuple[str, ...]
    entries: tuple[str, ...]  # labels, `ENTRIES` or POLICY@CHUNK
    quick_entries: tuple[str, ...] = ()  # none: the same
    quick_fleets: tuple[Fleet, ...] = ()  # none: the last one
    measures: tuple[str, ...] = tuple(MEASURES)
    quick_measures: tuple[str, ...] = ()  # none: the same
    loads: tuple[float, ...] = ()  # shares of the optimum that are run for every entry, in any case
    quick_loads: tuple[float, ...] = ()
    overload: bool = (
        True  # run 150 % of the optimum too, where it is not quick: there what refuses nobody takes longest
    )
    worlds: tuple[World, ...] = (QUIET,)
    quick_worlds: tuple[World, ...] = ()  # none: the same
    least_requests: tuple[int, int] = (10_000, 60_000)  # in a window at the optimum: quick, full


# ---------------------------------------------------------------------------------------------------------- policies

OWN = ("polyserve", "polyserve-paper")
# Told the tier shares beforehand, so never "the best baseline" of a service that does not know them.
HINDSIGHT = ("static",)
# The baselines as the paper had them.
UNTUNED = ("random@512", "random@2048", "minimal@512", "minimal@2048")
ALL = (
    *OWN,
    "minimal",
    "least-requests",
    "power-of-two",
    "round-robin",
    "random",
    "static",
    "least-headroom",
    "ptokens-batch",
    "shared-slack",
    "single-slo",
)
# The strongest of their kinds, where time is short. `least-headroom` and `single-slo` predict for every instance, which
# takes several times as long to simulate; they were weaker than `ptokens-batch` where both were tried.
STRONG = (*OWN, "minimal", "ptokens-batch", "static", "shared-slack")

# Where fleets change.
SCALED = (
    *OWN,
    *(
        f"{name} + queue scaler"
        for name in ("polyserve", "minimal", "least-requests", "least-headroom", "shared-slack")
    ),
    *(f"{name}, static fleet" for name in ("polyserve", "minimal", "shared-slack")),
)

# Each mechanism off in turn, and each alternative on.
VARIANTS: dict[str, Pairs] = {
    "average lengths": (("lengths", "average"),),
    "promotion tightest first": (("promotion_order", "tightest"),),
    "promotion eager": (("promotion", "eager"),),
    "no promotion": (("promotion", "off"),),
    "no guest reserve": (("guest_reserve", 0.0),),
    "tight on loose": (("tight_on_loose", True),),
    "no wait-time test": (("wait_time", False),),
    "no token-1 test": (("test_token1", False),),
    "no pace test": (("test_pace", False),),
    "no memory test": (("test_memory", False),),
    "no prefill test": (("test_prefill", False),),
    "no chunk prediction": (("predict_chunks", False),),
    "paced chunk": (("chunk_bound", "pace"),),
    "slack-driven chunk": (("chunk_bound", "slack"),),
    "no relabelling": (("relabel", False),),
    "sized by pending": (("sizing", "pending"),),
    "never refuse": (("on_late", "never"),),
    "serve late": (("on_late", "serve_late"),),
    "most loaded first": (("placement", "fill"),),
    "a head blocks": (("head_walk", 0),),
    "no safety margin": (("safety_sigma", 0.0), ("memory_margin_sigma", 0.0), ("ttft_margin", 0.0)),
    "no live correction": (("correction", False),),
}
# The variant whose engines keep a fixed chunk instead of the dynamic one.
FIXED_VARIANT = "fixed chunk"
# Those whose answer is asked for most often.
QUICK_VARIANTS = (
    "average lengths",
    "promotion tightest first",
    "promotion eager",
    "no promotion",
    "tight on loose",
    "no wait-time test",
    "no chunk prediction",
    "paced chunk",
    "slack-driven chunk",
    "no relabelling",
    "never refuse",
    "most loaded first",
    FIXED_VARIANT,
)


def entry(label: str) -> Entry:
    """The entry of that label: a policy, POLICY@CHUNK, or a variant of `polyserve`; raises `StudyError`."""
    if label in VARIANTS:
        return Entry(label, "polyserve", "variant", VARIANTS[label])
    if label == FIXED_VARIANT:
        return Entry(label, "polyserve", "variant", tunes=("chunk",))
    match = re.fullmatch(r"(.+)@(\d{1,6})", label)
    name = match[1] if match else label
    try:
        tunes = engine_wish(policy(name).router).tunes
    except SettingError as error:
        raise StudyError(
            f"--policies: {error}; any of them with a fixed chunk (minimal@512); or one of polyserve's variants: "
            f"{', '.join((*VARIANTS, FIXED_VARIANT))}"
        ) from None
    if match:
        if int(match[2]) < 1:
            raise StudyError(f"--policies: a fixed chunk is at least 1 token, not {label!r}")
        return Entry(label, name, "untuned", chunk=int(match[2]))
    role: EntryRole = "ours" if name in OWN else "hindsight" if name in HINDSIGHT else "baseline"
    return Entry(label, name, role, tunes=tunes)


# Behind a policy's name, where fleets change: requests per instance decide, or nobody (and the fleet is as large as
# its busiest hour needs); without either the policy scales by itself.
SCALERS: dict[str, Literal["queue", "static"]] = {" + queue scaler": "queue", ", static fleet": "static"}


def scaled_entry(label: str) -> Entry:
    """The entry of that label where fleets change; raises `StudyError`."""
    for ending, scaler in SCALERS.items():
        if label.endswith(ending):
            plain = entry(label.removesuffix(ending))
            values = (*plain.values, ("autoscaler", "queue")) if scaler == "queue" else plain.values
            return replace(plain, label=label, values=values, scaler=scaler)
    return replace(entry(label), scaler="own")


def known_entries(labels: tuple[str, ...], named: Callable[[str], Entry]) -> tuple[list[Entry], list[str]]:
    """The entries that can be run, and the labels of those whose policy does not exist here."""
    able, missing = [], []
    for label in labels:
        try:
            able.append(named(label))
        except StudyError:
            missing.append(label)
    return able, missing


# ---------------------------------------------------------------------------------------------------------- settings

H200_8B, H200_70B, A100_8B = "h200-llama-3-8b", "h200-llama-3-70b-tp4", "a100-llama-3-8b"
PAPER_WORKLOADS = (
    "azure-conv",
    "azure-code",
    "sharegpt",
    "mooncake",
    "uniform:512/512",
    "uniform:4096/256",
    "servegen-small",
    "servegen-mid",
)


def _both(profile: str, instances: int) -> tuple[Fleet, ...]:
    """The same fleet under both assumptions about mixed batches, the measured kind last."""
    return fleet(profile, instances), fleet(f"{profile}-mixed", instances)


# Where binning has something to win: slow weights for the paces asked.
FLEETS = (*_both(A100_8B, 20), *_both(H200_70B, 20))
MIXED_FLEETS = FLEETS[1::2]

SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            "paper-co",
            "the paper's co-located set-up: Llama-3-8B on 20 H200, baselines tuned and as the paper had them",
            (fleet(H200_8B, 20),),
            PAPER_WORKLOADS,
            ("azure-code",),
            (*ALL, *UNTUNED),
            (*OWN, "minimal", "ptokens-batch", "static", *UNTUNED),
        ),
        Setting(
            "paper-pd",
            "the same with prompts and answers on different instances (PD), baselines with their splits tuned too",
            (in_two_roles(fleet(H200_8B, 20)),),
            PAPER_WORKLOADS,
            ("azure-code",),
            (*OWN, "minimal", "least-requests", "random", "ptokens-batch", *UNTUNED),
            (*OWN, "minimal", "ptokens-batch"),
        ),
        Setting(
            "big",
            "Llama-3-70B on 20 times four H200",
            _both(H200_70B, 20),
            ("azure-conv", "azure-code", "sharegpt", "uniform:512/512"),
            ("azure-code",),
            ALL,
            STRONG,
        ),
        Setting(
            "old",
            "Llama-3-8B on 20 A100",
            _both(A100_8B, 20),
            ("azure-conv", "azure-code", "sharegpt", "uniform:512/512"),
            ("azure-code",),
            ALL,
            STRONG,
        ),
        Setting(
            "long-answers",
            "answers far longer than prompts, on 20 A100 and 20 times four H200",
            FLEETS,
            ("apex", "uniform:256/1500"),
            ("uniform:256/1500",),
            ALL,
            STRONG,
            quick_fleets=(fleet(f"{A100_8B}-mixed", 8),),
        ),
        Setting(
            "overload",
            "from half to twice what can be served at best",
            FLEETS,
            ("azure-conv", "azure-code"),
            ("azure-code",),
            ALL,
            STRONG,
            quick_fleets=MIXED_FLEETS,
            measures=(),
            loads=tuple(round(0.5 + 0.1 * n, 1) for n in range(16)),
            quick_loads=(0.5, 0.8, 1.0, 1.25, 1.5, 2.0),
        ),
        Setting(
            "noise",
            "iterations vary by 10 % and take 10 % longer than the profile says; nobody is told",
            FLEETS,
            ("azure-conv", "azure-code"),
            ("azure-code",),
            ALL,
            STRONG,
            quick_fleets=MIXED_FLEETS,
            worlds=(World(jitter=0.1, bias=0.1),),
        ),
        Setting(
            "few",
            "four instances for four tiers",
            (*_both(A100_8B, 4), *_both(H200_70B, 4)),
            ("azure-conv", "azure-code"),
            ("azure-code",),
            ALL,
            STRONG,
            quick_fleets=(fleet(f"{A100_8B}-mixed", 4), fleet(f"{H200_70B}-mixed", 4)),
        ),
        Setting(
            "burst",
            "the shares of the tiers swapped in the middle of the window",
            FLEETS,
            ("azure-conv", "azure-code"),
            ("azure-code",),
            ALL,
            STRONG,
            quick_fleets=MIXED_FLEETS,
            worlds=(World(later=SWAPPED),),
        ),
        Setting(
            "mixed-gpu",
            "Llama-3-8B on twelve A100 and six H200 together",
            tuple(fleet(f"{A100_8B}{law}", 12, Group(f"{H200_8B}{law}", 6)) for law in ("", "-mixed")),
            ("azure-conv", "azure-code"),
            ("azure-code",),
            tuple(label for label in ALL if label not in HINDSIGHT),
            (*OWN, "minimal", "ptokens-batch", "shared-slack"),
        ),
        Setting(
            "scale",
            "goodput per instance as the fleet grows",
            tuple(each for n in (8, 16, 32, 64, 256, 1000) for each in _both(A100_8B, n)),
            ("azure-code",),
            ("azure-code",),
            (*OWN, "minimal"),
            quick_fleets=tuple(fleet(f"{A100_8B}-mixed", n) for n in (8, 16, 32, 64)),
            quick_measures=("G90", "G90t"),
            overload=False,
        ),
        Setting(
            "ablation",
            "each mechanism of polyserve off in turn, and each alternative on",
            FLEETS,
            ("azure-code",),
            ("azure-code",),
            ("polyserve", *VARIANTS, FIXED_VARIANT),
            ("polyserve", *QUICK_VARIANTS),
            quick_fleets=MIXED_FLEETS,
            quick_measures=("G90t",),
        ),
        Setting(
            "autoscale",
            "a day in two hours: instance-seconds per attained request with every tier at 99 %",
            _both(A100_8B, 20),
            ("servegen-mid", "azure-conv"),
            ("azure-code",),
            SCALED,
            ("polyserve", "polyserve + queue scaler", "minimal + queue scaler", "polyserve, static fleet"),
            quick_fleets=(fleet(f"{A100_8B}-mixed", 8),),
            measures=(),
            overload=False,
            worlds=tuple(World(day=day, start_up_s=s) for day in ("small", "mid") for s in (0.0, 30.0, 120.0)),
            quick_worlds=(World(day="small", day_s=2400.0, start_up_s=30.0),),
        ),
    )
}


def setting_named(name: str) -> Setting:
    if name not in SETTINGS:
        raise StudyError(f"--setting: unknown setting {name!r}; there are: {', '.join(SETTINGS)}")
    return SETTINGS[name]


def scaled_down(setting: Setting) -> Setting:
    """The setting as `--quick` runs it."""
    return replace(
        setting,
        fleets=setting.quick_fleets or setting.fleets[-1:],
        workloads=setting.quick_workloads,
        entries=setting.quick_entries or setting.entries,
        measures=setting.quick_measures or setting.measures,
        worlds=setting.quick_worlds or setting.worlds,
        loads=setting.quick_loads or setting.loads,
        overload=False,
    )
