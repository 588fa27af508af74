"""The rules of the house that no linter knows: file and function length, names without a job, nothing unpickled."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
NO_JOB = {"utils", "util", "helpers", "helper", "misc", "common"}
UNSAFE_CALLS = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("torch", "load"),
    ("yaml", "unsafe_load"),
    ("dist", "broadcast_object_list"),
    ("dist", "all_gather_object"),
}
ROOT = Path(__file__).resolve().parent.parent


def problems(path: Path) -> Iterator[str]:
    """What is wrong with one source file, as `file:line: text`."""
    text = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT)
    lines = text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{where}:1: {lines} lines, at most {MAX_FILE_LINES}"
    if path.stem in NO_JOB:
        yield f"{where}:1: a room without a job; name the file after what it does"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{where}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            call = (node.func.value.id, node.func.attr)
            if call in UNSAFE_CALLS:
                yield f"{where}:{node.lineno}: {'.'.join(call)} can execute what it reads"


def main() -> None:
    """Print every problem; exit 1 when there is one."""
    files = sorted((ROOT / "src").rglob("*.py"))
    found = [problem for path in files for problem in problems(path)]
    print("\n".join(found) or f"house: {len(files)} files in order")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
