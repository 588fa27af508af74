"""Where alignment stages live and what each starts from: the newest good checkpoint of the one before.

Supervised fine-tuning is the same step loop over prompt-response pairs: only the response counts in the loss, so it
differs from pre-training by its data alone (`bloomery.data.pairs`).
"""

from __future__ import annotations

from pathlib import Path

from bloomery.spec.commit import newest_good
from bloomery.spec.errors import InputError


def stage_folder(run_dir: Path, stage: str) -> Path:
    """The folder of one stage; it holds the same files as the run itself."""
    return run_dir / "align" / stage


def starting_point(run_dir: Path, stages: list[str], number: int) -> Path:
    """The checkpoint that stage `number` starts from. Raises InputError when it is not there yet."""
    before = run_dir if number == 0 else stage_folder(run_dir, stages[number - 1])
    checkpoint, _ = newest_good(before / "checkpoints")
    if checkpoint is None:
        raise InputError("no checkpoint to start from; `bloomery train RUN.yaml` comes first", where=str(before))
    return checkpoint
