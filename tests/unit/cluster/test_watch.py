"""Who hangs is told from heartbeats: the culprit is named, and nobody who only takes long for a reason."""

from __future__ import annotations

import time
from pathlib import Path

from bloomery.cluster.watch import Pause, awake, find_hang, limit_s
from bloomery.ledger.heartbeat import (
    BESIDE_A_DEVICE,
    JOINING,
    PHASE_OF,
    PHASES,
    WAITING,
    Beat,
    Heartbeat,
    beat_file,
    read_beat,
    usual_s,
)
from bloomery.ledger.slow_steps import PAUSES
from bloomery.spec.reliability import Supervision

NOW = 1000.0
SETTINGS = Supervision(hang_floor_s=5, hang_factor=5, first_phase_s=300)
RUNNING = ("S", "S", "S", "S")


def beat(phase: str, silent_s: float, step: int = 7, changes: int = 100, **longest_s: float) -> Beat:
    """A rank that has been in `phase` for so long; `longest_s` by phase, a tenth of a second where not given."""
    return Beat(changes, NOW - silent_s, step, phase, tuple(longest_s.get(name, 0.1) for name in PHASES))


def test_a_rank_that_computes_for_ever_is_the_culprit_and_not_those_that_wait_for_it() -> None:
    beats = [beat("communicate", 20), beat("communicate", 20), beat("compute", 20.1), beat("communicate", 20)]
    hang = find_hang(beats, RUNNING, NOW, SETTINGS)
    assert hang is not None
    assert (hang.rank, hang.phase, hang.step) == (2, "compute", 7)


def test_a_long_evaluation_or_save_of_a_usual_length_is_legal() -> None:
    for phase in ("evaluate", "save"):
        beats = [beat(phase, 60, **{phase: 30}), beat("communicate", 60)]
        assert find_hang(beats, RUNNING[:2], NOW, SETTINGS) is None


def test_a_long_compilation_after_a_short_one_is_no_hang_and_so_is_a_long_write() -> None:
    for phase in ("compile", "profile", "write"):
        beats = [beat(phase, 350, **{phase: 2}), beat("communicate", 350)]
        assert find_hang(beats, RUNNING[:2], NOW, SETTINGS) is None


def test_every_pause_has_a_phase_and_is_not_taken_for_a_message() -> None:
    assert WAITING not in {PHASE_OF.get(bucket, WAITING) for bucket in PAUSES}


def test_what_has_never_ended_before_is_given_time() -> None:
    first = Beat(1, NOW - 200, -1, "startup")
    assert find_hang([first, first], RUNNING[:2], NOW, SETTINGS) is None
    assert find_hang([first, first], RUNNING[:2], NOW + 200, SETTINGS) is not None


def test_a_stopped_process_is_found_though_all_seem_to_wait() -> None:
    hang = find_hang([beat("communicate", 6)] * 3, ("S", "T", "S"), NOW, SETTINGS)
    assert hang is not None and hang.rank == 1


def test_when_all_wait_the_rank_behind_is_the_culprit() -> None:
    behind = [beat("communicate", 9, step=8), beat("communicate", 9, step=7), beat("communicate", 9, step=8)]
    apart = [beat("communicate", 9), beat("communicate", 9), beat("communicate", 9, changes=102)]
    for beats, rank in ((behind, 1), (apart, 2)):
        hang = find_hang(beats, RUNNING[:3], NOW, SETTINGS)
        assert hang is not None and hang.rank == rank


def test_beside_a_device_a_host_that_computes_may_wait_for_the_one_behind(tmp_path: Path) -> None:
    """Its device's queue is full of work behind a message."""
    beats = list[Beat]()
    for rank, (step, bucket) in enumerate(((8, "compute"), (7, "optimizer"), (8, "compute"))):
        heart = Heartbeat(beat_file(tmp_path, rank))
        heart.phase_of = BESIDE_A_DEVICE
        heart.begin(step)
        heart.enter(bucket)
        now = read_beat(beat_file(tmp_path, rank))
        assert now is not None
        beats.append(now)
    hang = find_hang(beats, RUNNING[:3], time.monotonic() + 2 * SETTINGS.first_phase_s, SETTINGS)
    assert hang is not None and (hang.rank, hang.step) == (1, 7)
    assert BESIDE_A_DEVICE["data"] == "load"


