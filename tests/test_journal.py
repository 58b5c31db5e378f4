"""The journal: what is written reads back equal, damage is named, and a replay decides the same."""

from __future__ import annotations

import dataclasses
import gzip
import math
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.core import types as nouns
from polyserve.core.profile import Limits, Profile
from polyserve.core.settings import Settings
from polyserve.core.types import (
    Action,
    Arrived,
    Configured,
    Dispatch,
    Event,
    Joined,
    Progressed,
    Ready,
    Reconfigured,
    Request,
    SetPace,
    Slo,
    Tick,
    Tier,
)
from polyserve.journal import JournalError, JournalWriter, from_plain, read_journal, replay, to_plain

PROFILE = Profile("small", (0, 64, 512), (0.004, 0.005, 0.02), 2e-5, 1e-6, 1e-8, Limits(4096, 16, 256))
CONFIGURED = Configured(
    0.0, Settings().to_dict(), (Tier("30", 0.03, 0.5, weight=0.1),), {"small": PROFILE.to_dict()}, seed=3
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type of `core/types.py`, its times whole microseconds."""
    if hint is float:
        return st.integers(0, 10**13).map(lambda us: us / 1e6)
    if get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of(*map(values, get_args(hint)))
    if get_origin(hint) is dict:
        return st.dictionaries(*map(values, get_args(hint)), max_size=3)
    if get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        return st.sampled_from(get_args(hint) or list(hint))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, vars(nouns))
        fields = {f.name: values(hints[f.name]) for f in dataclasses.fields(hint)}
        return st.builds(hint, **fields)
    return st.from_type(hint)


ALL = [cls for cls in (*get_args(Event), *get_args(Action)) if cls not in (Configured, Reconfigured)]


@given(st.sampled_from(ALL).flatmap(values))
def test_every_event_and_action_reads_back_equal(value: Any) -> None:
    written = msgspec.json.encode(to_plain(value))
    assert from_plain(msgspec.json.decode(written)) == value


def test_a_configuration_keeps_its_floats_as_written() -> None:
    read = from_plain(msgspec.json.decode(msgspec.json.encode(to_plain(CONFIGURED))))
    assert read == CONFIGURED
    assert Profile.from_dict(read.profiles["small"]) == PROFILE


def test_other_tiers_keep_their_floats_as_written() -> None:
    other = Reconfigured(1.5, (Tier("30", 1 / 30, 0.5, weight=0.1),), {"small": PROFILE.to_dict()})
    plain = to_plain(other)
    assert plain["at"] == 1_500_000
    assert from_plain(msgspec.json.decode(msgspec.json.encode(plain))) == other


def test_times_are_whole_microseconds_and_no_bound_is_a_word() -> None:
    assert to_plain(Tick(1.25))["at"] == 1_250_000
    unbounded = to_plain(SetPace("i0", math.inf))
    assert unbounded["pace_s"] == "inf"
    assert from_plain(unbounded) == SetPace("i0", math.inf)


@pytest.mark.parametrize("name", ["steps.jsonl", "steps.jsonl.gz"])
def test_steps_read_back_in_order(tmp_path: Path, name: str) -> None:
    request = Request("r0", 0.5, 100, Slo(0.3, 0.02))
    steps: list[tuple[float, Event, list[Action]]] = [
        (0.0, CONFIGURED, []),
        (0.5, Arrived(0.5, request), [Dispatch("r0", "i0", "20", None, request.slo, predicted_ttft_s=0.12)]),
        (0.6, Progressed(0.55, "i0", {"r0": 2}), []),
    ]
    with JournalWriter(tmp_path / name) as journal:
        for step in steps:
            journal.write(*step)
    assert [tuple(step) for step in read_journal(tmp_path / name)] == steps


def test_a_compressed_journal_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        with JournalWriter(tmp_path / name) as journal:
            journal.write(0.0, CONFIGURED, [])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def recorded(path: Path) -> list[bytes]:
    """A journal of a small fleet taking in two requests, decided by the core itself; returns its lines."""
    from polyserve.core.controller import Controller

    controller = Controller()
    with JournalWriter(path) as journal:
        for now, event in (
            (0.0, CONFIGURED),
            (0.0, Joined(0.0, nouns.Instance("i0", "small"))),
            (0.0, Ready(0.0, "i0")),
            (0.1, Arrived(0.1, Request("r0", 0.1, 40, Slo(0.5, 0.03)))),
            (0.2, Arrived(0.2, Request("r1", 0.2, 40, Slo(0.5, 0.03)))),
        ):
            journal.write(now, event, controller.step(now, event))
    return path.read_bytes().splitlines(keepends=True)


def test_a_replay_decides_the_same(tmp_path: Path) -> None:
    lines = recorded(tmp_path / "j.jsonl")
    assert b"Dispatch" in lines[3]
    result = replay(tmp_path / "j.jsonl")
    assert result.mismatch is None
    assert result.steps == len(lines)


def test_a_replay_names_the_first_line_that_differs(tmp_path: Path) -> None:
    lines = recorded(tmp_path / "j.jsonl")
    lines[3] = lines[3].replace(b'"resume_from":0', b'"resume_from":7')
    lines[4] = lines[4].replace(b'"resume_from":0', b'"resume_from":9')
    (tmp_path / "j.jsonl").write_bytes(b"".join(lines))
    mismatch = replay(tmp_path / "j.jsonl").mismatch
    assert mismatch is not None
    assert mismatch.line == 4
    assert '"resume_from":7' in str(mismatch)
    assert '"resume_from":0' in str(mismatch)


@pytest.mark.parametrize("name", ["j.jsonl", "j.jsonl.gz"])
def test_a_line_that_a_crash_cut_off_is_left_out_and_said(tmp_path: Path, name: str) -> None:
    lines = recorded(tmp_path / "j.jsonl")
    torn = b"".join(lines)[:-20]
    (tmp_path / name).write_bytes(gzip.compress(torn) if name.endswith(".gz") else torn)
    result = replay(tmp_path / name)
    assert (result.steps, result.torn, result.mismatch) == (len(lines) - 1, True, None)


def test_a_compressed_journal_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    recorded(tmp_path / "j.jsonl.gz")
    whole = (tmp_path / "j.jsonl.gz").read_bytes()
    (tmp_path / "j.jsonl.gz").write_bytes(whole[:-12])
    assert replay(tmp_path / "j.jsonl.gz").torn


def damaged(line: bytes) -> bytes:
    return b'{"now":0,"event":' + line + b',"actions":[]}\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "empty"),
        (b"{}\n{}\n", r":1: a step is an object with now, event and actions"),
        (b"not json\n{}\n", ":1: "),
        (b'{"now":0,"event":{"type":"Tick","at":0},"actions":{}}\n', "actions wants a list"),
        (damaged(b'{"type":"Tock","at":0}'), "unknown type 'Tock'; there are: Arrived"),
        (damaged(b'{"type":"Tick"}'), "Tick has no field 'at'"),
        (damaged(b'{"type":"Tick","at":0,"why":1}'), "Tick has a field 'why' too many"),
        (damaged(b'{"type":"Tick","at":0.5}'), "Tick.at: wants whole microseconds, got 0.5"),
        (damaged(b'{"type":"Ready","at":0,"instance":7}'), "Ready.instance: wants str, got 7"),
        (
            damaged(b'{"type":"Progressed","at":0,"instance":"i","tokens":{"r":"x"}}'),
            "Progressed.tokens: Expected `int`",
        ),
        (
            damaged(b'{"type":"Arrived","at":0,"request":{"id":"r"}}'),
            "Arrived.request: Request has no field 'arrived_at'",
        ),
    ],
)
def test_a_damaged_journal_is_one_line_of_complaint(tmp_path: Path, text: bytes, complaint: str) -> None:
    (tmp_path / "j.jsonl").write_bytes(text)
    with pytest.raises(JournalError) as caught:
        list(read_journal(tmp_path / "j.jsonl"))
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "j.jsonl"))
    assert "\n" not in str(caught.value)


def test_a_missing_or_foreign_file_is_one_line_of_complaint(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="No such file"):
        replay(tmp_path / "none.jsonl")
    (tmp_path / "plain.jsonl.gz").write_bytes(b"plain text\n")
    with pytest.raises(JournalError, match=r"plain\.jsonl\.gz"):
        replay(tmp_path / "plain.jsonl.gz")


def test_a_journal_that_does_not_begin_with_a_configuration_is_refused(tmp_path: Path) -> None:
    with JournalWriter(tmp_path / "j.jsonl") as journal:
        journal.write(0.0, Tick(0.0), [])
    with pytest.raises(JournalError, match="Configured is the first event"):
        replay(tmp_path / "j.jsonl")


def test_a_journal_in_which_time_runs_backwards_is_refused(tmp_path: Path) -> None:
    with JournalWriter(tmp_path / "j.jsonl") as journal:
        journal.write(1.0, CONFIGURED, [])
        journal.write(0.5, Tick(0.5), [])
    with pytest.raises(JournalError, match=r":2: now is 0\.5"):
        replay(tmp_path / "j.jsonl")
