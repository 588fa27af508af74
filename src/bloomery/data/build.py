"""Corpus to clean documents to tokens to packed shards, with an account of what was dropped and why.

Held-out documents are set apart first: neither shards nor pairs to train on hold any of them, though the tokenizer has
seen some. A finished build of the same text under the same settings is used again. An interrupted one leaves nothing
that loads: `report.json` is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bloomery.data import pairs as pair_files
from bloomery.data.corpus import (
    Progress,
    evenly,
    pieces,
    place,
    read_corpus,
    split,
    text_bytes,
    unfit,
)
from bloomery.data.origin import check_one_build, origin_of, pair_limit, said_of, sources_of, tokenizer_hash
from bloomery.data.readers import SUFFIXES, Account, Document, read_documents, shown, some, text_files
from bloomery.data.shards import verify, write_tokens
from bloomery.data.tokenizer import TOKENIZER_FILE, Tokenizer, load, train
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, write_atomically
from bloomery.spec.lock import one_writer
from bloomery.spec.run import Data
from bloomery.spec.seal import KEY, sealed_json, write_sums

REPORT_FILE = "report.json"
CHUNK = 256


@dataclass
class Report:
    """The funnel: what came in, what was dropped by reason, what came out."""

    fingerprint: str
    sources: list[str]
    files: int = 0
    documents_read: int = 0
    """Long ones of the user's by their pieces."""
    dropped: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    documents_train: int = 0
    documents_heldout: int = 0
    bytes_text: int = 0
    tokens_train: int = 0
    tokens_heldout: int = 0
    pairs: int = 0
    pairs_kind: str = ""
    pairs_double: int = 0
    pairs_beyond: int = 0
    """Distinct ones past the limit."""
    pairs_too_long: int = 0
    pairs_cut: int = 0
    vocab_used: int = 0
    tokenizer: str = ""
    """The hash of the one that shards and pairs were made with."""
    tokenizer_kept: bool = False
    origin: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reused: bool = False
    rebuilt: str = ""
    """What was wrong with the build of the same text that was there before."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def build(
    data: Data,
    folder: Path,
    *,
    described: bool = True,
    pairs_file: str = "",
    max_pairs: int | None = None,
    seq_len: int = 256,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Report:
    """Build `folder` (tokenizer.json, train/, heldout/, pairs/, report.json) from the text that `data` names.

    `tokenizer`: the one that is there and stays. `seq_len`: what pairs will be trained at. `described`: False where
    `data.text` is not the description's. Raises InputError when there is no usable text, the disk cannot hold the
    result or another process builds there.
    """
    tell = progress or (lambda *_: None)
    account, sources, kept = Account(), sources_of(data), tokenizer is not None
    files = text_files(sources, account)
    given = pair_files.read_pairs(Path(pairs_file)) if pairs_file else None
    limit = pair_limit(max_pairs, pairs_file)
    fingerprints = _fingerprints(data, sources, files, pairs_file, limit, tokenizer)
    finished, damage = read_report(folder), ""
    if finished and _is_same(finished, fingerprints, seq_len, kept):
        damage = _damage(folder, finished, kept=kept, alike=finished.fingerprint == fingerprints[0])
        if not damage:
            return _reused(folder, finished, said_of(data, described=described))
    _check_space(data, files, folder)
    report = Report(fingerprints[0], [shown(source) for source in sources], tokenizer_kept=kept)
    report.origin = origin_of(data, files, described=described, pairs_file=pairs_file, max_pairs=limit, seq_len=seq_len)
    with one_writer(folder):
        documents = _timed(report, "read", lambda: _read(data, sources, files, account, report, tell))
        training, heldout = split(documents, data.holdout, ", ".join(report.sources))
        if tokenizer is not None:
            _check_ends(tokenizer, given=bool(given))
        # From here on an interrupted build must not pass for the one before it.
        (folder / REPORT_FILE).unlink(missing_ok=True)
        used = tokenizer or _timed(report, "tokenizer", lambda: _trained(documents, data, folder, tell))
        report.vocab_used, report.tokenizer = used.size, tokenizer_hash(folder)
        _timed(report, "encode", lambda: _shards(data, folder, training, heldout, used, report, tell))
        found, report.pairs_kind = (given, pair_files.GIVEN) if given else pair_files.made_from(training, seq_len)
        _timed(report, "pairs", lambda: _pairs(folder, found, limit, used, report))
        write_atomically(folder / REPORT_FILE, sealed_json(report.to_json()))
    report.rebuilt = damage
    return report


def _reused(folder: Path, finished: Report, said: dict[str, Any]) -> Report:
    """A finished build that is used again: as the text is named today, so are the shards of it asked for later."""
    if finished.origin and finished.origin != {**finished.origin, **said}:
        finished.origin |= said
        with one_writer(folder):
            write_atomically(folder / REPORT_FILE, sealed_json(finished.to_json()))
    finished.reused = True
    return finished


def _read(
    data: Data, sources: list[Path], files: list[Path], account: Account, report: Report, tell: Progress
) -> list[Document]:
    """The documents, two at least where their text differs; what was read for them goes to the report."""
    corpus = read_corpus(data, files, sources, account, tell)
    if not corpus.documents:
        raise _no_text(report.sources, account)
    if len(corpus.documents) == 1:
        corpus.cut_in_ten()
    report.files, report.documents_read, report.bytes_text = corpus.files, corpus.read, corpus.size
    report.dropped, report.named = dict(account.counts), account.named
    return corpus.documents


def _trained(documents: list[Document], data: Data, folder: Path, tell: Progress) -> Tokenizer:
    """A tokenizer of the documents, written to the folder."""
    tokenizer = train(evenly(documents, tell), data.vocab)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    write_sums(folder, [TOKENIZER_FILE])
    return tokenizer


def check_text(data: Data) -> None:
    """Raise InputError, as `build` would, when the text that `data` names holds no document that would be kept."""
    account = Account()
    for file in text_files(sources_of(data), account):
        for document in pieces(read_documents(file, account), named=bool(data.text)):
            reason = unfit(document, data)
            if not reason:
                return
            account.drop(reason, document.path)
    raise _no_text([shown(source) for source in sources_of(data)], account)


def _no_text(sources: list[str], account: Account) -> InputError:
    counts = account.counts
    reasons = ", ".join(f"{reason}: {some(names, counts[reason], 2)}" for reason, names in account.named.items())
    accepted = f"files {' '.join(SUFFIXES)}, each also as .gz"
    return InputError(f"no usable text ({reasons or 'no files'})", where=", ".join(sources), accepted=accepted)


def _check_ends(tokenizer: Tokenizer, *, given: bool) -> None:
    """Raise InputError when a tokenizer from elsewhere has no end of texts, or cannot mark the turns of given pairs."""
    if not tokenizer.ends.eos:
        raise InputError("no token of it ends a text; import the model again", where=TOKENIZER_FILE)
    if given and not tokenizer.has_turns:
        raise InputError("this tokenizer cannot mark who speaks in given pairs", where=TOKENIZER_FILE)


def _is_same(finished: Report, fingerprints: tuple[str, str], seq_len: int, kept: bool) -> bool:
    """Whether a finished build is the one asked for: pairs depend on the sequence's length, a tokenizer kept for
    checkpoints is used on only where it is kept again. What a run has checkpoints of may be from before fingerprints
    were of names as they are from their source, and stays."""
    length = finished.origin.get("seq_len", seq_len)
    known = fingerprints if kept else fingerprints[:1]
    return finished.fingerprint in known and length == seq_len and (kept or not finished.tokenizer_kept)


def read_report(folder: Path) -> Report | None:
    """The report of a finished build, or None."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    values.pop(KEY, None)
    try:
        return Report(**values)
    except TypeError:
        raise InputError("not the report of a data build; remove it and build again", where=str(path)) from None


