"""Files to documents: what a page shows is kept and stays apart, a large file is read as far as it goes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from bloomery.data import readers
from bloomery.data.build import build, check_text
from bloomery.data.readers import Account, read_documents, shown, text_files, weight
from bloomery.spec.errors import InputError
from bloomery.spec.run import Data
from bloomery.spec.seal import sealed_json, sealed_text


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """The limit of a file, made small."""
    monkeypatch.setattr(readers, "MAX_FILE_BYTES", 1000)
    return 1000


@pytest.mark.parametrize("letter", ["a", "é", "铁", "😀"])
def test_a_file_beyond_the_limit_is_cut_between_characters_and_that_is_said(
    tmp_path: Path, small: int, letter: str
) -> None:
    path = tmp_path / "large.txt"
    for shift in range(4):
        path.write_text("x" * shift + letter * 2 * small)
        account = Account()
        [found] = read_documents(path, account)
        assert small - 8 <= len(found.text.encode()) <= small
        assert set(found.text) <= {"x", letter}
        assert [name for name in account.counts if name.startswith("the rest of a file")]


def test_records_beyond_the_limit_of_a_file_are_read_one_by_one(tmp_path: Path, small: int) -> None:
    path = tmp_path / "large.jsonl.gz"
    lines = [json.dumps({"text": f"record {number}"}) for number in range(200)]
    lines[100] = json.dumps({"text": "y" * 3 * small})
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    account = Account()
    found = [one.text for one in read_documents(path, account)]
    assert found == [f"record {number}" for number in range(200) if number != 100]
    assert account.named == {"record larger than 0 MiB": [f"{path}:101"]}


def test_no_more_records_are_read_than_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n' + "no record\n" * 5)
    account = Account()
    assert next(iter(read_documents(path, account))).text == "one"
    assert not account.counts


def test_a_torn_archive_gives_the_records_before_the_tear(tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"text": f"record {i * i}"}) + "\n" for i in range(9000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    account = Account()
    found = list(read_documents(path, account))
    assert 1000 < len(found) < 9000
    assert account.counts["unreadable (EOFError)"] == 1
    flipped = bytearray(whole)
    flipped[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    path.write_bytes(flipped)
    list(read_documents(path, account))
    assert sum(count for reason, count in account.counts.items() if reason.startswith("unreadable")) == 2


def test_a_short_chinese_document_is_kept_where_an_english_one_of_its_length_is_not(tmp_path: Path) -> None:
    poem = "静夜思\n李白\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    assert weight("iron") == 4 < weight("铁")
    texts = [poem, poem.replace("明月", "白日"), "An English text as short as this one is still dropped."]
    (tmp_path / "poems.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    report = build(Data(text=(str(tmp_path),), vocab=300), tmp_path / "out")
    assert report.documents_train + report.documents_heldout == 2
    assert report.dropped == {"too short": 1}


def test_what_is_no_text_that_is_read_is_counted_and_named(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.txt.zst", "array.json", "NOTES.TXT", "Page.Htm"):
        (tmp_path / name).write_text("words " * 200)
    (tmp_path / "BOOK.TXT.GZ").write_bytes(gzip.compress(b"words " * 300))
    account = Account()
    assert [path.name for path in text_files([tmp_path], account)] == ["BOOK.TXT.GZ", "NOTES.TXT", "Page.Htm"]
    assert account.counts == {"not a kind that is read": 3}
    assert account.named["not a kind that is read"][0] == str(tmp_path / "array.json")
    [found] = read_documents(tmp_path / "BOOK.TXT.GZ", account)
    assert found.text.startswith("words words")


@pytest.mark.parametrize("named", ["records.ndjson", "records.NDJSON.gz", "."])
def test_records_are_read_under_their_other_name_too(tmp_path: Path, named: str) -> None:
    content = json.dumps({"text": "caf\u00e9\nau lait"}).encode()
    (tmp_path / "records.ndjson").write_bytes(content)
    (tmp_path / "records.NDJSON.gz").write_bytes(gzip.compress(content))
    files = text_files([tmp_path / named], Account())
    assert {one.text for file in files for one in read_documents(file, Account())} == {"caf\u00e9\nau lait"}


def test_json_in_one_piece_is_refused_and_an_unknown_kind_is_plain_text_where_it_is_named(tmp_path: Path) -> None:
    for name in ("array.json", "array.json.gz", "enwik8"):
        (tmp_path / name).write_text("[]")
    for name in ("array.json", "array.json.gz"):
        with pytest.raises(InputError, match=rf"{name}: JSON is read as records.*; accepted: \.jsonl, \.ndjson"):
            text_files([tmp_path / name], Account())
    assert text_files([tmp_path / "enwik8"], Account()) == [tmp_path / "enwik8"]


def test_no_usable_text_says_what_was_found_and_what_is_accepted(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.parquet").write_text("words " * 200)
    words = r"not a kind that is read: \S+0\.parquet, \S+1\.parquet and 2 more\); accepted: files \.txt \.md"
    with pytest.raises(InputError, match=words):
        check_text(Data(text=(str(tmp_path),)))


def test_a_folder_that_cannot_be_read_is_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, scandir = tmp_path / "closed", os.scandir
    closed.mkdir()

    def refused(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    account = Account()
    assert not text_files([tmp_path], account)
    assert account.named == {"unreadable folder": [str(closed)]}


def test_the_folders_of_runs_and_builds_are_no_text_but_where_they_are_named(tmp_path: Path) -> None:
    for folder in ("run/align", "data", "theirs", "broken"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "words.txt").write_text("words")
    (tmp_path / "run" / "run.yaml").write_text(sealed_text("name: tiny\n"))
    (tmp_path / "data" / "report.json").write_text(sealed_json({"files": 3}))
    (tmp_path / "theirs" / "report.json").write_text('{"sha256": "ours has one", "files": 3}')
    (tmp_path / "broken" / "run.yaml").write_bytes(b"\xff\xfe")
    account = Account()
    found = [path.parent.name for path in text_files([tmp_path], account)]
    assert found == ["broken", "theirs"]
    assert sorted(account.named["folder of a run or a build"]) == [str(tmp_path / "data"), str(tmp_path / "run")]
    assert len(text_files([tmp_path / "run"], Account())) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1", "gb18030"])
def test_records_in_another_encoding_are_dropped_as_a_text_in_it_is(tmp_path: Path, encoding: str) -> None:
    records, text = tmp_path / "records.jsonl", tmp_path / "text.txt"
    line = json.dumps({"text": "Gru\u00df, Schmelz\u00f6fen"}, ensure_ascii=False) + "\n"
    content = (line.replace("\u00df", "\u94c1").replace("\u00f6", "\u77ff") if encoding[0] != "l" else line) * 3
    records.write_bytes(content.encode(encoding))
    text.write_bytes(content.encode(encoding))
    account, of_text = Account(), Account()
    assert not list(read_documents(records, account))
    assert not list(read_documents(text, of_text))
    assert set(account.counts) == set(of_text.counts)


def test_a_record_with_a_byte_order_mark_is_read_and_one_with_a_nul_is_not(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "two \\u0000"}\n')
    account = Account()
    assert [found.text for found in read_documents(path, account)] == ["one"]
    assert account.named == {"binary (NUL bytes)": [f"{path}:2"]}


def test_a_page_of_unclosed_tags_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<p>words</p>" + "<!--" * 100)
    account = Account()
    assert not list(read_documents(path, account))
    assert account.named == {"page of tags without an end": [str(path)]}


def test_names_that_are_no_utf8_end_nothing_and_are_shown_with_escapes(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xe4xt"))
    folder.mkdir()
    words = "Iron is made from ore with charcoal, and steel from iron. " * 20
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"{number} {words}")
    for name in (b"\xfcber.txt", b"\xfcber.parquet", b"\xfcber.jsonl"):
        with open(os.path.join(os.fsencode(folder), name), "w") as stream:
            stream.write(f"more {words}")
    assert shown(Path(os.fsdecode(b"a/\xfc"))) == "a/\\xfc"
    report = build(Data(text=(str(folder),), vocab=300), tmp_path / "out")
    assert report.documents_train + report.documents_heldout == 11
    assert report.named["not a JSON record"] == [f"{tmp_path}/t\\xe4xt/\\xfcber.jsonl:1"]
    lines = "".join((tmp_path / "out" / part / "documents.jsonl").read_text() for part in ("train", "heldout"))
    assert any(json.loads(line)["path"].endswith("\\xfcber.txt") for line in lines.splitlines())


def test_linked_and_skipped_folders_are_counted_and_named(tmp_path: Path) -> None:
    text = tmp_path / "text"
    for folder in (text / "site-packages", text / "own", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        (folder / "words.txt").write_text("words")
    (text / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    account = Account()
    assert text_files([text], account) == [text / "own" / "words.txt"]
    assert account.named == {
        "link to a folder": [str(text / "linked")],
        "folder of packages or caches": [str(text / "site-packages")],
    }
    assert len(text_files([text / "linked"], Account())) == 1
