"""Where figures go: JSON Lines that survive a crash, and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends whole lines with one write each, so several processes may share a file and a crash tears nothing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        os.write(self._descriptor, (json.dumps(record, ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a file; a torn line or one that is no object is left out, a missing file is empty."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class TensorBoard:
    """Scalars for TensorBoard; its import is paid only when asked for."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer: Any = EventFileWriter(str(folder))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the numbers among `values` as scalars of `step`."""
        import time

        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in values.items()
            if isinstance(value, int | float) and name != "step"
        ]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=scalars)))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
