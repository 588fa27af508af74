"""Slurm: the batch script, and what sbatch, squeue and scontrol say. Pure text first, commands at the end.

A job that is told to stop ahead of its time limit saves, leaves with code 75 and puts itself back in the queue; Slurm
does so with one whose node fails. Either way the same script goes on from the newest checkpoint. One that was
cancelled, that failed, or that got nothing done is not started again.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomery.cluster.place import PORT
from bloomery.cluster.sites.order import Order, program, require_program
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.job import STOPPED_BY_SIGNAL

_BODY = r"""
# Written by `bloomery launch`. The run as launched is in the files named here; the same script resumes it.
runs=({runs})
folders=({folders})
task=${{SLURM_ARRAY_TASK_ID:-0}}
# The number of an array's last task means all of them.
me=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$task}}
me=${{me:-$SLURM_JOB_ID}}
newest() {{ ls "${{folders[$task]}}/checkpoints" 2>/dev/null | grep '^step_' | sort -V | tail -n 1; }}
before=$(newest)

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" --oneliner | sed -nE 's/.* NodeAddr=([^ ]+).*/\1/p')
case $address in *:*) address="[$address]" ;; esac
# One number for all hosts, so what the smallest has: 2 of `4,2(x3)`.
cores=$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
export BLOOMERY_LAUNCHER=slurm BLOOMERY_JOB=$SLURM_JOB_ID BLOOMERY_REQUEUES=${{SLURM_RESTART_COUNT:-0}}
export BLOOMERY_SUBMITTED={submitted:.0f}

srun --kill-on-bad-exit=1 --cpus-per-task="$cores" --cpu-bind=none \
  bash -c 'exec "$@" --node "$SLURM_NODEID/$SLURM_NNODES"' bloomery \
  {program} train "${{runs[$task]}}" --rendezvous "${{address:-$first}}:$(({port} + SLURM_JOB_ID % 2000))"
code=$?

# Stopped ahead of the time limit ({stopped}), or killed: go on, unless nothing was saved since this job began.
if [ $code -eq {stopped} ] || [ $code -gt 128 ]; then
  state=$(scontrol show job "$me" --oneliner | sed -nE 's/.* JobState=([A-Z]+).*/\1/p')
  if [ "$state" != RUNNING ]; then
    echo "job $me: $state, not put back in the queue" >&2
  elif [ "$(newest)" = "$before" ]; then
    echo "job $me: nothing was saved since it began, not put back in the queue" >&2
  else
    scontrol requeue "$me" || echo "job $me: this site does not requeue; launch it again" >&2
  fi
fi
exit $code
"""


def script(orders: Sequence[Order], log: Path, tasks: Sequence[int] = ()) -> str:
    """The batch script of one run, or of several alike ones as an array. `log`: where its output goes; `tasks`: the
    numbers of those to start, where not all.

    Raises InputError when the runs of an array need different resources.
    """
    one = orders[0]
    needs = {(other.nodes, other.per_node, other.gpus, other.whole, other.run.launch.slurm) for other in orders}
    if len(needs) > 1:
        raise InputError("the runs of one array need the same hosts, accelerators and launch.slurm", where="launch")
    head = [f"#SBATCH {shlex.quote(option)}" for option in _options(orders, log, tasks)]
    body = _BODY.format(
        runs=" ".join(shlex.quote(str(other.description)) for other in orders),
        folders=" ".join(shlex.quote(str(other.folder)) for other in orders),
        program=shlex.join(program()),
        submitted=one.submitted,
        port=PORT,
        stopped=STOPPED_BY_SIGNAL,
    )
    return "\n".join(["#!/bin/bash", *head]) + "\n" + body


def _options(orders: Sequence[Order], log: Path, tasks: Sequence[int]) -> list[str]:
    one = orders[0]
    site = one.run.launch.slurm
    named = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "time": site.time,
        "gpus-per-node": str(one.gpus or ""),
        "cpus-per-task": _cores(one),
        "array": _array(len(orders), tasks),
    }
    return [
        f"--job-name={one.run.name}",
        f"--nodes={one.nodes}",
        "--ntasks-per-node=1",
        *(["--exclusive", "--mem=0"] if one.whole else []),
        *(f"--{name}={value}" for name, value in named.items() if value),
        f"--signal=USR1@{site.notice_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={_literal(log.parent)}/{log.name}",
        f"--chdir={one.folder}",
        *site.options,
    ]


def _literal(folder: Path) -> str:
    """A folder in a name where Slurm replaces % and a letter by numbers of the job."""
    return str(folder).replace("%", "%%")


def _array(count: int, tasks: Sequence[int]) -> str:
    """A number for each run, which it keeps when others of the array are not started."""
    if count == 1:
        return ""
    return ",".join(map(str, tasks)) if 0 < len(tasks) < count else f"0-{count - 1}"


def _cores(one: Order) -> str:
    """On a part of a host: a core for each rank at least, since the task that starts them all would get a single one.

    Nothing where the site's own options say how many.
    """
    told = any(option.startswith("--cpus-per-") for option in one.run.launch.slurm.options)
    return "" if one.whole or told else str(one.per_node)


@dataclass(frozen=True)
class Status:
    """A job as Slurm sees it. `reason`: why it waits. `code`: how it ended, None while it has not."""

    state: str
    reason: str = ""
    code: int | None = None


GOING_ON = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED"}
GOING_ON |= {"RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "RESV_DEL_HOLD", "REQUEUE_FED"}


def read_status(text: str) -> Status:
    """From `scontrol show job --oneliner`. A job that ended without success and without a code counts as 1."""
    fields = dict(word.partition("=")[::2] for word in text.split())
    state = fields.get("JobState", "UNKNOWN")
    if state in GOING_ON:
        reason = fields.get("Reason", "None")
        return Status(state, "" if reason == "None" else reason)
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    left = int(code) or (128 + int(number) if int(number or 0) else 0)
    return Status(state, code=0 if state == "COMPLETED" else left or 1)


def status(job: str) -> Status:
    """What has become of a job. Raises BloomeryError when Slurm does not answer; one it has forgotten is UNKNOWN."""
    done = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True)
    if done.returncode and "Invalid job id" in done.stderr:
        return Status("UNKNOWN", code=1)
    if done.returncode:
        raise BloomeryError(f"scontrol: {_first_line(done.stderr)}")
    return read_status(done.stdout)


def submit(path: Path) -> str:
    """Submit a script. Returns the job's number. Raises BloomeryError with what sbatch says."""
    sbatch = require_program("sbatch", "Slurm")
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise BloomeryError(f"sbatch: {_first_line(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0].removeprefix("sbatch: error: ") if lines else "failed without a word"
