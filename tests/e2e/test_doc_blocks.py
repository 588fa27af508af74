"""The documents show what the commands print today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["budget", "design"])
def test_the_blocks_of_the_documents_are_current(name: str) -> None:
    documents = [f"docs/{name}.md", f"docs/{name}.zh-CN.md"]
    command = [sys.executable, "tools/doc_blocks.py", *documents]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(['tools/doc_blocks.py --write', *documents])}\n{done.stdout}{done.stderr}"
