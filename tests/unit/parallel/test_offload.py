"""Offloaded activations: the same bits as kept ones, and two layers on the device at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bloomery.model.transformer import Transformer
from bloomery.parallel.offload import TINY_BYTES, HostLink, _Luggage, _Trip, offload_layers
from bloomery.parallel.recompute import recompute_layers, recompute_outputs
from bloomery.parallel.tally import SavedTally
from bloomery.spec.model import MixtureOfExperts, Model

LLAMA = Model(layers=4, hidden=32, heads=4, kv_heads=2, ffn_hidden=64, vocab=64, max_seq_len=8)
GPT = LLAMA.model_copy(update={"activation": "gelu", "norm": "layernorm", "position": "learned", "bias": True})
MIXTURE = LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=16)})
TOKENS = torch.arange(64).view(8, 8)


def built(model: Model, recompute: Callable[[Transformer], None] | None, offload: bool) -> Transformer:
    torch.manual_seed(0)
    module = Transformer(model).double()
    if recompute is not None:
        recompute(module)
    if offload:
        offload_layers(module, HostLink(torch.device("cpu")))
    return module


def run(module: Transformer) -> tuple[Tensor, dict[str, Tensor], SavedTally]:
    """Logits, gradients of two micro-batches in flight, the last to go forward first to go back, and what was kept."""
    tally = SavedTally()
    with tally.over([module]):
        one, other = module(TOKENS), module(TOKENS.flip(0))
    other.square().sum().backward()
    one.square().sum().backward()
    return one.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, tally


@pytest.mark.parametrize("recompute", [None, recompute_outputs, recompute_layers], ids=["none", "selective", "full"])
@pytest.mark.parametrize("model", [LLAMA, GPT, MIXTURE], ids=["llama", "gpt", "mixture"])
def test_it_gives_the_same_bits_and_keeps_nothing_on_the_device(
    model: Model, recompute: Callable[[Transformer], None] | None
) -> None:
    logits, gradients, kept = run(built(model, recompute, offload=False))
    again, found, moved = run(built(model, recompute, offload=True))
    assert torch.equal(logits, again)
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    # What stays is tiny, tensor by tensor; a copy on the host is counted among what is kept.
    assert moved.layers == pytest.approx(kept.layers, rel=1e-6)
    assert moved.offloaded > 0.9 * kept.layers
    assert kept.offloaded == 0


def test_two_layers_are_on_the_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trips: list[_Trip] = []
    most, copies = 0, 0
    pack, fetch = _Trip.pack, _Luggage.fetch

    def packed(trip: _Trip, tensor: Tensor) -> object:
        if trip not in trips:
            trips.append(trip)
        return counted(pack(trip, tensor))

    def fetched(luggage: _Luggage) -> Tensor:
        nonlocal copies
        copies += luggage.flat is None
        return counted(fetch(luggage))

    def counted(value):  # type: ignore[no-untyped-def]
        nonlocal most
        here = sum(any(one.flat is not None for one in trip.luggage.values()) for trip in trips)
        most = max(most, here)
        return value

    monkeypatch.setattr(_Trip, "pack", packed)
    monkeypatch.setattr(_Luggage, "fetch", fetched)
    run(built(LLAMA, None, offload=True))
    assert len(trips) == 2 * LLAMA.layers
    assert most == 2
    storages = len({id(one) for trip in trips for one in trip.luggage.values()})
    assert storages == 0, "all is let go in the end"
    assert copies > 0


def test_weights_shared_tables_and_tiny_tensors_stay() -> None:
    module = built(LLAMA, None, offload=True)
    sizes = []
    out = HostLink.out

    def watched(link: HostLink, flat: Tensor) -> object:
        sizes.append(flat.numel() * flat.element_size())
        return out(link, flat)

    HostLink.out = watched  # type: ignore[method-assign,assignment]
    try:
        module(TOKENS)
    finally:
        HostLink.out = out  # type: ignore[method-assign]
    tokens = TOKENS.numel() * 8
    # Of each layer: norms' inputs and outputs, queries, keys, values, output, four of the feed-forward; log-sum-exp.
    expected = [32, 32, 32, 32, 32, 16, 16, 32, 64, 64, 64, 64]
    assert min(sizes) >= TINY_BYTES
    each = sorted(size // tokens for size in sizes if size // tokens > 4)
    assert each == sorted(expected * LLAMA.layers)


def test_without_gradients_nothing_moves() -> None:
    module = built(LLAMA, None, offload=True)
    with torch.no_grad():
        expected = built(LLAMA, None, offload=False)(TOKENS)
        assert torch.equal(module(TOKENS), expected)
