"""What a published rate counts, as its source words it; beside closed forms."""

from __future__ import annotations

import pytest

from bloomery.perf.flops import eight_n, model_flops, recomputed_flops, six_n
from bloomery.planner.conventions import counted_flops, counts_recomputation
from bloomery.planner.published import published
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch

MODEL = catalog.model("llama-3-8b")
SIZES = {"global_batch": 4, "seq_len": 8192}


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("Megatron formula 96BslH^2(1+s/6H+V/16lH), includes full-recompute forward (HFU-like)", True),
        ("Megatron-like incl. recompute (134 TF log value)", True),
        ("8*N*tokens (coefficient 4x2, includes recompute)", True),
        ("factor 4 with ckpt, 3 without", True),
        ("HFU", True),
        ("HFU (MFU is 45 %)", True),
        ("model FLOPs incl. recomputation", True),
        ("MFU: 6N + 12*L*d*s per token; HFU=8N+16*L*d*s with recompute", False),
        ("Megatron model TFLOPs, no recompute", False),
        ("Model FLOPs (Megatron), no recompute counted; peak 989", False),
        ("6N+12LHs (recompute not included)", False),
        ("without activation recomputation", False),
        ("NeMo model TFLOPS/GPU", False),
        ("", False),
    ],
)
def test_whether_recomputation_is_counted(text: str, counted: bool) -> None:
    assert counts_recomputation(text) == counted


@pytest.mark.parametrize(
    ("text", "causal"),
    [
        ("6N+6LHs per token (causal attention halved), no recompute", True),
        ("causal-aware", True),
        ("6N + 12LHs per token (non-causal attention; checked 1.000)", False),
        ("BF16 MFU (paper); causal treatment not stated", False),
        ("", False),
    ],
)
def test_how_attention_is_counted(text: str, causal: bool) -> None:
    found = counted_flops(text, MODEL, Layout(), recomputed=False, **SIZES)
    assert found == model_flops(MODEL, causal=causal, **SIZES)


def test_rates_without_attention_are_six_or_eight_n() -> None:
    tokens = SIZES["global_batch"] * SIZES["seq_len"]
    full = Layout(recompute="full")
    assert counted_flops("6ND, no attention", MODEL, full, recomputed=False, **SIZES) == six_n(MODEL, tokens)
    assert counted_flops("8*N*tokens", MODEL, full, recomputed=True, **SIZES) == eight_n(MODEL, tokens)


def test_recomputation_is_the_layouts_own() -> None:
    full = Layout(recompute="full")
    again = float(recomputed_flops(MODEL, LayoutBatch.of([full]).recompute, **SIZES)[0])
    plain = model_flops(MODEL, **SIZES)
    assert counted_flops("HFU", MODEL, full, recomputed=True, **SIZES) == plain + again
    assert counted_flops("HFU", MODEL, Layout(), recomputed=True, **SIZES) == plain


@pytest.mark.parametrize(("name", "share"), [("mfu", "0.4"), ("mfu", "40"), ("hfu", "40")])
def test_a_share_of_the_peak_is_a_time(name: str, share: str) -> None:
    row = {"id": "a", "source": "torchtitan", "accelerator": "H100-SXM", "n_gpus": "8", "tp": "1", "pp": "1", "dp": "8",
           "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "8", "ffn_hidden": "14336", "vocab": "128256",
           "seq_len": "8192", "global_batch": "8", "micro_batch": "1", "recompute": "none", name: share}  # fmt: skip
    found = published(row)
    flops = model_flops(found.model, global_batch=8, seq_len=8192)
    assert found.measured_s == pytest.approx(flops / (0.4 * 989.4e12 * 8))
