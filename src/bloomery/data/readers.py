"""Text in: files of many kinds to documents, as a stream. A bad file or record is skipped, counted and named.

Memory stays bounded: of a file, and of one record, `MAX_FILE_BYTES` after decompression are read and no more; records
are read one by one, as far as the caller wants them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path

from bloomery.data.pages import UnclosedTags, strip_html
from bloomery.spec.errors import InputError
from bloomery.spec.seal import is_sealed

RECORDS = (".jsonl", ".ndjson")
SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".htm", *RECORDS)
_NAMES = ("copyright", "README", "changelog.gz")
MAX_FILE_BYTES = 64 * 2**20
MAX_NAMED = 20
BINARY = "binary (NUL bytes)"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", ".git", "node_modules"}
_OUR_FILES = ("run.yaml", "report.json")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from; `id` is a hash of the text."""

    id: str
    path: str
    text: str


@dataclass
class Account:
    """What was read and what was dropped, by reason, with the first names of each."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, what: str) -> None:
        """Count one dropped file or record under `reason`."""
        self.counts[reason] += 1
        names = self.named.setdefault(reason, [])
        if len(names) < MAX_NAMED:
            names.append(what)

    def add(self, other: Account) -> None:
        """Count what another one has."""
        self.counts.update(other.counts)
        for reason, names in other.named.items():
            mine = self.named.setdefault(reason, [])
            mine += names[: MAX_NAMED - len(mine)]


def shown(path: str | Path) -> str:
    r"""A path as text for files and screens: where its bytes are no UTF-8, escapes stand for them.

    >>> shown("iron/\udcfcber.txt")
    'iron/\\xfcber.txt'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def some(names: list[str], count: int, shown: int) -> str:
    """The first names of `count`.

    >>> some(["a", "b", "c"], 30, 2)
    'a, b and 28 more'
    """
    more = f" and {count - shown:,} more" if count > shown else ""
    return f"{', '.join(names[:shown])}{more}"


def default_sources() -> list[Path]:
    """The text every machine has: Python's standard library and the system's documentation."""
    return [path for path in (Path(sysconfig.get_path("stdlib")), Path("/usr/share/doc")) if path.is_dir()]


def text_files(sources: list[Path], account: Account) -> list[Path]:
    """Every readable kind of file below the sources, sorted, each real file once (links cannot loop).

    What is passed over is in the account. A file that is named itself may be of another kind, and is read as plain
    text. Raises InputError when a source does not exist, or is JSON in one piece, which would be text full of escapes.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if not source.exists():
            raise InputError("no such file or folder of text", where=str(source))
        if source.is_file() and plain_name(source.name).endswith(".json"):
            problem = "JSON is read as records, one a line with its text under `text`"
            raise InputError(problem, where=shown(source), accepted=RECORDS)
        found |= dict.fromkeys([source] if source.is_file() else _below(source, account))
    real: dict[Path, Path] = {}
    for path in found:
        real.setdefault(Path(os.path.realpath(path)), path)  # of a link that leads back to itself too
    return list(real.values())


def _below(source: Path, account: Account) -> Iterator[Path]:
    """The files of a readable kind below a folder, but for the folders of runs and builds: what is there was text."""

    def unreadable(error: OSError) -> None:
        account.drop("unreadable folder", shown(error.filename))

    for folder, folders, names in os.walk(source, onerror=unreadable):
        here = Path(folder)
        if here != source and any(name in names and is_sealed(here / name) for name in _OUR_FILES):
            account.drop("folder of a run or a build", shown(here))
            folders.clear()
            continue
        reasons = {name: _passed_over(here / name) for name in sorted(folders)}
        for name, reason in reasons.items():
            if reason:
                account.drop(reason, shown(here / name))
        folders[:] = [name for name, reason in reasons.items() if not reason]
        for name in sorted(names):
            if plain_name(name).endswith(SUFFIXES) or name in _NAMES:
                yield here / name
            else:
                account.drop("not a kind that is read", shown(here / name))


def _passed_over(folder: Path) -> str:
    """Why a folder is not looked into; empty: it is. A link may lead anywhere: who means its text names that folder."""
    if folder.name in _SKIPPED_FOLDERS:
        return "folder of packages or caches"
    return "link to a folder" if folder.is_symlink() else ""


def plain_name(name: str) -> str:
    """A file's name in lower case and as it is once decompressed."""
    return name.lower().removesuffix(".gz")


