"""Which documents a corpus is: of files in an order of their own, of large ones a part, until `max_bytes` are full.

The order, and what documents are called, follow from where files lie in their source, not from where that lies: the
same text gives the same corpus on every machine.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

from bloomery.data.readers import (
    Account,
    Document,
    cut,
    is_compressed,
    read_documents,
    shown,
    weight,
)
from bloomery.spec.errors import InputError
from bloomery.spec.run import Data

TOKENIZER_BYTES = 8_000_000
"""The tokenizer is trained on about this much text, taken evenly: more changes the merges little."""
MAX_CHARACTERS = 300_000
"""A longer document of the machine's own text is a table; one of the user's is a book, and cut into pieces."""
PIECE_CHARACTERS = 50_000
GZIP_RATIO = 5
"""How much larger than its file compressed text is taken to be."""

DUPLICATE, SHORT, LONG = "exact duplicate", "too short", f"longer than {MAX_CHARACTERS:,} characters"
OF_DOCUMENTS = (DUPLICATE, SHORT, LONG)
"""Reasons to drop what was read; any other is one not to read a file, a folder or a record."""
UNREAD, REST = "beyond data.max_bytes", "the rest of a file beyond data.max_bytes"

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done and what there is in all."""


def place(path: Path, sources: Sequence[Path]) -> tuple[int, str]:
    """The number of the source a file is of, the first that holds it, and the file's name from there.

    >>> place(Path("text/zh/poems.txt"), [Path("code"), Path("text")])
    (1, 'zh/poems.txt')
    """
    for number, source in enumerate(sources):
        if path == source:
            return number, path.name
        if path.is_relative_to(source):
            return number, path.relative_to(source).as_posix()
    return len(sources), path.name


@dataclass
class _Part:
    """A file, what its documents are called by, and how many of them were taken; `account`: of the last time it was
    read, for it is read again from its start when there is room for more of it."""

    path: Path
    name: str
    taken: int = 0
    account: Account = field(default_factory=Account)


def _in_order(files: Sequence[Path], sources: Sequence[Path]) -> list[_Part]:
    """The files in an order given by their names' hash: those of one folder do not come one after the other."""
    placed = [(*place(file, sources), file) for file in files]
    placed.sort(key=lambda one: (hashlib.sha256(os.fsencode(one[1])).digest(), one[0]))
    several = len(sources) > 1
    return [_Part(file, shown(f"{number}/{name}" if several else name)) for number, name, file in placed]


