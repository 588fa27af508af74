"""What a training process is told: one file, `job.json`, written by the command before any process starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bloomery.spec.base import Noun
from bloomery.spec.course import Course, RampStage
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, write_atomically
from bloomery.spec.float8 import Float8
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.reliability import GuardSettings, Supervision
from bloomery.spec.run import Averaging, Optimizer
from bloomery.spec.seal import KEY, sealed_json
from bloomery.spec.stabilisers import Stabilisers

JOB_FILE = "job.json"
STOPPED_BY_SIGNAL = 75
"""Exit code after SIGTERM, SIGUSR1, SIGHUP or Ctrl-C: the step was finished and saved, the same command goes on
(EX_TEMPFAIL)."""
CORRUPTED = 5
"""A training process's exit code when replicas hold different values: a start from the newest checkpoint heals that."""
GAVE_UP = 4
"""A training process's exit code when a start from the same state would end the same way; the command's is 1."""

FIXED = (
    "model",
    "seed",
    "seq_len",
    "global_batch",
    "ramp",
    "steps",
    "optimizer",
    "averaging",
    "kind",
    "document_mask",
    "dtype",
    "float8",
    "stabilisers",
)
"""What a resume takes over unchanged: model, batches, schedule, seed."""
LATER = ("stabilisers", "ramp", "averaging", "float8")
"""Of these, what is no part of the hash where it is not used: checkpoints from before there was any go on."""


LATER_IN_MODEL = ("value_embeddings", "embedding_skip")
"""The same of the model's keys."""


class Job(Noun):
    """One stage of training (pre-training or an alignment stage), every default resolved."""

    name: str
    model: Model
    layout: Layout
    dtype: str
    device: Literal["gpu", "cpu"] = Field(default="gpu", description="of the plan's cluster; gpu: where there are any")
    float8: Float8 = Float8()
    compiled: bool = False
    seed: int
    seq_len: int
    global_batch: int
    ramp: tuple[RampStage, ...] = ()
    steps: int
    optimizer: Optimizer
    averaging: Averaging = Averaging()
    data: str
    heldout: str
    kind: str = "tokens"
    document_mask: bool = False
    initial: str = ""
    initial_hash: str = ""
    data_hash: str = ""
    tokenizer_hash: str = ""
    checkpoint_every: int = 100
    memory_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0
    guard: GuardSettings = GuardSettings()
    supervision: Supervision = Supervision()
    stabilisers: Stabilisers = Stabilisers()
    evaluate_every: int = 0
    heldout_tokens: int = 65_536
    log_every: int = 1
    metrics: tuple[str, ...] = ()
    profile: str = ""
    model_flops: float = 0.0
    ramp_flops: tuple[float, ...] = ()
    peak_flops_per_s: float = 0.0
    mfu_convention: str = ""

    @property
    def course(self) -> Course:
        """The batch and the length of sequences of every step."""
        return Course.of(self.ramp, global_batch=self.global_batch, seq_len=self.seq_len, steps=self.steps)

    def flops_of(self, step: int) -> float:
        """Model FLOPs of one step (0: unknown)."""
        return (*self.ramp_flops, self.model_flops)[self.course.at(step).number]

    def run_hash(self) -> str:
        """The hash of what must not change between a checkpoint and its resume."""
        values = self.model_dump(mode="json", include=set(FIXED))
        for name in LATER:
            if getattr(self, name) == Job.model_fields[name].default:
                del values[name]
        for name in LATER_IN_MODEL:
            if not values["model"][name]:
                del values["model"][name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def changes_since(self, earlier: Job) -> list[str]:
        """The names of what must not change and did, `earlier` being the job that checkpoints were made by; of settings
        that have keys, with the first that differs: a description that leaves it out can say it."""
        names = [
            name + _first_change(getattr(earlier, name), getattr(self, name))
            for name in (*FIXED, "data_hash")
            if getattr(self, name) != getattr(earlier, name)
        ]
        return names + (["starting checkpoint"] if self._starts_elsewhere(earlier) else [])

    def _starts_elsewhere(self, earlier: Job) -> bool:
        """Whether a stage starts from other weights; by its checkpoint's name alone where a job is from before there
        was a hash. A folder may have moved."""
        if self.initial_hash and earlier.initial_hash:
            return self.initial_hash != earlier.initial_hash
        return Path(self.initial).name != Path(earlier.initial).name


def _first_change(before: Any, now: Any) -> str:
    if not isinstance(before, Noun):
        return ""
    keys = (key for key in type(before).model_fields if getattr(before, key) != getattr(now, key))
    return next((f" ({key} {getattr(before, key)}, now {getattr(now, key)})" for key in keys), "")


def read_job(run_dir: Path) -> Job:
    """The job of a stage folder. Raises InputError when there is none."""
    path = run_dir / JOB_FILE
    if not path.is_file():
        raise InputError("no job here; `bloomery train RUN.yaml` writes it", where=str(path))
    values = read_json(path)
    values.pop(KEY, None)
    return Job.checked(values, where=str(path), resolved=True)


def write_job(run_dir: Path, job: Job) -> None:
    """Write the job of a stage folder, sealed."""
    write_atomically(run_dir / JOB_FILE, sealed_json(job.model_dump(mode="json")))
