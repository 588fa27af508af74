"""Wrong inputs as a new user would make them: one clear line, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bloomery.cli.demo import write_run_file

TINY = {
    "name": "tiny",
    "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": 512, "max_seq_len": 64},
    "cluster": "this-machine",
    "layout": {},
    "train": {"seq_len": 32, "global_batch": 4, "steps": 2},
    "data": {"vocab": 512},
}


def bloomery(*arguments: object, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the console program as a user would."""
    command = [sys.executable, "-m", "bloomery", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and exactly one line on standard error that holds all the words."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def run_file(folder: Path, **changes: object) -> Path:
    """A valid tiny run.yaml with some top-level keys changed."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**TINY, "out": str(folder / "runs"), **changes}))
    return path


def test_misspelt_key_names_file_path_and_nearest_match(tmp_path: Path) -> None:
    path = run_file(tmp_path, train={"seq_len": 32, "global_batch": 4, "stepps": 2})
    refused(bloomery("plan", path, cwd=tmp_path), "run.yaml", "train.stepps", "steps")


def test_misspelt_set_is_refused_like_a_misspelt_file(tmp_path: Path) -> None:
    path = run_file(tmp_path)
    refused(bloomery("plan", path, "--set", "model.layrs=4", cwd=tmp_path), "model.layrs", "layers")


def test_unknown_model_name_suggests_the_nearest(tmp_path: Path) -> None:
    refused(bloomery("plan", run_file(tmp_path, model="yuan-1.0-245"), cwd=tmp_path), "yuan-1.0-245")


def test_missing_run_file_suggests_the_nearest(tmp_path: Path) -> None:
    run_file(tmp_path)
    refused(bloomery("plan", "runn.yaml", cwd=tmp_path), "no such file", "run.yaml")


@pytest.mark.parametrize("layout", ["tp=3", "tp=2,pp=4", "dp=3", "tp=8", "xp=2", "tp=two"])
def test_impossible_mesh_is_refused_before_any_process_starts(tmp_path: Path, layout: str) -> None:
    path = run_file(tmp_path)
    refused(bloomery("train", path, "--layout", layout, cwd=tmp_path))
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_missing_text_folder(tmp_path: Path) -> None:
    path = run_file(tmp_path)
    refused(bloomery("data", "build", path, "--text", tmp_path / "nowhere", cwd=tmp_path), "nowhere")


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    refused(bloomery("data", "build", run_file(tmp_path), "--text", tmp_path / "text", cwd=tmp_path), "text")
    assert not list((tmp_path / "runs").rglob("*.bin"))


def test_binary_file_given_as_text(tmp_path: Path) -> None:
    binary = tmp_path / "picture.txt"
    binary.write_bytes(bytes(range(256)) * 64)
    refused(bloomery("data", "build", run_file(tmp_path), "--text", binary, cwd=tmp_path), "picture.txt")


def test_binary_file_given_as_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(os.urandom(512))
    refused(bloomery("plan", path, cwd=tmp_path), "run.yaml")


def test_run_directory_that_does_not_exist(tmp_path: Path) -> None:
    for verb in (["report"], ["evaluate"], ["chat", "--message", "hello"]):
        refused(bloomery(verb[0], tmp_path / "nowhere", *verb[1:], cwd=tmp_path), "nowhere")


def test_unknown_verb_suggests_the_nearest(tmp_path: Path) -> None:
    refused(bloomery("trian", cwd=tmp_path), "train")


def test_the_demo_writes_a_run_file_that_validates(tmp_path: Path) -> None:
    path = write_run_file(tmp_path, [])
    values = yaml.safe_load(path.read_text())
    assert values["cluster"] == "machine.yaml"
    assert values["out"] == str(tmp_path)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own with 1 MB in all."""
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_disk_space_is_said_before_anything_is_written(tmp_path: Path, full_disk: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "some.txt").write_text("Iron is made from ore with charcoal and patience.\n" * 200)
    (full_disk / "others").write_bytes(bytes(900_000))
    path = run_file(tmp_path, out=str(full_disk / "runs"))
    refused(bloomery("data", "build", path, "--text", text, cwd=tmp_path), "no space left", str(full_disk))
    assert [file.name for file in full_disk.rglob("*") if file.is_file()] == ["others"]


def test_a_disk_too_small_for_checkpoints_is_said_before_training(tmp_path: Path, full_disk: Path) -> None:
    text = {"vocab": 512, "text": [str(Path(json.__file__).parent)], "folder": str(tmp_path / "data")}
    assert bloomery("data", "build", run_file(tmp_path, data=text), cwd=tmp_path).returncode == 0
    several = {**TINY["train"], "steps": 3, "checkpoint_every": 1}  # one alone would fit
    path = run_file(tmp_path, data=text, train=several, out=str(full_disk / "runs"))
    refused(bloomery("train", path, cwd=tmp_path), "no space left for checkpoints: 3 of them", str(full_disk))
    assert not list(full_disk.iterdir())


def test_training_again_under_another_description_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = run_file(tmp_path, data={"vocab": 512, "text": [str(Path(json.__file__).parent)]})
    for verb in (["data", "build"], ["train"]):
        assert bloomery(*verb, path, cwd=tmp_path).returncode == 0
    run_dir = tmp_path / "runs" / "tiny"
    before = {file: file.read_bytes() for file in run_dir.glob("[!.]*.*")}
    refused(bloomery("train", path, "--set", "model.layers=3", cwd=tmp_path), "another model", "--fresh")
    assert {file: file.read_bytes() for file in run_dir.glob("[!.]*.*")} == before


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    path = run_file(tmp_path, data={"vocab": 512, "text": [str(Path(json.__file__).parent)]})
    for verb in (["data", "build"], ["train"]):
        assert bloomery(*verb, path, cwd=tmp_path).returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = bloomery("serve", tmp_path / "runs" / "tiny", "--port", port, cwd=tmp_path)
    refused(result, f"127.0.0.1:{port}", "in use")
