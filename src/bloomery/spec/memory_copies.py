"""Where a run's copies of its state in the host's memory are. Torch-free: the supervisor clears them.

They belong to the host, not to a process, so they outlive the ranks and whoever supervises them: only losing the host
loses them. A folder of the memory file system that is the user's alone; its name comes from the run's folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from bloomery.spec.commit import checkpoint_bytes
from bloomery.spec.errors import InputError

MEMORY = Path("/dev/shm")
AT_ONCE = 2
"""Copies that exist at a time: the newest whole one and the one being made."""


def copies_folder(run_folder: Path) -> Path:
    """The folder of a run's copies."""
    name = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:16]
    return MEMORY / f"bloomery-{os.getuid()}-{name}"


def own_folder(folder: Path) -> None:
    """Make the folder, for this user alone. Raises OSError when somebody else has made one of that name."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if folder.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise OSError(f"{folder} is not this user's alone")


def forget_copies(run_folder: Path) -> None:
    """Give their memory back."""
    shutil.rmtree(copies_folder(run_folder), ignore_errors=True)


def check_memory(parameters: int, run_folder: Path, *, averages: int = 0) -> None:
    """Raise InputError when the memory file system cannot hold the copies of so many parameters; those that the run has
    already are written over. `averages`: running averages of the weights."""
    if not MEMORY.is_dir():
        raise InputError(f"copies in memory need {MEMORY}; 0 makes none", where="train.memory_every")
    held = sum(file.stat().st_size for file in copies_folder(run_folder).glob("copy_*/*"))
    need = checkpoint_bytes(parameters, averages) * AT_ONCE
    free = shutil.disk_usage(MEMORY).free + held
    if need > free:
        problem = f"copies in memory take {need / 1e6:,.1f} MB, {MEMORY} has {free / 1e6:,.1f} MB free; 0 makes none"
        raise InputError(problem, where="train.memory_every")
