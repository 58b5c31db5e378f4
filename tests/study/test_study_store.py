"""Runs on disk: kept whole, read back, and a line that was cut off is no loss but its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyserve.study.settings import StudyError
from polyserve.study.store import Record, Store, code, digest


def record(key: str, load: float = 0.5, made_by: str | None = None) -> Record:
    return {"key": key, "code": made_by or code(), "load": load, "seed": 0, "result": {"x": load}}


def reopened(path: Path, fresh: bool = False) -> dict[str, Record]:
    store = Store(path, fresh)
    store.close()
    return store.runs


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "runs.jsonl")
    store.add(record("a"))
    store.add(record("b", 0.7))
    store.close()
    assert reopened(tmp_path / "deep" / "runs.jsonl") == {"a": record("a"), "b": record("b", 0.7)}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_was_cut_off_is_left_out_and_the_rest_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "runs.jsonl"
    store = Store(path)
    store.add(record("a"))
    store.add(record("b"))
    store.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Store(path)
    assert list(again.runs) == ["a"]
    again.add(record("c"))
    again.close()
    assert list(reopened(path)) == ["a", "c"]


def test_fresh_leaves_out_what_other_code_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl")
    store.add(record("old", made_by="0" * 12))
    store.add(record("new"))
    store.close()
    assert list(reopened(tmp_path / "runs.jsonl")) == ["old", "new"]
    assert list(reopened(tmp_path / "runs.jsonl", fresh=True)) == ["new"]


@pytest.mark.parametrize("line", ["{}", "[1]", "7", '{"key": "a"', "nonsense"])
def test_a_file_of_something_else_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(StudyError, match=r"runs\.jsonl: line 1 is no run of a study"):
        Store(path)


@given(st.dictionaries(st.text(), st.integers() | st.text(), min_size=1))
def test_equal_identities_share_a_digest_and_others_do_not(identity: dict[str, object]) -> None:
    assert digest(identity) == digest(dict(reversed(identity.items())))
    assert digest(identity) != digest({**identity, "\0another": 1})
