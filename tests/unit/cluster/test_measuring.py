"""One process for each rank: figures in the order of ranks, and whoever fails is named with its host and last words."""

from __future__ import annotations

import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bloomery.cluster import measuring
from bloomery.cluster.hostfile import Host, Hosts
from bloomery.cluster.measuring import run_ranks
from bloomery.spec.errors import BloomeryError

WORKER = """
import json, sys, time
place = json.loads(sys.stdin.readline())
rank, do = place["rank"], place["do"]
if rank == 0 and place["world_size"] > 1:
    print("PORT 4711")
there = None
if rank:
    there = json.loads(sys.stdin.readline())
print("JOINED ", flush=True)
if do == "fail" and rank == 1:
    sys.exit("the disk is gone")
if do == "silent" and rank == 1:
    time.sleep(60)
print("TELL half way", flush=True)
time.sleep(0.3 * (rank == 0))
print("RESULT " + json.dumps({"rank": rank, "place": place, "there": there}), flush=True)
if do == "fail":
    time.sleep(60)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A worker without torch."""
    (tmp_path / "a_small_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "a_small_worker"


HOSTS = (Host("a", 2, "10.0.0.1", 3), Host("b", 1, "10.0.0.2"))


def on_this_machine(tmp_path: Path) -> Hosts:
    """The hosts, with a shell that starts everything here."""
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\nshift; exec "$@"\n')
    shell.chmod(0o755)
    return Hosts(HOSTS, (str(shell),))


def test_every_rank_gets_its_place_and_gives_its_figures(module: str, tmp_path: Path) -> None:
    told = list[str]()
    results = run_ranks(module, on_this_machine(tmp_path), {"do": "well"}, 30, told.append)
    assert [result["rank"] for result in results] == [0, 1, 2]
    places = [result["place"] for result in results]
    assert [(p["host"], p["local_rank"], p["world_size"], p["threads"]) for p in places] == [
        (0, 0, 3, 3),
        (0, 1, 3, 3),
        (1, 0, 3, None),
    ]
    assert [result["there"] for result in results] == [None, *[{"meet": "10.0.0.1", "port": 4711}] * 2]
    assert all(result["started_s"] > 0 for result in results)
    assert "half way" in told


@pytest.mark.parametrize(("do", "seconds", "words"), [("fail", 30, "the disk is gone"), ("silent", 3, "no figures")])
def test_a_rank_that_fails_or_is_silent_is_named(
    module: str, tmp_path: Path, do: str, seconds: float, words: str
) -> None:
    with pytest.raises(BloomeryError, match=r"rank 1|\b1 on a") as failed:
        run_ranks(module, on_this_machine(tmp_path), {"do": do}, seconds)
    assert words in str(failed.value)
    assert "on a" in str(failed.value)


def test_ranks_that_get_on_may_take_longer_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word comes just in time, as on a machine that is busy with something else."""
    words = [(0, "JOINED", ""), (0, "TELL", "products"), (0, "TELL", "memory"), (0, "RESULT", "{}")]
    now, waited_for = [0.0], list[float]()

    class Said(queue.Queue[tuple[int, str, str]]):
        def get(self, block: bool = True, timeout: float | None = None) -> tuple[int, str, str]:
            assert timeout is not None
            waited_for.append(timeout)
            now[0] += 2.0
            return words.pop(0)

    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])
    rank = SimpleNamespace(rank=0, host=HOSTS[0])
    assert measuring._followed([rank], Said(), 3.0, lambda _: None) == [{"started_s": 2.0}]
    assert waited_for == [3.0] * 4


def test_a_shell_that_cannot_reach_a_host_is_told_in_its_own_words(module: str) -> None:
    complains = (sys.executable, "-c", "import sys; sys.exit('no route to ' + sys.argv[1])")
    with pytest.raises(BloomeryError, match="no route to"):
        run_ranks(module, Hosts(HOSTS, complains), {"do": "well"}, 30)


def test_a_shell_that_has_ended_before_it_is_told_anything_is_told_in_its_own_words(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.wait()

    monkeypatch.setattr(subprocess, "Popen", Ended)
    complains = (sys.executable, "-c", "import sys; sys.exit('no route to ' + sys.argv[1])")
    with pytest.raises(BloomeryError, match="no route to"):
        run_ranks(module, Hosts(HOSTS, complains), {"do": "well"}, 30)
