"""The running average of the weights against its formula, in use and out of it, and through a checkpoint."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from bloomery.ledger.clock import Clock
from bloomery.model.transformer import Transformer
from bloomery.model.weights import load_weights
from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import Engine, build
from bloomery.parallel.mesh import Mesh
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Averaging, Optimizer
from bloomery.train import checkpoint
from bloomery.train.optimizers import Optimizers, build_optimizers
from bloomery.train.writer import Writer

MODEL = Model(layers=1, hidden=16, heads=2, ffn_hidden=48, vocab=32, max_seq_len=8)
NAME, STEPS = "layers.0.ffn.up.weight", 10
EMA = Averaging(method="ema", decay=0.6, every=2, start=0.3)
UNIFORM = Averaging(method="uniform", every=3, start=0.1)


def training(averaging: Averaging) -> tuple[Engine, Optimizers]:
    layout = Layout(micro_batch=4)
    engine = build(
        MODEL, layout, Mesh(layout, torch.device("cpu"), 0, None), seq_len=8, global_batch=4, dtype="float32", seed=0,
        measure=lambda _: contextlib.nullcontext(),
    )  # fmt: skip
    return engine, build_optimizers(engine, Optimizer(lr=0.05), averaging, STEPS)


def steps(engine: Engine, optimizers: Optimizers, first: int, stop: int) -> list[torch.Tensor]:
    """Train, and what one matrix was after each step."""
    seen = []
    for step in range(first, stop):
        text = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(step))
        engine.forward_backward(Batch(text[:, :-1], text[:, 1:], 32))
        optimizers.step()
        optimizers.zero_grad()
        optimizers.average.update(step + 1)
        seen.append(engine.parameters()[NAME].detach().clone())
    return seen


def test_an_average_is_that_of_the_weights_there_were() -> None:
    engine, optimizers = training(EMA)
    after = steps(engine, optimizers, 0, STEPS)
    expected = after[2].lerp(after[4], 0.5)  # of step 3, the first, and 5: a mean until that is a smaller share
    for done in (7, 9):
        expected = 0.6 * expected + 0.4 * after[done - 1]
    torch.testing.assert_close(optimizers.average.kept[engine.parameters()[NAME]], expected)

    engine, optimizers = training(UNIFORM)
    after = steps(engine, optimizers, 0, STEPS)
    expected = torch.stack([after[done - 1] for done in (1, 4, 7, 10)]).mean(0)
    torch.testing.assert_close(optimizers.average.kept[engine.parameters()[NAME]], expected)


def test_a_slow_average_of_a_short_run_is_the_mean_of_its_weights() -> None:
    engine, optimizers = training(Averaging(method="ema"))
    after = steps(engine, optimizers, 0, STEPS)
    torch.testing.assert_close(optimizers.average.kept[engine.parameters()[NAME]], torch.stack(after).mean(0))


def test_it_takes_the_weights_place_and_gives_it_back() -> None:
    engine, optimizers = training(EMA)
    steps(engine, optimizers, 0, 2)
    assert not optimizers.average.begun
    (*_, last) = steps(engine, optimizers, 2, 6)
    weight = engine.parameters()[NAME]
    average = optimizers.average.kept[weight].clone()
    with optimizers.average.in_use():
        assert torch.equal(weight, average)
    assert torch.equal(weight, last)
    assert torch.equal(optimizers.average.kept[weight], average)
    assert not torch.equal(last, average)


@pytest.mark.parametrize("begun", [2, 5])
def test_a_checkpoint_carries_it_and_is_used_by_it(tmp_path: Path, begun: int) -> None:
    engine, optimizers = training(EMA)
    (*_, last) = steps(engine, optimizers, 0, begun)
    average = optimizers.average.kept.get(engine.parameters()[NAME], last).clone()
    writer = Writer(tmp_path, engine, optimizers, checkpoint.Keep(), Clock())
    writer.start({"cursor": 0, "run_hash": "", "data_hash": "", "guard": {}, "fence": 0, "step": begun})
    assert writer.wait()
    writer.close()
    folder = tmp_path / f"step_{begun:06d}"
    expected = steps(engine, optimizers, begun, STEPS)
    plain = Transformer(MODEL)
    load_weights(folder, plain)
    assert torch.equal(dict(plain.named_parameters())[NAME], average)
    aligned, _ = training(Averaging())
    checkpoint.load(folder, aligned, None)
    assert torch.equal(aligned.parameters()[NAME], average)
    again, restored = training(EMA)
    checkpoint.load(folder, again, restored)
    assert torch.equal(again.parameters()[NAME], last)
    assert torch.equal(torch.stack(steps(again, restored, begun, STEPS)), torch.stack(expected))
    ours, theirs = (o.average.kept[e.parameters()[NAME]] for e, o in ((engine, optimizers), (again, restored)))
    assert torch.equal(ours, theirs)
