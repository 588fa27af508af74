"""The example for Slurm's HealthCheckProgram drains a node with a fault, saying why, and leaves good ones alone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[4] / "examples" / "slurm" / "health_check.sh"
FAULT = {"check": "GPUs", "host": "n1", "verdict": "fault", "found": "GPU 3: 2 uncorrected memory errors", "remedy": ""}
BUSY = {"check": "other work", "host": "n1", "verdict": "fault", "found": "60% of the cores used", "remedy": ""}
TAKEN = {"check": "GPU use", "host": "n1", "verdict": "fault", "found": "GPU 0: 70.0 GiB in use", "remedy": ""}
ADVICE = {"check": "disk", "host": "n1", "verdict": "advice", "found": "slow", "remedy": ""}


def drained(folder: Path, findings: list[dict[str, str]], code: int, **variables: str) -> tuple[int, str]:
    """Exit code of the script and what it told Slurm, where the doctor says this."""
    (folder / "report.json").write_text(json.dumps({"findings": findings}))
    for name, body in {
        "bloomery": f'cat "{folder}/report.json"; exit {code}',
        "scontrol": f'echo "$@" > "{folder}/said"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURMD_NODENAME": "n1", **variables}
    done = subprocess.run(["sh", str(SCRIPT)], env=environment, timeout=60)
    said = folder / "said"
    return done.returncode, said.read_text().strip() if said.exists() else ""


def test_a_fault_drains_the_node_with_its_reason(tmp_path: Path) -> None:
    expected = "update NodeName=n1 State=DRAIN Reason=doctor: GPUs: GPU 3: 2 uncorrected memory errors"
    assert drained(tmp_path, [ADVICE, BUSY, FAULT, TAKEN], 1) == (0, expected)


def test_as_a_prolog_it_also_fails(tmp_path: Path) -> None:
    assert drained(tmp_path, [FAULT], 1, DOCTOR_EXIT="1")[0] == 1


@pytest.mark.parametrize(("findings", "code"), [([ADVICE], 0), ([], 2), ([FAULT], 127), ([BUSY, TAKEN], 1)])
def test_a_node_that_is_fit_that_others_use_or_that_could_not_be_examined_is_left_alone(
    tmp_path: Path, findings: list[dict[str, str]], code: int
) -> None:
    assert drained(tmp_path, findings, code) == (0, "")
