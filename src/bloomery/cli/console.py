"""What every verb shares at the terminal: one console, JSON out, one line and an exit code for errors."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bloomery.spec.errors import BloomeryError, InputError, nearest_match

WRONG_PLACE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
"""Errors of the system that the user puts right by naming another file or folder, or by making room: wrong input."""


def print_json(value: Any) -> None:
    """One JSON document on standard output, for programs: a whole one or none, escaped where the encoding is not UTF-8.

    Raises InputError for what JSON has no number for.
    """
    whole = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    try:
        text = json.dumps(value, ensure_ascii=not whole, indent=1, allow_nan=False)
    except ValueError:
        raise InputError("a figure is beyond all numbers: a price, a size or a rate given is out of range") from None
    sys.stdout.write(text + "\n")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn our own errors into `error: ...` on standard error and their exit code; others keep their traceback."""
    try:
        yield
    except BloomeryError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped by the user; nothing half-written is taken for good", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"error: {name}{(error.strerror or str(error)).lower()}", file=sys.stderr)
        raise SystemExit(2 if error.errno in WRONG_PLACE else 1) from None


def warn(lines: Iterable[str]) -> None:
    """Remarks on standard error, where they do not mix with what a program reads."""
    for line in lines:
        print(f"note: {line}; passed over", file=sys.stderr)


def require_names(names: Iterable[str], option: str) -> None:
    """Refuse an empty name, as of a shell's variable that is not set: it would mean the folder one is in."""
    if not all(names):
        raise InputError("a file or folder is expected, this name is empty", where=option, found="")


def require_run(run_dir: Path) -> None:
    """Refuse a folder that is no run before anything heavy is imported."""
    if not run_dir.is_dir():
        beside = [file.parent.name for file in run_dir.absolute().parent.glob("*/run.yaml")]
        raise InputError("no such run folder", where=str(run_dir), nearest=nearest_match(run_dir.name, beside))
    if not (run_dir / "run.yaml").is_file():
        raise InputError("not a run folder (no run.yaml in it)", where=str(run_dir))


def run_to_its_end(*arguments: str) -> int:
    """Run `bloomery ARGUMENTS` in a process of its own; its exit code. A terminal's Ctrl-C reaches that one too: it
    finishes its step and saves, and is waited for (`subprocess.run` would kill it after a quarter of a second)."""
    import subprocess
    import sys

    process = subprocess.Popen([sys.executable, "-m", "bloomery", *arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
