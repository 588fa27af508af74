"""SkyPilot: the task's YAML, for a managed job (`sky jobs launch`), started again when machines are lost."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

from bloomery.cluster.place import PORT
from bloomery.cluster.sites.order import Order, require_program, require_shared
from bloomery.spec.catalog import data_sheets_of
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.files import to_yaml, write_atomically
from bloomery.spec.job import STOPPED_BY_SIGNAL
from bloomery.spec.run import Run

ACCELERATORS = {
    "v100-16gb": "V100",
    "v100-32gb": "V100-32GB",
    "v100-pcie-16gb": "V100",
    "v100-pcie-32gb": "V100-32GB",
    "a100-40gb": "A100",
    "a100-80gb": "A100-80GB",
    "a100-pcie-40gb": "A100",
    "a100-pcie-80gb": "A100-80GB",
    "h100-sxm": "H100",
    "h100-pcie": "H100",
    "h200": "H200",
    "b200": "B200",
    "gb200": "GB200",
    "b300": "B300",
    "l40s": "L40S",
    "rtx-4090": "RTX4090",
    "mi300x": "MI300X",
}
"""SkyPilot's names (`sky show-gpus --all`) of the catalog's accelerators."""
SAME_MEMORY = 0.1
"""Memory of one product differs by no more, as a driver and a data sheet tell it; that of its variants does."""
DESCRIBED = "/tmp/bloomery-run.yaml"


def task(one: Order) -> dict[str, Any]:
    """The task. Raises InputError when SkyPilot has no name for the accelerator, or for a folder off the volume."""
    site = one.run.launch.skypilot
    require_shared(one.run, [site.mount])
    train = shlex.join(["bloomery", "train", DESCRIBED])
    return {
        "name": one.run.name,
        "num_nodes": one.nodes,
        "resources": {
            **({"infra": site.infra} if site.infra else {}),
            **({"accelerators": f"{_accelerator(one)}:{one.gpus}"} if one.gpus else {}),
            "image_id": f"docker:{site.image}",
            "use_spot": site.spot,
            "job_recovery": {"recover_on_exit_codes": [STOPPED_BY_SIGNAL]},
        },
        "envs": {
            "BLOOMERY_LAUNCHER": "skypilot",
            "BLOOMERY_JOB": one.run.name,
            "BLOOMERY_SUBMITTED": f"{one.submitted:.0f}",
        },
        **({"volumes": {site.mount: site.volume}} if site.volume else {}),
        "file_mounts": {DESCRIBED: str(one.description)},
        "run": (
            f"cd {shlex.quote(site.mount)}\n"
            f'exec {train} --node "$SKYPILOT_NODE_RANK/$SKYPILOT_NUM_NODES" '
            f'--rendezvous "$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"\n'
        ),
    }


def _accelerator(one: Order) -> str:
    """By its name in the catalog, or by the driver's, which a probed cluster has: `NVIDIA H200`."""
    found = one.run.cluster.accelerator
    if found.name in ACCELERATORS:
        return ACCELERATORS[found.name]
    alike = [
        sheet.name
        for sheet in data_sheets_of(found.name)
        if abs(found.memory_bytes / sheet.memory_bytes - 1) < SAME_MEMORY
    ]
    meant = {ACCELERATORS[name] for name in alike if name in ACCELERATORS}
    if len(meant) != 1:
        problem, where = "SkyPilot has no name for it", "cluster.accelerator"
        raise InputError(problem, where=where, found=found.name, accepted=ACCELERATORS)
    return meant.pop()


def text(one: Order) -> str:
    """The task as YAML."""
    return to_yaml(task(one))


def submit(one: Order) -> Path:
    """Write the task and hand it to SkyPilot. Returns its path. Raises BloomeryError with what sky says."""
    sky = require_program("sky", "SkyPilot")
    path = one.folder / "launch" / "skypilot.yaml"
    one.write_description()
    write_atomically(path, text(one))
    command = [sky, "jobs", "launch", "--yes", "--detach-run", "--name", one.run.name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BloomeryError(f"sky: {(done.stderr.strip() or done.stdout.strip() or 'failed').splitlines()[-1]}")
    return path


def how_to_follow(run: Run) -> str:
    """The command that shows the job's log, the live line in it."""
    return f"sky jobs logs --name {run.name}"
