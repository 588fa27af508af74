"""Weights that were imported to a run's folder: training starts from them, for their model alone. No torch."""

from __future__ import annotations

from pathlib import Path

from bloomery.spec.catalog import read_run
from bloomery.spec.commit import checkpoint_folders, imported_checkpoint, read_commit
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.model import Model
from bloomery.spec.parameters import all_parameters


def check_imported(folder: Path, model: Model) -> None:
    """Raise InputError when the weights that were imported to `folder`, if any, are of another model, or damaged.

    Their description tells what their shapes do not: positions, norms, a window. Files are read whole only while
    training has yet to leave them.
    """
    checkpoint, described = imported_checkpoint(folder / "checkpoints"), folder / "run.yaml"
    if checkpoint is None:
        return
    shapes = {parameter.name: tuple(parameter.shape) for parameter in all_parameters(model)}
    untrained = checkpoint_folders(folder / "checkpoints")[0] == checkpoint
    try:
        stored = {name: record.shape for name, record in read_commit(checkpoint, verify=untrained).tensors.items()}
    except BloomeryError as error:
        raise InputError(f"the imported weights are damaged; import them again: {error}", where=str(folder)) from None
    if shapes != stored or (described.is_file() and not _same(read_run(described).model, model)):
        problem = "the weights imported here are of another model; give your run another name"
        raise InputError(problem, where=str(folder))


def _same(one: Model, other: Model) -> bool:
    """Whether weights of one model are the other's, whatever it is called and however it would have started."""
    said = {"name": "", "source": "", "init": "gpt2"}
    return one.model_copy(update=said) == other.model_copy(update=said)