def is_compressed(path: Path) -> bool:
    """Whether a file is to be decompressed."""
    return path.suffix.lower() == ".gz"


def read_documents(path: Path, account: Account) -> Iterator[Document]:
    """The documents of one file; none, with the reason in the account, when it cannot be read as text."""
    where = shown(path)
    if path.exists() and not path.is_file():
        account.drop("not a plain file", where)
        return
    kind = plain_name(path.name)
    try:
        opener = gzip.open if is_compressed(path) else open
        with opener(path, "rb") as stream:
            if kind.endswith(RECORDS):
                yield from _records(where, stream, account)
                return
            raw = stream.read(MAX_FILE_BYTES)
            whole = not stream.read(1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        account.drop(f"unreadable ({type(error).__name__})", where)
        return
    text = decode(raw if whole else _whole_characters(raw), where, account)
    if text is None:
        return
    if not whole:
        account.drop(f"the rest of a file larger than {MAX_FILE_BYTES >> 20} MiB", where)
    if kind.endswith((".html", ".htm")):
        try:
            text = strip_html(text)
        except UnclosedTags:
            account.drop("page of tags without an end", where)
            return
    yield document(where, text)


def _whole_characters(raw: bytes) -> bytes:
    """UTF-8 text that was cut anywhere, without its last character: of that one, bytes may be missing."""
    start = len(raw) - 1
    while start > 0 and raw[start] & 0xC0 == 0x80:
        start -= 1
    return raw[:start]


def document(path: str, text: str) -> Document:
    """A document with lines ended by newline and without trailing blanks."""
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip()
    return Document(hashlib.sha256(text.encode()).hexdigest()[:16], path, text)


def cut(whole: Document, longest: int) -> Iterator[Document]:
    """A document as pieces PATH#1, PATH#2, ... of at most `longest` characters, cut where lines end if they do."""
    start, number = 0, 0
    while start < len(whole.text):
        stop = start + longest
        line = whole.text.rfind("\n", start + longest // 2, stop)
        stop = line + 1 if line >= 0 and stop < len(whole.text) else stop
        number += 1
        yield document(f"{whole.path}#{number}", whole.text[start:stop])
        start = stop


def decode(raw: bytes, where: str, account: Account) -> str | None:
    """UTF-8 text (with or without byte-order mark), or None and the reason in the account."""
    if b"\0" in raw:
        account.drop(BINARY, where)
        return None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        account.drop("not UTF-8", f"{where} (byte {error.start})")
        return None
    if not text.strip():
        account.drop("empty", where)
        return None
    return text


def _records(path: str, stream: BufferedIOBase, account: Account) -> Iterator[Document]:
    for number, line in enumerate(_lines(stream), start=1):
        where = f"{path}:{number}"
        if len(line) > MAX_FILE_BYTES:
            account.drop(f"record larger than {MAX_FILE_BYTES >> 20} MiB", where)
            continue
        if not line.strip():
            continue
        # Not the bytes: of these, each line could be in another encoding.
        content = decode(line, where, account)
        if content is None:
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            account.drop("not a JSON record", where)
            continue
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text.strip():
            account.drop("record without text", where)
            continue
        if has_half_pair(text):
            account.drop("half a surrogate pair", where)
            continue
        if "\0" in text:
            account.drop(BINARY, where)
            continue
        yield document(where, text)


def _lines(stream: BufferedIOBase) -> Iterator[bytes]:
    """Line by line; of one longer than `MAX_FILE_BYTES` only so much that this can be seen."""
    while line := stream.readline(MAX_FILE_BYTES + 1):
        rest = line
        while len(rest) > MAX_FILE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_FILE_BYTES + 1)
        yield line


def has_half_pair(text: str) -> bool:
    """Whether an escape of JSON has put half of a surrogate pair into a text: no character, and without UTF-8."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]")
CJK_WEIGHT = 8


def weight(text: str) -> int:
    """How long a text is in English characters: a Chinese, Japanese or Korean one says about as much as a word.

    >>> weight("iron"), weight("铁, iron")
    (4, 14)
    """
    return len(text) + (CJK_WEIGHT - 1) * len(_CJK.findall(text))
