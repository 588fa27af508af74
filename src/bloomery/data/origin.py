"""What token shards were built from, and whether a description still asks for the same.

Nothing is said of builds and runs from before this was kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bloomery.data.readers import Account, default_sources, shown, text_files
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json
from bloomery.spec.job import JOB_FILE
from bloomery.spec.run import AlignStage, Data
from bloomery.spec.seal import sha256_of

DECISIVE = ("vocab", "max_bytes", "holdout", "shard_tokens", "min_characters")
"""What of a description, besides the text, decides the shards."""

TOKENIZER = "tokenizer.json"
"""As `data.tokenizer` has it, whose library takes long to load."""

MADE_PAIRS = 4000
"""So many pairs made from the text are kept unless more or fewer are asked for."""


def pair_limit(max_pairs: int | None, pairs_file: str) -> int | None:
    """The most pairs that are kept: all that the user gives, unless a number is said."""
    return max_pairs or (None if pairs_file else MADE_PAIRS)


def sources_of(data: Data) -> list[Path]:
    """Where the text lies. Raises InputError for an empty name, which would be the folder that this runs in."""
    if not all(data.text):
        raise InputError("a folder or file of text is expected, this name is empty", where="data.text", found="")
    return [Path(text).expanduser() for text in data.text] or default_sources()


def origin_of(
    data: Data, files: Iterable[Path], *, described: bool, pairs_file: str, max_pairs: int | None, seq_len: int
) -> dict[str, Any]:
    """What the report keeps. `described`: False where the text was named for this build alone, by no description."""
    return {
        **{name: getattr(data, name) for name in DECISIVE},
        **said_of(data, described=described),
        "listing": _listing(files),
        "pairs": pairs_file,
        "pairs_hash": sha256_of(Path(pairs_file)) if pairs_file else "",
        "max_pairs": max_pairs,
        "seq_len": seq_len,
    }


def said_of(data: Data, *, described: bool) -> dict[str, Any]:
    """How the text is named: None where no description does."""
    return {"text": [shown(name) for name in data.text] if described else None, "places": _places(data.text)}


def other_text(origin: dict[str, Any], data: Data) -> str:
    """How the text that a description names differs from what was built; empty: it does not.

    A description that names a folder of shards and no text takes what is there.
    """
    if not origin or (data.folder and not data.text):
        return ""
    for name in DECISIVE:
        if origin[name] != getattr(data, name):
            return f"data.{name} {origin[name]}, now {getattr(data, name)}"
    built = origin["text"]
    if built is None or built == list(data.text) or origin["places"] == _places(data.text):
        return ""
    if data.text and _listing_of(data) == origin["listing"]:
        return ""  # the same files in another place
    own = "this machine's own"
    return f"data.text {', '.join(built) or own}, now {', '.join(data.text) or own}"


def other_files(origin: dict[str, Any], data: Data) -> str:
    """How the files of the text that a description names differ from those built, which were named the same; empty:
    they do not, or are not here."""
    if not origin or not data.text or origin["text"] is None or _listing_of(data) in ("", origin["listing"]):
        return ""
    return f"data.text {', '.join(data.text)} holds other files now"


def other_shards(origin: dict[str, Any], data: Data) -> str:
    """Why a build of today would give other shards than those of an earlier one; empty: it would not."""
    if not origin:
        return ""
    for name in DECISIVE:
        if origin[name] != getattr(data, name):
            return f"data.{name} {origin[name]}, now {getattr(data, name)}"
    return "" if _listing_of(data) in ("", origin["listing"]) else "of other text"


def other_pairs(origin: dict[str, Any], stage: AlignStage) -> str:
    """How the pairs that a description's first alignment stage names differ from those built; empty: they do not."""
    if not origin:
        return ""
    kept, wanted = origin["max_pairs"], pair_limit(stage.max_pairs, stage.pairs)
    if kept != wanted and bool(origin["pairs"]) == bool(stage.pairs):
        return f"align.0.max_pairs {kept or 'null'}, now {wanted or 'null'}"
    built, named = origin["pairs"], stage.pairs
    if built and named and Path(named).is_file():
        if sha256_of(Path(named)) == origin["pairs_hash"]:
            return ""
        return f"align.0.pairs {named} has another content now"
    made = "made from the text"
    return "" if _places([built]) == _places([named]) else f"align.0.pairs {built or made}, now {named or made}"


def tokenizer_hash(folder: Path) -> str:
    """The hash of a data folder's tokenizer; empty where there is none."""
    path = folder / TOKENIZER
    return sha256_of(path) if path.is_file() else ""


def check_tokenizer(run_dir: Path, folder: Path) -> None:
    """Raise InputError when the tokenizer of a data folder is not the one that a run was trained with."""
    path = run_dir / JOB_FILE
    known = str(read_json(path).get("tokenizer_hash", "")) if path.is_file() else ""
    if known and tokenizer_hash(folder) not in ("", known):
        problem = "not the tokenizer this run was trained with: the data were built again"
        remedy = "`bloomery data build --fresh` of this run makes it again from the same text"
        raise InputError(f"{problem}; {remedy}, `bloomery train --fresh` starts over", where=str(folder / TOKENIZER))


def check_one_build(folder: Path) -> None:
    """Raise InputError when report, shards and tokenizer of a data folder are not of one build. Those from before the
    tokenizer's hash was kept pass."""
    there = tokenizer_hash(folder)
    for name in ("report.json", "train/manifest.json", "heldout/manifest.json"):
        path = folder / name
        made_with = str(read_json(path).get("tokenizer", "")) if path.is_file() else ""
        if made_with and there and made_with != there:
            raise InputError("made with another tokenizer than the one there; build the data again", where=str(path))


def _places(names: Iterable[str]) -> list[str]:
    return sorted(shown(Path(name).expanduser().absolute()) if name else "" for name in names)


def _listing(files: Iterable[Path]) -> str:
    """A hash of the files' names and sizes, wherever their folder is."""
    found = sorted((file.name, file.stat().st_size) for file in files if file.is_file())
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _listing_of(data: Data) -> str:
    """The listing of the text that a description names; empty where that is not here."""
    try:
        return _listing(text_files(sources_of(data), Account()))
    except InputError:
        return ""
