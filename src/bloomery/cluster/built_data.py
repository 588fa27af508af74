"""What a stage asks of a data build before it starts: whole, of the text that the run names, made by one tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bloomery.data.origin import check_one_build, check_tokenizer, other_files, other_pairs, other_text
from bloomery.data.pairs import PairDataset
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json
from bloomery.spec.run import Run


def require_pairs(run: Run, folder: Path, data: Path) -> None:
    """Raise InputError unless `data`, of the run in `folder`, has pairs that its description asks for
    and its model can be trained on."""
    if not (data / "report.json").is_file():
        raise InputError("no finished data build here; `bloomery data build RUN.yaml` makes one", where=str(data))
    check_tokenizer(folder, data)
    _require_same_origin(run, data)
    if not (data / "pairs" / "manifest.json").is_file():
        problem = (
            "no prompt-response pairs: none could be made from the text; name a file in align.0.pairs and build again"
        )
        raise InputError(problem, where=str(data))
    PairDataset(data / "pairs", seq_len=run.train.seq_len, seed=0)


def _require_same_origin(run: Run, data: Path) -> None:
    """Raise InputError when shards and pairs were built from something else than the run's description names."""
    origin = _origin(data)
    text, pairs = other_text(origin, run.data), other_pairs(origin, run.align[0]) if run.align else ""
    if text or pairs:
        raise _built_from_other(f"{'text' if text else 'pairs'} ({text or pairs})", data)


def require_today_s_text(run: Run, data: Path) -> None:
    """Raise InputError when the files that the run's description names have changed since the shards were built of
    them. A run that goes on asks for the shards it began with instead, whatever became of their text."""
    change = other_files(_origin(data), run.data)
    if change:
        raise _built_from_other(f"text ({change})", data)


def _origin(data: Path) -> dict[str, Any]:
    path = data / "report.json"
    return read_json(path).get("origin", {}) if path.is_file() else {}


def _built_from_other(what: str, data: Path) -> InputError:
    return InputError(f"built from other {what}; `bloomery data build RUN.yaml` builds it again", where=str(data))


def require_data(run: Run, data: Path) -> None:
    """Raise InputError unless `data` is a finished build of this run's text that its model can read, held-out text
    included."""
    if not (data / "report.json").is_file() or not (data / "train" / "manifest.json").is_file():
        raise InputError("no token shards here; `bloomery data build RUN.yaml` makes them", where=str(data))
    _require_same_origin(run.model_copy(update={"align": ()}), data)
    check_one_build(data)
    used = int(read_json(data / "report.json").get("vocab_used", 0))
    if used > run.model.vocab:
        problem = f"its tokenizer has {used} tokens, the model {run.model.vocab}; lower data.vocab and build again"
        raise InputError(problem, where=str(data))
    for part in ("train", "heldout"):
        tokens = int(read_json(data / part / "manifest.json").get("tokens", 0))
        if tokens <= run.train.seq_len:
            remedy = "name more text" if part == "train" else "raise data.holdout or name more text"
            problem = f"{tokens} tokens are too few for train.seq_len {run.train.seq_len}; {remedy}"
            raise InputError(problem, where=str(data / part))


def manifest_hash(folder: Path) -> str:
    """The hash of the token shards, from their manifest. Raises InputError when there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError("no token shards here; `bloomery data build RUN.yaml` makes them", where=str(folder))
    return str(read_json(path)["content_hash"])
