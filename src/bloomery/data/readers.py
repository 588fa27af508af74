"""Text in: files of many kinds to documents, as a stream. A bad file or record is skipped, counted and named.

Memory stays bounded: a file is read to `MAX_FILE_BYTES` after decompression and no further.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from bloomery.spec.errors import InputError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".htm", ".jsonl")
MAX_FILE_BYTES = 64 * 2**20
MAX_NAMED = 20
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", ".git", "node_modules"}


@dataclass(frozen=True)
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


def default_sources() -> list[Path]:
    """The text every machine has: Python's standard library and the system's documentation."""
    return [path for path in (Path(sysconfig.get_path("stdlib")), Path("/usr/share/doc")) if path.is_dir()]


def text_files(sources: list[Path]) -> list[Path]:
    """Every readable kind of file below the sources, sorted, each real file once (links cannot loop).

    Raises InputError when a source does not exist.
    """
    found: dict[Path, None] = {}
    for source in sources:
        if not source.exists():
            raise InputError("no such file or folder of text", where=str(source))
        if source.is_file():
            found[source] = None
            continue
        for folder, folders, names in os.walk(source):
            folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
            for name in sorted(names):
                if name.removesuffix(".gz").endswith(SUFFIXES) or name in ("copyright", "README", "changelog.gz"):
                    found[Path(folder) / name] = None
    real: dict[Path, Path] = {}
    for path in found:
        real.setdefault(Path(os.path.realpath(path)), path)  # of a link that leads back to itself too
    return list(real.values())


def read_documents(path: Path, account: Account) -> Iterator[Document]:
    """The documents of one file; none, with the reason in the account, when it cannot be read as text."""
    if path.exists() and not path.is_file():
        account.drop("not a plain file", str(path))
        return
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, ValueError) as error:
        account.drop(f"unreadable ({type(error).__name__})", str(path))
        return
    if len(raw) > MAX_FILE_BYTES:
        account.drop(f"larger than {MAX_FILE_BYTES >> 20} MiB of text", str(path))
        return
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".jsonl"):
        yield from _records(path, raw, account)
        return
    text = decode(raw, str(path), account)
    if text is None:
        return
    if kind.endswith((".html", ".htm")):
        text = strip_html(text)
    account.counts["documents read"] += 1
    yield document(str(path), text)


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
        account.drop("binary (NUL bytes)", where)
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


def _records(path: Path, raw: bytes, account: Account) -> Iterator[Document]:
    for number, line in enumerate(raw.splitlines(), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
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
        account.counts["documents read"] += 1
        yield document(where, text)


def has_half_pair(text: str) -> bool:
    """Whether an escape of JSON has put half of a surrogate pair into a text: no character, and without UTF-8."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")
        if tag in ("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "pre"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style") and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def strip_html(text: str) -> str:
    """The visible text of a page."""
    parser = _Text()
    parser.feed(text)
    return "".join(parser.parts)
