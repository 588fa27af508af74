"""What makes a checkpoint exist: `commit.json`, with a hash of every file. Loading verifies and walks back.

Torch-free: the supervisor and `runs` read it too. Nothing in a checkpoint is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, lcm
from pathlib import Path
from typing import Any

from bloomery.spec.base import Noun
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.files import write_atomically
from bloomery.spec.layout import Layout
from bloomery.spec.seal import sha256_of

BYTES_PER_PARAMETER = 12  # float32 parameter and two moments
FORMAT = 1
AVERAGE = "average"
"""Before the name of a parameter: its running average."""
IMPORTED = "imported"
"""The run hash of a checkpoint that no training made: weights from elsewhere, at step 0."""
COMMIT_FILE = "commit.json"
FENCE_FILE = ".fence"
EVERYTHING = slice(None)


class FileRecord(Noun):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class Rectangle(Noun):
    """Where a part of a tensor is: `shape` at `offsets`, under `key` in `file`."""

    file: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class TensorRecord(Noun):
    """A whole tensor and the rectangles that make it up."""

    shape: tuple[int, ...]
    parts: tuple[Rectangle, ...]


class Commit(Noun):
    """The content of `commit.json`. `updates`: steps that moved the weights, fewer than `step` where some were
    skipped; None in older files, whose writer did not tell them apart."""

    format: int
    step: int
    updates: int | None = None
    cursor: int
    run_hash: str
    data_hash: str
    layout: Layout
    guard: dict[str, Any]
    fence: int = 0
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]

    def trained(self, name: str) -> str:
        """The tensor that a parameter is to be used by: its running average where there is one."""
        averaged = f"{AVERAGE}.{name}"
        return averaged if averaged in self.tensors else name


def read_commit(
    folder: Path, *, verify: bool = True, share: slice = EVERYTHING, gets_on: Callable[[], None] = lambda: None
) -> Commit:
    """The commit of a checkpoint folder; with `verify`, size and hash of its files (or of a `share` of them) are
    checked, which takes minutes where they are large: `gets_on` is called every few milliseconds.

    Raises BloomeryError that names the file which is missing, torn or changed.
    """
    path = folder / COMMIT_FILE
    try:
        envelope = json.loads(path.read_bytes())
        body = envelope["commit"]
        if hashlib.sha256(canonical(body).encode()).hexdigest() != envelope["sha256"]:
            raise BloomeryError(f"{path}: changed since it was written")
        commit = Commit.checked(body, where=str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BloomeryError(f"{path}: not a commit ({type(error).__name__})") from None
    for name, record in list(commit.files.items())[share] if verify else ():
        if Path(name).name != name or (folder / name).is_symlink():
            raise BloomeryError(f"{path}: {name} is not a plain file name")
        try:
            _check_file(folder / name, record, gets_on)
        except OSError as error:  # a sector that cannot be read any more, say
            raise BloomeryError(f"{folder / name}: cannot be read ({error.strerror or error})") from None
    return commit


def _check_file(file: Path, record: FileRecord, gets_on: Callable[[], None]) -> None:
    """Raise BloomeryError when a file is not what was written, OSError when that cannot be told."""
    if not file.is_file() or file.stat().st_size != record.bytes:
        raise BloomeryError(f"{file}: missing or torn")
    if sha256_of(file, gets_on) != record.sha256:
        raise BloomeryError(f"{file}: content does not match its hash")


def canonical(body: Any) -> str:
    """One text for one value, to hash."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def write_commit(folder: Path, commit: Commit) -> None:
    """Write and fsync `commit.json`."""
    body = commit.model_dump(mode="json")
    text = json.dumps({"sha256": hashlib.sha256(canonical(body).encode()).hexdigest(), "commit": body})
    with (folder / COMMIT_FILE).open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def step_of(folder: Path) -> int:
    """The step of a finished checkpoint, by its name."""
    return int(folder.name[5:])


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Finished checkpoint folders, newest step first (by name, never by file time)."""
    found = [path for path in checkpoints.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest_good(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that was passed over."""
    skipped = []
    for folder in checkpoint_folders(checkpoints):
        try:
            read_commit(folder)
        except BloomeryError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def imported_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint of weights from elsewhere, perhaps the only copy of them; None where there is none."""
    folder = checkpoints / "step_000000"
    made = (folder / COMMIT_FILE).is_file() and read_commit(folder, verify=False).run_hash == IMPORTED
    return folder if made else None


def read_fence(run_folder: Path) -> int:
    """The fencing number of the newest start of a run (0: none yet). A writer with a lower one has been replaced."""
    try:
        return int((run_folder / FENCE_FILE).read_text())
    except (OSError, ValueError):
        return 0


def take_fence(run_folder: Path) -> int:
    """The next fencing number, taken for a start that begins now."""
    with fence_held(run_folder):
        fence = read_fence(run_folder) + 1
        write_atomically(run_folder / FENCE_FILE, str(fence))
    return fence


@contextmanager
def fence_held(run_folder: Path) -> Iterator[None]:
    """Inside, no other process takes the next number: between a writer's look at it and its rename nobody starts."""
    with (run_folder / f"{FENCE_FILE}.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def checkpoints_to_come(checkpoints: Path, *, keep: int, every: int, steps: int, keep_every: int = 0) -> int:
    """How many a run of so many steps has yet to find room for: no more than it keeps and the one being written, beside
    those that are there, and than it has yet to write. Imported weights are none of those it keeps, and those of every
    `keep_every`-th step stay beside them for good."""
    there = [folder for folder in checkpoint_folders(checkpoints) if step_of(folder)]
    done = step_of(there[0]) if there else 0
    passing, staying = there, 0
    if keep_every:
        passing, spacing = [folder for folder in there if step_of(folder) % keep_every], lcm(every, keep_every)
        staying = steps // spacing - done // spacing
    return max(1, min(keep + 1 - len(passing) + staying, ceil(steps / every) - done // every))


def checkpoint_bytes(parameters: int, averages: int) -> int:
    """Of one, with so many averages of the weights in it."""
    return parameters * (BYTES_PER_PARAMETER + 4 * averages)


def check_space(checkpoints: Path, parameters: int, count: int, averages: int = 0) -> None:
    """Raise InputError when the disk cannot hold so many checkpoints more, with so many averages of the weights in
    each."""
    existing = next(path for path in (checkpoints, *checkpoints.absolute().parents) if path.exists())
    need, free = checkpoint_bytes(parameters, averages) * count, shutil.disk_usage(existing).free
    if need > free:
        raise InputError(
            f"no space left for checkpoints: {count} of them take {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are "
            "free; keep fewer (train.keep_checkpoints, train.keep_every) or free some space",
            where=str(checkpoints),
        )
