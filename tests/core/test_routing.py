"""Every rung of the ladder in a small fleet made by hand, and what happens when room appears."""

from __future__ import annotations

import dataclasses

import pytest
from scenes import STEADY, TIERS, Crew

from polyserve.core.fleet import Books, Job
from polyserve.core.routing import Placement
from polyserve.core.types import Tier

# Each decode costs 1.1 ms above a floor of 10 ms: an instance at 20 ms holds nine.
COSTLY = dataclasses.replace(STEADY, name="costly", per_decode_s=1e-3)


def costly(**switches: object) -> Crew:
    return Crew(profile=COSTLY, switches=switches)


def steady(**switches: object) -> Crew:
    return Crew(switches=switches)


def full(crew: Crew, id: str, tier: str | None) -> Books:
    """An instance whose memory one long prompt has taken."""
    books = crew.instance(id, tier)
    crew.resident(books, f"{id}/long", tier, prompt=99_700)
    return books


def where(placement: Placement | None) -> str | None:
    return placement.books.id if placement else None


def place(crew: Crew, tier: str | None, now: float = 0.0, **job: object) -> Placement | None:
    return crew.router.place(now, crew.job("r", tier, **job))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- own tier


@pytest.mark.parametrize(("placement", "chosen"), [("fill", "i1"), ("spread", "i2")])
def test_the_own_tier_is_filled_or_spread(placement: str, chosen: str) -> None:
    crew = costly(placement=placement)
    for n, residents in enumerate((3, 5, 1)):
        crew.instance(f"i{n}", "tight", residents)
    assert where(place(crew, "tight")) == chosen


def test_the_most_loaded_that_admits_is_taken_and_the_fuller_ones_say_why_not() -> None:
    crew = costly(placement="fill", explain=True)
    for n, residents in enumerate((3, 9, 5)):
        crew.instance(f"i{n}", "tight", residents)
    placement = place(crew, "tight")
    assert where(placement) == "i2"
    assert placement is not None
    assert placement.forecast is not None
    assert placement.forecast.admits
    assert [(refusal.instance, refusal.forecast.lacks) for refusal in crew.router.considered] == [("i1", "pace")]


def test_an_instance_that_broke_a_request_is_not_asked_again() -> None:
    crew = steady()
    crew.instance("i0", "tight", 2)
    crew.instance("i1", "tight")
    job = crew.job("r", "tight")
    job.avoid.add("i0")
    assert where(crew.router.place(0.0, job)) == "i1"


def test_a_request_whose_deadline_is_lost_is_placed_all_the_same() -> None:
    crew = steady()
    crew.instance("i0", "tight", 1)
    assert where(place(crew, "tight", now=0.99, prompt=400)) is None, "40 ms of prompt, and 10 left"
    assert where(place(crew, "tight", now=1.01, prompt=400)) == "i0"


# -------------------------------------------------------------------------------------------------- promotion


def ranks(crew: Crew) -> None:
    """One instance per tier, named after it, none of them full."""
    for tier in crew.tiers:
        crew.instance(tier.name, tier.name, 1)


@pytest.mark.parametrize(
    ("switches", "own_full", "chosen"),
    [
        ({}, False, "loose"),
        ({}, True, "middle"),
        ({"promotion_order": "tightest"}, True, "tight"),
        ({"promotion_order": "tightest"}, False, "loose"),
        ({"promotion": "eager"}, False, "middle"),
        ({"promotion": "eager", "promotion_order": "tightest"}, False, "tight"),
        ({"promotion": "off"}, False, "loose"),
        ({"promotion": "off"}, True, None),
    ],
)
def test_looser_requests_are_promoted(switches: dict[str, object], own_full: bool, chosen: str | None) -> None:
    crew = steady(**switches)
    ranks(crew)
    if own_full:
        full(crew, "loose", "loose")
    placement = place(crew, "loose")
    assert where(placement) == chosen
    assert placement is None or not placement.takes


