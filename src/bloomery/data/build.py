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
from bloomery.data.origin import origin_of, pair_limit
from bloomery.data.readers import (
    SUFFIXES,
    Account,
    Document,
    cut,
    default_sources,
    is_compressed,
    read_documents,
    some,
    text_files,
    weight,
)
from bloomery.data.shards import read_manifest, write_tokens
from bloomery.data.tokenizer import TOKENIZER_FILE, Tokenizer, train
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, write_atomically
from bloomery.spec.run import Data
from bloomery.spec.seal import KEY, sealed_json, write_sums

REPORT_FILE = "report.json"
TOKENIZER_BYTES = 8_000_000
"""The tokenizer is trained on about this much text, taken evenly: more changes the merges little."""
MAX_CHARACTERS = 300_000
"""A longer document of the machine's own text is a table; one of the user's is a book, and cut into pieces."""
PIECE_CHARACTERS = 50_000
GZIP_RATIO = 5
"""How much larger than its file compressed text is taken to be, when the disk is asked for room."""
CHUNK = 256

DUPLICATE, SHORT, LONG = "exact duplicate", "too short", f"longer than {MAX_CHARACTERS:,} characters"
OF_DOCUMENTS = (DUPLICATE, SHORT, LONG)
"""Reasons to drop what was read; any other is one not to read a file, a folder or a record."""

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done and what there is in all."""


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
    tokenizer_kept: bool = False
    origin: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reused: bool = False

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
    `data.text` is not the description's. Raises InputError when there is no usable text or the disk cannot hold the
    result.
    """
    tell = progress or (lambda *_: None)
    account = Account()
    files = text_files(_sources(data), account)
    given = pair_files.read_pairs(Path(pairs_file)) if pairs_file else None
    limit = pair_limit(max_pairs, pairs_file)
    fingerprint = _fingerprint(data, files, pairs_file, limit, tokenizer)
    finished = read_report(folder)
    kept = tokenizer is not None
    if finished and _is_same(finished, fingerprint, seq_len, kept) and _is_whole(folder, finished, kept):
        finished.reused = True
        return finished
    _check_space(data, files, folder)
    report = Report(fingerprint, [str(source) for source in _sources(data)], tokenizer_kept=kept)
    report.origin = origin_of(data, files, described=described, pairs_file=pairs_file, max_pairs=limit, seq_len=seq_len)
    documents = _timed(report, "read", lambda: _read(data, files, account, report, tell))
    if not documents:
        raise _no_text(report.sources, account)
    if len(documents) == 1:
        # One file is a corpus too: a tenth of it is held out.
        documents = list(cut(documents[0], max(1, len(documents[0].text) // 10)))
        report.documents_read += len(documents) - 1
    if tokenizer is not None:
        _check_ends(tokenizer, given=bool(given))
    # From here on an interrupted build must not pass for the one before it.
    (folder / REPORT_FILE).unlink(missing_ok=True)
    if tokenizer is None:
        tokenizer = _timed(report, "tokenizer", lambda: train(_evenly(documents, tell), data.vocab))
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
        write_sums(folder, [TOKENIZER_FILE])
    report.vocab_used, used = tokenizer.size, tokenizer
    training, heldout = _split(documents, data.holdout)
    _timed(report, "encode", lambda: _shards(data, folder, training, heldout, used, report, tell))
    found, report.pairs_kind = (given, pair_files.GIVEN) if given else pair_files.made_from(training, seq_len)
    _timed(report, "pairs", lambda: _pairs(folder, found, limit, used, report))
    write_atomically(folder / REPORT_FILE, sealed_json(report.to_json()))
    return report


def check_text(data: Data) -> None:
    """Raise InputError, as `build` would, when the text that `data` names holds no document that would be kept."""
    account = Account()
    for file in text_files(_sources(data), account):
        for document in _pieces(read_documents(file, account), named=bool(data.text)):
            reason = _unfit(document, data)
            if not reason:
                return
            account.drop(reason, document.path)
    raise _no_text([str(source) for source in _sources(data)], account)


def _sources(data: Data) -> list[Path]:
    if not all(data.text):
        raise InputError("a folder or file of text is expected, this name is empty", where="data.text", found="")
    return [Path(text).expanduser() for text in data.text] or default_sources()


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


def _is_same(finished: Report, fingerprint: str, seq_len: int, kept: bool) -> bool:
    """Whether a finished build is the one asked for: pairs depend on the sequence's length, a tokenizer kept for
    checkpoints is used on only where it is kept again."""
    length = finished.origin.get("seq_len", seq_len)
    return finished.fingerprint == fingerprint and length == seq_len and (kept or not finished.tokenizer_kept)


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


def _is_whole(folder: Path, finished: Report, kept: bool) -> bool:
    """Whether what a finished build left is still there: a disk that was lost or filled up is no reason to stop. One
    from before reports told their origin is made anew, but for shards that a run was trained on and that have pairs."""
    if not finished.origin and not (kept and (folder / "pairs").is_dir()):
        return False
    try:
        for part in ("train", "heldout"):
            read_manifest(folder / part)
    except InputError:
        return False
    return (folder / TOKENIZER_FILE).is_file()


def is_heldout(document: Document, share: float) -> bool:
    """A pure function of the document's hash: the same text is held out in every build."""
    return int(document.id[:8], 16) < share * 2**32


def _timed(report: Report, name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    report.seconds[name] = round(time.perf_counter() - started, 2)
    return result


def _fingerprint(
    data: Data, files: list[Path], pairs_file: str, max_pairs: int | None, tokenizer: Tokenizer | None
) -> str:
    named = [*files, *([Path(pairs_file)] if pairs_file else [])]
    listing = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in named if file.exists()]
    said: list[Any] = [data.model_dump(mode="json"), listing, pairs_file, max_pairs]
    if tokenizer is not None and tokenizer.ends.start:
        said.append(tokenizer.ends.start)
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def text_bytes(file: Path) -> int:
    """About how much text a file holds; 0 for what is no plain file."""
    return file.stat().st_size * (GZIP_RATIO if is_compressed(file) else 1) if file.is_file() else 0


def fair_share(sizes: list[int], most: int) -> int:
    """The share of one file: smaller files are read whole, larger ones so far that all together come to `most`.

    >>> fair_share([10, 100, 1000], 300)
    190
    >>> fair_share([10, 100, 1000], 5000)
    5000
    """
    left = most
    for number, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - number)
        if size > share:
            return share
        left -= size
    return most


def _check_space(data: Data, files: list[Path], folder: Path) -> None:
    """Raise InputError when the disk cannot hold the shards of so much text."""
    text = sum(map(text_bytes, files))
    need, free = 3 * min(data.max_bytes, text) + 2**20, shutil.disk_usage(_existing(folder)).free
    if free < need:
        problem = f"no space left for token shards: they may take {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
        raise InputError(problem, where=str(folder))


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _read(data: Data, files: list[Path], account: Account, report: Report, tell: Progress) -> list[Document]:
    """Clean documents up to `max_bytes`, a mix: files in an order given by their names' hash, large ones in part."""
    seen, kept, size = set[str](), list[Document](), 0
    ordered = sorted(files, key=lambda path: hashlib.sha256(str(path).encode()).digest())
    share = fair_share([text_bytes(file) for file in ordered], data.max_bytes)
    for file in ordered:
        if size >= data.max_bytes:
            break
        report.files += 1
        enough = min(size + share, data.max_bytes)
        for document in _pieces(read_documents(file, account), named=bool(data.text)):
            report.documents_read += 1
            reason = _unfit(document, data) or (DUPLICATE if document.id in seen else "")
            if reason:
                account.drop(reason, document.path)
            else:
                seen.add(document.id)
                kept.append(document)
                size += len(document.text.encode())
                if size >= enough:
                    break
        tell("read text", min(size, data.max_bytes), data.max_bytes)
    report.dropped, report.named, report.bytes_text = dict(account.counts), account.named, size
    return kept


def _unfit(document: Document, data: Data) -> str:
    """Why a document is dropped whatever the others are; empty: it is not."""
    if len(document.text) > MAX_CHARACTERS:
        return LONG
    short = len(document.text) < data.min_characters and weight(document.text) < data.min_characters
    return SHORT if short else ""


def _pieces(documents: Iterator[Document], *, named: bool) -> Iterator[Document]:
    """The documents; long ones of text the user named are cut."""
    for document in documents:
        if named and len(document.text) > MAX_CHARACTERS:
            yield from cut(document, PIECE_CHARACTERS)
        else:
            yield document


def _evenly(documents: list[Document], tell: Progress) -> Iterator[str]:
    """Every k-th document, so that about TOKENIZER_BYTES are seen."""
    total = sum(len(document.text) for document in documents)
    step = max(1, total // TOKENIZER_BYTES)
    chosen = documents[::step]
    for number, document in enumerate(chosen, start=1):
        tell("train tokenizer", number, len(chosen))
        yield document.text


def _split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents held out, neither of them empty where there are two."""
    heldout = [document for document in documents if is_heldout(document, share)]
    if len(heldout) in (0, len(documents)):
        heldout = documents[:1]
    out = {document.id for document in heldout}
    return [document for document in documents if document.id not in out], heldout


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
    counts = write_tokens(folder / "train", encoded(training), **settings)
    report.documents_train, report.tokens_train = counts["documents"], counts["tokens"]
    counts = write_tokens(folder / "heldout", encoded(heldout), **settings)
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
