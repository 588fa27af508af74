"""The plain model against independent arithmetic: attention by hand, names by the table, prefix and causal masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from bloomery.model.init import initial_value
from bloomery.model.names import Family, translations
from bloomery.model.rotary import frequencies, rotary_tables, rotate
from bloomery.model.transformer import Transformer
from bloomery.model.view import View, attend, visible
from bloomery.spec.attention import LatentAttention, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from bloomery.spec.model import Model
from bloomery.spec.parameters import all_parameters, parameter_count

LLAMA = Model(layers=2, hidden=16, heads=4, kv_heads=2, ffn_hidden=24, vocab=32, max_seq_len=12)
GPT = LLAMA.model_copy(
    update={"activation": "gelu", "norm": "layernorm", "position": "learned", "bias": True, "kv_heads": 4}
)
NORMED = LLAMA.model_copy(update={"qk_norm": True, "sliding_window": 3})
LATENT = Model(
    layers=2, hidden=16, heads=4, ffn_hidden=24, vocab=32, max_seq_len=12,
    mla=LatentAttention(q_lora_rank=6, kv_lora_rank=10, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3),
)  # fmt: skip
PLAIN_QUERY = LATENT.model_copy(
    update={"mla": LatentAttention(kv_lora_rank=10, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6)}
)
READ_AGAIN = LLAMA.model_copy(update={"value_embeddings": True, "embedding_skip": True})
TIED = LLAMA.model_copy(update={"tie_embeddings": True, "qkv_bias": True})


@pytest.mark.parametrize(
    "model",
    [LLAMA, GPT, TIED, NORMED, READ_AGAIN, LATENT, PLAIN_QUERY],
    ids=["llama", "gpt", "tied", "qk-norm", "read-again", "latent", "latent-plain-query"],
)
def test_modules_hold_exactly_the_parameters_of_the_table(model: Model) -> None:
    found = {name: tuple(p.shape) for name, p in Transformer(model).named_parameters()}
    assert found == {p.name: p.shape for p in all_parameters(model)}
    assert sum(p.numel() for p in Transformer(model).parameters()) == parameter_count(model)


@pytest.mark.parametrize(
    "model", [LLAMA, GPT, NORMED, READ_AGAIN, LATENT], ids=["llama", "gpt", "qk-norm", "read-again", "latent"]
)
def test_the_future_never_changes_the_past(model: Model) -> None:
    module = Transformer(model).double()
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 32
    before, after = module(tokens), module(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize(
    "model", [LLAMA, GPT, NORMED, READ_AGAIN, LATENT], ids=["llama", "gpt", "qk-norm", "read-again", "latent"]
)
def test_under_autocast_all_between_embedding_and_loss_is_narrow(model: Model) -> None:
    module, found = Transformer(model), set[torch.dtype]()
    for name, part in module.named_modules():
        if (name.startswith("layers.") or name == "norm") and not name.endswith("value_embedding"):
            part.register_forward_hook(lambda _, inputs, output: found.update((inputs[0].dtype, output.dtype)))
    for layer in module.blocks():
        plain = layer.attention.attend
        layer.attention.attend = lambda *given, plain=plain: (found.update(x.dtype for x in given[:3]), plain(*given))[
            1
        ]
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(torch.zeros(1, 12, dtype=torch.int64), targets_bs=torch.ones(1, 12, dtype=torch.int64))
    loss.backward()
    assert found == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in module.parameters() if parameter.grad is not None} == {torch.float32}


def test_a_prefix_sees_itself_whole_and_nothing_after_it() -> None:
    mask = visible(View(torch.arange(5), prefix_b=torch.tensor([3])), torch.arange(5))[0, 0]
    assert mask[:3, :3].all()
    assert not mask[:3, 3:].any()
    assert mask[3].tolist() == [True, True, True, True, False]


def test_documents_do_not_see_each_other() -> None:
    mask = visible(View(torch.arange(4), documents_bs=torch.tensor([[0, 0, 1, 1]])), torch.arange(4))[0, 0]
    assert mask.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]


def test_a_packed_document_has_the_logits_it_has_alone() -> None:
    module = Transformer(LLAMA).double()
    tokens = torch.randint(0, 32, (1, 12), generator=torch.Generator().manual_seed(0))
    packed = module(tokens, (torch.arange(12) >= 5).long()[None])
    torch.testing.assert_close(packed[:, :5], module(tokens[:, :5]), rtol=1e-10, atol=1e-10)
    # Rotary positions are relative: where a document starts makes no difference to it.
    torch.testing.assert_close(packed[:, 5:], module(tokens[:, 5:]), rtol=1e-10, atol=1e-10)


def test_causal_and_prefix_agree_when_the_prefix_is_one_token() -> None:
    module = Transformer(LLAMA).double()
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(module(tokens), module(tokens, prefix_b=torch.tensor([1])), rtol=1e-12, atol=1e-12)


def test_values_by_token_are_added_to_what_the_stream_gives() -> None:
    plain, module = Transformer(LLAMA).double(), Transformer(READ_AGAIN).double()
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    module.load_state_dict(plain.state_dict(), strict=False)
    tables = [layer.attention.value_embedding for layer in module.blocks()]
    for table in tables:
        torch.nn.init.zeros_(table.weight)
    torch.testing.assert_close(module(tokens), plain(tokens), rtol=1e-12, atol=1e-12)
    # One value for all tokens is what a bias of the projection would add.
    value = torch.randn(8, dtype=torch.float64)
    for table, layer in zip(tables, plain.blocks(), strict=True):
        table.weight.data[:] = value
        layer.attention.v.register_forward_hook(lambda _, inputs, output: output + value)
    torch.testing.assert_close(module(tokens), plain(tokens), rtol=1e-12, atol=1e-12)


def test_a_skip_adds_the_embedding_to_what_a_layer_reads() -> None:
    module = Transformer(LLAMA.model_copy(update={"embedding_skip": True})).double()
    tokens = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    before, second = module(tokens), module.blocks()[1]
    second.skip.weight.data[:] = torch.linspace(-1, 1, 16, dtype=torch.float64)
    wanted = module.embedding(tokens) * second.skip.weight
    second.skip, skip = None, second.skip
    second.register_forward_pre_hook(lambda _, inputs: (inputs[0] + wanted, *inputs[1:]))
    expected = module(tokens)
    second._forward_pre_hooks.clear()
    second.skip = skip
    torch.testing.assert_close(module(tokens), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, expected)


def test_rotation_keeps_length_and_depends_only_on_distance() -> None:
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    tables = rotary_tables(torch.arange(10), 8, 10_000.0, torch.float64)
    rotated_q = rotate(q.expand(1, 1, 10, 8), *tables)
    rotated_k = rotate(k.expand(1, 1, 10, 8), *tables)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1).expand(1, 1, 10))
    scores = rotated_q @ rotated_k.transpose(-1, -2)
    torch.testing.assert_close(
        scores[0, 0].diagonal(2), scores[0, 0, 2, 0].flatten().new_full((8,), float(scores[0, 0, 0, 2]))
    )


def test_grouped_heads_equal_repeated_keys_and_values() -> None:
    grouped = Transformer(LLAMA).double()
    repeated = Transformer(LLAMA.model_copy(update={"kv_heads": 4})).double()
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith((".k.weight", ".v.weight")):
            state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
    repeated.load_state_dict(state)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(grouped(tokens), repeated(tokens), rtol=1e-10, atol=1e-10)


def test_initial_values_are_a_pure_function_of_seed_and_name() -> None:
    matrix = next(p for p in all_parameters(LLAMA) if p.name.endswith("q.weight"))
    first, again = (initial_value(LLAMA, matrix, 3, torch.float32) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, initial_value(LLAMA, matrix, 4, torch.float32))


@pytest.mark.parametrize(
    ("model", "family"),
    [(LLAMA, "llama"), (GPT, "gpt2"), (TIED, "qwen2"), (NORMED, "qwen3"), (LATENT, "deepseek_v3")],
    ids=["llama", "gpt", "tied", "qk-norm", "latent"],
)
def test_every_parameter_has_its_numbers_in_a_family_and_comes_back(model: Model, family: Family) -> None:
    ours = {p.name: torch.randn(p.shape) for p in all_parameters(model)}
    parts, back = translations(model, family), dict[str, torch.Tensor]()
    names = [name for part in parts for name in part.theirs]
    assert len(set(names)) == len(names)
    for part in parts:
        theirs = part.to_theirs([ours[name] for name in part.ours])
        assert sum(t.numel() for t in theirs) == sum(ours[name].numel() for name in part.ours)
        back |= zip(part.ours, part.to_ours(theirs), strict=True)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_a_window_ends_what_a_token_sees() -> None:
    mask = visible(View(torch.arange(5), window=2), torch.arange(5))[0, 0]
    assert mask.tolist() == [[i - 2 < j <= i for j in range(5)] for i in range(5)]


def test_a_window_wider_than_the_sequence_changes_nothing() -> None:
    plain = Transformer(LLAMA).double()
    windowed = Transformer(LLAMA.model_copy(update={"sliding_window": 12})).double()
    windowed.load_state_dict(plain.state_dict())
    tokens = torch.arange(12)[None]
    assert torch.equal(plain(tokens), windowed(tokens))


@pytest.mark.parametrize(
    ("scaling", "kept", "divided"),
    [
        (LinearScaling(kind="linear", factor=4), 0, 32),
        (Llama3Scaling(kind="llama3", factor=4, original_max_seq_len=128), 2, 4),
        (YarnScaling(kind="yarn", factor=4, original_max_seq_len=128), 1, 5),
    ],
    ids=["linear", "llama3", "yarn"],
)
def test_scaling_keeps_short_waves_and_divides_long_ones(scaling: RopeScaling, kept: int, divided: int) -> None:
    plain, scaled = frequencies(64, 10_000.0, None), frequencies(64, 10_000.0, scaling)
    share = plain / scaled
    assert (share[1:] >= share[:-1] - 1e-12).all(), "the longer the wave, the more it is divided"
    torch.testing.assert_close(share[:kept], torch.ones(kept, dtype=torch.float64))
    torch.testing.assert_close(share[-divided:], torch.full((divided,), 4.0, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("masked", "dtype", "repeated"),
    [(False, torch.bfloat16, False), (True, torch.bfloat16, True), (False, torch.float32, True)],
)
def test_on_a_gpu_grouped_queries_meet_keys_of_their_own_where_only_the_plain_kernel_takes_them(
    masked: bool, dtype: torch.dtype, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list[tuple[int, bool]]()

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, **_: Any) -> Tensor:
        assert k.shape == v.shape
        found.append((k.shape[1], enable_gqa))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(View, "bias", lambda *_: "a mask")  # this machine cannot even slice a tensor that has no data
    with FakeTensorMode(), torch.device("cuda"):
        q, kv = torch.empty(1, 4, 8, 2, dtype=dtype), torch.empty(1, 2, 8, 2, dtype=dtype)
        documents = torch.zeros(1, 8, dtype=torch.int64) if masked else None
        attend(q, kv, kv, View(torch.arange(8), documents_bs=documents))
    assert found == [(4, False) if repeated else (2, True)]