def test_a_tight_request_is_no_guest_of_a_looser_tier() -> None:
    crew = steady()
    ranks(crew)
    full(crew, "tight", "tight")
    assert place(crew, "tight") is None


@pytest.mark.parametrize(("reserve", "chosen"), [(0.1, None), (0.0, "tight")])
def test_guests_leave_a_reserve_that_hosts_may_use(reserve: float, chosen: str | None) -> None:
    """Eight decodes take 18.8 ms: more than 90 % of 20."""
    crew = costly(guest_reserve=reserve)
    crew.instance("tight", "tight", 7)
    full(crew, "loose", "loose")
    assert where(place(crew, "loose")) == chosen
    assert where(place(crew, "tight")) == "tight"


# ------------------------------------------------------------------------------------------------------- pool


def test_the_pool_comes_after_own_instances_and_hosts() -> None:
    crew = steady()
    crew.instance("free")
    crew.instance("tight", "tight", 1)
    crew.instance("middle", "middle", 1)
    assert where(place(crew, "middle")) == "middle"
    full(crew, "middle", "middle")
    assert where(place(crew, "middle")) == "tight"
    full(crew, "tight", "tight")
    placement = place(crew, "middle")
    assert where(placement) == "free"
    assert placement is not None
    assert placement.takes


def test_an_empty_pool_instance_is_taken_even_where_it_will_be_late() -> None:
    """Nothing faster exists, so waiting would only make it later."""
    crew = steady()
    crew.instance("free")
    assert where(place(crew, "tight", prompt=2000, ttft_s=0.05)) == "free"


def test_an_instance_that_cannot_hold_the_pace_is_not_taken() -> None:
    crew = Crew((Tier("instant", 0.005, 1.0), *TIERS))
    crew.instance("free")
    assert place(crew, "instant") is None
    assert where(place(crew, "tight")) == "free"


def test_the_emptiest_of_the_pool_is_taken_and_its_free_residents_leave_only_if_they_must() -> None:
    crew = steady()
    crew.resident(crew.instance("a"), "free", None)
    crew.instance("b")
    assert where(place(crew, "tight")) == "b"
    crew.fleet.remove("b")
    placement = place(crew, "tight")
    assert placement is not None
    assert (placement.books.id, placement.takes, placement.evicts) == ("a", True, ())
    crew.resident(crew.fleet.books["a"], "long", None, prompt=99_000)
    placement = place(crew, "tight", prompt=800)
    assert placement is not None
    assert (placement.books.id, placement.takes, placement.evicts) == ("a", True, ("long",)), "the newest goes first"


def test_a_pool_instance_that_cannot_be_cleared_does_not_hide_the_next() -> None:
    crew = steady()
    first, second = crew.instance("a"), crew.instance("b")
    crew.resident(first, "stuck", "loose", prompt=99_700)
    for n in range(2):
        crew.resident(second, f"free{n}", None)
    assert where(place(crew, "tight")) == "b"


# ------------------------------------------------------------------------------------- taking, and slowing down


def test_a_tier_without_an_instance_takes_the_least_loaded_of_a_tier_with_more_than_one() -> None:
    crew = costly()
    crew.instance("m", "middle", 1)
    for n, residents in enumerate((4, 2, 3)):
        crew.instance(f"l{n}", "loose", residents)
    placement = place(crew, "tight")
    assert where(placement) == "l1"
    assert placement is not None
    assert placement.takes


def test_a_looser_tier_gives_even_its_last_one_where_it_stays_a_guest() -> None:
    crew = costly()
    crew.instance("l", "loose", 1)
    assert where(place(crew, "tight")) == "l"
    crew = costly()
    crew.instance("t", "tight", 9)
    assert place(crew, "loose") is None, "a tighter tier keeps its last one"


def test_it_takes_none_on_which_it_would_be_late() -> None:
    crew = costly()
    for n in range(2):
        crew.instance(f"l{n}", "loose", 12)
    assert place(crew, "tight") is None


def test_a_tier_that_has_an_instance_takes_none() -> None:
    crew = costly()
    crew.instance("t", "tight", 9)
    crew.instance("l0", "loose")
    crew.instance("l1", "loose")
    assert place(crew, "tight") is None


