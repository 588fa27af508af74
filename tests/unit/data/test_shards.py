"""Shards: read in the order they were written in, however many there are, and written one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bloomery.data import shards
from bloomery.data.shards import MANIFEST, TokenDataset, verify, write_tokens
from bloomery.spec.errors import InputError
from bloomery.spec.seal import sealed_json

SHARD = 8


def a_document(tokens: list[int]) -> tuple[dict[str, Any], list[int]]:
    return {"id": "a", "path": "a.txt", "bytes": len(tokens)}, tokens


def test_more_than_a_thousand_shards_are_read_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.os, "fsync", lambda _: None)
    tokens = list(range(SHARD * 1003 + 4))
    write_tokens(tmp_path / "train", [a_document(tokens)], vocab=60_000, shard_tokens=SHARD, end=0)
    dataset = TokenDataset(tmp_path / "train", seq_len=4, seed=0)
    for number in range(dataset.n_samples):
        first = dataset._first_token(number)
        assert dataset.sample(number)[0].tolist() == tokens[first : first + 4]


def test_a_manifest_that_says_more_tokens_than_there_are_ends_in_one_line(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", [a_document([1] * 30)], vocab=300, shard_tokens=64, end=0)
    path = tmp_path / "train" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(sealed_json({**manifest, "tokens": 60}))
    dataset = TokenDataset(tmp_path / "train", seq_len=4, seed=0)
    with pytest.raises(InputError, match="fewer tokens than its manifest says"):
        dataset.batch(range(dataset.n_samples))


@pytest.mark.parametrize("lengths", [[], [3], [SHARD - 1], [2 * SHARD - 1], [5, 30, 1, 0, SHARD], [SHARD] * 8])
def test_shards_hold_every_token_whatever_documents_end_where(tmp_path: Path, lengths: list[int]) -> None:
    documents = [[10 * number + 1] * length for number, length in enumerate(lengths)]
    counts = write_tokens(
        tmp_path / "train", map(a_document, documents), vocab=300, shard_tokens=SHARD, end=0, tokenizer="its hash"
    )
    manifest = json.loads((tmp_path / "train" / MANIFEST).read_text())
    expected = [token for document in documents for token in [*document, 0]]
    names = sorted(name for name in manifest["files"] if name.startswith("tokens_"))
    parts = [np.fromfile(tmp_path / "train" / name, dtype="<u2").tolist() for name in names]
    assert [token for part in parts for token in part] == expected
    assert all(len(part) == SHARD for part in parts[:-1])
    assert len(names) == max(1, -(-len(expected) // SHARD))
    assert counts == {"tokens": len(expected), "documents": len(lengths), "text_bytes": sum(lengths)}
    assert manifest["tokens"] == len(expected)
    assert manifest["tokenizer"] == "its hash"
    verify(tmp_path / "train")


def test_a_full_shard_is_on_disk_before_further_documents_are_asked_for(tmp_path: Path) -> None:
    written = tmp_path / ".train.writing" / "tokens_000.bin"

    def documents() -> Iterator[tuple[dict[str, Any], list[int]]]:
        yield a_document([1] * SHARD)
        assert written.stat().st_size == 2 * SHARD
        yield a_document([2] * SHARD)

    assert write_tokens(tmp_path / "train", documents(), vocab=300, shard_tokens=SHARD, end=0)["documents"] == 2
