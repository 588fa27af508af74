"""Asks a checkout of calculon, in a process and an interpreter of its own; nothing of it is copied or imported here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("calculon_worker.py")


def add_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """`--calculon` and `--calculon-python`."""
    parser.add_argument(
        "--calculon", type=Path, required=required, help="a checkout of github.com/calculon-ai/calculon"
    )
    parser.add_argument("--calculon-python", default="python3", help="an interpreter with its requirements")


def shipped(calculon: Path, kind: str, name: str) -> dict[str, Any]:
    """One of calculon's own files: `systems` or `models`."""
    return dict(json.loads((calculon / kind / f"{name}.json").read_text()))


def ask(calculon: Path, python: str, task: dict[str, Any]) -> Any:
    """The worker's answer to a task. Raises RuntimeError with its last line when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(calculon.resolve()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, str(WORKER)], input=json.dumps(task), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"calculon: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)
