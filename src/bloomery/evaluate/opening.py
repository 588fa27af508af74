"""Opening a run folder for use: its description, its tokenizer, its stages' checkpoints, a stage as a plain model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bloomery.data.origin import check_tokenizer
from bloomery.data.tokenizer import Tokenizer
from bloomery.data.tokenizer import load as load_tokenizer
from bloomery.model.init import initial_value
from bloomery.model.transformer import Transformer
from bloomery.model.weights import load_weights
from bloomery.spec.catalog import read_run
from bloomery.spec.commit import imported_checkpoint, newest_good
from bloomery.spec.errors import BloomeryError, InputError, nearest_match
from bloomery.spec.files import read_json
from bloomery.spec.job import JOB_FILE
from bloomery.spec.parameters import all_parameters
from bloomery.spec.run import Run

BEFORE, PRETRAIN = "before", "pretrain"


@dataclass(frozen=True)
class OpenRun:
    """A run folder: what it says, where its data lies, and the newest good checkpoint of each stage in their order.

    `skipped` has a line for each newer checkpoint that did not verify.
    """

    folder: Path
    run: Run
    data: Path
    stages: dict[str, Path]
    skipped: tuple[str, ...] = ()

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer. Raises InputError when its data folder is gone or was built anew with another one."""
        check_tokenizer(self.folder, self.data)
        return load_tokenizer(self.data)

    @property
    def was_trained_here(self) -> bool:
        """Whether pre-training began from an untrained model; that of an imported one, if any, did not."""
        return (self.folder / JOB_FILE).is_file() and imported_checkpoint(self.folder / "checkpoints") is None

    def last_stage(self) -> str:
        """The stage furthest along. Raises InputError when nothing was trained."""
        if not self.stages:
            problem = (
                f"no checkpoint that verifies ({self.skipped[0]})"
                if self.skipped
                else "no checkpoint here: train first"
            )
            raise InputError(problem, where=str(self.folder))
        return list(self.stages)[-1]

    def model(self, stage: str = "", *, device: str = "") -> Transformer:
        """A stage as a plain float32 model: `before` is the untrained initialisation, empty the last stage."""
        stage = stage or self.last_stage()
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        module = Transformer(self.run.model)
        if stage == BEFORE:
            initialise(module, self.run.train.seed, self.run.train.optimizer.start_scale(module.model.hidden))
        elif stage in self.stages:
            self._load(self.stages[stage], module)
        else:
            accepted = [BEFORE, *self.stages]
            raise InputError(
                "no such stage", where="--stage", found=stage, accepted=accepted, nearest=nearest_match(stage, accepted)
            )
        return module.to(where).eval()

    def _load(self, chosen: Path, module: Transformer) -> None:
        """Fill the model from the checkpoint that was chosen; where a run that still trains has removed it since, from
        the newest there is now."""
        try:
            load_weights(chosen, module)
        except (BloomeryError, OSError):
            if chosen.is_dir():
                raise
            found, _ = newest_good(chosen.parent)
            if found is None:
                raise InputError("removed meanwhile, and no other checkpoint is left", where=str(chosen)) from None
            load_weights(found, module)


def reads_turns(stage: str, tokenizer: Tokenizer) -> bool:
    """Whether a stage's model has read the marks of who speaks, here or before it came here, and its tokenizer has
    them."""
    return tokenizer.has_turns and (stage != PRETRAIN or tokenizer.ends.turns)


def initialise(module: Transformer, seed: int, start_scale: float = 1.0) -> None:
    """The weights training started from."""
    table = {parameter.name: parameter for parameter in all_parameters(module.model)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(module.model, table[name], seed, torch.float32, start_scale))


def open_run(folder: str | Path) -> OpenRun:
    """Open a run folder. Raises InputError when it is none; a stage without a good checkpoint is left out."""
    folder = Path(folder)
    path = folder / "run.yaml"
    if not path.is_file():
        near = nearest_match(folder.name, _names_beside(folder))
        raise InputError("no run here: run.yaml is missing", where=str(folder), nearest=near)
    run = read_run(path)
    stages, skipped = dict[str, Path](), list[str]()
    places = {PRETRAIN: folder, **{name: folder / "align" / name for name in stage_names(folder, run)}}
    for name, place in places.items():
        found, passed_over = newest_good(place / "checkpoints")
        skipped += passed_over
        if found is not None:
            stages[name] = found
    return OpenRun(folder, run, _data_folder(folder, run), stages, tuple(skipped))


def stage_names(folder: Path, run: Run) -> list[str]:
    """Alignment stages with a folder: in the order the run names them, then any others by name."""
    there = sorted(path.name for path in (folder / "align").glob("*") if path.is_dir())
    named = [stage.name for stage in run.align if stage.name in there]
    return named + [name for name in there if name not in named]


def _data_folder(folder: Path, run: Run) -> Path:
    """Where the token shards are; the job knows best when the run was started from another place."""
    plain = Path(run.data.folder) if run.data.folder else folder / "data"
    job = folder / JOB_FILE
    if plain.is_dir() or not job.is_file():
        return plain
    return Path(str(read_json(job).get("data", plain))).parent


def _names_beside(folder: Path) -> list[str]:
    parent = folder.parent
    return [path.name for path in parent.iterdir() if (path / "run.yaml").is_file()] if parent.is_dir() else []
