"""Held-out text: each sample once, and the bytes of exactly the tokens that are judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from bloomery.data import tokenizer as tokenizers
from bloomery.data.heldout import Evaluated
from bloomery.data.samples import IGNORED
from bloomery.data.shards import TokenDataset, write_tokens
from bloomery.data.tokenizer import Tokenizer

TEXTS = ["Iron is made from ore, " * 5, "铁从矿石中来，要用木炭炼。" * 5, "def f(x): return 'é' + x\n" * 5]


def shards(folder: Path, tokenizer: Tokenizer | None) -> TokenDataset:
    """Held-out shards of the texts, with the tokenizer beside them if there is one."""
    used = tokenizer or tokenizers.train(iter(TEXTS), 300)
    facts = [{"id": str(i), "path": "a.txt", "bytes": len(text.encode())} for i, text in enumerate(TEXTS)]
    ids = [used.encode(text) for text in TEXTS]
    write_tokens(folder / "heldout", zip(facts, ids, strict=True), vocab=300, shard_tokens=1024, end=used.end)
    if tokenizer is not None:
        tokenizer.save(folder)
    return TokenDataset(folder / "heldout", seq_len=8, seed=0)


def test_no_sample_counts_twice_and_what_fills_a_batch_counts_nothing(tmp_path: Path) -> None:
    tokens = shards(tmp_path, None)
    chosen = Evaluated(tokens, 5 * 8 + 3)
    assert (len(chosen), len(Evaluated(tokens, 1)), len(Evaluated(tokens, 10**9))) == (5, 1, len(tokens))
    batch = chosen.batch(range(4, 7))
    assert (batch.targets[1:] == IGNORED).all() and (batch.targets[0] != IGNORED).all()
    assert [chosen.n_targets(i) for i in (4, 5)] == [8, 0]
    everything = Evaluated(tokens, 10**9)
    assert everything.text_bytes / (8 * len(tokens)) == tokens.text_bytes / tokens.n_tokens


def test_the_bytes_are_those_of_the_tokens_judged(tmp_path: Path) -> None:
    tokenizer = tokenizers.train(iter(TEXTS), 300)
    tokens = shards(tmp_path, tokenizer)
    whole = Evaluated(tokens, 10**9)
    judged = np.concatenate([tokens.sample(i)[1] for i in range(len(tokens))])
    alphabet = [tokenizer.name(int(token)) or "" for token in judged if token != tokenizer.end]
    assert whole.text_bytes == sum(map(len, alphabet))
    assert Evaluated(tokens, 8).text_bytes < whole.text_bytes


def test_the_tokens_of_a_text_have_its_bytes() -> None:
    tokenizer = tokenizers.train(iter(TEXTS), 300)
    table = tokenizer.bytes_of_tokens()
    for text in TEXTS:
        assert table[tokenizer.encode(text)].sum() == len(text.encode())
    assert table[:4].tolist() == [0] * 4


def test_a_token_that_was_added_for_text_has_the_bytes_of_its_name(tmp_path: Path) -> None:
    tokenizers.train(iter(TEXTS), 300).save_plain(tmp_path)
    backend = Backend.from_file(str(tmp_path / tokenizers.TOKENIZER_FILE))
    backend.add_tokens(["été", "铁", "    "])
    backend.add_special_tokens(["<铁>"])
    tokenizer, text = Tokenizer(backend), "un été    铁!"
    ids = tokenizer.encode(text)
    assert {tokenizer.find(added) for added in ("été", "铁", "    ")} < set(ids)
    table = tokenizer.bytes_of_tokens()
    assert table[ids].sum() == len(text.encode()) and table[tokenizer.find("<铁>")] == 0


def test_the_bytes_of_names_with_bars_and_digits() -> None:
    names = ["<unk>", "\u2581", "e", "é", "\u2581é", *(f"<0x{i:02X}>" for i in range(256))]
    merges = [("\u2581", "é")]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>"])
    tokenizer, text = Tokenizer(backend), "e é 铁 \n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bytes_of_tokens()[tokenizer.encode(text)].sum() == len(text.encode())
