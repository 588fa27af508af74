"""A corpus: the same wherever its text lies, `max_bytes` used up, what is left over named, some of it held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bloomery.data import corpus
from bloomery.data.build import build
from bloomery.data.corpus import REST, UNREAD, Corpus, evenly, place, read_corpus, split
from bloomery.data.readers import Account, Document, document, text_files
from bloomery.data.tokenizer import train
from bloomery.spec.errors import InputError
from bloomery.spec.run import Data


def read(folder: Path, **settings: object) -> tuple[Corpus, Account]:
    data = Data.checked({"text": [str(folder)], "min_characters": 10, **settings})
    account = Account()
    return read_corpus(data, text_files([folder], account), [folder], account, lambda *_: None), account


def write(folder: Path, count: int = 12) -> Path:
    """Texts in two folders, some of them with the same name."""
    for number in range(count):
        path = folder / f"part{number % 2}" / f"{number // 2}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Text {number} of iron. " * 30)
    return folder


def hashes(folder: Path) -> list[str]:
    return [json.loads((folder / part / "manifest.json").read_text())["content_hash"] for part in ("train", "heldout")]


def test_the_same_text_elsewhere_or_in_another_spelling_is_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = write(tmp_path / "here"), write(tmp_path / "some" / "where" / "else")
    monkeypatch.chdir(tmp_path)
    built = [
        build(Data(text=(str(text),), vocab=300), tmp_path / str(number))
        for number, text in enumerate((here, there, "here"))
    ]
    assert hashes(tmp_path / "0") == hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert built[0].fingerprint == built[2].fingerprint
    lines = (tmp_path / "0" / "train" / "documents.jsonl").read_text().splitlines()
    assert "part0/2.txt" in {json.loads(line)["path"] for line in lines}


def test_files_of_the_same_name_are_told_apart_by_the_number_of_their_source(tmp_path: Path) -> None:
    write(tmp_path / "text")
    sources = [tmp_path / "text" / "part0", tmp_path / "text" / "part1"]
    files = text_files(sources, Account())
    names = [
        one.path for one in read_corpus(Data(text=("a", "b")), files, sources, Account(), lambda *_: None).documents
    ]
    assert sorted(names) == [f"{source}/{number}.txt" for source in (0, 1) for number in range(6)]
    assert place(tmp_path / "text" / "part1" / "3.txt", sources) == (1, "3.txt")


def test_what_files_leave_of_their_shares_goes_to_others(tmp_path: Path) -> None:
    """A file whose text is less than its size says leaves room that no first round fills."""
    for name in ("a", "b", "c"):
        empty = "".join(json.dumps({"id": number, "text": ""}) + "\n" for number in range(400))
        lines = "".join(json.dumps({"text": f"{name} {number} " + "x" * 90}) + "\n" for number in range(100))
        (tmp_path / f"{name}.jsonl").write_text(empty if name == "b" else lines)
    found, account = read(tmp_path, max_bytes=9_000)
    assert 9_000 <= found.size < 9_100
    assert sorted(account.named[REST]) == [str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")]
    assert account.counts["record without text"] == 400
    assert account.counts[REST] == 2
    assert found.read == len(found.documents)
    assert len({one.id for one in found.documents}) == len(found.documents)


def test_files_that_no_room_is_left_for_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    found, account = read(tmp_path, max_bytes=1200)
    assert found.files == len(found.documents)
    assert account.counts[UNREAD] == 12 - found.files > 0
    found, account = read(tmp_path, max_bytes=100_000)
    assert found.files == 12
    assert not account.counts


def texts(*sizes: int) -> list[Document]:
    return [document(f"{number}.txt", f"{number}" + "x" * (size - 1)) for number, size in enumerate(sizes)]


def test_no_more_is_held_out_than_is_trained_on() -> None:
    training, heldout = split(texts(9000, 100), 1e-9, "text")
    assert [len(one.text) for one in heldout] == [100]
    assert [len(one.text) for one in training] == [9000]
    drawn = [(corpus.is_heldout(one, 0.4), one) for one in texts(*range(100, 120))]
    held, kept = ([one for is_held, one in drawn if is_held == wanted] for wanted in (True, False))
    with pytest.raises(InputError, match=r"more text would be held out .* lower data\.holdout or name more text"):
        split([*held, kept[0]], 0.4, "text")
    with pytest.raises(InputError, match="text: all of the text repeats itself"):
        split(texts(100), 0.1, "text")


@pytest.mark.parametrize(
    ("sizes", "share", "expected"),
    [
        ([450, 200, 150, 60, 130], 1e-9, 130),  # of few documents about a tenth
        ([450, 200, 150, 60, 140], 0.3, 200),
        ([*range(1000, 1100), 9000, 20], 1e-9, 1100),  # of many what one has on the mean
        ([700, 200, 100], 0.6, 200),  # never more than half
    ],
)
def test_where_no_hash_falls_below_the_share_a_document_of_about_its_size_is_held_out(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], share: float, expected: int
) -> None:
    monkeypatch.setattr(corpus, "is_heldout", lambda *_: False)
    _, heldout = split(texts(*sizes), share, "text")
    assert [len(one.text) for one in heldout] == [expected]


def test_one_document_is_cut_without_empty_pieces_or_a_short_rest(tmp_path: Path) -> None:
    line = "One line of iron and ore, with its number {}."
    path = tmp_path / "book.txt"
    path.write_text("\n".join(line.format(number) for number in range(400)) + "\n" * 3000 + "Rest.")
    found, account = read(tmp_path, min_characters=200)
    found.cut_in_ten()
    assert min(len(one.text) for one in found.documents) >= 200
    assert account.counts[corpus.SHORT] >= 2
    assert found.read == len(found.documents) + sum(account.counts.values())


def test_a_file_of_one_repeated_line_is_refused_or_trained_on_more_than_held_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("x" * 1000)
    with pytest.raises(InputError, match=r"lines\.txt: all of the text repeats itself"):
        build(Data(text=(str(path),), vocab=300), tmp_path / "out")
    path.write_text("The same line again.\n" * 1000 + "And the last. " * 40)
    report = build(Data(text=(str(path),), vocab=300), tmp_path / "out")
    assert report.tokens_train > report.tokens_heldout
    assert report.documents_read == report.documents_train + report.documents_heldout + sum(report.dropped.values())


def test_overlong_words_are_cut_for_training_and_ordinary_text_is_not() -> None:
    long = "铁" * 1000 + "。" + "😀" * 900 + "1" * 500
    parts = list(evenly([document("long.txt", long)], lambda *_: None))
    assert "".join(parts) == long
    assert max(map(len, parts)) <= 800
    ordinary = "Iron, from ore and charcoal. " * 99 + "明月几时有，把酒问青天。" * 99 + "=" * 80
    assert list(evenly([document("a.txt", ordinary)], lambda *_: None)) == [ordinary.strip()]
    assert train(iter(parts), 300).size <= 300


def test_the_tokenizer_sees_no_more_than_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "TOKENIZER_BYTES", 1000)
    documents = [document(f"{number}.txt", f"{number:02d}" + "，铁" * 10) for number in range(29)]
    seen = "".join(evenly(documents, lambda *_: None))
    assert 500 < len(seen.encode()) <= 1000