@pytest.mark.parametrize(("allowed", "chosen"), [(True, "m"), (False, None)])
def test_tight_on_loose_slows_a_looser_instance_down(allowed: bool, chosen: str | None) -> None:
    crew = costly(tight_on_loose=allowed)
    crew.instance("t", "tight", 9)
    crew.instance("m", "middle", 3)
    crew.instance("l", "loose", 3)
    placement = place(crew, "tight")
    assert where(placement) == chosen
    assert placement is None or not placement.takes


def test_tight_on_loose_minds_the_tighter_pace() -> None:
    crew = costly(tight_on_loose=True)
    crew.instance("t", "tight", 9)
    crew.instance("l", "loose", 9)
    assert place(crew, "tight") is None, "ten decodes take 21 ms"


# ------------------------------------------------------------------------------------------------ best effort


def test_best_effort_goes_to_the_pool_and_then_to_the_least_loaded() -> None:
    crew = costly()
    crew.instance("t", "tight", 5)
    crew.instance("l", "loose", 3)
    crew.instance("free")
    assert where(place(crew, None)) == "free"
    crew.fleet.remove("free")
    placement = place(crew, None)
    assert where(placement) == "l"
    assert placement is not None
    assert not placement.takes


def test_best_effort_stays_out_of_the_last_fifth() -> None:
    crew = costly()
    crew.instance("t", "tight", 5)  # six decodes take 16.6 ms of 20
    assert place(crew, None) is None
    assert where(place(crew, "tight")) == "t"
    crew = steady()
    crew.resident(crew.instance("l", "loose"), "long", "loose", prompt=79_900)
    assert place(crew, None) is None
    assert where(place(crew, "loose")) == "l"


def test_best_effort_leaves_before_a_tier_waits() -> None:
    crew = costly()
    books = crew.instance("t", "tight", 4)
    for n in range(5):
        crew.resident(books, f"free{n}", None)
    placement = place(crew, "tight")
    assert placement is not None
    assert (placement.books.id, placement.takes) == ("t", False)
    assert set(placement.evicts) <= {f"free{n}" for n in range(5)}
    assert placement.evicts


def test_best_effort_leaves_for_a_guest_too() -> None:
    crew = costly()
    books = crew.instance("t", "tight", 3)
    for n in range(5):
        crew.resident(books, f"free{n}", None)
    placement = place(crew, "loose")
    assert placement is not None
    assert (placement.books.id, placement.takes) == ("t", False)
    assert 1 <= len(placement.evicts) <= 5


def test_best_effort_is_not_thrown_out_in_vain() -> None:
    crew = costly()
    books = crew.instance("t", "tight", 9)
    crew.resident(books, "free", None)
    assert place(crew, "tight") is None


# ------------------------------------------------------------------------------------------------- room again


def refilled(crew: Crew, books: Books, now: float = 0.0) -> list[str]:
    """Who is taken in, in order; each placement is carried out before the next is asked for."""
    taken = []
    for placement in crew.router.refill(now, books, crew.pending):
        assert placement.books is books
        crew.pending.remove(placement.job.id)
        books.add(placement.job, now)
        if placement.takes:
            books.tier, books.pace_s = placement.job.tier, crew.tier(placement.job.tier or "").tpot_s
        taken.append(placement.job.id)
    return taken


def wait(crew: Crew, id: str, tier: str | None, avoid: str = "", **job: object) -> Job:
    made = crew.job(id, tier, **job)  # type: ignore[arg-type]
    made.avoid.update(avoid)
    crew.pending.push(made, 0.0)
    return made


def test_room_goes_to_the_own_tier_then_to_guests_then_to_best_effort() -> None:
    crew = steady()
    books = crew.instance("m", "middle", 1)
    for id, tier in (("free", None), ("guest", "loose"), ("own", "middle"), ("tighter", "tight")):
        wait(crew, id, tier)
    assert refilled(crew, books) == ["own", "guest", "free"]


