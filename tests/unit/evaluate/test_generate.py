"""Sampling: the cache changes nothing, the filters keep what they say, limits hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bloomery.model.generate import Cache, NoNumbers, Sampling, draw, forward_cached, generate
from bloomery.model.transformer import Transformer
from bloomery.spec.errors import InputError
from bloomery.spec.model import Model

LATENT = {"kv_lora_rank": 10, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "gpt2": {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True},
    "window": {"kv_heads": 2, "qk_norm": True, "sliding_window": 3},
    "latent": {"mla": {**LATENT, "q_lora_rank": 6}},
    "latent, windowed, with YaRN": {
        "mla": LATENT,
        "sliding_window": 4,
        "rope_scaling": {"kind": "yarn", "factor": 4, "original_max_seq_len": 8, "mscale_all_dim": 0.7},
    },
    "prefix": {"mask": "prefix"},
    "prefix, windowed": {"mask": "prefix", "sliding_window": 3},
    "read again": {"kv_heads": 2, "value_embeddings": True, "embedding_skip": True},
    "tied": {"tie_embeddings": True, "qkv_bias": True},
}


def make(**shape: Any) -> Transformer:
    torch.manual_seed(0)
    return (
        Transformer(Model(layers=2, hidden=32, heads=4, ffn_hidden=48, vocab=50, max_seq_len=24, **shape))
        .double()
        .eval()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_are_those_of_the_plain_forward(shape: str) -> None:
    module, tokens = make(**SHAPES[shape]), torch.arange(12)[None] * 3 % 50
    cache = Cache(2)
    with torch.inference_mode():
        pieces = [forward_cached(module, tokens[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
        whole = module(tokens, prefix_b=torch.tensor([5]) if module.model.mask == "prefix" else None)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-12)


def test_greedy_sampling_is_the_argmax_of_the_plain_forward_at_every_step() -> None:
    module, expected = make(kv_heads=2), [1, 2, 3]
    for _ in range(8):
        with torch.inference_mode():
            expected.append(int(module(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate(module, [1, 2, 3], 8, sampling=Sampling(temperature=0))) == expected[3:]


def test_one_seed_gives_one_text() -> None:
    module = make()
    texts = [list(generate(module, [1], 12, sampling=Sampling(temperature=2.0, seed=seed))) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_top_k_of_one_is_greedy() -> None:
    module = make()
    greedy = list(generate(module, [4, 5], 8, sampling=Sampling(temperature=0)))
    assert list(generate(module, [4, 5], 8, sampling=Sampling(temperature=5.0, top_k=1))) == greedy


def test_filters_leave_the_tokens_they_should() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings: Any) -> set[int]:
        return {draw(logits, Sampling(temperature=1.0, **settings), generator) for _ in range(400)}

    assert drawn(top_p=1.0) == {0, 1, 2, 3, 4}
    assert drawn(top_k=2, top_p=1.0) == {1, 3}
    assert drawn(top_p=0.69) == {1, 3}
    assert drawn(top_p=0.71) == {1, 3, 4}
    assert drawn(top_p=1e-9) == {1}


def test_a_tiny_temperature_is_greedy_and_a_tiny_mass_leaves_one() -> None:
    logits, generator = torch.tensor([30.0, 90.0, -20.0]), torch.Generator().manual_seed(0)
    for settings in ({"temperature": 1e-44}, {"temperature": 9e-6}, {"temperature": 1.0, "top_p": 1e-60}):
        assert draw(logits, Sampling(**settings), generator) == 1


def test_drawn_shares_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    generator, n = torch.Generator().manual_seed(1), 6000
    sampling = Sampling(temperature=1.0, top_p=1.0)
    found = torch.bincount(torch.tensor([draw(logits, sampling, generator) for _ in range(n)]), minlength=3) / n
    torch.testing.assert_close(found, torch.tensor([0.5, 0.3, 0.2]), atol=0.03, rtol=0)


def test_it_ends_when_the_context_is_full() -> None:
    assert len(list(generate(make(), [1] * 20, 100, sampling=Sampling(temperature=0)))) == 4


def test_it_ends_before_a_stop_token_and_draws_only_below_the_limit() -> None:
    module = make()
    first = next(generate(module, [1], 1, sampling=Sampling(temperature=0)))
    assert list(generate(module, [1], 5, sampling=Sampling(temperature=0), stop=(None, first))) == []
    drawn = [next(generate(module, [1], 1, sampling=Sampling(temperature=50.0, seed=s), limit=3)) for s in range(30)]
    assert max(drawn) < 3


def test_an_id_without_a_token_is_never_drawn() -> None:
    module, holes = make(), [number for number in range(50) if number not in (7, 9)]
    for temperature in (0, 50.0):
        sampling = Sampling(temperature=temperature, seed=1)
        assert set(generate(module, [1], 20, sampling=sampling, limit=50, holes=holes)) <= {7, 9}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers_are_said_in_one_line(temperature: float) -> None:
    module = make()
    with torch.no_grad():
        next(module.parameters()).fill_(torch.nan)
    with pytest.raises(NoNumbers, match=r"^this model's scores are no numbers"):
        next(generate(module, [1], 1, sampling=Sampling(temperature=temperature)))


@pytest.mark.parametrize("prompt", [[], [1] * 24, [50], [-1]])
def test_prompts_that_do_not_fit_are_refused(prompt: list[int]) -> None:
    with pytest.raises(InputError):
        next(generate(make(), prompt, 1, sampling=Sampling()))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"seed": 10**23}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Sampling(**wrong)