def _damage(folder: Path, finished: Report, *, kept: bool, alike: bool) -> str:
    """What a finished build has lost, or has otherwise than it was written: a disk that filled up or changed a bit is
    no reason to stop. Empty: nothing.

    What a run was trained on is not made anew without need. From before reports told their origin it stays if it has
    pairs; where it would not come out alike, in the order of today, pairs alone are no such need.
    """
    if not finished.origin and not (kept and (folder / "pairs").is_dir()):
        return f"{folder / REPORT_FILE}: does not tell what was built"
    try:
        for part in ("train", "heldout", "pairs") if finished.pairs and alike else ("train", "heldout"):
            verify(folder / part)
        load(folder)
        check_one_build(folder)
    except InputError as error:
        return str(error)
    return ""


def _timed(report: Report, name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    report.seconds[name] = round(time.perf_counter() - started, 2)
    return result


def _fingerprints(
    data: Data,
    sources: list[Path],
    files: list[Path],
    pairs_file: str,
    max_pairs: int | None,
    tokenizer: Tokenizer | None,
) -> tuple[str, str]:
    """A hash of the settings and of every file's name, size and time: names as they are from their source, which may
    be spelled in other ways; then as it was before, of whole paths."""
    named = [*files, *([Path(pairs_file)] if pairs_file else [])]
    stats = [(file, file.stat()) for file in named if file.exists()]

    def hashed(settings: dict[str, Any], name_of: Callable[[Path], Any]) -> str:
        listing = [(name_of(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
        said: list[Any] = [settings, listing, pairs_file, max_pairs]
        if tokenizer is not None and tokenizer.ends.start:
            said.append(tokenizer.ends.start)
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    settings = data.model_dump(mode="json")
    placed = {**settings, "text": bool(data.text), "folder": ""}
    return hashed(placed, lambda file: place(file, sources)), hashed(settings, str)


def _check_space(data: Data, files: list[Path], folder: Path) -> None:
    """Raise InputError when the disk cannot hold the shards of so much text."""
    text = sum(map(text_bytes, files))
    need, free = 3 * min(data.max_bytes, text) + 2**20, shutil.disk_usage(_existing(folder)).free
    if free < need:
        problem = f"no space left for token shards: they may take {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise InputError(problem, where=str(folder))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _shards(
    data: Data,
    folder: Path,
    training: list[Document],
    heldout: list[Document],
    tokenizer: Tokenizer,
    report: Report,
    tell: Progress,
) -> None:
    done = 0

    def encoded(part: list[Document]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        nonlocal done
        for first in range(0, len(part), CHUNK):
            chunk = part[first : first + CHUNK]
            for document, ids in zip(chunk, tokenizer.encode_batch([d.text for d in chunk]), strict=True):
                yield {"id": document.id, "path": document.path, "bytes": len(document.text.encode())}, ids
            done += len(chunk)
            tell("encode", done, len(training) + len(heldout))

    settings: dict[str, Any] = {
        # A tokenizer that was kept may be larger than the description's.
        "vocab": max(data.vocab, tokenizer.size),
        "shard_tokens": data.shard_tokens,
        "start": tokenizer.ends.start,
        "end": tokenizer.end,
    }
    counts = write_tokens(folder / "train", encoded(training), **settings, tokenizer=report.tokenizer)
    report.documents_train, report.tokens_train = counts["documents"], counts["tokens"]
    counts = write_tokens(folder / "heldout", encoded(heldout), **settings, tokenizer=report.tokenizer)
    report.documents_heldout, report.tokens_heldout = counts["documents"], counts["tokens"]


def _pairs(folder: Path, found: list[tuple[str, str]], limit: int | None, tokenizer: Tokenizer, report: Report) -> None:
    """Write the pairs, each once and at most `limit`; none is no error until a stage asks for them.

    None are made of text for an imported model whose tokenizer cannot mark turns; given ones were refused before.
    """
    shutil.rmtree(folder / "pairs", ignore_errors=True)
    if found and tokenizer.has_turns:
        each = pair_files.distinct(found)
        pairs = each[:limit]
        report.pairs, report.pairs_double = len(pairs), len(found) - len(each)
        report.pairs_beyond = len(each) - len(pairs)
        length = report.origin["seq_len"]
        report.pairs_too_long, report.pairs_cut = pair_files.write_pairs(folder / "pairs", pairs, tokenizer, length)
