"""Memory that a process has freed is the system's again once it is given back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from bloomery.cluster.world import READ_AT_IMPORT

HOLES = """
import psutil
from bloomery.train.heap import give_back

resident = lambda: psutil.Process().memory_info().rss >> 20
before = resident()
blocks = [bytearray(b"x" * (1 << 20)) for _ in range(200)]
blocks = blocks[::10]  # what is left lies between the holes
kept = resident()
give_back()
print(kept - before, resident() - before, all(block == b"x" * (1 << 20) for block in blocks))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_holes_of_a_heap_that_is_never_given_back_are_given_back() -> None:
    environment = {**os.environ, "GLIBC_TUNABLES": READ_AT_IMPORT["GLIBC_TUNABLES"]}
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, env=environment)
    kept, left, whole = done.stdout.split()
    assert int(kept) >= 200 and 20 <= int(left) <= 30 and whole == "True"
