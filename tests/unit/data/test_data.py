"""Data: one order for every world size, provenance to the document, bad files counted, nothing half-written loads."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from bloomery.data import shards
from bloomery.data.build import build, read_report
from bloomery.data.corpus import OF_DOCUMENTS
from bloomery.data.order import nth_seed, permuted, sample_at
from bloomery.data.pairs import IGNORED, PairDataset, pairs_of
from bloomery.data.readers import Account, document, read_documents, text_files
from bloomery.data.shards import TokenDataset, verify
from bloomery.data.tokenizer import TOKENIZER_FILE, Ends, load, read, train
from bloomery.spec.errors import InputError
from bloomery.spec.run import Data
from bloomery.spec.seal import sealed_json

PROSE = "明月几时有，把酒问青天。不知天上宫阙，今夕是何年。" * 20
CODE = '''
def area(width, height):
    """Return the area of a rectangle of the given width and height."""
    return width * height


def greet(name):
    """Say hello to the person of that name, politely and in English."""
    return f"hello {name}"
'''


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Prose in two languages, code, a page, records."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        (folder / f"prose_{number}.txt").write_text(f"Document {number}. {PROSE}\n" + f"Some English {number}. " * 30)
    (folder / "code.py").write_text(CODE + "# padding\n" * 20)
    (folder / "page.html").write_text("<html><script>hidden()</script><p>" + "visible words " * 30 + "</p></html>")
    (folder / "records.jsonl").write_text("\n".join(json.dumps({"text": f"record {i} " * 40}) for i in range(5)))
    return folder


def settings(corpus: Path, **changes: object) -> Data:
    """Small settings."""
    return Data.checked({"text": [str(corpus)], "vocab": 600, "holdout": 0.1, "min_characters": 50, **changes})


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_an_epoch_visits_every_sample_once(n: int) -> None:
    assert sorted(permuted(i, n, key=5) for i in range(n)) == list(range(n))
    assert sorted(sample_at(i, n, seed=3) for i in range(4 * n, 5 * n)) == list(range(n))


def test_a_large_seed_counts_whole_and_a_small_one_gives_the_order_it_always_gave() -> None:
    def order(seed: int) -> tuple[int, ...]:
        return tuple(sample_at(i, 50, seed) for i in range(50))

    assert len({order(seed) for seed in (1, 2**32 + 1, 2**33 + 1, 2**63 + 1, 2**32)}) == 5
    assert order(1)[:8] == (49, 13, 46, 33, 22, 2, 21, 0)
    assert order(2**32 - 1)[:8] == (25, 31, 32, 43, 39, 17, 20, 38)


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(sample_at(i + 500 * epoch, 500, seed) for i in range(500)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_seeds_of_several_draws_are_nobody_elses() -> None:
    assert nth_seed(7, 0) == 7 and nth_seed(-(2**63), 0) == -(2**63)
    found = [nth_seed(seed, number) for seed in range(-50, 50) for number in range(4)]
    assert len(set(found)) == len(found) and all(-(2**63) <= seed < 2**64 for seed in found)
    assert nth_seed(0, 1) == 0xE220A8397B1DCDAF  # the first number of splitmix64 from 0


def test_sample_a_billion_needs_no_walk() -> None:
    assert 0 <= sample_at(10**9, 12_345, seed=0) < 12_345


def test_samples_are_the_same_for_every_world_size(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    dataset = TokenDataset(tmp_path / "out" / "train", seq_len=16, seed=0)
    whole = dataset.batch(range(24)).inputs
    for world in (2, 3, 4):
        share = 24 // world
        parts = [dataset.batch(range(rank * share, (rank + 1) * share)).inputs for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_a_prefix_is_the_same_for_every_world_size_and_its_targets_do_not_count(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    dataset = TokenDataset(tmp_path / "out" / "train", seq_len=16, seed=0, prefix=True)
    plain = TokenDataset(tmp_path / "out" / "train", seq_len=16, seed=0)
    whole, part = dataset.batch(range(24)), dataset.batch(range(12, 24))
    assert whole.prefix is not None
    assert part.prefix is not None
    assert np.array_equal(whole.prefix[12:], part.prefix)
    assert whole.prefix.min() >= 1
    assert whole.prefix.max() <= 15
    assert len(set(whole.prefix.tolist())) > 5
    for i, (prefix, targets) in enumerate(zip(whole.prefix, whole.targets, strict=True)):
        counted = np.flatnonzero(targets != IGNORED)
        # The target at place p is the token at p + 1: those of the prefix are seen, the first one after it is not.
        assert counted.tolist() == list(range(prefix - 1, 16))
        assert dataset.n_targets(i) == len(counted)
        assert np.array_equal(targets[counted], plain.sample(i)[1][counted])


def test_documents_change_after_each_end_token(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    dataset = TokenDataset(tmp_path / "out" / "train", seq_len=48, seed=0, documents=True)
    samples, end = dataset.batch(range(24)), load(tmp_path / "out").end
    assert samples.documents is not None
    assert samples.documents.max() > 0
    for inputs, documents in zip(samples.inputs, samples.documents, strict=True):
        ended_before = np.cumsum(inputs == end) - (inputs == end)
        assert np.array_equal(documents, ended_before)


def test_a_prompt_is_the_prefix_of_its_response(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    dataset = PairDataset(tmp_path / "out" / "pairs", seq_len=96, seed=0, prefix=True)
    samples, assistant = dataset.batch(range(4)), load(tmp_path / "out").assistant
    assert samples.prefix is not None
    for inputs, targets, prefix in zip(samples.inputs, samples.targets, samples.prefix, strict=True):
        assert inputs[prefix - 1] == assistant
        assert np.flatnonzero(targets != IGNORED)[0] == prefix - 1


def test_provenance_leads_back_to_the_text(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    dataset, tokenizer = TokenDataset(tmp_path / "out" / "train", seq_len=24, seed=0), load(tmp_path / "out")
    for i in range(40):
        inputs, _ = dataset.sample(i)
        first = dataset.provenance(i)[0]
        source = first["path"].split(":")[0]
        (text,) = [d.text for d in read_documents(corpus / source, Account()) if d.id == first["id"]]
        ids = [*tokenizer.encode(text), tokenizer.end]
        n = min(len(inputs), first["last"] - first["first"] + 1)
        assert ids[first["first"] : first["first"] + n] == inputs[:n].tolist()


def test_chinese_comes_back_unchanged_and_specials_cannot_be_forged(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    tokenizer = load(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode(PROSE)) == PROSE
    assert tokenizer.end not in tokenizer.encode("a <|end|> in the text")


def test_lengths_that_a_tokenizer_was_saved_with_cut_and_fill_no_text(tmp_path: Path) -> None:
    own = train(iter([PROSE]), 300)
    own.save_plain(tmp_path)
    backend = Backend.from_file(str(tmp_path / TOKENIZER_FILE))
    backend.enable_truncation(16)
    backend.enable_padding(length=16, pad_id=own.pad)
    backend.save(str(tmp_path / TOKENIZER_FILE))
    found = read(tmp_path / TOKENIZER_FILE)
    for text in (PROSE, "月"):
        assert found.encode(text) == found.encode_batch([text])[0] == own.encode(text)
        assert found.decode(found.encode(text)) == text


def test_documents_start_as_the_texts_of_an_imported_model_do(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "own")
    own = load(tmp_path / "own")
    first = own.user
    foreign = own.with_ends(Ends(bos=first, eos=(own.end,), start=(first,)))
    build(settings(corpus), tmp_path / "out", tokenizer=own)
    foreign.save(tmp_path / "out")
    report = build(settings(corpus), tmp_path / "out", tokenizer=foreign)
    assert not report.reused and build(settings(corpus), tmp_path / "out", tokenizer=foreign).reused
    for part, documents in (("train", report.documents_train), ("heldout", report.documents_heldout)):
        tokens, plain = (np.fromfile(tmp_path / home / part / "tokens_000.bin", "<u2") for home in ("out", "own"))
        starts = np.fromfile(tmp_path / "out" / part / "documents.bin", "<i8")
        assert (tokens[starts] == first).all() and (tokens[starts[1:] - 1] == own.end).all()
        assert (len(starts), len(tokens)) == (documents, len(plain) + documents)
        assert np.array_equal(tokens[tokens != first], plain)


def test_bad_files_are_counted_and_named_and_nothing_else_is_lost(corpus: Path, tmp_path: Path) -> None:
    bad = corpus / "bad"
    bad.mkdir()
    (bad / "nul.txt").write_bytes(b"abc\0def" * 100)
    (bad / "latin.txt").write_bytes("Grüße".encode("latin-1") * 50)
    (bad / "empty.txt").write_bytes(b"")
    whole = gzip.compress(PROSE.encode())
    (bad / "torn.txt.gz").write_bytes(whole[: len(whole) // 2])
    (bad / "broken.jsonl").write_text(
        '{"text": "good enough to keep, long enough as well, yes it is"}\n{"text": \n[1]\n'
    )
    (bad / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (bad / "loop").symlink_to(corpus, target_is_directory=True)
    (bad / "dangling.txt").symlink_to(bad / "nowhere.txt")
    os.mkfifo(bad / "pipe.txt")
    report = build(settings(corpus), tmp_path / "out")
    assert report.dropped["binary (NUL bytes)"] == 1
    assert report.dropped["not UTF-8"] == 1
    assert report.dropped["empty"] == 1
    assert report.dropped["unreadable (EOFError)"] == 1
    assert report.dropped["not a JSON record"] == 2
    assert report.dropped["unreadable (FileNotFoundError)"] == 1
    assert report.dropped["not a plain file"] == 1
    assert report.dropped["record without text"] == 1
    assert any("nul.txt" in name for name in report.named["binary (NUL bytes)"])
    kept = report.documents_train + report.documents_heldout
    late = sum(report.dropped.get(reason, 0) for reason in ("too short", "exact duplicate"))
    assert report.documents_read == kept + late
    assert kept == 30 + 1 + 1 + 5 + 1


def test_a_changed_byte_is_found_and_named(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    folder = tmp_path / "out" / "train"
    verify(folder)
    for name in json.loads((folder / shards.MANIFEST).read_text())["files"]:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(InputError, match=name):
            verify(folder)
        (folder / name).write_bytes(content)


def test_an_interrupted_build_is_never_taken_for_good(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        build(settings(corpus), tmp_path / "out")
    assert read_report(tmp_path / "out") is None
    with pytest.raises(InputError, match="data build"):
        TokenDataset(tmp_path / "out" / "train", seq_len=8, seed=0)


def test_an_unchanged_build_is_used_again_and_a_changed_one_is_not(corpus: Path, tmp_path: Path) -> None:
    assert not build(settings(corpus), tmp_path / "out").reused
    assert build(settings(corpus), tmp_path / "out").reused
    (corpus / "new.txt").write_text("something new under the sun, quite long enough to be kept " * 3)
    assert not build(settings(corpus), tmp_path / "out").reused


def test_a_book_that_the_user_names_is_cut_into_pieces_not_dropped(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Line {number} of a long book about iron.\n" for number in range(10_000)))
    report = build(settings(book), tmp_path / "out")
    assert not report.dropped
    assert report.documents_read == report.documents_train + report.documents_heldout == 8
    assert report.bytes_text == pytest.approx(book.stat().st_size, rel=1e-4)


def test_pieces_that_are_dropped_are_among_those_read(corpus: Path, tmp_path: Path) -> None:
    (corpus / "table.txt").write_text("| all rows | are alike |\n" * 40_000)
    report = build(settings(corpus), tmp_path / "out")
    assert report.dropped["exact duplicate"] > 10
    kept = report.documents_train + report.documents_heldout
    assert report.documents_read == kept + sum(report.dropped[name] for name in report.dropped if name in OF_DOCUMENTS)


def test_an_empty_name_of_text_is_not_the_folder_one_is_in(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.text: .* this name is empty"):
        build(Data(text=("",)), tmp_path / "out")


def test_one_short_file_is_still_split_into_training_and_held_out_text(tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("".join(f"Line {number} of a short note.\n" for number in range(100)))
    report = build(settings(text), tmp_path / "out")
    assert report.documents_read == report.documents_train + report.documents_heldout
    parts = {}
    for part in ("train", "heldout"):
        lines = (tmp_path / "out" / part / "documents.jsonl").read_text().splitlines()
        parts[part] = {json.loads(line)["id"] for line in lines}
    assert parts["train"] and parts["heldout"]
    assert not parts["train"] & parts["heldout"]


@pytest.mark.parametrize("content", [b'{"prompt": 1}\n', b"no json\n", b"\xff\xfe\n", b"\n"])
def test_wrong_pairs_are_refused_before_the_build_that_is_there_is_touched(
    corpus: Path, tmp_path: Path, content: bytes
) -> None:
    before = build(settings(corpus), tmp_path / "out")
    (tmp_path / "pairs.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"pairs\.jsonl"):
        build(settings(corpus), tmp_path / "out", pairs_file=str(tmp_path / "pairs.jsonl"))
    assert read_report(tmp_path / "out") == before


def test_changed_pairs_of_the_same_name_are_read_again(corpus: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "response": "b"}\n')
    assert build(settings(corpus), tmp_path / "out", pairs_file=str(pairs)).pairs == 1
    pairs.write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": "c", "response": "d"}\n')
    assert build(settings(corpus), tmp_path / "out", pairs_file=str(pairs)).pairs == 2


def test_a_corpus_without_text_leaves_the_build_that_is_there(corpus: Path, tmp_path: Path) -> None:
    before = build(settings(corpus), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no usable text"):
        build(settings(tmp_path / "empty"), tmp_path / "out")
    assert read_report(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["tokenizer.json", "report.json", "train/manifest.json"])
def test_a_torn_file_of_a_build_is_named_in_one_line(corpus: Path, tmp_path: Path, name: str) -> None:
    build(settings(corpus), tmp_path / "out")
    (tmp_path / "out" / name).write_text('{"a')
    with pytest.raises(InputError, match=name):
        load(tmp_path / "out")
        read_report(tmp_path / "out")
        TokenDataset(tmp_path / "out" / "train", seq_len=8, seed=0)


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        text_files([tmp_path / "nowhere"], Account())


def test_only_the_response_counts_in_the_loss(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    tokenizer = load(tmp_path / "out")
    dataset = PairDataset(tmp_path / "out" / "pairs", seq_len=96, seed=0)
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) > 4
    for i in range(len(dataset)):
        inputs, targets = dataset.sample(i)
        pair = pairs[dataset.provenance(i)[0]["id"]]
        counted = targets[targets != IGNORED]
        assert counted.tolist() == [*tokenizer.encode(pair["response"]), tokenizer.end][: len(counted)]
        assert dataset.n_targets(i) == len(counted)
        assert inputs[0] == tokenizer.user


def test_pairs_ask_what_a_function_does_and_which_does_this() -> None:
    found = list(pairs_of(document("code.py", CODE)))
    assert (
        "What does `def area(width, height)` do?",
        "Return the area of a rectangle of the given width and height.",
    ) in found
    assert len(found) == 4


def test_half_a_surrogate_pair_is_counted_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "half of one: \\ud83d"}\n{"text": "a whole one: \\ud83d\\ude00"}\n')
    account = Account()
    assert [found.text for found in read_documents(path, account)] == ["a whole one: \U0001f600"]
    assert account.counts == {"half a surrogate pair": 1}


def test_a_build_from_before_reports_told_their_origin_is_made_again(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = build(settings(corpus), out)
    report.origin = {}
    (out / "report.json").write_text(sealed_json(report.to_json()))
    assert build(settings(corpus), out, tokenizer=load(out)).reused == (out / "pairs").is_dir()
    (out / "report.json").write_text(sealed_json(report.to_json()))
    assert not build(settings(corpus), out).reused


def test_a_build_that_has_lost_files_is_made_again(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    assert build(settings(corpus), tmp_path / "out").reused
    tokens = tmp_path / "out" / "train" / "tokens_000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert not build(settings(corpus), tmp_path / "out").reused
    verify(tmp_path / "out" / "train")


def test_a_changed_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    build(settings(corpus), tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"[', b'"]', 1) + b" ")
    with pytest.raises(InputError, match=r"tokenizer.json: content does not match"):
        load(tmp_path / "out")


def test_a_cap_takes_small_files_whole_and_a_part_of_large_ones(tmp_path: Path) -> None:
    sizes = {"zh": 400, "en": 20, "fr": 5}
    for name, documents in sizes.items():
        lines = (json.dumps({"text": f"{name} {number} " + "x" * 90}) for number in range(documents))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = Data(text=(str(tmp_path),), vocab=300, max_bytes=10_000, min_characters=10)
    report = build(data, tmp_path / "out")
    assert report.files == 3
    assert 9_000 <= report.bytes_text < 10_200  # what JSON needs besides is part of a file, and not of its text
    assert report.documents_train + report.documents_heldout > 25
