"""Selective recomputation: the same numbers as without, fewer bytes kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from bloomery.model.transformer import Transformer
from bloomery.parallel.recompute import made_again, recompute_outputs
from bloomery.parallel.tally import SavedTally
from bloomery.spec.model import MixtureOfExperts, Model

LLAMA = Model(layers=2, hidden=32, heads=4, kv_heads=2, ffn_hidden=64, vocab=64, max_seq_len=8)
GPT = LLAMA.model_copy(update={"activation": "gelu", "norm": "layernorm", "position": "learned", "bias": True})
MIXTURE = LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=32, shared_experts=1)})


def run(model: Model, selective: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients, and bytes kept in the layers."""
    torch.manual_seed(0)
    module, tally = Transformer(model).double(), SavedTally()
    if selective:
        recompute_outputs(module)
    tokens = torch.arange(16).view(2, 8)
    with tally.over([module]):
        logits = module(tokens)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, tally.layers


@pytest.mark.parametrize(
    ("model", "share"), [(LLAMA, 0.65), (GPT, 0.65), (MIXTURE, 0.7)], ids=["llama", "gpt", "mixture"]
)
def test_it_gives_the_same_numbers_and_keeps_less(model: Model, share: float) -> None:
    (logits, gradients, kept), (again, found, less) = run(model, False), run(model, True)
    assert torch.equal(logits, again)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=name)
    assert less < share * kept


def test_a_value_is_freed_after_the_forward_pass_and_made_once_in_the_backward() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(None)
        return 2 * x

    x = torch.ones(3, requires_grad=True)
    value = made_again(double, x)
    seen = weakref.ref(value)
    result = value.exp().sum()
    del value
    gc.collect()
    assert seen() is None
    result.backward()
    assert len(calls) == 2
    assert torch.allclose(x.grad, 2 * torch.full((3,), 2.0).exp())


def test_a_view_of_its_input_is_refused() -> None:
    with pytest.raises(AssertionError, match="view of an input"):
        made_again(lambda x: x.view(3, 1), torch.ones(3, requires_grad=True))


def test_nothing_is_remembered_without_gradients() -> None:
    with torch.no_grad():
        assert not hasattr(made_again(torch.exp, torch.ones(3)), "recipe")
