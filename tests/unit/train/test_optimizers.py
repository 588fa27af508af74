"""Muon's direction against the singular value decomposition, its size against AdamW's, and its state through a
checkpoint."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

from bloomery.ledger.clock import Clock
from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import Engine, build
from bloomery.parallel.mesh import Mesh
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train import checkpoint
from bloomery.train.optimizers import ADAMW_RMS, Optimizers, build_optimizers, orthogonal
from bloomery.train.writer import Writer

MODEL = Model(layers=2, hidden=16, heads=2, ffn_hidden=48, vocab=32, max_seq_len=8)
MUON = Optimizer(name="muon", lr=0.02, embedding_lr_factor=3.0, head_lr_factor=0.5)
STATE = {"cursor": 0, "run_hash": "a", "data_hash": "b", "guard": {}, "fence": 0}


def engine(model: Model = MODEL, start_scale: float = 1.0) -> Engine:
    """A tiny model on one process."""
    return build(
        model, Layout(micro_batch=4), Mesh(Layout(micro_batch=4), torch.device("cpu"), 0, None), seq_len=8,
        global_batch=4, dtype="float32", seed=0, measure=lambda _: contextlib.nullcontext(), start_scale=start_scale,
    )  # fmt: skip


def steps(part: Engine, optimizers: Optimizers, first: int, last: int) -> list[float]:
    """Train on tokens that a step's number decides; the losses."""
    losses = []
    for step in range(first, last):
        text = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(step))
        losses.append(float(part.forward_backward(Batch(text[:, :-1], text[:, 1:], 32))))
        optimizers.step()
        optimizers.zero_grad()
    return losses


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_a_matrix_is_turned_into_nearly_the_nearest_semi_orthogonal_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    # The singular vectors are exact; values from 1 to 1e-3 of the norm come within a fifth of one.
    diagonal = u.mT @ found @ vh.mT
    values = diagonal.diagonal(dim1=1, dim2=2)
    assert (diagonal - torch.diag_embed(values)).abs().max() < 1e-9
    assert values.min() > 0.8 and values.max() < 1.2


def test_what_muon_moves_it_moves_by_the_root_mean_square_of_adamw() -> None:
    part = engine()
    before = {name: parameter.detach().clone() for name, parameter in part.parameters().items()}
    settings = MUON.model_copy(update={"weight_decay": 0.0})
    steps(part, build_optimizers(part, settings), 0, 1)
    for name, parameter in part.parameters().items():
        moved = (parameter.detach() - before[name]).square().mean().sqrt() / settings.lr
        if part.table[name].kind == "matrix" and name != "head.weight":
            # A semi-orthogonal (m, n) matrix has min(m, n) singular values of one: root mean square 1 / sqrt(max).
            assert moved == pytest.approx(ADAMW_RMS, rel=0.2), name


def test_weights_decay_alike_under_both_and_norms_never() -> None:
    for name in ("adamw", "muon"):
        part = engine()
        before = {key: parameter.detach().clone() for key, parameter in part.parameters().items()}
        optimizers = build_optimizers(part, Optimizer(name=name, lr=0.5, weight_decay=0.1))  # type: ignore[arg-type]
        for parameter in part.parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        optimizers.step()
        for key, parameter in part.parameters().items():
            kept = 1.0 if part.table[key].kind == "norm" else 1 - 0.5 * 0.1
            torch.testing.assert_close(parameter.detach(), kept * before[key])


def test_embedding_and_head_have_their_own_learning_rates() -> None:
    part = engine()
    optimizers = build_optimizers(part, MUON)
    optimizers.set_rate(0.1)
    owner = {
        id(parameter): group.lr for one in optimizers.parts for group in one.groups for parameter in group.parameters
    }
    found = {name: owner[id(parameter)] for name, parameter in part.parameters().items()}
    assert found["embedding.weight"] == pytest.approx(0.3)
    assert found["head.weight"] == pytest.approx(0.05)
    assert found["layers.1.ffn.up.weight"] == found["norm.weight"] == pytest.approx(0.1)


def saved(folder: Path, part: Engine, optimizers: Optimizers, step: int) -> Path:
    writer = Writer(folder, part, optimizers, checkpoint.Keep(), Clock())
    writer.start({**STATE, "step": step})
    assert writer.wait()
    writer.close()
    return folder / f"step_{step:06d}"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_going_on_from_a_checkpoint_is_bitwise_going_on(name: str, tmp_path: Path) -> None:
    settings = MUON.model_copy(update={"name": name})
    whole = engine()
    optimizers = build_optimizers(whole, settings)
    steps(whole, optimizers, 0, 2)
    folder = saved(tmp_path, whole, optimizers, 2)
    expected = steps(whole, optimizers, 2, 5)
    again = engine()
    restored = build_optimizers(again, settings)
    checkpoint.load(folder, again, restored)
    assert steps(again, restored, 2, 5) == expected


def test_a_checkpoint_holds_one_moment_of_a_matrix_and_two_of_the_rest(tmp_path: Path) -> None:
    part = engine()
    optimizers = build_optimizers(part, MUON)
    steps(part, optimizers, 0, 1)
    folder = saved(tmp_path, part, optimizers, 1)
    held = set(checkpoint.read_commit(folder).tensors)
    assert {key for key in held if key.endswith("layers.0.attention.q.weight")} == {
        "layers.0.attention.q.weight",
        "momentum_buffer.layers.0.attention.q.weight",
    }
    assert {"exp_avg.head.weight", "exp_avg_sq.head.weight", "exp_avg.layers.0.ffn_norm.weight"} <= held


def moved(name: str, hidden: int, *, mup: bool) -> dict[str, list[float]]:
    """Root mean square, step by step, of what blocks write and of how far logits have moved, by what is measured."""
    model = Model(
        layers=2, hidden=hidden, heads=hidden // 16, head_dim=16, vocab=32, max_seq_len=8, init="unit_stream"
    )  # fmt: skip
    scaled = {"scaling": "mup", "base_hidden": 32} if mup else {}
    settings = Optimizer.checked({"name": name, "lr": 2e-3, "weight_decay": 0.0, **scaled})
    part, seen = engine(model, settings.start_scale(hidden)), dict[str, list[float]]()

    def watch(what: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _, inputs, output: seen.setdefault(what, []).append(size(output)))

    for number, layer in enumerate(part.stages[0].blocks()):
        watch(f"attention {number}", layer.attention)
        watch(f"feed-forward {number}", layer.ffn)
    optimizers = build_optimizers(part, settings)
    text = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        part.forward_backward(Batch(text[:, :-1], text[:, 1:], 32))
        optimizers.step()
        optimizers.zero_grad()
    with torch.no_grad():
        return {**seen, "logits": [size(part.stages[0](text[:, :-1]))]}


def size(values: torch.Tensor) -> float:
    return float(values.detach().square().mean().sqrt())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_under_mup_steps_move_blocks_and_logits_as_far_at_every_width(name: str) -> None:
    """The coordinate check of 2203.03466, appendix D.1: 8 times as wide, the same learning rate."""
    narrow, wide, plain = moved(name, 32, mup=True), moved(name, 256, mup=True), moved(name, 256, mup=False)
    assert plain["logits"][0] > 4 * narrow["logits"][0]
    for what, values in narrow.items():
        for step, value in enumerate(values):
            if what == "logits" or step > 1:  # blocks begin with zero, and the head after the first step moves them
                assert 0.5 < wide[what][step] / value < 2, (what, step)
