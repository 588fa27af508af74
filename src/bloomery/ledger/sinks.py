"""JSON Lines that survive a crash: what every run leaves. Where else figures go: `trackers`."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT_LINES = 10_000
"""Kept for a file that takes none: hours of steps, a few megabytes."""


class JsonLines:
    """Appends whole lines with one write each, so several processes may share a file and a crash tears nothing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Raises OSError where the disk took less than all of it."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        if self._torn():
            line = b"\n" + line
        if os.write(self._descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _torn(self) -> bool:
        """Whether the file ends within a line, which would take the next one with it: whoever wrote it, a full disk
        may have torn it while this one was open."""
        size = os.fstat(self._descriptor).st_size
        return size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class PatientLines:
    """Lines of a run that goes on while the disk takes none: they are kept, the newest KEPT_LINES of them, and written
    once there is room. Said when it begins and where lines were lost."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be opened."""
        self.path, self._lines = path, JsonLines(path)
        self._kept = deque[dict[str, Any]]()
        self._lost, self._waits = 0, False

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, now or later."""
        self._kept.append(record)
        problem = self._catch_up()
        if len(self._kept) > KEPT_LINES:
            self._kept.popleft()
            self._lost += 1
        if problem and not self._waits:
            _warn(f"{self.path} cannot be written: {problem}; its lines are kept until it can")
        self._waits = problem != ""
        if not problem:
            self._tell_lost()

    def _catch_up(self) -> str:
        """Write what is kept. Returns what was in the way."""
        try:
            while self._kept:
                self._lines.write(self._kept[0])
                self._kept.popleft()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def close(self) -> None:
        """Close the file; what it does not take now is lost."""
        self._catch_up()
        self._lost += len(self._kept)
        self._tell_lost()
        self._lines.close()

    def _tell_lost(self) -> None:
        if self._lost:
            _warn(f"{self.path}: {self._lost} lines that found no room are lost")
        self._lost = 0


def _warn(text: str) -> None:
    with suppress(OSError):  # nor does a terminal that is gone end a run
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Follower:
    """Reads what others append to a file of JSON Lines from now on, whole lines only."""

    def __init__(self, path: Path) -> None:
        self._path, self._rest = path, b""
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """The records since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            content = stream.read()
        self._offset += len(content)
        *whole, self._rest = (self._rest + content).split(b"\n")
        return parse_lines(line.decode(errors="replace") for line in whole)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a file; a torn line or one that is no object is left out, a missing file is empty."""
    # A line may be torn within a character; and text in a record may hold what only looks like the end of a line.
    return parse_lines(path.read_text(encoding="utf-8", errors="replace").split("\n")) if path.exists() else []


def parse_lines(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The records among some lines of JSON; what is no object is left out."""
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
