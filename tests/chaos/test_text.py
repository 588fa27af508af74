"""F18: text of every broken kind through a data build: nothing crashes, good records stay, the counts add up."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from runs import Figure, chance

from bloomery.data.build import Report, build
from bloomery.data.shards import verify
from bloomery.spec.run import Data

RECORDS, A_FILE = 100_000, 2_000
MAX_BYTES = 40_000_000
LONG = 30_000_000


def good(draw: random.Random, number: int) -> bytes:
    """A record as it should be."""
    return json.dumps({"text": f"Record {number}: " + "iron and fire " * draw.randrange(1, 6)}).encode()


KINDS: dict[str, Callable[[random.Random, int], bytes]] = {
    "good": good,
    "cut short": lambda draw, number: good(draw, number)[: draw.randrange(1, 20)],
    "a flipped byte": lambda draw, number: flipped(draw, good(draw, number)),
    "noise": lambda draw, number: bytes(draw.randrange(256) for _ in range(draw.randrange(1, 60))).replace(b"\n", b" "),
    "not UTF-8": lambda draw, number: b'{"text": "' + bytes([0xC3, 0x28, 0xFF]) + b'words"}',
    "byte-order mark": lambda draw, number: b"\xef\xbb\xbf" + good(draw, number),
    "NUL": lambda draw, number: b'{"text": "a\0b"}',
    "escaped NUL": lambda draw, number: json.dumps({"text": f"{number} zero \0 inside " * 3}).encode(),
    "half a pair": lambda draw, number: b'{"text": "half \\ud83d of %d"}' % number,
    "twice the key": lambda draw, number: b'{"text": "first %d", "text": "second %d of the two"}' % (number, number),
    "NaN": lambda draw, number: b'{"text": NaN}',
    "a huge number": lambda draw, number: b'{"text": ' + b"9" * draw.randrange(10, 6000) + b"}",
    "a list": lambda draw, number: b"[1, 2, 3]",
    "null": lambda draw, number: b'{"text": null}',
    "no text": lambda draw, number: b'{"body": "words"}',
    "empty text": lambda draw, number: b'{"text": "  "}',
    "deep": lambda draw, number: b"[" * 3000 + b"]" * 3000,
    "separators": lambda draw, number: json.dumps(
        {"text": f"{number} a\u2028b\u0085c\x1cd " * 3}, ensure_ascii=False
    ).encode(),
}
HOLDS_TEXT = {"good", "twice the key", "separators"}
RARE = {"deep": 0.01, "noise": 0.3, "a huge number": 0.1}


def flipped(draw: random.Random, record: bytes) -> bytes:
    """One byte other than a line's end changed into another."""
    content = bytearray(record)
    content[draw.randrange(len(content))] = draw.choice([value for value in range(256) if value not in (10, 13)])
    return bytes(content)


def write_records(folder: Path, draw: random.Random) -> dict[str, int]:
    """Fuzzed records, some in compressed files. Returns how many of each kind."""
    names, weights = list(KINDS), [RARE.get(name, 1.0) * (6 if name == "good" else 1) for name in KINDS]
    planted = dict.fromkeys(names, 0)
    for first in range(0, RECORDS, A_FILE):
        lines = []
        for number in range(first, first + A_FILE):
            name = draw.choices(names, weights)[0]
            planted[name] += 1
            # A carriage return ends a line too: none may be inside.
            lines.append(KINDS[name](draw, number).replace(b"\r", b" ") or b" ")
        content = b"\n".join(lines)
        if first // A_FILE % 5 == 0:
            (folder / f"records{first:06d}.jsonl.gz").write_bytes(gzip.compress(content, 1))
        else:
            (folder / f"records{first:06d}.jsonl").write_bytes(content)
    return planted


def write_files(folder: Path) -> dict[str, int]:
    """Whole files that are broken, links that loop, one record that is long. Returns the least each must count."""
    (folder / "empty.txt").write_bytes(b"")
    (folder / "nul.txt").write_bytes(b"text\0text" * 50)
    (folder / "latin.txt").write_bytes("Schmelzöfen ".encode("latin-1") * 50)
    (folder / "torn.txt.gz").write_bytes(gzip.compress(os.urandom(20_000))[:-3000])
    (folder / "no.txt.gz").write_bytes(b"no archive at all")
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(bytes(200 * 2**20), 9))
    (folder / "long.jsonl").write_bytes(b'{"text": "' + b"x" * LONG)
    (folder / "deep.html").write_text("<div>" * 50_000 + "words and more words " * 20)
    (folder / "dangling.txt").symlink_to(folder / "nowhere.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "self.txt").symlink_to(folder / "self.txt")
    os.mkfifo(folder / "pipe.txt")
    return {"empty": 1, "binary (NUL bytes)": 2, "not UTF-8": 1}


def most_memory() -> int:
    """The most bytes this program has held (what `getrusage` says includes what its parent held)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def built(text: Path, out: Path, answer: Path) -> None:
    """Build in a process of its own, to know its memory."""
    before = most_memory()
    report = build(Data(text=(str(text),), vocab=300, min_characters=20, max_bytes=MAX_BYTES, holdout=0.05), out)
    answer.write_text(json.dumps({**report.to_json(), "rss": most_memory() - before}))


def test_f18_broken_text(tmp_path: Path, figure: Figure) -> None:
    text = tmp_path / "text"
    text.mkdir()
    planted = write_records(text, chance("F18"))
    expected = write_files(text)
    process = get_context("spawn").Process(target=built, args=(text, tmp_path / "out", tmp_path / "answer.json"))
    process.start()
    process.join()
    figure("F18", f"{RECORDS:,} fuzzed records and 12 broken files", "0 crashes",
           f"exit code {process.exitcode}", process.exitcode == 0)  # fmt: skip
    assert process.exitcode == 0
    answer = json.loads((tmp_path / "answer.json").read_text())
    rss = answer.pop("rss")
    report = Report(**answer)
    for part in ("train", "heldout"):
        verify(tmp_path / "out" / part)
    for reason, count in expected.items():
        assert report.dropped[reason] >= count, (reason, report.dropped)  # records are dropped for the same reasons
    kept = report.documents_train + report.documents_heldout
    told = sum(count for reason, count in report.dropped.items() if reason in AFTER_READING)
    adds_up = report.documents_read == kept + told
    sure = sum(planted[name] for name in HOLDS_TEXT)
    figure("F18", "records with text among them", "0 lost, counts add up",
           f"{report.documents_read:,} read of {sure:,} planted whole, "
           f"{'sums equal' if adds_up else 'sums differ'}", adds_up and report.documents_read >= sure)  # fmt: skip
    figure(
        "F18",
        "memory of the build",
        "<= 2 x its limit of text",
        f"{rss / 1e6:.0f} MB",
        rss <= 2 * 2**26 + 2 * MAX_BYTES,
    )
    assert adds_up and report.documents_read >= sure


AFTER_READING = {"longer than 300,000 characters", "too short", "exact duplicate"}
"""Reasons for which a document that was read is dropped."""
