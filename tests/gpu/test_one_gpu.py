"""What one GPU computes: the same as a CPU in float64, compiled or not, with whatever a layout may ask of one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import MODELS, Case, train_case
from torch import nn

from bloomery.model.mixture import Experts
from bloomery.model.view import View, attend
from bloomery.parallel.attention_tiles import Tile, attend_plainly, attend_tile, plain_gradients, tile_gradients
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.train.adamw import AdamW, Group

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = [
    *(Case(model, "micro_batch=4") for model in MODELS),
    *(Case("llama", "micro_batch=8", mask=mask) for mask in ("prefix", "documents", "both")),
    Case("llama", "micro_batch=4,recompute=full"),
    Case("gpt", "micro_batch=4,recompute=selective"),
    Case("llama", "micro_batch=2,offload=activations"),
    Case("deepseek", "micro_batch=2,recompute=full,offload=activations"),
    Case("llama", "micro_batch=4", masked=True, stable=True),
    Case("deepseek", "micro_batch=4", optimizer="muon"),
    Case("tied", "micro_batch=4", ramp=True),
]


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, norms, held-out losses and final parameters. Sums are in another order, and AdamW's first steps go by the
    sign of gradients that are almost nothing: hence more room for a parameter."""
    for key in ("losses", "norms", "held_out"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-9, err_msg=key)
    for one, other in zip(found["shards"], expected["shards"], strict=True):
        assert one["name"] == other["name"]
        np.testing.assert_allclose(one["value"], other["value"], rtol=1e-8, atol=1e-11, err_msg=one["name"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_gpu_equals_a_cpu(case: Case) -> None:
    same(train_case(case, 0, None, device="cuda"), train_case(case, 0, None))


@pytest.mark.parametrize("model", ["llama", "gpt", "latent"])
def test_compiled_layers_compute_the_same(model: str) -> None:
    case = Case(model, "micro_batch=4")
    found = train_case(case, 0, None, device="cuda", compiled=True)
    same(found, train_case(case, 0, None, device="cuda"))


@pytest.mark.parametrize("model", ["llama", "gpt", "qk-norm", "mixtral", "latent"])
def test_bfloat16_stays_near_float32(model: str) -> None:
    case = Case(model, "micro_batch=4", dtype="bfloat16")
    narrow, wide = (train_case(one, 0, None, device="cuda") for one in (case, replace(case, dtype="float32")))
    np.testing.assert_allclose(narrow["losses"], wide["losses"], rtol=0.02)


@pytest.mark.parametrize("model", ["llama", "gpt", "qk-norm", "latent"])
def test_compiled_bfloat16_stays_near_float32(model: str) -> None:
    case = Case(model, "micro_batch=4", dtype="bfloat16")
    narrow = train_case(case, 0, None, device="cuda", compiled=True)
    wide = train_case(replace(case, dtype="float32"), 0, None, device="cuda")
    np.testing.assert_allclose(narrow["losses"], wide["losses"], rtol=0.02)


def test_clipped_gradients_move_parameters_as_scaled_ones() -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(512, 1024, device="cuda"))] for _ in range(2))
    optimizer = AdamW([Group(ours, weight_decay=0.1, lr=0.01)], (0.9, 0.95), 1e-8)
    other = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for scale in (1.0, 0.25, 0.5):
        ours[0].grad = torch.randn_like(ours[0])
        theirs[0].grad = ours[0].grad * scale
        optimizer.step(scale)
        other.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [48, 44])
def test_experts_of_any_width_multiply_in_bfloat16(width: int) -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=width)
    experts = Experts(Model(layers=1, hidden=64, heads=2, ffn_hidden=64, vocab=16, max_seq_len=8, moe=moe), moe).cuda()
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3)
    tokens_e = torch.tensor([3, 0, 9, 4], device="cuda")
    x_rd = torch.randn(16, 64, device="cuda")
    x_rd, exact_rd = (x.requires_grad_() for x in (x_rd.bfloat16(), x_rd.clone()))
    for rows in (x_rd, exact_rd):
        experts(rows, tokens_e, torch.linspace(0.1, 1, 16, device="cuda")).sum().backward()
    assert x_rd.grad is not None and exact_rd.grad is not None
    assert (x_rd.grad.float() - exact_rd.grad).norm() < 0.03 * exact_rd.grad.norm()


@pytest.mark.parametrize("width", [6, 64, 72, 100, 264])
def test_tiles_of_any_width_are_what_matrix_products_give(width: int) -> None:
    torch.manual_seed(0)
    whole = slice(None)
    tile = Tile(whole, whole, causal=True)
    q, k, v, gradient = (torch.randn(2, n, 32, width, device="cuda").bfloat16() for n in (4, 2, 2, 4))
    out, log_sum = attend_tile(q, k, v, tile, None)
    known = (gradient, q, k, v, out, log_sum, tile, None)
    pairs = [*zip((out, log_sum), attend_plainly(q, k, v, tile, None), strict=True)]
    pairs += zip(tile_gradients(*known), plain_gradients(*known), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_grouped_queries_in_float32_write_no_scores() -> None:
    tokens = 2048
    q, k, v = (torch.randn(1, heads, tokens, 64, device="cuda") for heads in (8, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v, View(torch.arange(tokens, device="cuda")))
    assert torch.cuda.max_memory_allocated() - before < 8 * tokens**2 * 4 / 2