def test_without_promotion_no_guests_come() -> None:
    crew = steady(promotion="off")
    wait(crew, "guest", "loose")
    assert refilled(crew, crew.instance("m", "middle", 1)) == []


def test_with_tight_on_loose_the_tighter_come_too() -> None:
    crew = steady(tight_on_loose=True)
    wait(crew, "tighter", "tight")
    assert refilled(crew, crew.instance("m", "middle", 1)) == ["tighter"]


@pytest.mark.parametrize(("promotion", "tier"), [("off", "loose"), ("off", "tight"), ("lazy", "tight")])
def test_nobody_waits_beside_an_idle_instance_of_another_tier(promotion: str, tier: str) -> None:
    crew = steady(promotion=promotion)
    for n in range(2):
        wait(crew, f"w{n}", tier)
    books = crew.instance("m", "middle")
    assert refilled(crew, books) == ["w0", "w1"]
    assert books.tier == tier, "it takes it over"


def test_one_that_is_late_anyway_is_served_by_an_empty_instance_that_has_become_slow() -> None:
    crew = steady()
    wait(crew, "late", "tight")
    books = crew.instance("t", "tight")
    for _ in range(500):
        books.observe(0.03, 0.01)
    assert refilled(crew, books, now=0.5) == []
    assert refilled(crew, books, now=1.5) == ["late"]


def test_room_is_given_by_deadline_until_there_is_none() -> None:
    crew = costly()
    for n in range(5):
        wait(crew, f"w{n}", "tight", ttft_s=1.0 - n / 10)
    assert refilled(crew, crew.instance("t", "tight", 6)) == ["w4", "w3", "w2"]


def test_guests_of_the_tier_that_got_least_come_first() -> None:
    crew = steady(shortage="demand")
    for tier, admitted in (("middle", 3), ("loose", 1)):
        for n in range(4):
            crew.demand.arrived(0.0, tier, 10)
            if n < admitted:
                crew.demand.admitted(tier)
        wait(crew, tier, tier)
    assert refilled(crew, crew.instance("t", "tight", 1)) == ["loose", "middle"]


@pytest.mark.parametrize(("walk", "taken"), [(6, ["short"]), (0, [])])
def test_a_head_beyond_hope_does_not_block(walk: int, taken: list[str]) -> None:
    crew = steady(head_walk=walk)
    wait(crew, "hopeless", "tight", prompt=900, ttft_s=0.05)
    wait(crew, "short", "tight", ttft_s=0.5)
    assert refilled(crew, crew.instance("t", "tight", 1)) == taken


def test_a_head_that_the_instance_has_no_room_for_does() -> None:
    crew = steady()
    wait(crew, "long", "tight", prompt=99_000, ttft_s=50.0)
    wait(crew, "short", "tight", ttft_s=51.0)
    assert refilled(crew, crew.instance("t", "tight", 30)) == []


def test_a_pool_instance_with_room_takes_the_tier_that_got_least() -> None:
    crew = steady()
    for tier in ("middle", "loose"):
        crew.demand.arrived(0.0, tier, 10)
        wait(crew, tier, tier)
    crew.demand.admitted("middle")
    books = crew.instance("free")
    assert refilled(crew, books)[0] == "loose"
    assert books.tier == "loose"


def test_nobody_is_offered_an_instance_that_broke_it() -> None:
    crew = steady()
    for tier in ("tight", None):
        wait(crew, f"broken {tier}", tier, avoid="t")
        wait(crew, f"whole {tier}", tier)
    assert refilled(crew, crew.instance("t", "tight", 1)) == ["whole tight", "whole None"]


def test_a_tier_leaves_others_their_minimum_counts() -> None:
    tight, middle, loose = TIERS
    crew = Crew((tight, middle, dataclasses.replace(loose, min_instances=1)))
    crew.instance("a")
    assert place(crew, "tight") is None, "the only pool instance is owed to the loose tier"
    crew.instance("b")
    assert place(crew, "tight") is not None
