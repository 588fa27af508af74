"""Seals: a hash inside a file, or beside files, that one changed bit breaks. What is read back was written so.

Against accidents (disks, copies, memory), not against people: whoever changes a file on purpose can remove its seal.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bloomery.spec.errors import InputError

KEY = "sha256"
"""The key of a JSON object that holds the hash of all the others."""
SUMS_FILE = "SHA256SUMS"
PIECE_BYTES = 1 << 20
_FIRST_LINE = re.compile(r"# sha256 ([0-9a-f]{64}) of the lines below\n")
_LAST_KEY = re.compile(rf'"{KEY}": "[0-9a-f]{{64}}"\s*}}\s*$')
_SUM = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")


def sealed_json(values: Mapping[str, Any]) -> str:
    """The text of a JSON object with a hash of itself, to be read by `spec.files.read_json`."""
    said = json.loads(json.dumps(values))  # as it will be read: keys are text, tuples lists
    return json.dumps({**said, KEY: _hash_of(said)}, ensure_ascii=False, indent=1)


def check_json(values: Mapping[str, Any], where: str) -> None:
    """Raise InputError when an object holds a hash that is not its own; one without a hash passes."""
    if KEY in values and values[KEY] != _hash_of(values):
        raise InputError("changed since it was written: its content does not match its own hash", where=where)


def _hash_of(values: Mapping[str, Any]) -> str:
    said = {key: value for key, value in values.items() if key != KEY}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def sealed_text(text: str) -> str:
    """Text after a comment with its hash: first, so that a file cut short still has it."""
    return f"# sha256 {hashlib.sha256(text.encode()).hexdigest()} of the lines below\n{text}"


def check_text(text: str, where: str) -> None:
    """Raise InputError when the first line is the hash of other lines; text without such a line passes."""
    found = _FIRST_LINE.match(text)
    if found and hashlib.sha256(text[found.end() :].encode()).hexdigest() != found[1]:
        raise InputError("changed since it was written; if on purpose, remove its first line", where=where)


def is_sealed(path: Path) -> bool:
    """Whether a file holds a hash of itself, right or wrong: a run or a build of ours has left it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return bool(_FIRST_LINE.match(text) or _LAST_KEY.search(text))


def sha256_of(path: Path, gets_on: Callable[[], None] = lambda: None) -> str:
    """The hash of a file, read in pieces; after each `gets_on` is called."""
    digest, buffer = hashlib.sha256(), bytearray(PIECE_BYTES)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            gets_on()
    return digest.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write `SHA256SUMS`, which `sha256sum -c` checks too."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in sorted(names)]
    with (folder / SUMS_FILE).open("w", encoding="utf-8") as stream:
        stream.write("".join(lines))
        stream.flush()
        os.fsync(stream.fileno())


def check_sums(folder: Path, names: Iterable[str]) -> None:
    """Check the named files against `SHA256SUMS`. Raises InputError that names the one which changed.

    A folder without the file, and files it does not name, pass: other programs' folders have no such hashes.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
    sums = {found[2]: found[1] for line in lines if (found := _SUM.fullmatch(line))}
    for name in names:
        file = folder / name
        if name in sums and file.is_file() and sha256_of(file) != sums[name]:
            raise InputError(f"content does not match its hash in {SUMS_FILE}", where=str(file))
