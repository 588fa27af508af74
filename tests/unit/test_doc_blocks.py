"""What a document says a command prints is what it prints, or is told and can be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "doc_blocks.py"
DOCUMENT = """Before.

```
$ bloomery catalog failures
an old table
```

```
$ nvidia-smi
not ours
```
"""


def doc_blocks(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_stale_block_is_told_and_written_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    found = doc_blocks(path)
    assert found.returncode == 1
    assert "-an old table" in found.stdout and "+failures" in found.stdout
    assert path.read_text(encoding="utf-8") == DOCUMENT
    assert doc_blocks("--write", path).returncode == 0
    written = path.read_text(encoding="utf-8")
    head, rest = DOCUMENT.split("an old table")
    assert written.startswith(f"{head}failures\n") and written.endswith(f"\n{rest.lstrip()}")
    assert doc_blocks(path).returncode == 0


def test_a_command_that_fails_is_named_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("```\n$ bloomery catalog nothing\nold\n```\n", encoding="utf-8")
    found = doc_blocks("--write", path)
    assert found.returncode == 1 and "bloomery catalog nothing: exit code 2" in found.stderr
    assert "old" in path.read_text(encoding="utf-8")
