"""`data build` leaves trained runs their tokenizer; `data inspect` checks every file and shows what training saw."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bloomery.cli import main as command_line
from bloomery.cluster.prepare import prepare_pretraining
from bloomery.cluster.supervisor import run_lock
from bloomery.data.shards import TokenDataset
from bloomery.data.tokenizer import load
from bloomery.spec.catalog import read_run
from bloomery.spec.commit import FORMAT, IMPORTED, Commit, write_commit
from bloomery.spec.files import to_yaml
from bloomery.spec.layout import Layout

Called = Callable[..., int]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Called:
    """The exit code of `bloomery data` called in this process and in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["bloomery", "data", *map(str, arguments)])
        try:
            command_line.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A tiny run on a little text."""
    for name, words in (("text", "Iron is made from ore with charcoal. "), ("other", "Steel holds less carbon. ")):
        (tmp_path / name).mkdir()
        for number in range(12):
            (tmp_path / name / f"{number}.txt").write_text(f"Number {number}. {words}" * 30)
    values = {
        "name": "tiny",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": 600, "max_seq_len": 64},
        "cluster": "this-machine",
        "layout": {},
        "train": {"seq_len": 64, "global_batch": 4, "steps": 2, "seed": 5},
        "data": {"vocab": 400, "text": ["text"]},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(values))
    return path


def begun(run_file: Path) -> Path:
    """As if the run had been trained for some steps. Returns its folder."""
    folder, _ = prepare_pretraining(read_run(run_file), world_size=None, fresh=False)
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    return folder


def trained(run_file: Path) -> Path:
    """As if the run had been trained. Returns its folder."""
    folder = begun(run_file)
    (folder / "events.jsonl").write_text('{"event": "finished", "step": 2}\n')
    return folder


def test_a_trained_run_keeps_its_tokenizer_unless_told_otherwise(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("build", run_file) == 0
    tokenizer = trained(run_file) / "data" / "tokenizer.json"
    before = tokenizer.read_bytes()
    assert called("build", run_file, "--text", "other") == 0
    assert "kept" in capsys.readouterr().out
    assert tokenizer.read_bytes() == before
    assert called("build", run_file, "--set", "data.vocab=500") == 2
    assert "tiny.yaml: data.vocab: checkpoints in runs/tiny were trained with" in capsys.readouterr().err
    assert called("build", run_file, "--text", "other", "--fresh") == 0
    assert tokenizer.read_bytes() != before


def test_a_run_that_goes_on_keeps_the_shards_it_began_with_unless_told_otherwise(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("build", run_file) == 0
    manifest = begun(run_file) / "data" / "train" / "manifest.json"
    before = manifest.read_bytes()
    assert called("build", run_file, "--text", "other") == 2
    assert "runs/tiny/data: training in runs/tiny is to go on with these shards" in capsys.readouterr().err
    Path("text/0.txt").write_text("More of it than there was. " * 90)
    assert called("build", run_file) == 2
    assert manifest.read_bytes() == before
    assert called("build", run_file, "--fresh") == 0
    assert manifest.read_bytes() != before


def test_a_damaged_build_is_mended_under_a_run_that_goes_on(called: Called, run_file: Path) -> None:
    assert called("build", run_file) == 0
    manifest = begun(run_file) / "data" / "train" / "manifest.json"
    before = json.loads(manifest.read_text())["content_hash"]
    (manifest.parent / "tokens_000.bin").write_bytes(b"")
    assert called("build", run_file) == 0
    assert json.loads(manifest.read_text())["content_hash"] == before


@pytest.mark.parametrize("stage", [".", "align/sft"])
def test_nothing_is_built_while_the_run_or_a_stage_of_it_trains(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    assert called("build", run_file) == 0
    place = trained(run_file) / stage
    with run_lock(place):
        assert called("build", run_file, "--text", "other", "--fresh") == 2
        assert "another process" in capsys.readouterr().err
        assert called("build", run_file, "--text", "other", "--out", "shards") == 0


def test_what_is_refused_leaves_no_folder_behind(called: Called, run_file: Path) -> None:
    assert called("build", run_file, "--text", "nowhere") == 2
    assert not Path("runs").exists()


def test_data_may_lie_in_the_folder_of_their_run(called: Called, run_file: Path) -> None:
    assert called("build", run_file, "--set", "data.folder=runs/tiny") == 0


def test_shards_elsewhere_have_a_tokenizer_of_their_own(called: Called, run_file: Path) -> None:
    assert called("build", run_file) == 0
    before = (trained(run_file) / "data" / "tokenizer.json").read_bytes()
    assert called("build", run_file, "--text", "other", "--out", "shards") == 0
    assert Path("shards/tokenizer.json").read_bytes() != before


def test_an_imported_model_keeps_the_tokenizer_it_came_with(called: Called, run_file: Path) -> None:
    """Its folder has a tokenizer and a checkpoint, and neither shards nor a job."""
    assert called("build", run_file) == 0
    folder = trained(run_file)
    before = (folder / "data" / "tokenizer.json").read_bytes()
    for name in ("train", "heldout", "pairs"):
        shutil.rmtree(folder / "data" / name)
    (folder / "data" / "report.json").unlink()
    (folder / "job.json").unlink()
    imported = folder / "run.yaml"
    changes = ("--set", "data.vocab=8192", "--set", "data.text=[other]")
    imported.write_text(imported.read_text().partition("\n")[2])
    assert called("build", imported, *changes) == 0
    assert (folder / "data" / "tokenizer.json").read_bytes() == before
    dataset, tokenizer = TokenDataset(folder / "data" / "train", seq_len=64, seed=0), load(folder / "data")
    assert "Steel holds" in tokenizer.decode(dataset.sample(0)[0].tolist())


def test_the_tokenizer_of_imported_weights_stays_even_where_another_is_asked_for(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("build", run_file) == 0
    tokenizer = trained(run_file) / "data" / "tokenizer.json"
    before, weights = tokenizer.read_bytes(), Path("runs/tiny/checkpoints/step_000000")
    weights.mkdir()
    made = Commit(
        format=FORMAT, step=0, cursor=0, run_hash=IMPORTED, data_hash=IMPORTED, layout=Layout(), guard={}, tensors={},
        files={},
    )  # fmt: skip
    write_commit(weights, made)
    assert called("build", run_file, "--text", "other", "--fresh") == 2
    assert "tokenizer.json: the weights imported to runs/tiny need the tokenizer" in capsys.readouterr().err
    assert tokenizer.read_bytes() == before
    assert called("build", run_file, "--text", "other", "--fresh", "--out", "shards") == 0


def test_a_tokenizer_that_another_run_s_build_took_away_is_made_again(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--set", "data.folder=shared")
    assert called("build", run_file, *shared) == 0
    before = Path("shared/tokenizer.json").read_bytes()
    run_file.write_text(run_file.read_text().replace("data:", "data:\n  folder: shared"))
    trained(run_file)
    assert called("build", run_file, "--set", "name=other", "--set", "data.vocab=300") == 0
    assert called("build", run_file) == 2
    assert "`bloomery data build --fresh` of this run makes it again" in capsys.readouterr().err
    assert called("build", run_file, "--fresh") == 0
    assert Path("shared/tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("name", ["pairs/tokens.bin", "pairs/pairs.jsonl", "tokenizer.json", "heldout/documents.jsonl"])
def test_a_flipped_byte_is_found_wherever_it_is(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert called("build", run_file) == 0
    assert called("inspect", "runs/tiny/data") == 0
    path = Path("runs/tiny/data") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert called("inspect", "runs/tiny/data") == 2
    assert name in capsys.readouterr().err


def test_inspect_refuses_shards_beside_another_tokenizer(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("build", run_file) == 0
    assert called("build", run_file, "--text", "other", "--out", "shards") == 0
    for name in ("tokenizer.json", "SHA256SUMS"):
        shutil.copy(Path("shards") / name, Path("runs/tiny/data") / name)
    capsys.readouterr()
    assert called("inspect", "runs/tiny/data") == 2
    assert "report.json: made with another tokenizer than the one there" in capsys.readouterr().err


def test_a_damaged_build_is_built_again_and_that_is_said(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("build", run_file) == 0
    shutil.rmtree("runs/tiny/data/pairs")
    assert called("build", run_file) == 0
    assert "(built again: runs/tiny/data/pairs: no token shards here)" in capsys.readouterr().out
    assert called("inspect", "runs/tiny/data") == 0


def test_a_sample_is_the_one_that_the_run_was_trained_on(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("build", run_file) == 0
    data = trained(run_file) / "data"
    capsys.readouterr()
    assert called("inspect", data, "--sample", "3", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    met = TokenDataset(data / "train", seq_len=64, seed=5)
    assert shown["text"] == load(data).decode(met.sample(3)[0].tolist())
    assert (shown["seed"], shown["seq_len"]) == (5, 64)
    assert called("inspect", data, "--sample", "3", "--seed", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] != shown["text"]


def test_an_empty_name_of_text_is_refused(called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("build", run_file, "--text", "") == 2
    assert "--text: a file or folder is expected, this name is empty" in capsys.readouterr().err


def test_what_is_shown_adds_up_and_says_how_many_more_there_are(
    called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        Path(f"text/{number}.parquet").write_text("x")
        Path(f"text/short{number}.txt").write_text(f"short {number}")
    assert called("build", run_file) == 0
    lines = capsys.readouterr().out.splitlines()
    beginnings = ("files read", "  passed over: not a kind", "documents read", "  dropped: too short", "text kept")
    assert all(line.startswith(words) for line, words in zip(lines[1:], beginnings, strict=False))
    assert "0.parquet and 2 more" in lines[2]
    assert "15" in lines[3] and ".txt and 2 more" in lines[4]


def test_pairs_that_are_not_taken_are_said(called: Called, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pairs.jsonl").write_text("".join(f'{{"prompt": "{n % 9}", "response": "b"}}\n' for n in range(12)))
    assert called("build", run_file, "--set", "align=[{pairs: pairs.jsonl, max_pairs: 7}]") == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["pairs", "7", "yours"] in shown
    assert ["dropped:", "exact", "duplicate", "3"] in shown
    assert ["dropped:", "beyond", "the", "limit", "2", "of", "align.0.max_pairs", "7"] in shown
