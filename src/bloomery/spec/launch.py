"""Where a run is started: what a site's scheduler must be told beyond what layout and cluster already say."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from bloomery.spec.base import Noun

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
NO_LIMIT = ("UNLIMITED", "INFINITE")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[\w.,:;@%+*/=|&()\[\]-]*)?")
WRITTEN = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "array", "signal"),
    *("requeue", "no-requeue", "output", "chdir", "open-mode"),
)
"""Options of sbatch that the batch script says itself, and that its ranks, restarts and log rest on."""
_WORD = re.compile(r"[\w/][\w.,:@/+-]*")


def time_limit_s(text: str) -> int:
    """Seconds of a Slurm time: `MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`. Raises ValueError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError("a time is expected, as in 24:00:00, 30 (minutes), 2-12 (days-hours) or UNLIMITED")
    days, *rest = match.groups()
    first, second, third = (int(part) if part else 0 for part in rest)
    if days is not None:
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    if rest[2] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def _time(value: object) -> str:
    """A bare number is minutes, as sbatch has it."""
    text = str(value)
    if text and text not in NO_LIMIT:
        time_limit_s(text)
    return text


def _option(text: str) -> str:
    """An option for a batch script's head: one that could end its line or be expanded would be a command."""
    if not _OPTION.fullmatch(text):
        raise ValueError("an option of sbatch is expected, as in --constraint=h100")
    name = text.removeprefix("--").partition("=")[0]
    ours = next((word for word in WRITTEN if word.startswith(name)), None)  # sbatch takes shortened names
    if ours is not None:
        raise ValueError(f"--{ours} is what bloomery launch itself tells sbatch; any other option is accepted")
    return text


def _word(text: str) -> str:
    if text and not _WORD.fullmatch(text):
        raise ValueError("a plain name is expected")
    return text


Word = Annotated[str, AfterValidator(_word)]


class Slurm(Noun):
    """For `launch --on slurm`; what is empty is left to the site's defaults."""

    partition: Word = ""
    account: Word = ""
    qos: Word = ""
    time: Annotated[str, BeforeValidator(_time)] = Field(default="", description="limit, as sbatch takes it")
    notice_s: int = Field(default=120, ge=10, description="before the limit, to finish the step and save")
    options: tuple[Annotated[str, AfterValidator(_option)], ...] = Field(
        default=(), description="further options of sbatch, as in --constraint=h100"
    )

    @model_validator(mode="after")
    def _time_for_work(self) -> Slurm:
        if self.time and self.time not in NO_LIMIT and time_limit_s(self.time) <= self.notice_s:
            raise ValueError(f"time {self.time} leaves nothing to train in before the notice of {self.notice_s} s")
        return self


class Kubernetes(Noun):
    """For `launch --on kubernetes`: the image, and the claim of the volume that all pods share, mounted at `mount`.

    Relative folders of the description are below `mount`. `topology`: a node label; all pods lie within one value of it
    where the scheduler can. `pod` is laid over the pod's spec: mappings are merged, items of lists by their name.
    """

    kind: Literal["jobset", "trainjob"] = "jobset"
    image: Word = "bloomery:latest"
    claim: Word = "bloomery"
    mount: Word = "/work"
    namespace: Word = ""
    queue: Word = Field(default="", description="Kueue's local queue")
    topology: Word = ""
    runtime: Word = Field(default="torch-distributed", description="Kubeflow's training runtime, for trainjob")
    grace_s: int = Field(default=120, ge=10, description="to finish the step and save")
    restarts: int = Field(default=100, ge=0)
    pod: dict[str, Any] = Field(default={}, description="what else the pods need: nodeSelector, tolerations, ...")

    @model_validator(mode="after")
    def _restarts_are_ours(self) -> Kubernetes:
        """A TrainJob has no field for them: its runtime says how often."""
        usual = type(self).model_fields["restarts"].default
        if self.kind == "trainjob" and self.restarts != usual:
            raise ValueError(f"restarts {self.restarts} with kind trainjob: its runtime says how often, leave it out")
        return self


class SkyPilot(Noun):
    """For `launch --on skypilot`: the image, and the volume that all nodes share, mounted at `mount`.

    SkyPilot has volumes on Kubernetes and RunPod; elsewhere `volume` is empty and the site mounts what is shared.
    """

    infra: Word = ""
    image: Word = "bloomery:latest"
    volume: Word = "bloomery"
    mount: Word = "/work"
    spot: bool = False


class Launch(Noun):
    """Settings by site."""

    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()
    skypilot: SkyPilot = SkyPilot()
