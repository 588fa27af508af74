"""A run that is killed and started again ends with the same bits as one that nothing disturbed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml
from safetensors.numpy import load_file

from bloomery.ledger.sinks import read_lines

STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards made once."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"Chapter {number}. " + "The quick brown fox jumps over a lazy dog. " * 40)
    path = write_run(folder, "build", folder / "shards", {"dp": 1})
    done = subprocess.run(command("data", "build", path, "--text", text), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "shards"


NOTHING: Mapping[str, object] = MappingProxyType({})


def command(*arguments: object) -> list[str]:
    """The console program."""
    return [sys.executable, "-m", "bloomery", *map(str, arguments)]


def write_run(
    folder: Path,
    name: str,
    data: Path,
    layout: dict[str, object],
    settings: Mapping[str, object] = NOTHING,
) -> Path:
    """A tiny run that saves often."""
    values = {
        "name": name,
        "model": {"layers": 2, "hidden": 64, "heads": 4, "vocab": 512, "max_seq_len": 64},
        "cluster": "this-machine",
        "layout": {"micro_batch": 2, **layout},
        "data": {"folder": str(data), "vocab": 512},
        "train": {
            "seq_len": 64,
            "global_batch": 8,
            "steps": STEPS,
            "checkpoint_every": 3,
            "dtype": "float32",
            **settings,
        },
        "out": str(folder / "runs"),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def final_bits(run_dir: Path) -> dict[str, str]:
    """A hash of every tensor of the last checkpoint, by name, whatever files hold it."""
    bits = {}
    for file in sorted((run_dir / "checkpoints" / f"step_{STEPS:06d}").glob("*.safetensors")):
        for name, value in load_file(file).items():
            bits[f"{file.name}:{name}"] = hashlib.sha256(value.tobytes()).hexdigest()
    assert bits
    return bits


def train(path: Path) -> subprocess.CompletedProcess[str]:
    """Train to the end."""
    return subprocess.run(command("train", path), capture_output=True, text=True, timeout=120)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Wait until a run has logged a step."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        if any(row.get("step", 0) >= step for row in read_lines(run_dir / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"{run_dir} never reached step {step}")


def workers(run_dir: Path) -> list[int]:
    """The process numbers of a run's ranks."""
    return json.loads((run_dir / ".processes").read_text())


RAMP = {
    "ramp": [{"tokens": 640, "global_batch": 4, "seq_len": 32}, {"tokens": 640, "global_batch": 4}],
    "averaging": {"method": "uniform", "every": 2, "start": 0.1},
}


@pytest.mark.parametrize(
    ("layout", "settings"),
    [({"dp": 2}, {}), ({"tp": 2, "sequence_parallel": True}, {}), ({"dp": 2, "zero_stage": 2}, RAMP)],
)
def test_killed_and_started_again_ends_with_the_same_bits(
    tmp_path: Path, data: Path, layout: dict[str, object], settings: dict[str, object]
) -> None:
    undisturbed = write_run(tmp_path, "undisturbed", data, layout, settings)
    assert train(undisturbed).returncode == 0
    disturbed = write_run(tmp_path, "disturbed", data, layout, settings)
    run_dir = tmp_path / "runs" / "disturbed"
    process = subprocess.Popen(command("train", disturbed), stderr=subprocess.DEVNULL)
    wait_for_step(run_dir, 4)
    ranks = workers(run_dir)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < until, "orphans"
        time.sleep(0.05)
    finished = train(disturbed)
    assert finished.returncode == 0, finished.stderr
    assert final_bits(run_dir) == final_bits(tmp_path / "runs" / "undisturbed")


def test_a_killed_worker_is_named_and_the_run_goes_on_by_itself(tmp_path: Path, data: Path) -> None:
    path = write_run(tmp_path, "worker", data, {"dp": 2})
    run_dir = tmp_path / "runs" / "worker"
    process = subprocess.Popen(command("train", path), stderr=subprocess.PIPE, text=True)
    wait_for_step(run_dir, 4)
    os.kill(workers(run_dir)[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "rank 1 killed by SIGKILL" in error and "starting again" in error
    kinds = [event["event"] for event in read_lines(run_dir / "events.jsonl")]
    assert kinds.index("worker_failed") < kinds.index("resumed") < kinds.index("finished")


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "zero_stage": 1}])
def test_a_torn_checkpoint_is_passed_over_and_named(tmp_path: Path, data: Path, layout: dict[str, object]) -> None:
    path = write_run(tmp_path, "torn", data, layout)
    assert train(path).returncode == 0
    run_dir = tmp_path / "runs" / "torn"
    expected = final_bits(run_dir)
    newest = run_dir / "checkpoints" / f"step_{STEPS:06d}"
    file = max(newest.glob("*.safetensors"))  # the last rank's, who verifies it
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (run_dir / "events.jsonl").unlink()
    assert train(path).returncode == 0
    skipped = [event for event in read_lines(run_dir / "events.jsonl") if event["event"] == "checkpoint_skipped"]
    assert file.name in skipped[0]["reason"]
    assert (run_dir / "checkpoints" / skipped[0]["set_aside"] / file.name).read_bytes() == bytes(content)
    assert final_bits(run_dir) == expected


def test_a_term_signal_saves_and_ends_with_75(tmp_path: Path, data: Path) -> None:
    path = write_run(tmp_path, "signal", data, {"dp": 2})
    run_dir = tmp_path / "runs" / "signal"
    process = subprocess.Popen(command("train", path, "--set", "train.steps=4000"), stderr=subprocess.DEVNULL)
    wait_for_step(run_dir, 4)
    process.terminate()
    assert process.wait(timeout=60) == 75
    last = max(row["step"] for row in read_lines(run_dir / "metrics.jsonl"))
    assert (run_dir / "checkpoints" / f"step_{last:06d}" / "commit.json").is_file()


def test_every_line_of_the_ledger_adds_up(tmp_path: Path, data: Path) -> None:
    path = write_run(tmp_path, "ledger", data, {"dp": 2})
    assert train(path).returncode == 0
    lines = read_lines(tmp_path / "runs" / "ledger" / "ledger.jsonl")
    assert {line["rank"] for line in lines} == {0, 1}
    assert all(abs(sum(line["buckets"].values()) - line["wall_s"]) <= 0.005 * line["wall_s"] for line in lines)


def test_a_second_writer_is_refused(tmp_path: Path, data: Path) -> None:
    path = write_run(tmp_path, "second", data, {})
    process = subprocess.Popen(command("train", path, "--set", "train.steps=4000"), stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "runs" / "second", 1)
    refused = train(path)
    process.kill()
    process.wait()
    assert refused.returncode == 2
    assert "another process" in refused.stderr
