"""The most bytes alive in a real step, as every run measures them, are those that the performance model predicts."""

from __future__ import annotations

import contextlib

import pytest
import torch

from bloomery.parallel import mesh as meshes
from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import build
from bloomery.perf.case import Case
from bloomery.perf.memory import peak_bytes
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.run import Optimizer
from bloomery.train.optimizers import build_optimizers
from bloomery.train.profiled_step import allocations, held_bytes, most_bytes, profiler

SEQ_LEN, GLOBAL_BATCH = 256, 8
LLAMA = Model(layers=6, hidden=192, heads=4, ffn_hidden=512, vocab=4096, max_seq_len=SEQ_LEN)
GPT = Model(
    layers=4, hidden=256, heads=4, ffn_hidden=1024, vocab=2048, max_seq_len=SEQ_LEN, activation="gelu",
    norm="layernorm", position="learned", bias=True, tie_embeddings=True,
)  # fmt: skip
MIXTURE = Model(
    layers=4, hidden=128, heads=4, ffn_hidden=384, vocab=2048, max_seq_len=SEQ_LEN,
    moe=MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=192),
)  # fmt: skip


def measured_bytes(model: Model, layout: Layout) -> int:
    """Of the second step of one process."""
    mesh = meshes.start(layout, torch.device("cpu"), None)
    try:
        engine = build(
            model, layout, mesh, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, dtype="float32", seed=0,
            measure=lambda _: contextlib.nullcontext(),
        )  # fmt: skip
        optimizers = build_optimizers(engine, Optimizer())
        tokens = torch.randint(0, model.vocab, (GLOBAL_BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(0))

        def step() -> None:
            engine.statistics(engine.forward_backward(Batch(tokens, tokens, tokens.numel())))
            engine.update(optimizers)
            optimizers.zero_grad()

        step()
        held = held_bytes(engine, optimizers)
        with profiler(torch.device("cpu"), memory=True) as profiled:
            step()
        return held + most_bytes(allocations(profiled))
    finally:
        meshes.stop(mesh)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("model", "micro_batch", "within"),
    [(LLAMA, 2, 0.03), (LLAMA, 8, 0.03), (GPT, 8, 0.05), (MIXTURE, 8, 0.07)],
    ids=["llama-2", "llama-8", "gpt", "mixture"],
)
def test_the_peak_is_the_predicted_one(model: Model, micro_batch: int, within: float, recompute: str) -> None:
    layout = Layout.parse(f"micro_batch={micro_batch},recompute={recompute}")
    case = Case.of(
        model, catalog.cluster("this-machine"), LayoutBatch.of([layout]), global_batch=GLOBAL_BATCH, seq_len=SEQ_LEN,
        dtype="float32",
    )  # fmt: skip
    reserved = case.accelerator.reserved_bytes
    assert peak_bytes(case)[0] - reserved == pytest.approx(measured_bytes(model, layout), rel=within)


def test_what_a_thread_without_a_profiler_frees_is_gone_when_its_address_comes_again() -> None:
    assert most_bytes([(0, 100, 1), (1, 100, 2), (2, -100, 2), (3, 50, 1)]) == 200
    assert most_bytes([(0, 100, 1), (1, 100, 1), (2, 100, 1)]) == 100
    assert most_bytes([(0, -100, 7), (1, 30, 1)]) == 30


def test_what_a_message_was_made_of_is_gone_when_the_message_has_ended() -> None:
    sent, later = (0, 100, 1), (20, 50, 2)
    assert most_bytes([sent, later, (30, -50, 2)], [(5, 10)]) == 100
    assert most_bytes([sent, later, (30, -50, 2)], [(5, 25)]) == 150
    assert most_bytes([sent, (8, 70, 1), (9, 50, 2), (30, -70, 1), (30, -50, 2)], [(5, 25)]) == 120
    assert most_bytes([sent, later, (30, -50, 2), (40, -100, 1)], [(5, 10)]) == 150  # said to be freed later
