"""FLOPs against closed forms of the literature and the figures of Yuan 1.0."""

import numpy as np
import pytest

from bloomery.perf.flops import backward_flops, eight_n, forward_flops, model_flops, pf_days, recomputed_flops, six_n
from bloomery.spec import catalog
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import parameter_count

GPT3 = catalog.model("gpt3-175b")


def megatron_closed_form(model: Model, batch: int, seq_len: int, factor: int) -> float:
    """Narayanan et al. 2021, equation 2 (96 with full recomputation; 72 without, head then counted alike)."""
    s, h, layers, vocab = seq_len, model.hidden, model.layers, model.vocab
    head = 16 if factor == 96 else 12
    return factor * batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (head * layers * h))


@pytest.mark.parametrize("seq_len", [512, 2048, 8192])
def test_model_flops_are_megatrons_closed_form(seq_len: int) -> None:
    ours = model_flops(GPT3, global_batch=1536, seq_len=seq_len)
    assert ours == pytest.approx(megatron_closed_form(GPT3, 1536, seq_len, 72), rel=1e-12)


def test_full_recomputation_gives_the_factor_96() -> None:
    again = recomputed_flops(GPT3, np.array([2]), global_batch=1536, seq_len=2048)[0]
    total = model_flops(GPT3, global_batch=1536, seq_len=2048) + again
    assert total == pytest.approx(megatron_closed_form(GPT3, 1536, 2048, 96), rel=1e-12)


def test_selective_recomputation_repeats_the_attention_core_only() -> None:
    none, selective, full = recomputed_flops(GPT3, np.array([0, 1, 2]), global_batch=2, seq_len=2048)
    forward = forward_flops(GPT3, 2048)
    assert (none, selective, full) == (0.0, 2 * forward.attention, 2 * forward.layers)


def test_backward_is_twice_forward_and_causal_halves_attention_alone() -> None:
    full, causal = forward_flops(GPT3, 2048), forward_flops(GPT3, 2048, causal=True)
    assert backward_flops(GPT3, 2048) == 2 * full.total
    assert causal.attention == full.attention / 2
    assert causal.total == full.total - full.attention / 2


def test_yuan_has_its_parameters_and_both_readings_of_its_pf_days() -> None:
    yuan = catalog.model("yuan-1.0-245b")
    assert parameter_count(yuan) == pytest.approx(245.7e9, rel=2e-3)
    assert pf_days(six_n(yuan, 180e9)) == pytest.approx(3071, rel=3e-3)
    assert pf_days(eight_n(yuan, 180e9)) == pytest.approx(4095, rel=3e-3)


def test_gpt3_spent_about_3640_pf_days() -> None:
    assert pf_days(six_n(GPT3, 300e9)) == pytest.approx(3640, rel=5e-3)


def test_a_gated_model_counts_three_feed_forward_products_and_narrow_keys() -> None:
    model = Model(layers=1, hidden=64, heads=4, kv_heads=2, ffn_hidden=96, vocab=100)
    forward = forward_flops(model, 10)
    assert forward.feed_forward == 10 * 2 * 64 * 96 * 3
    assert forward.projections == 10 * 2 * 64 * (64 + 32 + 32 + 64)
    assert forward.attention == 4 * 10 * 10 * 64


def test_mixture_of_experts_counts_what_one_token_passes_through() -> None:
    moe = MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=32, shared_experts=1, first_dense_layers=1)
    model = Model(layers=3, hidden=64, heads=4, ffn_hidden=96, vocab=100, moe=moe)
    forward = forward_flops(model, 10)
    assert forward.feed_forward == 10 * 2 * 64 * 3 * (96 + 2 * 3 * 32)
    assert forward.router == 2 * 10 * 2 * 64 * 8


def test_latent_attention_counts_its_own_matrices_and_its_narrower_values() -> None:
    model = catalog.model("deepseek-v3")
    forward = forward_flops(model, 4096)
    down, up = 7168 * (1536 + 512 + 64), 1536 * 128 * (128 + 64) + 512 * 128 * (128 + 128)
    assert forward.projections == 61 * 2 * 4096 * (down + up + 128 * 128 * 7168)
    assert forward.attention == 61 * 2 * 4096**2 * 128 * (128 + 64 + 128)


def test_a_sliding_window_leaves_the_pairs_it_shows() -> None:
    windowed = Model(layers=1, hidden=64, heads=4, vocab=100, sliding_window=100)
    whole = windowed.model_copy(update={"sliding_window": None})
    shown = sum(min(i + 1, 100) for i in range(1000)) / sum(i + 1 for i in range(1000))
    found = forward_flops(windowed, 1000).attention / forward_flops(whole, 1000).attention
    assert found == pytest.approx(shown, rel=2e-3)
    assert forward_flops(windowed, 100) == forward_flops(whole, 100)
