"""Where figures go: lines stay whole when several processes write, and a torn end is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bloomery.ledger import sinks
from bloomery.ledger.environment import describe
from bloomery.ledger.progress import tail
from bloomery.ledger.sinks import JsonLines, PatientLines, read_lines


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path, children = tmp_path / "deep" / "ledger.jsonl", []
    for rank in range(4):
        child = os.fork()
        if child == 0:
            sink = JsonLines(path)
            for step in range(200):
                sink.write({"rank": rank, "step": step, "filler": "x" * 300})
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = read_lines(path)
    assert len(found) == 800
    for rank in range(4):
        assert [line["step"] for line in found if line["rank"] == rank] == list(range(200))


def test_a_torn_last_line_is_left_out_and_what_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n7\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_bytes('{"step": 1}\n{"text": "好'.encode()[:-1])
    assert read_lines(path) == [{"step": 1}]
    assert read_lines(tmp_path / "missing") == []


def test_a_line_that_a_full_disk_tore_is_an_error_and_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, write = JsonLines(tmp_path / "events.jsonl"), os.write
    sink.write({"step": 1})
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
        with pytest.raises(OSError, match="No space left"):
            sink.write({"step": 2})
    sink.close()
    for step in (3, 4):
        sink = JsonLines(tmp_path / "events.jsonl")
        sink.write({"step": step})
        sink.close()
    assert read_lines(tmp_path / "events.jsonl") == [{"step": 1}, {"step": 3}, {"step": 4}]
    assert (tmp_path / "events.jsonl").read_bytes().count(b"\n") == 4


def test_what_is_written_on_after_a_torn_line_is_whole_whoever_tore_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "events.jsonl", os.write
    mine, other = JsonLines(path), JsonLines(path)
    for step, sink in ((1, mine), (3, other)):
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
            with pytest.raises(OSError, match="No space left"):
                mine.write({"torn": step})
        sink.write({"step": step})
        sink.write({"step": step + 1})
    for sink in (mine, other):
        sink.close()
    assert read_lines(path) == [{"step": step} for step in (1, 2, 3, 4)]


def test_lines_that_a_full_disk_does_not_take_are_written_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sinks, "KEPT_LINES", 3)
    sink, path, write = PatientLines(tmp_path / "events.jsonl"), tmp_path / "events.jsonl", os.write
    sink.write({"step": 1})
    kept = f"warning: {path} cannot be written: No space left on device; its lines are kept until it can\n"
    for steps, lost in ((range(2, 5), ""), (range(6, 11), f"warning: {path}: 2 lines that found no room are lost\n")):
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
            for step in steps:
                sink.write({"step": step})
        assert capsys.readouterr().err == kept  # once, not with every step
        sink.write({"step": steps[-1] + 1})
        assert capsys.readouterr().err == lost
    assert [record["step"] for record in read_lines(path)] == [1, 2, 3, 4, 5, 8, 9, 10, 11]
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
        sink.write({"step": 12})
        sink.close()
    assert capsys.readouterr().err == kept + f"warning: {path}: 1 lines that found no room are lost\n"


def test_what_only_looks_like_the_end_of_a_line_is_none(tmp_path: Path) -> None:
    path, records = tmp_path / "events.jsonl", [{"reason": f"a{sign}b"} for sign in "\u2028\u2029\u0085\x1c\r\n"]
    sink = JsonLines(path)
    for record in records:
        sink.write(record)
    sink.close()
    assert read_lines(path) == tail(path) == records


def test_the_environment_names_versions_and_keeps_secrets_out() -> None:
    os.environ["HARMLESS_TOKEN"], os.environ["OMP_NUM_THREADS_TEST"] = "secret", "1"
    try:
        found = describe()
    finally:
        del os.environ["HARMLESS_TOKEN"], os.environ["OMP_NUM_THREADS_TEST"]
    assert found["versions"]["torch"]
    assert found["flags"]["OMP_NUM_THREADS_TEST"] == "1"
    assert "secret" not in str(found)
