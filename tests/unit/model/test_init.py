"""Where weights start: what must hold of a model before its first step."""

from __future__ import annotations

import math

import pytest
import torch

from bloomery.model.init import initial_value
from bloomery.model.transformer import Transformer
from bloomery.spec.errors import InputError
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import all_parameters
from bloomery.spec.run import Optimizer

SHAPE = {"layers": 3, "hidden": 64, "heads": 4, "vocab": 512, "max_seq_len": 16}


def started(model: Model) -> Transformer:
    """The model as a run starts it."""
    module, table = Transformer(model), {parameter.name: parameter for parameter in all_parameters(model)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(model, table[name], 0, torch.float32))
    return module


def test_under_unit_stream_every_token_is_as_likely_as_any_other() -> None:
    logits = started(Model(**SHAPE, init="unit_stream"))(torch.arange(16)[None])
    torch.testing.assert_close(logits.log_softmax(-1), torch.full_like(logits, -math.log(512)))


def test_under_unit_stream_layers_start_as_the_identity_on_a_stream_of_size_one() -> None:
    module = started(Model(**SHAPE, init="unit_stream"))
    tokens = torch.arange(16)[None]
    view = module.view(tokens, 0, None, None)
    before = module.embed(tokens, view.positions_s)
    after = before
    for layer in module.blocks():
        after = layer(after, view)
    torch.testing.assert_close(after, before)
    assert float(before.detach().square().mean().sqrt()) == pytest.approx(1.0, rel=0.1)


def test_by_default_weights_are_gpt2s() -> None:
    module = started(Model(**SHAPE))
    deviations = {
        name: float(parameter.detach().std()) for name, parameter in module.named_parameters() if parameter.dim() == 2
    }
    for name, found in deviations.items():
        written = name.endswith((".o.weight", ".down.weight"))
        assert found == pytest.approx(0.02 / math.sqrt(6) if written else 0.02, rel=0.1), name


def test_what_reads_the_stream_starts_smaller_where_rates_follow_the_width() -> None:
    model = Model(**SHAPE, init="unit_stream", moe=MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=32))
    for parameter in all_parameters(model):
        plain, scaled = (initial_value(model, parameter, 0, torch.float32, scale) for scale in (1.0, 0.5))
        reads = parameter.kind == "matrix" and parameter.shape[-1] == 64
        torch.testing.assert_close(scaled, plain * 0.5 if reads else plain, rtol=1e-6, atol=0)
    assert Optimizer(scaling="mup", base_hidden=64).start_scale(64) == 1.0
    assert Optimizer(scaling="mup", base_hidden=64).start_scale(256) == 0.5
    assert Optimizer().start_scale(256) == 1.0


def test_a_head_that_is_the_embedding_cannot_start_at_zero() -> None:
    with pytest.raises(InputError, match="needs an untied head"):
        Model.checked({**SHAPE, "init": "unit_stream", "tie_embeddings": True})
