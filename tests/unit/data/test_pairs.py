"""Pairs: the user's as they are written, or made from any text; none from what is held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from bloomery.data import pairs as pair_files
from bloomery.data.build import build
from bloomery.data.continuations import continuations_of
from bloomery.data.corpus import is_heldout
from bloomery.data.pairs import PairDataset, pairs_of, read_pairs, write_pairs
from bloomery.data.readers import Account, document, read_documents
from bloomery.data.shards import read_manifest
from bloomery.data.tokenizer import Tokenizer, train
from bloomery.spec.errors import InputError
from bloomery.spec.run import Data


def made(text: str, seq_len: int = 100) -> list[tuple[str, str]]:
    return list(continuations_of(document("a.txt", text), seq_len))


def test_a_paragraph_s_first_sentence_or_title_asks_for_what_follows() -> None:
    assert made("Iron is made from ore. It needs charcoal, and air that bellows blow into the fire.") == [
        ("Iron is made from ore.", "It needs charcoal, and air that bellows blow into the fire.")
    ]
    below = "Iron is wrought in the fire, by men who know it."
    assert made(f"# The forge\n\n{below}")[0] == ("The forge", below)
    assert made(f"HAMLET:\n{below}") == [("HAMLET:", below)]


def test_chinese_sentences_end_with_their_own_signs() -> None:
    assert made("明月几时有？把酒问青天。不知天上宫阙，今夕是何年！") == [
        ("明月几时有？", "把酒问青天。不知天上宫阙，今夕是何年！")
    ]
    poem = "静夜思\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    assert made(poem) == [("静夜思", poem.partition("\n")[2])]


def test_a_response_is_whole_sentences_within_the_sequence() -> None:
    [(prompt, response)] = made("First of all. " + "Then comes the next of many sentences. " * 20, seq_len=60)
    assert len(prompt) + len(response) <= 120
    assert response == "Then comes the next of many sentences. Then comes the next of many sentences."


def test_code_and_tables_begin_nothing() -> None:
    assert not made("```\nprint(1)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n" + "$$ x = y + z. $$ " * 9)


def test_a_text_without_python_has_pairs_and_they_are_called_what_they_are(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"第{number}回说铁。" + "铁从矿石中来，要用木炭炼。" * 10)
    report = build(Data(text=(str(tmp_path),), vocab=300, min_characters=10), tmp_path / "out", seq_len=64)
    assert report.pairs_kind == "continuations"
    assert report.pairs == report.documents_train
    for name in ("area", "size", "space"):  # one document may be held out, by its name: not all of these
        code = f'def {name}(a, b):\n    """Return the area of a rectangle, a by b."""\n'
        (tmp_path / f"{name}.py").write_text(code * 3)
    with_code = Data(text=(str(tmp_path),), vocab=300, min_characters=10, holdout=0.001)
    report = build(with_code, tmp_path / "out", seq_len=64)
    assert report.pairs_kind == "docstrings and continuations"
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs" / "pairs.jsonl").read_text().splitlines()]
    asked = [pair for pair in pairs if "def " in pair["prompt"] + pair["response"]]
    assert len(asked) >= 4
    assert len(pairs) - len(asked) >= 18
    assert not any("def " in pair["prompt"] and "What does" not in pair["prompt"] for pair in pairs)


def test_held_out_documents_give_no_pairs(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        body = f'def work_{number}(x):\n    """Do the work of number {number}, carefully and well."""\n'
        (text / f"{number}.py").write_text(body + "# padding\n" * 20)
    build(Data(text=(str(text),), vocab=300, holdout=0.3), tmp_path / "out")
    documents = [one for path in sorted(text.iterdir()) for one in read_documents(path, Account())]
    heldout = {pair for one in documents if is_heldout(one, 0.3) for pair in pairs_of(one)}
    training = {pair for one in documents if not is_heldout(one, 0.3) for pair in pairs_of(one)}
    lines = (tmp_path / "out" / "pairs" / "pairs.jsonl").read_text().splitlines()
    written = {(row["prompt"], row["response"]) for row in map(json.loads, lines)}
    assert heldout and training
    assert written == training
    assert not written & heldout


def test_pairs_may_hold_line_separators_of_unicode(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a\u2028b", "response": "c\x85d"}, {"prompt": "e", "response": "f"}]
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert read_pairs(path) == [("a\u2028b", "c\x85d"), ("e", "f")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": None, "response": "b"}, "prompt must be text, not null"),
        ({"prompt": "a", "response": ["b"]}, r'response must be text, not \["b"\]'),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(tmp_path: Path, row: dict[str, object], said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + json.dumps(row))
    with pytest.raises(InputError, match=rf"pairs\.jsonl:2: {said}"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "respone": "b"}, r"unknown key; found 'respone'; .*did you mean 'response'\?"),
        ({"system": "s", "prompt": "a", "response": "b"}, "unknown key; found 'system'; accepted: prompt, response"),
        ({"prompt": "a"}, "response: this key is required"),
        (["a", "b"], "not a record with prompt and response"),
        ('{"prompt": "a", "prompt": "c", "response": "b"}', "this key is there twice; found 'prompt'"),
        ({"prompt": "a", "response": " \n"}, "this response is empty"),
    ],
)
def test_a_record_that_is_no_pair_is_named(tmp_path: Path, row: object, said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(InputError, match=rf"pairs\.jsonl:1: {said}"):
        read_pairs(path)


def test_given_pairs_are_all_taken_and_what_is_not_is_counted(tmp_path: Path) -> None:
    text, pairs = tmp_path / "text.txt", tmp_path / "pairs.jsonl"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    rows = [json.dumps({"prompt": str(number % 4100), "response": "b"}) for number in range(4110)]
    pairs.write_text("\n".join(rows))
    data = Data(text=(str(text),), vocab=300)
    report = build(data, tmp_path / "out", pairs_file=str(pairs))
    assert (report.pairs, report.pairs_double, report.pairs_beyond) == (4100, 10, 0)
    report = build(data, tmp_path / "out", pairs_file=str(pairs), max_pairs=4000)
    assert (report.pairs, report.pairs_double, report.pairs_beyond) == (4000, 10, 100)


def test_pairs_that_a_sequence_does_not_hold_are_counted(tmp_path: Path) -> None:
    text, pairs = tmp_path / "text.txt", tmp_path / "pairs.jsonl"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    rows = [("short", "short"), ("0 1 2 3 4 5 6 7 8 9 " * 9, "short"), ("short", "0 1 2 3 4 5 6 7 8 9 " * 9)]
    pairs.write_text("\n".join(json.dumps({"prompt": prompt, "response": answer}) for prompt, answer in rows))
    data = Data(text=(str(text),), vocab=300)
    report = build(data, tmp_path / "out", pairs_file=str(pairs), seq_len=32)
    assert (report.pairs, report.pairs_too_long, report.pairs_cut) == (3, 1, 1)
    assert build(data, tmp_path / "out", pairs_file=str(pairs), seq_len=32).reused
    report = build(data, tmp_path / "out", pairs_file=str(pairs), seq_len=500)
    assert (report.pairs_too_long, report.pairs_cut) == (0, 0)


def test_pairs_are_encoded_some_at_a_time_and_are_what_they_would_be_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, pairs = train(iter(["iron and ore "] * 9), 300), [(f"iron {n}", f"ore {n * n}") for n in range(7)]
    sizes, encode = list[int](), tokenizer.encode_batch

    def counted(texts: Sequence[str]) -> list[list[int]]:
        sizes.append(len(texts))
        return encode(texts)

    write_pairs(tmp_path / "at once", pairs, tokenizer, 64)
    monkeypatch.setattr(tokenizer, "encode_batch", counted)
    monkeypatch.setattr(pair_files, "CHUNK", 3)
    write_pairs(tmp_path / "parts", pairs, tokenizer, 64)
    assert sizes == [3, 3, 3, 3, 1, 1]
    assert read_manifest(tmp_path / "parts") == read_manifest(tmp_path / "at once")
    dataset = PairDataset(tmp_path / "parts", seq_len=64, seed=0)
    asked = {tokenizer.decode(dataset.sample(i)[0].tolist()) for i in range(7)}
    assert asked == {prompt + response for prompt, response in pairs}


def test_a_tokenizer_without_padding_pads_with_what_ends_texts(tmp_path: Path) -> None:
    backend = Backend(models.BPE({"<|end|>": 0, "<|user|>": 1, "<|assistant|>": 2, "a": 3}, []))
    backend.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    write_pairs(tmp_path / "pairs", [("a", "aa")], Tokenizer(backend), 8)
    inputs, targets = PairDataset(tmp_path / "pairs", seq_len=8, seed=0).sample(0)
    assert inputs.tolist() == [1, 3, 2, 3, 3, 0, 0, 0]
    assert targets.tolist() == [-100, -100, 3, 3, 0, -100, -100, -100]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("walk.py", True),
        ("WALK.PY.gz", True),
        ("walk.py#12", True),
        ("docs.python.org/a.md", False),
        ("a.pyx.txt#1", False),
    ],
)
def test_python_is_what_is_called_so_at_its_end(path: str, expected: bool) -> None:
    code = 'async def walk(x):\n    """Walk on from x as far as it goes."""\n'
    found = list(pairs_of(document(path, code)))
    assert found[:1] == [("What does `async def walk(x)` do?", "Walk on from x as far as it goes.")][: int(expected)]
