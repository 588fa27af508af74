"""F6, F7, F8: torn files, flipped bits, full disks. What is read is what was written, or it is refused by name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import Figure, chance, describe, events, final_bits, train

from bloomery.cluster.probe import write_cluster
from bloomery.data.build import read_report
from bloomery.data.shards import read_manifest, verify
from bloomery.data.tokenizer import load
from bloomery.evaluate.huggingface import export_run, load_directory
from bloomery.evaluate.opening import open_run
from bloomery.ledger.reconcile import read_plan
from bloomery.spec.catalog import cluster, read_cluster, read_run
from bloomery.spec.commit import newest_good, read_commit
from bloomery.spec.errors import BloomeryError
from bloomery.spec.job import read_job
from bloomery.spec.layout import Layout
from bloomery.spec.seal import KEY
from bloomery.train.memory import MemoryCopies

FLIPS, TEARS = 1000, 300
NEWEST, BEFORE = "step_000014", "step_000012"


@dataclass(frozen=True)
class Artefact:
    """Files of one kind, and how the product reads them: a value, or BloomeryError."""

    name: str
    files: list[Path]
    read: Callable[[], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished run on data of its own, exported."""
    place = tmp_path_factory.mktemp("artefacts")
    shutil.copytree(data, place / "shards")
    folder, _ = train(describe(place, "run", place / "shards", {"dp": 2}))
    export_run(open_run(folder), place / "export")
    write_cluster(cluster("this-machine"), place / "machine.yaml")
    return folder


def artefacts(run: Path) -> list[Artefact]:
    """All that a run reads again."""
    place = run.parent.parent
    newest = run / "checkpoints" / NEWEST
    train_folder, export = place / "shards" / "train", place / "export"

    def shards() -> Any:
        verify(train_folder)
        return {key: value for key, value in read_manifest(train_folder).items() if key != KEY}

    def weights() -> Any:
        return {name: value.numpy().tobytes() for name, value in load_directory(export).state_dict().items()}

    def checkpoint() -> Any:
        return read_commit(newest)

    def tokenizer() -> Any:
        return load(place / "shards").encode("the quick brown fox")

    def report() -> Any:
        found = read_report(place / "shards")
        return found and found.to_json()

    def plan() -> Any:
        return {key: value for key, value in read_plan(run)[0].items() if key != KEY}

    return [
        Artefact("checkpoint shards", sorted(newest.glob("*.safetensors")), checkpoint),
        Artefact("commit: index, cursor, guard", [newest / "commit.json"], checkpoint),
        Artefact(
            "token shards and index", [file for file in train_folder.iterdir() if file.name != "manifest.json"], shards
        ),
        Artefact("manifest of token shards", [train_folder / "manifest.json"], shards),
        Artefact("tokenizer", [place / "shards" / "tokenizer.json"], tokenizer),
        Artefact("report of the data", [place / "shards" / "report.json"], report),
        Artefact("exported weights and config", [export / "model.safetensors", export / "config.json"], weights),
        Artefact("plan.json", [run / "plan.json"], plan),
        Artefact("job.json", [run / "job.json"], lambda: read_job(run)),
        Artefact("run.yaml of the run", [run / "run.yaml"], lambda: read_run(run / "run.yaml")),
        Artefact("machine.yaml of probe", [place / "machine.yaml"], lambda: read_cluster(place / "machine.yaml")),
    ]


def test_f7_a_copy_in_memory(tmp_path: Path, figure: Figure) -> None:
    """The newest copy is flipped; a start goes on from the one before."""
    rank = SimpleNamespace(mesh=SimpleNamespace(rank=0, world_size=1), layout=Layout())
    draw, silent, back = chance("F7 memory"), 0, 0
    for number in (1, 2):
        writer = MemoryCopies(tmp_path / "copies", rank, None, number)  # type: ignore[arg-type]
        tensors = {"weight": torch.full((200,), float(number))}
        part = {"file": "rank_00000.safetensors", "key": "weight", "offsets": (0,), "shape": (200,)}
        state = {"step": number, "cursor": 0, "run_hash": "", "data_hash": "", "guard": {}, "fence": number}
        writer._write((number, number, number), state, tensors, {"weight": {"shape": (200,), "part": part}})
    shutil.copytree(tmp_path / "copies", tmp_path / "kept")
    reader = MemoryCopies(tmp_path / "copies", rank, None, 3)  # type: ignore[arg-type]
    for _ in range(FLIPS):
        shutil.rmtree(tmp_path / "copies")
        shutil.copytree(tmp_path / "kept", tmp_path / "copies")
        file = draw.choice(sorted(reader.path((2, 2, 2)).iterdir()))
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        found, _ = reader.newest_good()
        silent += found == (2, 2, 2)
        back += found == (1, 1, 1)
    figure("F7", "one bit: copy of the state in memory", "0 silent",
           f"{silent} silent of {FLIPS}, {back} went back one", silent == 0)  # fmt: skip
    assert silent == 0 and back == FLIPS


@contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """The file holds something else for a while."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def outcome(artefact: Artefact, good: Any) -> str:
    """refused, harmless (the same is read) or silent."""
    try:
        found = artefact.read()
    except BloomeryError:
        return "refused"
    if isinstance(good, dict):  # the name of the hash itself may have changed: nothing that is looked for
        found = {key: found.get(key) for key in good}
    return "harmless" if found == good else "silent"


KINDS = range(11)


@pytest.mark.parametrize("kind", KINDS)
def test_f7_flipped_bits(run: Path, figure: Figure, kind: int) -> None:
    artefact = artefacts(run)[kind]
    draw, good, found = chance(f"F7 {kind}"), artefact.read(), dict.fromkeys(("refused", "harmless", "silent"), 0)
    for _ in range(FLIPS):
        file = draw.choice(artefact.files)
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        with changed(file, bytes(content)):
            found[outcome(artefact, good)] += 1
    told = f"{found['silent']} silent of {FLIPS} ({found['harmless']} change nothing read)"
    figure("F7", f"one bit: {artefact.name}", "0 silent", told, found["silent"] == 0)
    assert found["silent"] == 0


def torn(content: bytes, draw: random.Random) -> bytes:
    """Cut short, emptied, a hole of zeros, or the end of something longer."""
    kind = draw.randrange(4)
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:
        return b""
    if kind == 2:
        start = draw.randrange(len(content))
        return content[:start] + bytes(min(4096, len(content) - start)) + content[start + 4096 :]
    return content + content[: draw.randrange(1, 64)]


@pytest.mark.parametrize("kind", KINDS)
def test_f6_torn_files(run: Path, figure: Figure, kind: int) -> None:
    artefact = artefacts(run)[kind]
    draw, good, found = chance(f"F6 {kind}"), artefact.read(), dict.fromkeys(("refused", "harmless", "silent"), 0)
    for _ in range(TEARS):
        file = draw.choice(artefact.files)
        with changed(file, torn(file.read_bytes(), draw)):
            found[outcome(artefact, good)] += 1
    figure("F6", f"torn: {artefact.name}", "100 % noticed", f"{found['silent']} silent of {TEARS}", not found["silent"])
    assert found["silent"] == 0


def damages(folder: Path, draw: random.Random) -> Iterator[str]:
    """Damage a checkpoint in each way there is; the caller mends it in between."""
    files = sorted(folder.glob("*.safetensors"))
    commit = folder / "commit.json"
    for file in [*files, commit]:
        file.unlink()
        yield f"{file.name} is missing"
    for _ in range(40):
        file = draw.choice([*files, commit])
        whole = left = file.read_bytes()
        while left == whole:
            left = torn(whole, draw)
        file.write_bytes(left)
        yield f"{file.name} is torn"
    other = folder.parent / BEFORE / "commit.json"
    commit.write_bytes(other.read_bytes())
    yield "the commit of another step"
    for file in files:
        file.unlink()
    yield "renamed without data"
    commit.write_text(json.dumps({"sha256": "", "commit": {}}))
    yield "an empty commit"
    files[0].unlink()
    files[0].symlink_to(folder.parent / BEFORE / files[0].name)
    yield "a link in place of a shard"


def test_f6_falls_back_to_the_newest_good(run: Path, tmp_path: Path, figure: Figure) -> None:
    checkpoints, draw, back, total = run / "checkpoints", chance("F6 back"), 0, 0
    shutil.copytree(checkpoints / NEWEST, tmp_path / "good")
    for _ in damages(checkpoints / NEWEST, draw):
        newest, skipped = newest_good(checkpoints)
        # A commit of another step verifies nothing that is there, unless all is equal.
        back += newest is not None and newest.name == BEFORE and len(skipped) == 1
        total += 1
        shutil.rmtree(checkpoints / NEWEST)
        shutil.copytree(tmp_path / "good", checkpoints / NEWEST)
    figure("F6", "a damaged newest checkpoint", "100 % go back one", f"{back} of {total}", back == total)
    assert back == total


def test_f6_a_run_goes_on_from_the_one_before(tmp_path: Path, data: Path, figure: Figure) -> None:
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}))
    described = describe(tmp_path, "run", data, {"dp": 2})
    assert train(described, [{"kind": "term", "rank": 0, "step": 7}])[1] == 75
    folder = Path(described.out) / described.name
    newest = max((folder / "checkpoints").glob("step_*"))
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert train(described)[1] == 0
    aside = [event["set_aside"] for event in events(folder, "checkpoint_skipped")]
    kept = all((folder / "checkpoints" / name).is_dir() for name in aside)
    same = final_bits(folder) == final_bits(reference)
    figure("F6", "resume over a torn checkpoint", "set aside, same bits", f"{aside}, {'same' if same else 'other'}",
           same and kept and len(aside) == 1)  # fmt: skip
    assert same and kept and len(aside) == 1


def test_f8_a_disk_that_stays_full(tmp_path: Path, data: Path, figure: Figure) -> None:
    described = describe(tmp_path, "run", data, {"dp": 2}, checkpoint_every=1)
    folder = Path(described.out) / described.name
    with pytest.raises(BloomeryError, match="gave up"):
        train(described, [{"kind": "full", "rank": 1, "step": 5}])
    newest, skipped = newest_good(folder / "checkpoints")
    failed = events(folder, "checkpoint_failed")
    good = newest is not None and not skipped and len(list((folder / "checkpoints").glob("step_*"))) == 2
    figure("F8", "the disk is full from step 6 on", "2 good ones stay, exit code not 0",
           f"{newest and newest.name} and one more stay, {len(failed)} alarms, exit code 1", good)  # fmt: skip
    assert good and len(failed) == 3


def test_f8_a_disk_that_gets_room_again(tmp_path: Path, data: Path, figure: Figure) -> None:
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}))
    faults: list[dict[str, object]] = [{"kind": "full", "rank": 1, "step": 5, "until": 10}]
    folder, code = train(describe(tmp_path, "run", data, {"dp": 2}), faults)
    failed, same = len(events(folder, "checkpoint_failed")), final_bits(folder) == final_bits(reference)
    figure("F8", "the disk is full for 5 steps", "training goes on, said at once",
           f"{failed} alarms, exit code {code}, {'same' if same else 'other'} bits", same and failed > 0)  # fmt: skip
    assert code == 0 and same and failed
