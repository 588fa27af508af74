"""What the batch script does, under commands of Slurm's that only write down what they are asked."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bloomery.cluster.hostfile import Host
from bloomery.cluster.sites import slurm, ssh
from bloomery.cluster.sites.order import Order, order
from bloomery.spec.catalog import read_run
from bloomery.spec.job import STOPPED_BY_SIGNAL

ROOT = Path(__file__).parents[3]
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$ASKED"
case "$1 $2 $3" in
  "show hostnames "*) printf 'n1\\nn2\\n' ;;
  "show node "*) echo "NodeName=$3 NodeAddr=$ADDRESS NodeHostName=$3" ;;
  "show job "*_*) echo "JobId=7 JobState=RUNNING Reason=None" ;;
  "show job "*) for _ in $(seq "$TASKS"); do echo "JobId=7 JobState=RUNNING Reason=None"; done ;;
esac
"""
SRUN = f"""#!/bin/bash
echo "srun $*" >> "$ASKED"
mkdir -p "$SAVED/checkpoints/step_000010"
exit {STOPPED_BY_SIGNAL}
"""


def alike(tmp_path: Path, runs: int) -> list[Order]:
    """Runs on two hosts that differ in their names."""
    fixed = ["cluster.nodes=2", "layout={tp: 8, dp: 2}", f"out={tmp_path}"]
    one = order(read_run(ROOT / "examples" / "llama3-8b.yaml", fixed), None)
    return [replace(one, run=one.run.model_copy(update={"name": f"r{number}"})) for number in range(runs)]


def asked(tmp_path: Path, runs: int, address: str = "10.0.0.1", **variables: str) -> str:
    """What the script of so many runs asks of Slurm, when each is stopped after a checkpoint."""
    orders = alike(tmp_path, runs)
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    number = int(variables.get("SLURM_ARRAY_TASK_ID", "0"))
    ours = {"ASKED": str(tmp_path / "asked"), "ADDRESS": address, "TASKS": str(runs)}
    ours |= {"SAVED": str(orders[number].folder), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "4(x2)", **variables}
    text = slurm.script(orders, tmp_path / "log")
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env={**ours, **job})
    assert done.returncode == STOPPED_BY_SIGNAL and not done.stderr, done.stderr
    return (tmp_path / "asked").read_text()


def test_the_last_task_of_an_array_asks_for_itself_alone(tmp_path: Path) -> None:
    """Its job has the array's own number, by which Slurm means every task."""
    text = asked(tmp_path, 3, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert "scontrol requeue 7_2\n" in text and "scontrol requeue 7\n" not in text


def test_a_job_of_one_run_is_put_back_by_its_number(tmp_path: Path) -> None:
    assert "scontrol requeue 7\n" in asked(tmp_path, 1)


@pytest.mark.parametrize(("cores", "least"), [("4,2(x3)", 2), ("16(x2),128", 16), ("8", 8)])
def test_hosts_of_different_sizes_are_asked_for_what_the_smallest_has(tmp_path: Path, cores: str, least: int) -> None:
    assert f"--cpus-per-task={least} " in asked(tmp_path, 1, SLURM_JOB_CPUS_PER_NODE=cores, SLURM_CPUS_ON_NODE="99")


@pytest.mark.parametrize(("address", "named"), [("10.0.0.1", "10.0.0.1"), ("2001:db8::1", "[2001:db8::1]")])
def test_a_host_is_named_so_that_its_port_can_be_told(tmp_path: Path, address: str, named: str) -> None:
    assert f"--rendezvous {named}:" in asked(tmp_path, 1, address)


def test_by_ssh_too(tmp_path: Path) -> None:
    one, _ = alike(tmp_path, 2)
    (command, _) = ssh.commands(one, [Host("me@far", address="2001:db8::1"), Host("near")])
    assert "--rendezvous '[2001:db8::1]:29400'" in command[-1]
