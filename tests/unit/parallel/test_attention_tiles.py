"""Tiles put together are attention over all keys; matrix products and the kernel agree on one tile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from bloomery.model.view import View
from bloomery.parallel import attention_tiles
from bloomery.parallel.attention_tiles import (
    Tile,
    attend_by_flash,
    attend_plainly,
    attend_tile,
    flash_gradients,
    merge,
    plain_gradients,
    tile_gradients,
)

BATCH, HEADS, KV_HEADS, SEQ, WIDTH = 2, 4, 2, 8, 6
ALL, EARLY, LATE = slice(None), slice(0, 4), slice(4, 8)
CAUSAL = [Tile(EARLY, EARLY, causal=True), Tile(LATE, LATE, causal=True), Tile(LATE, EARLY)]
SCALE = 0.3


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (torch.randn(BATCH, n, SEQ, WIDTH, generator=generator, dtype=torch.float64) for n in heads)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def in_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    out, log_sum = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    for tile in tiles:
        merge(out, log_sum, tile, *attend_tile(q, k, v, tile, SCALE))
    return out, log_sum


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True, scale=SCALE)


def masked() -> tuple[Tensor, list[Tile]]:
    """A mask under which some queries see none of a tile's keys, and tiles of it."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 2, 2, 2]])
    bias = View(torch.arange(SEQ), documents_bs=documents).bias(torch.arange(SEQ), torch.float64)
    tiles = [Tile(q, k, bias=bias[:, :, q, k]) for q in (EARLY, LATE) for k in (LATE, EARLY)]
    return bias, tiles


@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_tiles_in_any_order_are_attention_over_all_keys(mask: str) -> None:
    bias, tiles = (None, CAUSAL) if mask == "causal" else masked()
    q, k, v = inputs()
    for order in (tiles, tiles[::-1]):
        torch.testing.assert_close(in_tiles(q, k, v, order)[0], whole(q, k, v, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_gradients_of_tiles_add_up_to_those_of_the_whole(mask: str) -> None:
    bias, tiles = (None, CAUSAL) if mask == "causal" else masked()
    q, k, v = (x.requires_grad_() for x in inputs())
    weights = torch.randn(BATCH, HEADS, SEQ, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((whole(q, k, v, bias) * weights).sum(), (q, k, v))
    with torch.no_grad():
        out, log_sum = in_tiles(q, k, v, tiles)
        found = [torch.zeros_like(x) for x in (q, k, v)]
        for tile in tiles:
            parts = tile_gradients(weights, q, k, v, out, log_sum, tile, SCALE)
            for total, part, rows in zip(found, parts, (tile.queries, tile.keys, tile.keys), strict=True):
                total[:, :, rows] += part
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("kind", ["whole", "causal", "bias"])
def test_matrix_products_do_what_the_kernel_does(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    bias = masked()[0].clamp(min=-1e30).to(dtype) if kind == "bias" else None
    tile = Tile(ALL, ALL, causal=kind == "causal", bias=bias)
    q, k, v = inputs(dtype)
    out, log_sum = attend_tile(q, k, v, tile, None)
    gradient = torch.ones_like(out)
    pairs = [*zip((out, log_sum), attend_plainly(q, k, v, tile, None), strict=True)]
    known = (gradient, q, k, v, out, log_sum, tile, None)
    pairs += zip(tile_gradients(*known), plain_gradients(*known), strict=True)
    for kernel, plain in pairs:
        assert kernel.dtype == plain.dtype
        torch.testing.assert_close(kernel, plain, rtol=tolerance, atol=tolerance)


def test_matrix_products_stay_wide_under_autocast() -> None:
    q, k, v = inputs(torch.bfloat16)
    tile = Tile(ALL, ALL, causal=True)
    out, log_sum = attend_plainly(q, k, v, tile, None)
    known = (torch.ones_like(out), q, k, v, out, log_sum, tile, None)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [*zip((out, log_sum), attend_plainly(q, k, v, tile, None), strict=True)]
        narrow = plain_gradients(*known)
    for wide, other in [*pairs, *zip(plain_gradients(*known), narrow, strict=True)]:
        assert wide.dtype == other.dtype
        assert torch.equal(wide, other)


def kernel_of_a_gpu(q: Tensor, k: Tensor, v: Tensor, _: float, causal: bool, *, scale: float) -> tuple[Tensor, ...]:
    """As CUDA's, which refuses what it cannot read, and gives more than is asked."""
    assert all(x.shape[-1] == 8 for x in (q, k, v)), "multiples of 8"
    return (*attend_plainly(q, k, v, Tile(ALL, ALL, causal), scale), torch.empty(0))


def its_gradients(*known: Any, scale: float) -> tuple[Tensor, ...]:
    """The same of its backward pass."""
    assert all(x.shape[-1] == 8 and x.is_contiguous() for x in known[:5]), "multiples of 8"
    return plain_gradients(*known[:6], Tile(ALL, ALL, known[11]), scale)


@pytest.mark.parametrize("scale", [None, SCALE])
def test_heads_are_padded_to_a_width_that_a_gpus_kernel_takes(
    scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {"": kernel_of_a_gpu, "_backward": its_gradients}
    aten = SimpleNamespace(**{f"_scaled_dot_product_flash_attention{name}": one for name, one in kernels.items()})
    monkeypatch.setattr(attention_tiles, "aten", aten)
    tile, (q, k, v) = Tile(ALL, ALL, causal=True), inputs()
    out, log_sum = attend_by_flash(q, k, v, tile, scale)
    known = (torch.randn_like(out), q, k, v, out, log_sum, tile, scale)
    pairs = [*zip((out, log_sum), attend_plainly(q, k, v, tile, scale), strict=True)]
    pairs += zip(flash_gradients(*known), plain_gradients(*known), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "generation", "taken"),
    [(72, (8, 0), True), (256, (9, 0), True), (264, (9, 0), False), (64, (7, 5), False)],
)
def test_what_a_gpus_kernel_does_not_take_is_left_to_matrix_products(
    width: int, generation: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_tiles, "_cut", lambda q, k, v, _: (q, k, v))  # here such tensors cannot be sliced
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: generation)
    monkeypatch.setattr(attention_tiles, "attend_by_flash", lambda *_: (True, True))
    monkeypatch.setattr(attention_tiles, "attend_plainly", lambda *_: (False, False))
    with FakeTensorMode(), torch.device("cuda"):
        q = torch.empty(1, 2, 8, width, dtype=torch.bfloat16)
        assert attend_tile(q, q, q, Tile(ALL, ALL), None)[0] is taken
