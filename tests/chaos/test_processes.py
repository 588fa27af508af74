"""F1, F2, F4: ranks and whole commands that die or hang. Many faults a run: recoveries that cost a bit would differ in
the end, and a restart is what takes time."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import (
    BUCKETS,
    Figure,
    chance,
    describe,
    events,
    final_bits,
    losses,
    lost_steps,
    middle_and_worst,
    recovery_s,
    train,
)

from bloomery.cluster.watch import find_hang
from bloomery.cluster.world import PROCESSES_FILE
from bloomery.ledger.heartbeat import PHASES, Beat
from bloomery.ledger.sinks import read_lines
from bloomery.spec.files import to_yaml
from bloomery.spec.reliability import Supervision

KILLS, HANGS, HANGS_AS_SHIPPED, LOST_NODES = 40, 18, 4, 6
INTERVAL = 3
LAYOUTS: dict[str, dict[str, object]] = {
    "dp2": {"dp": 2},
    "zero2": {"dp": 2, "zero_stage": 2},
    "zero3": {"dp": 2, "zero_stage": 3},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
}


def at_every_step(draw: random.Random, kinds: tuple[str, ...], count: int) -> list[dict[str, object]]:
    """One fault in each of `count` steps, on a rank and in a bucket drawn."""
    return [
        {"kind": kinds[step % len(kinds)], "rank": draw.randrange(2), "step": step, "bucket": draw.choice(BUCKETS)}
        for step in range(1, count + 1)
    ]


def named(folder: Path, faults: list[dict[str, object]]) -> int:
    """How many faults were put to the rank they struck."""
    found = [event["rank"] for event in events(folder, "worker_failed")]
    assert len(found) == len(faults)
    return sum(rank == fault["rank"] for rank, fault in zip(found, faults, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_f1_killed_ranks(tmp_path: Path, data: Path, figure: Figure, name: str) -> None:
    faults = at_every_step(chance(f"F1 {name}"), ("kill",), KILLS)
    settings = {"steps": KILLS + 2, "checkpoint_every": INTERVAL}
    reference, _ = train(describe(tmp_path, "reference", data, LAYOUTS[name], **settings))
    folder, code = train(describe(tmp_path, "run", data, LAYOUTS[name], **settings), faults)
    assert code == 0
    usual, losing = losses(reference), losses(folder)
    equal = sum(losing[step] == usual[step] for step in usual)
    right = named(folder, faults)
    middle, worst = middle_and_worst(recovery_s(folder))
    lost = max(lost_steps(folder))
    same = final_bits(folder) == final_bits(reference) and equal == len(usual)
    figure("F1", f"kill -9 a rank, {name}", "same bits, p50 <= 3 s, p95 <= 6 s",
           f"{KILLS if same else 'not '} same, {right} named, p50 {middle:.2f} p95 {worst:.2f} s",
           same and right == KILLS and middle <= 3 and worst <= 6)  # fmt: skip
    figure("F1", f"steps lost by a kill, {name}", f"<= {INTERVAL} (the interval)", f"at most {lost}", lost <= INTERVAL)
    assert same and right == KILLS


def test_f1_with_copies_in_memory(tmp_path: Path, data: Path, figure: Figure) -> None:
    faults = at_every_step(chance("F1 memory"), ("kill",), KILLS)
    settings = {"steps": KILLS + 2, "checkpoint_every": 20}
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}, **settings))
    folder, code = train(describe(tmp_path, "run", data, {"dp": 2}, memory_every=1, **settings), faults)
    assert code == 0
    lost, same = lost_steps(folder), final_bits(folder) == final_bits(reference)
    middle, worst = middle_and_worst(recovery_s(folder))
    figure("F1", "kill -9 a rank, dp2, copies in memory every step", "0 finished steps lost, same bits",
           f"{sum(step > 0 for step in lost)} of {KILLS} lost {max(lost)}, {'same' if same else 'other'} bits, "
           f"p50 {middle:.2f} p95 {worst:.2f} s", same and max(lost) == 0)  # fmt: skip
    assert same and max(lost) == 0


def processes_of(folder: Path) -> list[psutil.Process]:
    """The ranks of a run that still live."""
    path = folder / ".processes"
    known = json.loads(path.read_text()) if path.exists() else []
    return [psutil.Process(pid) for pid in known if psutil.pid_exists(pid)]


def wait_for(folder: Path, step: int, since: float) -> float:
    """Seconds from `since` until a step has been logged by a start that began after it."""
    while time.time() - since < 60:
        rows = read_lines(folder / "ledger.jsonl")
        fences = [row["fence"] for row in rows]
        if fences and any(row["fence"] == max(fences) and row["step"] >= step for row in rows):
            return time.time() - since
        time.sleep(0.02)
    raise AssertionError(f"{folder}: no step {step}")


def test_f2_lost_agents(tmp_path: Path, data: Path, figure: Figure) -> None:
    """The command itself is killed, with a rank or without, and given again, as a scheduler would."""
    draw, orphans, seconds, done = chance("F2"), 0, list[float](), 0
    described = describe(tmp_path, "run", data, {"dp": 2}, steps=4000)
    folder = Path(described.out) / described.name
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(described.model_dump(mode="json")))
    command = [sys.executable, "-m", "bloomery", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(folder, 4, time.time())
    for number in range(LOST_NODES):
        ranks = processes_of(folder)
        assert len(ranks) == 2
        if number % 2:
            draw.choice(ranks).kill()
        process.kill()
        killed = time.time()
        process.wait()
        psutil.wait_procs(ranks, timeout=2)
        orphans += sum(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
        done = max(row["step"] for row in read_lines(folder / "ledger.jsonl"))
        starts = max(row["fence"] for row in read_lines(folder / "ledger.jsonl"))
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while max(row["fence"] for row in read_lines(folder / "ledger.jsonl")) == starts:
            time.sleep(0.02)
        seconds.append(wait_for(folder, done - 10, killed))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    middle, worst = middle_and_worst(seconds)
    figure("F2", "kill -9 the command (and a rank), given again", "0 orphans after 2 s, <= 15 s",
           f"{orphans} orphans, p50 {middle:.1f} worst {max(seconds):.1f} s", orphans == 0 and worst <= 15)  # fmt: skip
    assert orphans == 0


def test_f2_lost_while_ranks_start(tmp_path: Path, data: Path, figure: Figure) -> None:
    """The command is killed as soon as its ranks are forked, before they have done anything."""
    draw, orphans = chance("F2 start"), 0
    described = describe(tmp_path, "run", data, {"dp": 2}, steps=4000)
    folder = Path(described.out) / described.name
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(described.model_dump(mode="json")))
    for _ in range(LOST_NODES):
        (folder / PROCESSES_FILE).unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-m", "bloomery", "train", str(path)], stderr=subprocess.DEVNULL)
        while len(ranks := processes_of(folder)) < 2:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.wait()
        psutil.wait_procs(ranks, timeout=2)
        orphans += sum(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    figure("F2", "kill -9 the command while its ranks start", "0 orphans after 2 s",
           f"{orphans} of {2 * LOST_NODES} ranks", orphans == 0)  # fmt: skip
    assert orphans == 0


def score_hangs(tmp_path: Path, data: Path, name: str, count: int, floor_s: float) -> tuple[int, list[float], bool]:
    """Hangs named, seconds from each to the next step, and whether the run ends with the undisturbed bits."""
    faults = at_every_step(chance(f"F4 {name}"), ("stop", "loop", "hold"), count)
    for fault in faults:
        fault["step"] = int(str(fault["step"])) + 2
    settings = {"steps": count + 4, "checkpoint_every": 3, "supervision": {"hang_floor_s": floor_s}}
    reference, _ = train(describe(tmp_path, f"{name}-reference", data, {"dp": 2}, **settings))
    folder, code = train(describe(tmp_path, name, data, {"dp": 2}, **settings), faults)
    assert code == 0
    return named(folder, faults), recovery_s(folder), final_bits(folder) == final_bits(reference)


@pytest.mark.parametrize(("name", "count", "floor_s"), [("4", HANGS, 4.0), ("8", HANGS_AS_SHIPPED, 8.0)])
def test_f4_hung_ranks(tmp_path: Path, data: Path, figure: Figure, name: str, count: int, floor_s: float) -> None:
    right, seconds, same = score_hangs(tmp_path, data, name, count, floor_s)
    middle, worst = middle_and_worst(seconds)
    shipped = ", as shipped" if floor_s == Supervision().hang_floor_s else ""
    figure("F4", f"SIGSTOP, loop, held lock; floor {name} s{shipped}", ">= 95 % named, training in <= 12 s",
           f"{right} of {count}, p50 {middle:.1f} p95 {worst:.1f} s, {'same' if same else 'other'} bits",
           right >= 0.95 * count and worst <= 12 and same)  # fmt: skip
    assert right >= 0.95 * count and same


PLACES = ((0, 3, "checkpoint"), (1, 6, "data"), (0, 8, "compute"), (1, 10, "logging"), (0, 11, "evaluate"))


def test_f4_hangs_in_saving_and_evaluation(tmp_path: Path, data: Path, figure: Figure) -> None:
    places = [(1, 3, "checkpoint"), (0, 6, "checkpoint"), (1, 7, "evaluate"), (0, 11, "evaluate"), (1, 12, "data")]
    faults = [{"kind": "loop", "rank": rank, "step": step - 1, "bucket": bucket} for rank, step, bucket in places]
    # The first save is one whose usual length nobody knows.
    settings = {"evaluate_every": 1, "supervision": {"hang_floor_s": 4.0, "first_phase_s": 20.0}}
    folder, code = train(describe(tmp_path, "run", data, {"dp": 2}, **settings), faults)
    right = named(folder, faults)
    phases = [event["phase"] for event in events(folder, "worker_failed")]
    expected = ["save", "save", "evaluate", "evaluate", "load"]
    figure("F4", "hangs while saving, evaluating, loading", "rank and phase named",
           f"{right} ranks, {sum(a == b for a, b in zip(phases, expected, strict=True))} phases of {len(places)}",
           right == len(places) and phases == expected)  # fmt: skip
    assert code == 0 and right == len(places)


def test_f4_legal_pauses(tmp_path: Path, data: Path, figure: Figure) -> None:
    faults = [{"kind": "pause", "rank": rank, "step": step - 1, "bucket": bucket, "seconds": 2.5}
              for rank, step, bucket in PLACES]  # fmt: skip
    folder, _ = train(describe(tmp_path, "run", data, {"dp": 2}, evaluate_every=1), faults)
    alarms = len(events(folder, "worker_failed"))
    figure("F4", "pauses of 2.5 s under a floor of 4 s", "0 alarms", f"{alarms} alarms", alarms == 0)
    assert alarms == 0


def test_f4_a_day_of_legal_pauses(figure: Figure) -> None:
    """Heartbeats of four ranks over 24 h of made time, looked at once a second: steps of about a second, saves,
    evaluations, a compiling first step, and every hour a loader that waits for a disk."""
    draw, settings, alarms, polls = chance("F4 day"), Supervision(), 0, 0
    longest, now, end, step = [0.0] * len(PHASES), 0.0, 86_400.0, 0
    while now < end:
        lengths = {"load": 0.01, "compute": draw.lognormvariate(0, 0.2), "communicate": 0.1, "optimize": 0.05}
        if step == 0:
            lengths["compute"] = 200.0
        if step % 500 == 499:
            lengths["save"] = draw.uniform(1, 7)
        if step % 2000 == 1999:
            lengths |= {f"evaluate{number}": draw.uniform(0.5, 2) for number in range(60)}
        if step % 3000 == 1500:
            lengths["load"] = draw.uniform(2, 7)
        late = draw.randrange(4)
        for name, seconds in lengths.items():
            phase = name.rstrip("0123456789")
            began, now = now, now + seconds
            for moment in range(int(began) + 1, int(now) + 1):
                polls += 1
                beats = [
                    Beat(
                        step * 9 + (rank == late), began, step, phase if rank == late else "communicate", tuple(longest)
                    )
                    for rank in range(4)
                ]
                alarms += find_hang(beats, ["R"] * 4, float(moment), settings) is not None
            place = PHASES.index(phase)
            longest[place] = max(seconds, longest[place])
            waited = PHASES.index("communicate")
            longest[waited] = max(seconds, longest[waited])
        step += 1
    figure("F4", f"24 made hours of legal pauses ({polls:,} looks)", "0 alarms", f"{alarms} alarms", alarms == 0)
    assert alarms == 0 and polls > 80_000
