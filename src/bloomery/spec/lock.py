"""One writer per folder: who finds another one there is told which."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bloomery.spec.errors import InputError


@contextmanager
def one_writer(folder: Path, waits: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process if not before. Raises InputError when another process has it.

    `waits`: asked each time the lock is held elsewhere; it lets time pass and returns True to try once more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if waits():
                    continue
            stream.seek(0)
            raise InputError(f"another process ({stream.read().strip()}) writes here", where=str(folder))
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
