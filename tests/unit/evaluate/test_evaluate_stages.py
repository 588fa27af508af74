"""A run folder opened and evaluated stage by stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bloomery.data.shards import write_tokens
from bloomery.data.tokenizer import Tokenizer
from bloomery.evaluate.huggingface import import_directory
from bloomery.evaluate.opening import open_run
from bloomery.evaluate.stages import evaluate_run
from bloomery.spec.errors import InputError

Make = Callable[..., Path]


@pytest.fixture
def run_dir(hugging_face: Make, tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """An imported run with held-out shards and one alignment stage (a copy of the imported weights)."""
    folder = tmp_path / "run"
    import_directory(hugging_face(), folder)
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog. " * 60)
    fact = {"id": "a", "path": "a", "bytes": 45 * 60}
    write_tokens(folder / "data" / "heldout", [(fact, ids)], vocab=300, shard_tokens=4096, end=tokenizer.end)
    shutil.copytree(folder / "checkpoints", folder / "align" / "sft" / "checkpoints")
    return folder


@pytest.mark.parametrize("trained_on", [False, True])
def test_an_imported_model_never_was_untrained_here(run_dir: Path, trained_on: bool) -> None:
    if trained_on:
        (run_dir / "job.json").write_text("{}")
    result = evaluate_run(run_dir, max_tokens=64)
    assert set(result["completions"][0]["texts"]) == {"pretrain", "sft"} and "before" not in result


def test_every_stage_is_evaluated_and_written(run_dir: Path) -> None:
    (run_dir / "job.json").write_text("{}")
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "step_000000").rename(checkpoints / "step_000002")
    seen = list[tuple[str, int, int]]()
    looked = evaluate_run(run_dir, max_tokens=300)
    assert not (run_dir / "evaluation.json").exists()
    result = evaluate_run(run_dir, progress=lambda *state: seen.append(state))
    assert json.loads((run_dir / "evaluation.json").read_text()) == result
    assert looked["before"]["tokens"] < result["before"]["tokens"]
    assert result["before"]["heldout_loss"] != result["pretrain"]["heldout_loss"]
    assert result["align"]["sft"] == result["pretrain"]
    first = result["completions"][0]
    assert set(first["texts"]) == {"before", "pretrain", "sft"}
    assert first["texts"]["sft"] == first["texts"]["pretrain"] != first["texts"]["before"]
    assert {stage for stage, _, _ in seen} == {"before", "pretrain", "sft"}


def test_the_untrained_model_is_the_same_each_time(run_dir: Path) -> None:
    one, two = (open_run(run_dir).model("before", device="cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_damaged_checkpoint_is_not_a_stage(run_dir: Path) -> None:
    assert open_run(run_dir).last_stage() == "sft"
    (run_dir / "align" / "sft" / "checkpoints" / "step_000000" / "rank_00000.safetensors").write_bytes(b"torn")
    opened = open_run(run_dir)
    assert opened.last_stage() == "pretrain"
    assert "rank_00000.safetensors" in opened.skipped[0]


@pytest.mark.parametrize("left", [True, False])
def test_a_checkpoint_that_training_has_removed_since_is_the_newest_of_now(run_dir: Path, left: bool) -> None:
    opened, checkpoints = open_run(run_dir), run_dir / "checkpoints"
    expected = list(opened.model("pretrain", device="cpu").parameters())
    (checkpoints / "step_000000").rename(checkpoints / ("step_000009" if left else "rewound_step_000000"))
    if left:
        found = opened.model("pretrain", device="cpu").parameters()
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    else:
        with pytest.raises(InputError, match="step_000000: removed meanwhile, and no other checkpoint is left"):
            opened.model("pretrain", device="cpu")


def test_a_run_whose_only_checkpoint_is_damaged_says_what_is_wrong_with_it(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "align")
    (run_dir / "checkpoints" / "step_000000" / "rank_00000.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"no checkpoint that verifies \(.*rank_00000.safetensors: missing or torn"):
        open_run(run_dir).last_stage()


def test_unknown_stages_and_folders_are_refused(run_dir: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'pretrain'"):
        open_run(run_dir).model("pretrian")
    with pytest.raises(InputError, match="did you mean 'run'"):
        open_run(run_dir.parent / "runn")
    shutil.rmtree(run_dir / "checkpoints")
    shutil.rmtree(run_dir / "align")
    with pytest.raises(InputError, match="train first"):
        evaluate_run(run_dir)