@dataclass
class Corpus:
    """The documents that were kept, and what was read for them. `read`: long ones of the user's by their pieces."""

    data: Data
    account: Account
    documents: list[Document] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    files: int = 0
    read: int = 0
    size: int = 0

    def take(self, part: _Part, share: int) -> bool:
        """Take documents of a file until `share` bytes more are kept. Returns whether the file has more."""
        enough = min(self.size + share, self.data.max_bytes)
        self.files += part.taken == 0
        part.account = Account()
        documents = pieces(read_documents(part.path, part.account), named=bool(self.data.text))
        for document in islice(documents, part.taken, None):
            if self.size >= enough:
                return True
            part.taken += 1
            self._judge(document, unfit(document, self.data), part.name + document.path.removeprefix(shown(part.path)))
        self.account.add(part.account)
        return False

    def cut_in_ten(self) -> None:
        """The one document as ten or so: one file is a corpus too, of which a tenth is held out. What is left at a cut
        is as short as documents may be, or as half a piece."""
        [whole] = self.documents
        self.documents, self.seen, self.read, self.size = [], set(), self.read - 1, 0
        longest = max(1, len(whole.text) // 10)
        least = max(1, min(self.data.min_characters, longest // 2))
        for piece in cut(whole, longest):
            self._judge(piece, SHORT if weight(piece.text) < least else "", piece.path)

    def _judge(self, document: Document, reason: str, name: str) -> None:
        """Keep a document under a name, or drop it: for the reason given, or as one that is there."""
        self.read += 1
        reason = reason or (DUPLICATE if document.id in self.seen else "")
        if reason:
            self.account.drop(reason, document.path)
            return
        self.seen.add(document.id)
        self.documents.append(Document(document.id, name, document.text))
        self.size += len(document.text.encode())


def read_corpus(data: Data, files: Sequence[Path], sources: Sequence[Path], account: Account, tell: Progress) -> Corpus:
    """Clean documents up to `max_bytes`, a mix. How much text a file holds is known once it is read: what small files
    leave of their shares goes to the larger ones, in further rounds."""
    corpus, waiting, most = Corpus(data, account), _in_order(files, sources), data.max_bytes
    share = max(1, fair_share([text_bytes(part.path) for part in waiting], most))
    while waiting and corpus.size < most:
        unfinished = []
        for part in waiting:
            if corpus.size >= most or corpus.take(part, share):
                unfinished.append(part)
            tell("read text", min(corpus.size, most), most)
        waiting = unfinished
        share = max(1, (most - corpus.size) // max(1, len(waiting)))
    for part in waiting:
        account.add(part.account)
        account.drop(REST if part.taken else UNREAD, shown(part.path))
    return corpus


def unfit(document: Document, data: Data) -> str:
    """Why a document is dropped whatever the others are; empty: it is not."""
    if len(document.text) > MAX_CHARACTERS:
        return LONG
    short = len(document.text) < data.min_characters and weight(document.text) < data.min_characters
    return SHORT if short else ""


def pieces(documents: Iterator[Document], *, named: bool) -> Iterator[Document]:
    """The documents; long ones of text the user named are cut."""
    for document in documents:
        if named and len(document.text) > MAX_CHARACTERS:
            yield from cut(document, PIECE_CHARACTERS)
        else:
            yield document


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


def is_heldout(document: Document, share: float) -> bool:
    """A pure function of the document's hash: the same text is held out in every build."""
    return int(document.id[:8], 16) < share * 2**32


def split(documents: list[Document], share: float, where: str) -> tuple[list[Document], list[Document]]:
    """Documents to train on and documents held out, of sources that `where` names. Raises InputError when these would
    be the larger part."""
    whole = _bytes(documents)
    heldout = [document for document in documents if is_heldout(document, share)]
    if len(heldout) in (0, len(documents)):
        heldout = [_nearest(documents, share, whole)]
    out = {document.id for document in heldout}
    training = [document for document in documents if document.id not in out]
    if not training:
        raise InputError("all of the text repeats itself: none can be held out; name more text", where=where)
    if _bytes(training) < _bytes(heldout):
        sizes = f"more text would be held out ({_bytes(heldout):,} bytes) than trained on ({_bytes(training):,})"
        raise InputError(f"{sizes}; lower data.holdout or name more text", where=where)
    return training, heldout


TENTH = 0.1


def _nearest(documents: list[Document], share: float, whole: int) -> Document:
    """Of the documents that are at most half of the text, the one whose size is nearest to the share, where no hash
    falls below it. Of few documents a share may be less than any has, and the smallest too little to judge by: then
    nearest to what each has on the mean, a tenth at most."""
    wanted = whole * max(share, min(TENTH, 1 / len(documents)))
    fit = [one for one in documents if 2 * _bytes([one]) <= whole] or documents
    return min(fit, key=lambda one: abs(_bytes([one]) - wanted))


def _bytes(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


_LONG_RUN = re.compile(r"[^\W\d_]{400}|[^\w\s]{400}|\d{400}|\s{400}")
"""Letters, signs, digits or blanks without a break, which training takes for one word: its time goes with the square of
a word's length. No word of ordinary text is so long, so its merges stay what they are."""
_MAY_HAVE_ONE = (re.compile(r"\S{400}"), re.compile(r"\s{400}"))
"""What a text with a long run has, found in a fifth of the time: most text has none."""


def evenly(documents: list[Document], tell: Progress) -> Iterator[str]:
    """Every k-th document, so that at most about TOKENIZER_BYTES are seen, in parts without overlong words."""
    step = max(1, -(-_bytes(documents) // TOKENIZER_BYTES))
    chosen = documents[::step]
    for number, document in enumerate(chosen, start=1):
        tell("train tokenizer", number, len(chosen))
        yield from _without_long_runs(document.text)


def _without_long_runs(text: str) -> Iterator[str]:
    if not any(sign.search(text) for sign in _MAY_HAVE_ONE):
        yield text
        return
    ends = [found.end() for found in _LONG_RUN.finditer(text)]
    for first, end in pairwise([0, *ends, len(text)]):
        yield text[first:end]
