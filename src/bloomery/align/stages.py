"""Where alignment stages live and what each starts from: the newest good checkpoint of the one before.

Supervised fine-tuning is the same step loop over prompt-response pairs: only the response counts in the loss, so it
differs from pre-training by its data alone (`bloomery.data.pairs`).
"""

from __future__ import annotations

from pathlib import Path

from bloomery.data.tokenizer import ASSISTANT, TOKENIZER_FILE, USER, load
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


def require_turns(data: Path) -> None:
    """Raise InputError when the tokenizer of `data` cannot mark who speaks (one of an imported model).

    New tokens would need rows in the model's embedding that nothing has trained, so none are added.
    """
    if (data / TOKENIZER_FILE).is_file() and not load(data).has_turns:
        problem = "fine-tuning needs a tokenizer with the tokens that mark turns; that of an imported model has none"
        raise InputError(problem, where=str(data / TOKENIZER_FILE), accepted=[USER, ASSISTANT])
