"""Token shards checked against their hashes at the start of training, as many as a few seconds allow.

Ranks share the files out; which come first is another draw at each start, so that what one leaves out the next may see.
`bloomery data inspect` checks all of them.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path

from bloomery.data.shards import read_manifest
from bloomery.spec.errors import InputError


def spot_check(
    folder: Path, *, within_s: float, seed: int, rank: int, ranks: int, now: Callable[[], float] = time.monotonic
) -> tuple[int, int]:
    """Check this rank's share of a folder's files until `within_s` are over, one at least. Returns how many it checked
    and how many its share has. Raises InputError that names the file whose content changed."""
    files = read_manifest(folder)["files"]
    names = sorted(files)
    random.Random(seed).shuffle(names)
    mine, until = names[rank::ranks], now() + within_s
    for number, name in enumerate(mine):
        if number and now() > until:
            return number, len(mine)
        with (folder / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != files[name]["sha256"]:
                raise InputError("content does not match its hash; build the data again", where=str(folder / name))
    return len(mine), len(mine)
