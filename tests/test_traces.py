"""Traces: what is read, and what is said about files that cannot be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyserve.traces import TraceError, read_trace, trace_ids


@pytest.mark.parametrize(
    ("name", "rows", "mean_prompt", "timed"),
    [
        ("azure-conv", 19366, 1154.70, True),
        ("azure-code", 8819, 2047.85, True),
        ("mooncake", 3993, 15325.48, True),
        ("sharegpt", 10000, 245.75, False),
        ("apex", 512, 307.74, True),
        ("servegen-small", 31501, 136.48, True),
        ("servegen-mid", 46090, 673.95, True),
        ("aibrix-ramp", 2024, 293.51, True),
    ],
)
def test_each_shipped_trace_reads_with_the_numbers_its_origin_states(
    name: str, rows: int, mean_prompt: float, timed: bool
) -> None:
    trace = read_trace(name)
    assert len(trace) == rows
    assert trace.prompt_tokens.mean() == pytest.approx(mean_prompt, abs=0.01)
    assert (trace.arrived_s is not None) == timed
    assert trace.prompt_tokens.min() >= 1
    assert trace.output_tokens.min() >= 1


def test_no_trace_ships_that_the_list_above_forgets() -> None:
    assert trace_ids() == sorted(
        [
            "azure-conv",
            "azure-code",
            "mooncake",
            "sharegpt",
            "apex",
            "servegen-small",
            "servegen-mid",
            "aibrix-ramp",
        ]
    )


def test_recorded_hours_last_an_hour() -> None:
    for name in ("azure-conv", "azure-code", "servegen-mid", "servegen-small"):
        arrived = read_trace(name).arrived_s
        assert arrived is not None
        assert arrived[0] == 0
        assert 3400 < arrived[-1] <= 3600
        assert (np.diff(arrived) >= 0).all()


def test_mooncake_keeps_its_prefix_blocks() -> None:
    trace = read_trace("mooncake")
    assert trace.blocks is not None
    assert len(trace.blocks) == len(trace)
    for blocks, prompt in zip(trace.blocks[:200], trace.prompt_tokens[:200], strict=True):
        assert len(blocks) == -(-int(prompt) // trace.block_tokens)


def test_requests_without_an_answer_are_dropped_and_counted() -> None:
    assert read_trace("aibrix-ramp").dropped == 2


def test_uniform_traces_need_no_file() -> None:
    trace = read_trace("uniform:256/1500")
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([256], [1500])


ROWS = [(3.0, 10, 5), (1.0, 20, 6), (2.5, 30, 7)]


def test_the_same_requests_read_the_same_from_every_format(tmp_path: Path) -> None:
    csv = "arrived_s,prompt_tokens,output_tokens\n" + "".join(f"{t},{p},{d}\n" for t, p, d in ROWS)
    lines = "".join(json.dumps({"arrived_s": t, "prompt_tokens": p, "output_tokens": d}) + "\n" for t, p, d in ROWS)
    (tmp_path / "a.csv").write_text("\ufeff" + csv, encoding="utf-8")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv.encode()))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    times, prompts, outputs = zip(*ROWS, strict=True)
    table = pa.table({"arrived_s": times, "prompt_tokens": prompts, "output_tokens": outputs})
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"):
        trace = read_trace(tmp_path / name)
        assert trace.prompt_tokens.tolist() == [20, 30, 10], name  # by arrival
        assert trace.output_tokens.tolist() == [6, 7, 5], name
        assert trace.arrived_s is not None
        assert trace.arrived_s.tolist() == [0.0, 1.5, 2.0], name


def write(tmp_path: Path, text: str, name: str = "t.csv") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("timestamp_ms,input_length,output_length", ["1000,1,1", "3500,1,1"]),
        ("StartTimeOffset,ContextTokens,GeneratedTokens", ["1000000000,1,1", "3500000000,1,1"]),
        ("Timestamp,Request tokens,Response tokens", ["1,1,1", "3.5,1,1"]),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            ["2023-11-16 18:17:03.9799600,1,1", "2023-11-16 18:17:06.4799600,1,1"],
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            ["2024-05-10 00:00:00.5+00:00,1,1", "2024-05-10 00:00:03Z,1,1"],
        ),
    ],
)
def test_arrival_times_are_read_in_the_unit_of_their_origin(tmp_path: Path, header: str, cells: list[str]) -> None:
    arrived = read_trace(write(tmp_path, "\n".join([header, *cells]))).arrived_s
    assert arrived is not None
    assert arrived.tolist() == pytest.approx([0.0, 2.5])


def test_mooncake_json_lines_count_milliseconds(tmp_path: Path) -> None:
    rows = [{"timestamp": t, "input_length": 5, "output_length": 2, "hash_ids": [t, 7]} for t in (0, 250)]
    trace = read_trace(write(tmp_path, "\n".join(map(json.dumps, rows)), "m.jsonl"))
    assert trace.arrived_s is not None
    assert trace.arrived_s.tolist() == [0.0, 0.25]
    assert trace.blocks == ((0, 7), (250, 7))


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b,when\n5,6,0\n7,8,1500\n")
    trace = read_trace(path, {"prompt": "a", "output": "b", "arrived": "when:ms"})
    assert trace.prompt_tokens.tolist() == [5, 7]
    assert trace.recorded_rate == pytest.approx(1 / 1.5)


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", "t.csv", "holds no requests"),
        ("prompt_tokens,output_tokens\n", "t.csv", "holds no requests"),
        ("", "t.jsonl", "holds no requests"),
        ("prompt_tokens,foo\n1,2\n", "t.csv", "no column of output tokens .* there are: prompt_tokens, foo"),
        ("prompt_tokens,output_tokens\n1,2\n-3,4\n", "t.csv", "'prompt_tokens', row 2: '-3' is not a count"),
        ("prompt_tokens,output_tokens\n1,2.5\n", "t.csv", "'output_tokens', row 1: '2.5' is not a count"),
        ("prompt_tokens,output_tokens\n1,many\n", "t.csv", "'output_tokens', row 1: 'many' is not a number"),
        ("prompt_tokens,output_tokens\n1,nan\n", "t.csv", "'output_tokens', row 1: 'nan' is not a number"),
        ("prompt_tokens,output_tokens\n1\n", "t.csv", "row 1 has 1 fields where the header has 2"),
        ("prompt_tokens,output_tokens\n1,0\n", "t.csv", "no request has both"),
        ('{"prompt_tokens": 1, "output_tokens": 2}\n{"prompt_tokens": 1}\n', "t.jsonl", "row 2: None is not"),
        ("[1]\n", "t.jsonl", "row 1 is not a JSON object"),
        ("{\n", "t.jsonl", "row 1 is not JSON"),
        ("x", "t.txt", "ends in .csv"),
        ("x", "t.parquet", "cannot be read"),
        ("\x1f", "t.csv", "holds no requests"),
        ("TIMESTAMP,prompt_tokens,output_tokens\n2024-13-01,1,1\n", "t.csv", "'TIMESTAMP'"),
        ("hash_ids,prompt_tokens,output_tokens\n1 x,1,1\n", "t.csv", "'hash_ids', row 1"),
    ],
)
def test_a_bad_file_gets_one_line_with_file_and_place(tmp_path: Path, text: str, name: str, says: str) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(TraceError, match=says) as caught:
        read_trace(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_gzip_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"prompt_tokens,output_tokens\n1,2\n")[:-9])
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(path)


@pytest.mark.parametrize("name", ["azure", "no/such/file.csv", "uniform:0/5", "uniform:5", "uniform:a/b"])
def test_an_unknown_trace_is_told_what_exists(name: str) -> None:
    with pytest.raises(TraceError, match=r"azure-conv|uniform:P/D"):
        read_trace(name)


@pytest.mark.parametrize("columns", [{"prompt": "zzz"}, {"arrived": "zzz:ms"}, {"blocks": "zzz"}, {"prmpt": "x"}])
def test_a_named_column_that_is_not_there_is_refused(tmp_path: Path, columns: dict[str, str]) -> None:
    path = write(tmp_path, "prompt_tokens,output_tokens\n1,2\n")
    with pytest.raises(TraceError, match=r"zzz|prmpt"):
        read_trace(path, columns)
