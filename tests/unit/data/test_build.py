"""A build is whole and of one make: damage is found and mended, two at once are refused, what was trained on stays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from bloomery.data.build import build
from bloomery.data.origin import check_one_build, other_text
from bloomery.data.readers import Account, text_files
from bloomery.data.shards import verify
from bloomery.data.tokenizer import load
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json
from bloomery.spec.run import Data
from bloomery.spec.seal import sealed_json


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A little text that pairs can be made of."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"Number {number} is this. It is made from ore with charcoal. " * 10)
    return folder


def settings(corpus: Path, **changes: object) -> Data:
    return Data.checked({"text": [str(corpus)], "vocab": 320, **changes})


@pytest.mark.parametrize(
    "name", ["train/tokens_000.bin", "heldout/documents.jsonl", "pairs/tokens.bin", "tokenizer.json"]
)
def test_a_build_with_a_changed_bit_is_made_again_and_that_is_said(corpus: Path, tmp_path: Path, name: str) -> None:
    before = build(settings(corpus), tmp_path / "out")
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    report = build(settings(corpus), tmp_path / "out")
    assert not report.reused
    assert name in report.rebuilt
    assert report.tokenizer == before.tokenizer
    again = build(settings(corpus), tmp_path / "out")
    assert again.reused
    assert not again.rebuilt


def test_a_build_that_has_lost_its_pairs_is_made_again(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "pairs")
    assert "pairs" in build(settings(corpus), tmp_path / "out").rebuilt
    verify(tmp_path / "out" / "pairs")


def test_a_second_build_into_the_same_folder_is_refused_while_the_first_one_is_at_work(
    corpus: Path, tmp_path: Path
) -> None:
    def second(*_: object) -> None:
        with pytest.raises(InputError, match=rf"out: another process \({os.getpid()}\) writes here"):
            build(settings(corpus), tmp_path / "out")

    build(settings(corpus), tmp_path / "out", progress=second)
    assert build(settings(corpus), tmp_path / "out").reused


def test_shards_of_another_tokenizer_than_the_one_there_are_refused_and_built_again(
    corpus: Path, tmp_path: Path
) -> None:
    build(settings(corpus), tmp_path / "out")
    build(settings(corpus, vocab=300), tmp_path / "other")
    for name in ("tokenizer.json", "SHA256SUMS"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "out" / name)
    with pytest.raises(InputError, match=r"report\.json: made with another tokenizer than the one there"):
        check_one_build(tmp_path / "out")
    shutil.copy(tmp_path / "other" / "report.json", tmp_path / "out" / "report.json")
    with pytest.raises(InputError, match=r"train/manifest\.json: made with another tokenizer"):
        check_one_build(tmp_path / "out")
    assert not build(settings(corpus), tmp_path / "out").reused
    check_one_build(tmp_path / "out")


def test_shards_from_before_they_named_their_tokenizer_pass(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(settings(corpus), out)
    for name in ("report.json", "train/manifest.json", "heldout/manifest.json"):
        values = json.loads((out / name).read_text())
        del values["tokenizer"]
        (out / name).write_text(sealed_json(values))
    check_one_build(out)
    assert build(settings(corpus), out).reused


def test_data_that_a_run_was_trained_on_stay_though_names_were_whole_paths_then(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report, data = build(settings(corpus), out), settings(corpus)
    files = [(str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in text_files([corpus], Account())]
    whole = json.dumps([data.model_dump(mode="json"), files, "", 4000])
    report.fingerprint = hashlib.sha256(whole.encode()).hexdigest()
    (out / "report.json").write_text(sealed_json(report.to_json()))
    assert build(data, out, tokenizer=load(out)).reused
    shutil.rmtree(out / "pairs")
    assert build(data, out, tokenizer=load(out)).reused
    assert not build(data, out).reused
    verify(out / "pairs")


def test_a_build_that_is_used_again_is_asked_for_as_its_text_was_named_last(corpus: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", settings(tmp_path / "elsewhere")
    build(settings(corpus), out)
    assert other_text(read_json(out / "report.json")["origin"], elsewhere)
    assert build(settings(corpus), out, described=False).reused
    assert not other_text(read_json(out / "report.json")["origin"], elsewhere)
    again = build(settings(corpus), out)
    assert again.reused
    assert other_text(read_json(out / "report.json")["origin"], elsewhere)
    assert not read_json(out / "report.json")["reused"]
