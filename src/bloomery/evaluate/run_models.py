"""The models a run folder holds: untrained, pre-trained, and after each alignment stage, as plain modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bloomery.data.tokenizer import Tokenizer, load
from bloomery.model.init import initial_value
from bloomery.model.transformer import Transformer
from bloomery.model.weights import load_weights
from bloomery.spec.catalog import read_run
from bloomery.spec.commit import newest_good
from bloomery.spec.errors import InputError
from bloomery.spec.parameters import all_parameters
from bloomery.spec.run import Run


@dataclass(frozen=True)
class RunFolder:
    """A trained run: its description, tokenizer, and where each stage's checkpoints are, in order."""

    path: Path
    run: Run
    data: Path
    tokenizer: Tokenizer
    stages: dict[str, Path]

    def module(self, stage: str) -> Transformer:
        """The plain model after `stage` (`before`: untrained), in float32, ready to evaluate."""
        module = Transformer(self.run.model)
        if stage == "before":
            table = {parameter.name: parameter for parameter in all_parameters(self.run.model)}
            with torch.no_grad():
                for name, value in module.named_parameters():
                    value.copy_(initial_value(self.run.model, table[name], self.run.train.seed, torch.float32))
        else:
            newest, _ = newest_good(self.stages[stage])
            if newest is None:
                raise InputError("no checkpoint that verifies", where=str(self.stages[stage]))
            load_weights(newest, module)
        return module.eval()

    @property
    def last_stage(self) -> str:
        """The stage one talks to."""
        return list(self.stages)[-1]


def open_run(path: Path) -> RunFolder:
    """Read a run folder. Raises InputError when it is none, or has no checkpoint yet."""
    if not (path / "run.yaml").is_file():
        raise InputError("not a run folder (no run.yaml in it)", where=str(path))
    run = read_run(path / "run.yaml")
    data = Path(run.data.folder) if run.data.folder else path / "data"
    stages = {"pretrain": path / "checkpoints"}
    stages |= {s.name: path / "align" / s.name / "checkpoints" for s in run.align}
    stages = {name: folder for name, folder in stages.items() if folder.is_dir() and any(folder.glob("step_*"))}
    if not stages:
        raise InputError("nothing trained here yet; `bloomery train RUN.yaml` comes first", where=str(path))
    return RunFolder(path, run, data, load(data), stages)
