"""What each baseline looks at, that it always finds a place where it imitates one that does, and what it holds to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import STEADY, TIERS, Crew
from test_routing import costly, full, steady, wait, where

from polyserve.core.baselines import POOLS, Given, OnePool, router
from polyserve.core.forecast import Forecaster
from polyserve.core.profile import Limits
from polyserve.core.routing import Placement
from polyserve.core.settings import SettingError
from polyserve.core.types import ChunkRule

FIXED = ChunkRule("fixed", 128)
REFUSE_NOTHING = [name for name in POOLS if name != "single-slo"]


def made(name: str, crew: Crew, seed: int = 1) -> OnePool:
    forecaster = Forecaster(crew.settings, crew.lengths)
    return POOLS[name](Given(crew.settings, crew.tiers, crew.fleet, forecaster, crew.demand, Random(seed)))


def chosen(name: str, crew: Crew, times: int, seed: int = 1, tier: str = "tight", **job: float) -> list[str | None]:
    pool = made(name, crew, seed)
    return [where(pool.place(0.0, crew.job(f"r{n}", tier, **job))) for n in range(times)]  # type: ignore[arg-type]


def carry_out(placement: Placement) -> None:
    """As the controller does: the instance takes its label, and the job in."""
    if placement.takes:
        placement.books.tier = placement.label or placement.job.tier
    placement.job.instance = placement.books.id
    placement.books.add(placement.job, 0.0)


# ------------------------------------------------------------------------------------------------- that count


def test_round_robin_takes_them_in_turn() -> None:
    crew = steady()
    for n in range(3):
        crew.instance(f"i{n}")
    assert chosen("round-robin", crew, 5) == ["i0", "i1", "i2", "i0", "i1"]


def test_random_takes_them_evenly_and_the_same_by_the_same_seed() -> None:
    crew = steady()
    for n in range(3):
        crew.instance(f"i{n}")
    drawn = chosen("random", crew, 300)
    assert drawn == chosen("random", crew, 300)
    assert drawn != chosen("random", crew, 300, seed=2)
    assert min(drawn.count(f"i{n}") for n in range(3)) > 70


def test_least_requests_counts_those_that_others_sent() -> None:
    crew = steady()
    for n, residents in enumerate((3, 1, 2)):
        crew.instance(f"i{n}", residents=residents)
    assert chosen("least-requests", crew, 1) == ["i1"]
    crew.fleet.books["i1"].foreign = 2
    assert chosen("least-requests", crew, 1) == ["i2"]


def test_power_of_two_never_takes_the_fullest_and_not_always_the_emptiest() -> None:
    crew = steady()
    for n, residents in enumerate((3, 1, 2)):
        crew.instance(f"i{n}", residents=residents)
    assert set(chosen("power-of-two", crew, 100)) == {"i1", "i2"}


@pytest.mark.parametrize(("balance", "expected"), [("least-requests", ["b", "b"]), ("round-robin", ["a", "b"])])
def test_shared_slack_balances_as_it_is_told(balance: str, expected: list[str]) -> None:
    crew = steady(balance=balance)
    crew.instance("a", residents=2)
    crew.instance("b", residents=1)
    assert chosen("shared-slack", crew, 2) == expected


# ---------------------------------------------------------------------------------------------- a fixed partition


def partition(sizes: str, instances: int, **switches: object) -> tuple[Crew, OnePool]:
    crew = steady(static_sizes=sizes, **switches)
    for n in range(instances):
        crew.instance(f"i{n}")
    return crew, made("static", crew)


def fill(crew: Crew, pool: OnePool, arrivals: Sequence[str | None]) -> list[Placement | None]:
    placements = []
    for n, tier in enumerate(arrivals):
        placement = pool.place(0.0, crew.job(f"r{n}", tier))
        if placement is not None:
            carry_out(placement)
        placements.append(placement)
    return placements


@given(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.lists(st.sampled_from(TIERS), max_size=40))
def test_static_never_crosses_its_partition(sizes: list[int], arrivals: list[object]) -> None:
    sizes = sizes if any(sizes) else [1, 1, 1]
    crew, pool = partition(",".join(map(str, sizes)), sum(sizes))
    fill(crew, pool, [tier.name for tier in arrivals])  # type: ignore[attr-defined]
    own = {tier.name: size for tier, size in zip(TIERS, sizes, strict=True)}
    for tier in TIERS:
        mine = crew.fleet.of_tier(tier.name)
        assert len(mine) <= own[tier.name]
        for books in mine:
            guests = {job.tier for job in books.jobs.values()} - {tier.name}
            assert all(own[str(guest)] == 0 for guest in guests), "only who has no instances is elsewhere"
    assert all(not books.jobs for books in crew.fleet.of_tier(None)), "whoever gets a request has a tier"


def test_static_opens_an_instance_of_its_own_before_it_shares_one() -> None:
    crew, pool = partition("2,1,1", 4)
    placements = fill(crew, pool, ["tight", "tight", "tight", "loose", "middle", "middle"])
    assert [where(p) for p in placements] == ["i0", "i1", "i0", "i2", "i3", "i3"]
    assert [books.tier for books in crew.fleet] == ["tight", "tight", "loose", "middle"]


def test_a_tier_of_static_whose_instances_are_gone_waits() -> None:
    crew, pool = partition("1,1,1", 3)
    fill(crew, pool, ["tight", "middle", "loose"])
    job = crew.job("r", "middle")
    job.avoid.add("i1")
    assert pool.place(0.0, job) is None


def test_a_tier_of_size_0_shares_with_the_nearest_tighter_and_the_tightest_with_the_next() -> None:
    crew, pool = partition("0,2,0", 2)
    fill(crew, pool, ["tight", "middle", "loose", None])
    assert {books.tier for books in crew.fleet} == {"middle"}
    assert [pool.pace_s(books) for books in crew.fleet] == [0.02, 0.02], "the pace that the tightest needs"


def test_static_without_sizes_gives_every_tier_as_many() -> None:
    crew, pool = partition("", 6)
    fill(crew, pool, 9 * ["loose"] + 2 * ["tight"] + ["middle"])
    assert [len(crew.fleet.of_tier(name)) for name in ("tight", "middle", "loose", None)] == [2, 1, 2, 1]


@pytest.mark.parametrize("sizes", ["1,2", "1,2,3,4", "0,0,0"])
def test_sizes_that_are_not_those_of_the_tiers_are_named(sizes: str) -> None:
    with pytest.raises(SettingError, match=rf"'static_sizes': one number for each of the 3 tiers.*{sizes}"):
        made("static", steady(static_sizes=sizes))


# ------------------------------------------------------------------------------------------------ that predict


def test_minimal_takes_the_shortest_next_iteration() -> None:
    crew = costly()
    crew.instance("many", residents=4)
    queue = crew.instance("queue")
    queue.add(crew.job("prompt", "tight", prompt=400), 0.0)  # one resident, but 50 ms of prompt
    crew.instance("few", residents=2)
    assert chosen("minimal", crew, 1) == ["few"]


def test_prompt_tokens_times_batch_weighs_one_against_the_other() -> None:
    crew = costly()
    crew.instance("many", residents=5)
    queue = crew.instance("queue", chunk=FIXED)
    queue.add(crew.job("prompt", "tight", prompt=400), 0.0)
    # 100 * (5 + 1) against (400 + 100) * (1 + 1), then 1000 * 6 against 1400 * 2.
    assert chosen("ptokens-batch", crew, 1, prompt=100) == ["many"]
    assert chosen("ptokens-batch", crew, 1, prompt=1000) == ["queue"]


def test_least_headroom_packs_while_everybody_is_kept() -> None:
    crew = costly()
    for name, residents in (("few", 2), ("some", 5), ("full", 9)):
        crew.instance(name, "tight", residents, FIXED)
    # 9 others and the newcomer: 21 ms, above the 20 that the residents of `full` want.
    assert chosen("least-headroom", crew, 1) == ["some"]
    assert chosen("least-headroom", crew, 1, tier="loose") == ["some"], "bounded by the tightest resident"


def test_least_headroom_takes_the_instance_that_is_missed_by_the_least_where_all_are() -> None:
    crew = costly()
    for name, residents in (("full", 10), ("fuller", 12)):
        crew.instance(name, "tight", residents, FIXED)
    assert chosen("least-headroom", crew, 1) == ["full"]


def test_least_headroom_sends_those_without_an_slo_where_it_is_fastest() -> None:
    crew = costly()
    crew.instance("busy", "tight", 3, FIXED)
    crew.instance("idle", None, 0, FIXED)
    assert where(made("least-headroom", crew).place(0.0, crew.job("r", None))) == "idle"


@pytest.mark.parametrize(("buffer", "expected"), [(1.0, "more"), (0.7, "less")])
def test_the_buffer_is_kept_of_the_pace(buffer: float, expected: str) -> None:
    crew = costly(slo_buffer=buffer)
    crew.instance("more", "tight", 4, FIXED)  # 15.5 ms with the newcomer, above 14
    crew.instance("less", "tight", 2, FIXED)
    for name in ("least-headroom", "single-slo"):
        assert chosen(name, crew, 1) == [expected]


def test_single_slo_packs_within_the_tightest_pace_whoever_asks() -> None:
    crew = costly()
    for name, residents in (("few", 2), ("some", 5), ("full", 9)):
        crew.instance(name, "loose", residents, FIXED)
    assert chosen("single-slo", crew, 1, tier="loose") == ["some"]
    for name in ("few", "some"):
        crew.fleet.remove(name)
    assert chosen("single-slo", crew, 1, tier="loose") == [None]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 600), st.sampled_from(["tight", "loose"]))
def test_single_slo_never_admits_beyond_the_pace(residents: list[int], prompt: int, tier: str) -> None:
    crew = costly()
    for n, count in enumerate(residents):
        crew.instance(f"i{n}", "loose", count, FIXED)
    placement = made("single-slo", crew).place(0.0, crew.job("r", tier, prompt=prompt))
    if placement is not None:
        carry_out(placement)
        rows = [10 + 1] * (len(placement.books.jobs) - 1)  # prompt and the token it has made
        together = crew.profile.iteration_s(0, len(rows) + 1, sum(rows) + prompt)
        assert together <= TIERS[0].tpot_s


def test_those_who_wait_for_single_slo_come_in_deadline_order_across_tiers_past_some_heads() -> None:
    crew = costly(head_walk=1)
    books = crew.instance("i", "loose", 7, FIXED)
    wait(crew, "hopeless", "tight", ttft_s=0.001)
    wait(crew, "second", "loose", ttft_s=0.5)
    wait(crew, "third", "middle", ttft_s=0.7)
    wait(crew, "fourth", "middle", ttft_s=0.8)
    came = []
    for placement in made("single-slo", crew).refill(0.0, books, crew.pending):
        came.append(placement.job.id)
        carry_out(placement)
    assert came == ["second", "third"], "two more, and the instance is full"


# --------------------------------------------------------------------------------------------------- in common


@pytest.mark.parametrize("name", REFUSE_NOTHING)
def test_a_baseline_always_finds_a_place_while_there_is_one(name: str) -> None:
    crew = steady()
    assert chosen(name, crew, 1) == [None]
    if name != "static":
        full(crew, "i0", "tight")
    crew.instance("i1")
    assert None not in chosen(name, crew, 8)
    pool = made(name, crew)
    job = crew.job("r", "tight")
    job.avoid.add("i0")
    assert {where(pool.place(0.0, job)) for _ in range(5)} == {"i1"}
    for n in range(3):
        wait(crew, f"w{n}", "tight" if n else None)
    came = {placement.job.id for placement in pool.refill(0.0, crew.fleet.books["i1"], crew.pending)}
    assert came == {"w0", "w1", "w2"}


@pytest.mark.parametrize("name", POOLS)
def test_a_baseline_that_wants_no_progress_decides_the_same_without(name: str) -> None:
    """Whoever says it does not look must not: how far residents are is told to one crew alone."""
    answers = []
    for told in (False, True):
        crew = Crew(profile=dataclasses.replace(STEADY, limits=Limits(100_000, 64, 512, block_size=1)))
        for n in range(3):
            books = crew.instance(f"i{n}", chunk=FIXED)
            for m in range(2):
                books.add(crew.job(f"i{n}/{m}", "tight", prompt=500), 0.0)
                if told and n == 2:
                    books.progressed({f"i{n}/{m}": 1}, {}, None, 0.0)
        answers.append(chosen(name, crew, 6))
    if not POOLS[name].wants_progress:
        assert answers[0] == answers[1]
    elif name in ("minimal", "ptokens-batch"):
        assert answers[0] != answers[1]


def test_every_baseline_is_made_by_its_name() -> None:
    for name, kind in POOLS.items():
        crew = steady(router=name)
        forecaster = Forecaster(crew.settings, crew.lengths)
        given_ = Given(crew.settings, crew.tiers, crew.fleet, forecaster, crew.demand, Random(1))
        assert type(router(given_)) is kind
