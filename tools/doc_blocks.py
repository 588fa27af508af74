"""Keeps the `$ bloomery ...` blocks of documents true: each command is run, and what it prints compared with the lines
below it, or written there (`python tools/doc_blocks.py [--write] FILE.md...`)."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = "100"
BLOCK = re.compile(r"^\$ (?P<command>bloomery [^\n]*)\n.*?(?=^\$ bloomery |^```$)", re.MULTILINE | re.DOTALL)


@cache
def printed(command: str) -> str:
    """What a command prints at the root of the repository, blanks at the ends of lines left out."""
    words = [sys.executable, "-m", "bloomery", *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": COLUMNS, "NO_COLOR": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(f"{command}: exit code {done.returncode}: {done.stderr.strip()}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.strip().splitlines())


def current(text: str) -> str:
    """A document with every block as its command prints it now."""
    return BLOCK.sub(lambda found: f"$ {found['command']}\n{printed(found['command'])}", text)


def main() -> None:
    """Print what differs, exit code 1 when anything does; with --write, make it so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents", nargs="+", type=Path, metavar="FILE.md")
    parser.add_argument("--write", action="store_true", help="write the output of today into the documents")
    asked = parser.parse_args()
    differ = False
    for path in asked.documents:
        before = path.read_text(encoding="utf-8")
        after = current(before)
        if asked.write:
            path.write_text(after, encoding="utf-8")
            continue
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), str(path), "printed now", lineterm="")
        shown = "\n".join(lines)
        differ |= bool(shown)
        print(shown or f"{path}: current")
    sys.exit(differ)


if __name__ == "__main__":
    main()
