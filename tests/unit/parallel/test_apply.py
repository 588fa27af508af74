"""A stage is filled and cut over ranks layer by layer: the same values, and nothing whole is held that was cut."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from torch import nn

from bloomery.model.init import initial_value
from bloomery.parallel import apply
from bloomery.parallel.engine import Engine, build
from bloomery.parallel.mesh import Mesh, pretend
from bloomery.spec.layout import Layout
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import all_parameters

LLAMA = Model(layers=3, hidden=32, heads=4, ffn_hidden=64, vocab=48, max_seq_len=8)
TIED = LLAMA.model_copy(update={"tie_embeddings": True})
MIXTURE = LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=16)})


def built(model: Model, layout: Layout, mesh: Mesh) -> Engine:
    return build(
        model, layout, mesh, seq_len=8, global_batch=8, dtype="float32", seed=0,
        measure=lambda _: contextlib.nullcontext(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "layout"),
    [(LLAMA, "dp=2,zero=2"), (TIED, "tp=2,dp=2,zero=3"), (MIXTURE, "dp=2,zero=3"), (MIXTURE, "dp=4,ep=2,zero=3")],
)
def test_nobody_holds_a_whole_layer_once_it_is_cut(model: Model, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, still_there, fill = list[weakref.ref[nn.Parameter]](), list[int](), apply.InitialValues.fill

    def watched(initial: apply.InitialValues, module: nn.Module, prefix: str = "") -> None:
        still_there.append(sum(ref() is not None for ref in whole))
        fill(initial, module, prefix)
        whole.extend(weakref.ref(parameter) for parameter in module.parameters() if type(parameter) is nn.Parameter)

    monkeypatch.setattr(apply.InitialValues, "fill", watched)
    parsed = Layout.parse(layout)
    with pretend(parsed, 0) as mesh:
        built(model, parsed, mesh)
    still_there.append(sum(ref() is not None for ref in whole))
    assert still_there == [0] * (model.layers + 2)
    assert len(whole) > 6 * model.layers


@pytest.mark.parametrize("model", [LLAMA, TIED, MIXTURE], ids=["llama", "tied", "mixture"])
@pytest.mark.parametrize("layout", ["micro_batch=1", "dp=2,zero=3", "tp=2,dp=2,zero=2"])
def test_every_rank_has_its_rectangles_of_the_initial_values(model: Model, layout: str) -> None:
    parsed = Layout.parse(layout)
    table = {parameter.name: parameter for parameter in all_parameters(model)}
    for rank in range(parsed.world_size):
        with pretend(parsed, rank) as mesh:
            engine = built(model, parsed, mesh)
            for one in engine.shards():
                part = tuple(
                    slice(start, start + n) for start, n in zip(one.shard.offsets, one.shard.shape, strict=True)
                )
                expected = initial_value(model, table[one.shard.name], 0, torch.float32)[part]
                assert torch.equal(one.local(), expected), one.shard.name
            if model.tie_embeddings:
                (stage,) = engine.stages.values()
                assert stage.embedding is not None
                assert stage.head is not None
                assert stage.head.weight is stage.embedding.weight