def test_a_short_wait_is_no_hang() -> None:
    assert find_hang([beat("communicate", 4), beat("compute", 4)], RUNNING[:2], NOW, SETTINGS) is None


def test_a_pause_of_the_whole_machine_is_nobodys_silence() -> None:
    pauses = [Pause(600, 605), Pause(100, 800)]
    since = [awake(Beat(1, began), pauses).since for began in (0, 604, 610, 750, 801)]
    assert since == [700, 705, 710, 800, 801]


def test_a_heartbeat_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    heart = Heartbeat(path)
    assert read_beat(path) is None
    before = time.monotonic()
    for step, bucket in enumerate(("data", "compute", "dp_comm", "dp_comm")):
        heart.begin(step)
        heart.enter(bucket)
    read = read_beat(path)
    assert read is not None
    assert (read.phase, read.step, read.changes) == ("communicate", 3, 4)
    assert before <= read.since <= time.monotonic()
    assert read.longest_s[PHASES.index("compute")] > 0
    assert read_beat(tmp_path / "none") is None


def test_the_first_short_visit_to_a_phase_says_nothing_of_the_long_one_that_follows(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "beat")
    compute = PHASES.index("compute")
    longest = []
    for step in range(2):
        heart.begin(step)
        for bucket in ("compute", "data", "compute"):
            heart.enter(bucket)
            read = read_beat(tmp_path / "beat")
            assert read is not None
            longest.append(read.longest_s[compute])
    assert longest[:3] == [0.0] * 3
    assert longest[3] > 0


def test_a_start_knows_how_long_the_phases_of_the_last_one_took(tmp_path: Path) -> None:
    first = Heartbeat(beat_file(tmp_path, 0))
    first.begin(0)
    for bucket in ("data", "compute", "dp_comm"):
        first.enter(bucket)
        time.sleep(0.01)
    first.begin(1)
    first.enter("data")
    before = read_beat(beat_file(tmp_path, 0))
    assert before is not None
    second = Heartbeat(beat_file(tmp_path, 1), usual_s([before]))
    second.begin(1)
    second.enter("compute")
    now = read_beat(beat_file(tmp_path, 1))
    assert now is not None
    assert limit_s("startup", [now], SETTINGS) == SETTINGS.first_phase_s  # what there is to load is another matter
    assert limit_s("evaluate", [now], SETTINGS) == SETTINGS.first_phase_s  # not seen yet
    assert limit_s("compute", [now], SETTINGS) == SETTINGS.hang_floor_s


def test_a_rank_that_gets_on_where_it_is_has_time_again_and_no_other_count(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "beat")
    heart.enter("startup")
    before = read_beat(tmp_path / "beat")
    time.sleep(0.01)
    heart.gets_on()
    after = read_beat(tmp_path / "beat")
    assert before is not None and after is not None
    assert (after.changes, after.phase) == (before.changes, "startup")
    assert after.since - before.since >= 0.01


def test_how_long_others_took_to_load_says_nothing_of_a_message(tmp_path: Path) -> None:
    heart, communicate = Heartbeat(tmp_path / "beat"), PHASES.index(WAITING)
    for bucket in (JOINING, "startup", "data"):
        heart.enter(bucket)
        now = read_beat(tmp_path / "beat")
        assert now is not None and (now.phase == WAITING) == (bucket == JOINING)
        time.sleep(0.02)
    for step in range(2):
        heart.begin(step)
        heart.enter("data")
    now = read_beat(tmp_path / "beat")
    assert now is not None and now.longest_s[communicate] == 0
