"""The fault matrix, seeded: many faults of each kind in real runs, scored for bits, culprits and seconds."""

from __future__ import annotations

import random
import shutil
import statistics
from pathlib import Path

import pytest
import runs
from runs import Figure, describe, events, final_bits, losses, train

from bloomery.data.shards import read_manifest, verify
from bloomery.ledger.sinks import read_lines
from bloomery.spec.commit import newest_good
from bloomery.spec.errors import BloomeryError, InputError

KILLS_A_LAYOUT = 10
HANGS = 12
FLIPS = 1000
BUCKETS = ("data", "compute", "optimizer", "checkpoint", "logging")
LAYOUTS: dict[str, dict[str, object]] = {
    "dp2": {"dp": 2},
    "zero2": {"dp": 2, "zero_stage": 2},
    "zero3": {"dp": 2, "zero_stage": 3},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards made once."""
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_f1_killed_ranks(tmp_path: Path, data: Path, figure: Figure, name: str) -> None:
    chance = random.Random(f"F1 {name}")
    reference, _ = train(describe(tmp_path, "reference", data, LAYOUTS[name]))
    equal, named, seconds = 0, 0, list[float]()
    for number in range(KILLS_A_LAYOUT):
        rank, step, bucket = chance.randrange(2), chance.randrange(14), chance.choice(BUCKETS[:3])
        fault = {"kind": "kill", "rank": rank, "step": step, "bucket": bucket}
        folder, _ = train(describe(tmp_path, f"run{number}", data, LAYOUTS[name]), [fault])
        equal += final_bits(folder) == final_bits(reference)
        named += [event["rank"] for event in events(folder, "worker_failed")] == [rank]
        seconds += recovery_s(folder)
        shutil.rmtree(folder)
    middle, worst = statistics.median(seconds), max(seconds)
    figure("F1", f"kill -9, {name}", "same bits, named, <= 3 s", f"{equal} and {named} of {KILLS_A_LAYOUT}, "
           f"p50 {middle:.1f} s, worst {worst:.1f} s")  # fmt: skip
    assert equal == named == KILLS_A_LAYOUT


def recovery_s(folder: Path) -> list[float]:
    """Seconds from each failure's record to the first step after it."""
    ledger = [line for line in read_lines(folder / "ledger.jsonl") if line["rank"] == 0 and line["step"] == -1]
    starts = read_lines(folder / "supervision.jsonl")
    loaded = {line["fence"]: line["wall_s"] for line in ledger}
    return [start["forked_s"] + loaded[start["fence"]] for start in starts[1:] if start["fence"] in loaded]


def test_f4_hung_ranks(tmp_path: Path, data: Path, figure: Figure) -> None:
    chance = random.Random("F4")
    named, seconds = 0, list[float]()
    for number in range(HANGS):
        rank, kind = chance.randrange(2), ("stop", "loop", "hold")[number % 3]
        fault = {"kind": kind, "rank": rank, "step": chance.randrange(2, 14), "bucket": chance.choice(BUCKETS[:3])}
        folder, _ = train(describe(tmp_path, f"run{number}", data, {"dp": 2}), [fault])
        named += [event["rank"] for event in events(folder, "worker_failed")] == [rank]
        first = read_lines(folder / "supervision.jsonl")[0]
        seconds.append(first["detect_s"] + sum(recovery_s(folder)))
    middle = statistics.median(seconds)
    figure(
        "F4", "SIGSTOP, endless loop, held lock", ">= 95 % named, <= 12 s", f"{named} of {HANGS}, p50 {middle:.1f} s"
    )
    assert named >= 0.95 * HANGS


def test_f4_legal_pauses(tmp_path: Path, data: Path, figure: Figure) -> None:
    places = ((0, 3, "checkpoint"), (1, 5, "data"), (0, 7, "compute"), (1, 9, "logging"))
    faults = [{"kind": "pause", "rank": rank, "step": step, "bucket": bucket} for rank, step, bucket in places]
    folder, _ = train(describe(tmp_path, "run", data, {"dp": 2}), faults)
    alarms = len(events(folder, "worker_failed"))
    figure("F4", "pauses of 2.5 s under a floor of 4 s", "0 alarms", f"{alarms} alarms")
    assert alarms == 0


def test_f7_flipped_bits(tmp_path: Path, data: Path, figure: Figure) -> None:
    folder, _ = train(describe(tmp_path, "run", data, {"dp": 2}))
    chance, silent, fell_back, facts = random.Random("F7"), 0, 0, said(data / "train")
    places = [*(folder / "checkpoints" / "step_000014").iterdir(), *(data / "train").iterdir()]
    for _ in range(FLIPS):
        file = chance.choice(places)
        before = file.read_bytes()
        content = bytearray(before)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        if file.parent == data / "train":
            try:
                verify(data / "train")
                silent += said(data / "train") != facts
                fell_back += said(data / "train") == facts  # the name of the hash itself: nothing is read wrongly
            except (InputError, KeyError, TypeError):
                fell_back += 1
        else:
            newest, _ = newest_good(folder / "checkpoints")
            silent += newest is not None and newest.name == "step_000014"
            fell_back += newest is not None and newest.name == "step_000012"
        file.write_bytes(before)
    figure("F7", "one bit of a checkpoint or token shard", "0 silent", f"{silent} silent of {FLIPS}")
    assert silent == 0 and fell_back == FLIPS


def said(folder: Path) -> dict[str, object]:
    """What a manifest says, known keys only."""
    return {key: value for key, value in read_manifest(folder).items() if "256" not in key and key.isidentifier()}


def test_f8_full_disk(tmp_path: Path, data: Path, figure: Figure) -> None:
    described = describe(tmp_path, "run", data, {"dp": 2})
    with pytest.raises(BloomeryError):
        train(described, [{"kind": "full", "rank": 1, "step": 5}])
    newest, skipped = newest_good(tmp_path / "runs" / "run" / "checkpoints")
    figure(
        "F8", "the disk is full from step 5 on", "good ones stay, exit code not 0", f"{newest and newest.name} stays"
    )
    assert newest is not None and not skipped


@pytest.mark.parametrize("stop", range(1, 14, 2))
def test_f10_stopped_at_a_step(tmp_path: Path, data: Path, figure: Figure, stop: int) -> None:
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}))
    described = describe(tmp_path, "run", data, {"dp": 2})
    assert train(described, [{"kind": "term", "rank": 0, "step": stop}])[1] == 75
    folder, code = train(described)
    assert code == 0
    same = final_bits(folder) == final_bits(reference) and losses(folder) == losses(reference)
    figure("F10", f"SIGTERM in step {stop + 1:2}, then the same command", "75, same bits", "same" if same else "other")
    assert same


def test_f12_nan(tmp_path: Path, data: Path, figure: Figure) -> None:
    folder, _ = train(describe(tmp_path, "run", data, {"dp": 2}), [{"kind": "nan", "rank": 1, "step": 5}])
    lost = len(events(folder, "step_skipped"))
    figure("F12", "NaN gradient on one rank", "1 step lost", f"{lost} lost")
    assert lost == 1


def test_f14_flipped_weights(tmp_path: Path, data: Path, figure: Figure) -> None:
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}))
    found, steps = 0, (1, 4, 7, 10)
    for step in steps:
        fault = {"kind": "flip", "rank": 1, "step": step, "bucket": "data"}
        folder, _ = train(describe(tmp_path, f"run{step}", data, {"dp": 2}), [fault])
        found += len(events(folder, "replicas_differ")) == 1 and final_bits(folder) == final_bits(reference)
    figure(
        "F14",
        "a mantissa bit of one weight of a replica",
        "found before it is saved",
        f"{found} of {len(steps)}, healed",
    )
    assert found == len(steps)
