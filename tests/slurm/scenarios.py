"""Tiny runs launched on a private Slurm, and what became of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import runs
import yaml
from private_slurm import Slurm

NODE = {
    "name": "two-nodes",
    "nodes": 2,
    "accelerators_per_node": 1,
    "accelerator": "cpu-core-guess",
    "tiers": [{"name": "gloo", "span": 2, "bandwidth_bytes_per_s": 1e9, "ports_per_node": 1, "latency_s": 1e-4}],
    "failures_per_1000_node_days": 0,
}
"""Two hosts with a rank each."""


PATIENT = {"hang_floor_s": 120.0}
"""A busy machine is not hung."""


class Scenario:
    """Runs below one folder, their data made once. A run takes some ten seconds: time to disturb it."""

    def __init__(self, folder: Path, site: Slurm, steps: int = 120) -> None:
        self.base, self.site, self.steps = folder, site, steps
        self.environment = {**site.environment, "OMP_NUM_THREADS": "1"}
        self.data = runs.make_data(folder)

    def described(self, name: str) -> Path:
        """The description of a run."""
        return self.base / f"{name}.yaml"

    def describe(self, name: str, **train: object) -> Path:
        """Write one."""
        settings = {"steps": self.steps, "checkpoint_every": 10, "global_batch": 32, "supervision": PATIENT, **train}
        values = runs.describe(self.base, name, self.data, {"dp": 2}, **settings).model_dump(mode="json")
        values["cluster"] = NODE
        path = self.described(name)
        path.write_text(yaml.safe_dump(values))
        return path

    def bloomery(self, *arguments: object) -> list[str]:
        """The console program."""
        return [sys.executable, "-m", "bloomery", *map(str, arguments)]

    def call(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Call it in the site's environment."""
        return subprocess.run(self.bloomery(*arguments), capture_output=True, text=True, env=self.environment)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Call it and do not wait."""
        return subprocess.Popen(
            self.bloomery(*arguments), stderr=subprocess.PIPE, text=True, env=self.environment,
            # A job in a shell's background is deaf to Ctrl-C, and hands that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def train(self, name: str, **train: object) -> None:
        """Train a run here, without a scheduler."""
        done = self.call("train", self.describe(name, **train))
        assert done.returncode == 0, done.stderr

    def launch(self, name: str, *options: str, **train: object) -> str:
        """Describe and launch a run. Returns the job's number."""
        done = self.call("launch", self.describe(name, **train), "--on", "slurm", "--json", *options)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["job"])

    def printed(self, name: str, *options: str, **train: object) -> Path:
        """The script that would be submitted, in a file."""
        done = self.call("launch", self.describe(name, **train), "--on", "slurm", "--print", *options)
        assert done.returncode == 0, done.stderr
        path = self.base / f"{name}.sh"
        path.write_text(done.stdout)
        return path

    def submit(self, script: Path) -> str:
        """By sbatch itself."""
        return self.site.call("sbatch", "--parsable", str(script)).strip()

    def folder(self, name: str) -> Path:
        """Where a run lives."""
        return self.base / "runs" / name

    def log(self, name: str, job: str) -> str:
        """What a job printed."""
        path = self.folder(name) / "launch" / f"{job}.log"
        return path.read_text() if path.exists() else "no log"

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """A run's incidents of one kind."""
        return runs.events(self.folder(name), kind)

    def losses(self, name: str) -> dict[int, float]:
        """Loss by step."""
        return runs.losses(self.folder(name))

    def bits(self, name: str) -> str:
        """One hash over what a run ended with."""
        return runs.final_bits(self.folder(name))

    def reached(self, name: str, step: int) -> None:
        """Wait until a run has taken a step."""
        self.site.wait(lambda: max(self.losses(name), default=0) >= step, f"step {step} of {name}")
