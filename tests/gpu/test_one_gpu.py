"""What one GPU computes: the same as a CPU in float64, compiled or not, with whatever a layout may ask of one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import MODELS, Case, train_case
from torch import nn

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
