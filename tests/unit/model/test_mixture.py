"""Mixture of experts against the definition, token by token: who is chosen, with what weight, what the router pays."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bloomery.model import mixture as mixture_module
from bloomery.model.feed_forward import ACTIVATIONS
from bloomery.model.generate import Cache, forward_cached
from bloomery.model.init import initial_rectangle, initial_value, rectangle
from bloomery.model.mixture import Experts, Mixture, grouped, has_grouped_kernel, one_by_one
from bloomery.model.transformer import Transformer
from bloomery.model.weighted import weighted
from bloomery.spec.errors import InputError
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import all_parameters, parameter_count
from bloomery.spec.shard_table import tensor_shard

KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"z_loss_coefficient": 0.02, "aux_loss_coefficient": 0.5},
    "deepseek-v2": {
        "normalize_top_k": False, "groups": 4, "top_groups": 2, "shared_experts": 2, "routed_scaling_factor": 16.0,
    },
    "deepseek-v3": {
        "scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "two_best", "balancing": "bias",
        "first_dense_layers": 1, "shared_experts": 1, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip


def model(**moe: Any) -> Model:
    experts = MixtureOfExperts(**{"experts": 8, "top_k": 2, "expert_ffn_hidden": 12, **moe})
    return Model(layers=2, hidden=16, heads=4, ffn_hidden=24, vocab=32, max_seq_len=12, moe=experts)


def mixture(seed: int = 0, **moe: Any) -> Mixture:
    torch.manual_seed(seed)
    whole = model(**moe)
    assert whole.moe is not None
    module = Mixture(whole, whole.moe).double()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module


def by_definition(module: Mixture, x_d: Tensor) -> tuple[Tensor, list[int]]:
    """One token through its experts, and which these are."""
    moe = module.router.moe
    logits = [float(row @ x_d) for row in module.router.weight.detach()]
    powers = [torch.tensor(logit, dtype=torch.float64).exp() for logit in logits]
    scores = [p / sum(powers) for p in powers] if moe.scoring == "softmax" else [p / (1 + p) for p in powers]
    wanted = [float(s) + (0.0 if module.router.bias is None else float(module.router.bias[e])) for e, s in
              enumerate(scores)]  # fmt: skip
    size = moe.experts // moe.groups
    best = {
        g: sum(sorted(wanted[g * size : (g + 1) * size])[-(2 if moe.group_score == "two_best" else 1) :])
        for g in range(moe.groups)
    }
    allowed = sorted(best, key=lambda g: best[g])[-moe.top_groups :]
    chosen = sorted((e for e in range(moe.experts) if e // size in allowed), key=lambda e: wanted[e])[-moe.top_k :]
    total = sum(scores[e] for e in chosen) if moe.normalize_top_k else 1.0
    experts, y_d = module.experts, torch.zeros_like(x_d)
    for e in chosen:
        inner = F.silu(experts.gate.weight[e] @ x_d) * (experts.up.weight[e] @ x_d)
        y_d = y_d + moe.routed_scaling_factor * scores[e] / total * (experts.down.weight[e] @ inner)
    return (y_d if module.shared is None else y_d + module.shared(x_d)), chosen


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_gets_what_its_experts_say(kind: str) -> None:
    module = mixture(**KINDS[kind])
    x_bsd = torch.randn(2, 5, 16, dtype=torch.float64)
    y_bsd, tokens_e = module(x_bsd), module.router(x_bsd).tokens_e
    found = [by_definition(module, x_d) for x_d in x_bsd.flatten(0, 1)]
    torch.testing.assert_close(y_bsd.flatten(0, 1), torch.stack([y for y, _ in found]), rtol=1e-9, atol=1e-12)
    assert tokens_e.tolist() == [sum(e in chosen for _, chosen in found) for e in range(8)]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradients_are_those_of_weighing_what_experts_answer(activation: str) -> None:
    """The formula of the papers: the sum over a token's experts of weight times answer."""
    torch.manual_seed(0)
    whole = model(normalize_top_k=False, aux_loss_coefficient=0.0).model_copy(update={"activation": activation})
    assert whole.moe is not None
    module, x_bsd = Mixture(whole, whole.moe).double(), torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    routing = module.router(x_bsd)
    inner = [x_bsd.flatten(0, 1) @ matrix.weight.mT for matrix in [*module.experts.children()][:-1]]
    answers_end = ACTIVATIONS[activation](*inner) @ module.experts.down.weight.mT
    weights_ne = torch.zeros(18, 8, dtype=torch.float64).scatter(1, routing.experts_nk, routing.weights_nk)
    expected = torch.einsum("end,ne->nd", answers_end, weights_ne).view(x_bsd.shape)
    wanted, upstream = (x_bsd, *module.parameters()), torch.randn_like(x_bsd)
    found = torch.autograd.grad(module(x_bsd), wanted, upstream)
    for one, other in zip(found, torch.autograd.grad(expected, wanted, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_hold_exactly_the_parameters_of_the_table(kind: str) -> None:
    whole = model(**KINDS[kind])
    found = {name: tuple(p.shape) for name, p in Transformer(whole).named_parameters()}
    assert found == {p.name: p.shape for p in all_parameters(whole)}
    assert sum(p.numel() for p in Transformer(whole).parameters()) == parameter_count(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_of_the_plain_forward(kind: str) -> None:
    torch.manual_seed(0)
    module, tokens = Transformer(model(**KINDS[kind])).double(), torch.arange(12)[None] * 5 % 32
    cache = Cache(2)
    with torch.inference_mode():
        pieces = [forward_cached(module, tokens[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
        torch.testing.assert_close(torch.cat(pieces, dim=1), module(tokens), rtol=1e-10, atol=1e-12)


def test_the_routers_loss_joins_the_gradients_as_a_term_of_the_loss_would() -> None:
    module, x_bsd = mixture(**KINDS["mixtral"]), torch.randn(3, 7, 16, dtype=torch.float64)
    moe, weight = module.router.moe, module.router.weight
    module.router.loss_share = 0.25
    (module(x_bsd) ** 2).sum().backward()
    found, weight.grad = weight.grad, None
    routing = module.router(x_bsd)
    logits_bse = x_bsd @ weight.T
    # Switch Transformers (2101.03961), equations 4 to 6, for each sequence; ST-MoE (2202.08906), equation 5.
    terms = []
    for logits_se, experts_sk in zip(logits_bse, routing.experts_nk.unflatten(0, (3, 7)), strict=True):
        share_e = logits_se.softmax(-1).mean(0)
        load_e = experts_sk.flatten().bincount(minlength=8).double() / (7 * moe.top_k)
        terms += [moe.aux_loss_coefficient * 8 * (share_e * load_e).sum()]
        terms += [moe.z_loss_coefficient * (logits_se.exp().sum(-1).log() ** 2).mean()]
    with torch.no_grad():
        value = float(sum(terms)) * 0.25
    module.router.loss_share = 0.0
    ((module(x_bsd) ** 2).sum() + 0.25 * sum(terms)).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-9, atol=1e-12)
    module.router.tally.take()
    module.router.loss_share = 0.25
    module(x_bsd).sum().backward()
    tokens_e, loss = module.router.tally.take()
    assert tokens_e is not None and loss is not None
    assert float(loss) == pytest.approx(value, rel=1e-9)
    assert tokens_e.tolist() == routing.experts_nk.flatten().bincount(minlength=8).tolist()


def of_padded(module: Transformer, tokens_bs: Tensor, length: int) -> tuple[list[Tensor], list[list[int]], float]:
    """Gradients, copies for the experts of each router, and the routers' loss, of texts padded to `length`."""
    targets_bs = tokens_bs.roll(-1, 1)
    padded, targets = (
        F.pad(part, (0, length - part.shape[1]), value=value) for part, value in ((tokens_bs, 3), (targets_bs, -100))
    )
    lengths_b = torch.full((len(tokens_bs),), tokens_bs.shape[1])
    module.zero_grad()
    module(padded, lengths_b=lengths_b, targets_bs=targets).backward()
    tallies = [block.router.tally.take() for block in module.modules() if isinstance(block, Mixture)]
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    copies = [tokens_e.tolist() for tokens_e, _ in tallies if tokens_e is not None]
    return gradients, copies, sum(float(loss) for _, loss in tallies if loss is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_says_nothing_of_the_balance(kind: str) -> None:
    torch.manual_seed(0)
    module, tokens_bs = Transformer(model(**KINDS[kind])).double(), torch.randint(4, 32, (3, 5))
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    (gradients, copies, loss), padded = (of_padded(module, tokens_bs, length) for length in (5, 12))
    assert (padded[1], sum(map(sum, copies))) == (copies, 3 * 5 * 2 * len(copies))
    assert padded[2] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(padded[0], gradients, rtol=1e-9, atol=1e-12)


def test_what_is_run_again_is_counted_once_and_what_does_not_train_never() -> None:
    module, x_bsd = mixture(), torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    checkpoint(module, x_bsd, use_reentrant=False).sum().backward()
    with torch.no_grad():
        module(x_bsd)
    tokens_e, _ = module.router.tally.take()
    assert tokens_e is not None
    assert int(tokens_e.sum()) == 2 * 6 * 2
    assert module.router.tally.take() == (None, None)


def test_the_grouped_kernel_computes_what_one_expert_after_the_other_does() -> None:
    torch.manual_seed(0)
    tokens_e, weights_r = torch.tensor([3, 0, 9, 4]), torch.rand(16).requires_grad_()
    x_rd = torch.randn(16, 16).bfloat16().requires_grad_()
    matrices = [
        torch.randn(shape).mul(0.3).bfloat16().requires_grad_() for shape in ((4, 8, 16), (4, 8, 16), (4, 16, 8))
    ]
    answers, upstream = [], torch.randn(16, 16).bfloat16()
    for way in (grouped, one_by_one):
        y_rd = way(x_rd, tokens_e, weights_r, matrices, weighted("swiglu"))
        answers.append((y_rd, *torch.autograd.grad(y_rd, (x_rd, weights_r, *matrices), upstream)))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)


def test_of_what_experts_answer_nothing_is_kept() -> None:
    """Of each copy its input, gate, up and the product of both, and its weight."""
    torch.manual_seed(0)
    whole, tokens_e = model(), torch.tensor([3, 0, 9, 4, 1, 1, 3, 3])
    assert whole.moe is not None
    experts, x_rd, weights_r = Experts(whole, whole.moe), torch.randn(24, 16), torch.rand(24, requires_grad=True)
    storages = dict[int, torch.UntypedStorage]()

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y_rd = experts(x_rd.requires_grad_(), tokens_e, weights_r)
    assert sum(storage.nbytes() for storage in storages.values()) == 24 * 4 * (16 + 3 * 12 + 1)
    y_rd.sum().backward()
    assert weights_r.grad is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("width", "way"), [(48, "grouped"), (44, "one_by_one")])
def test_on_a_gpu_widths_that_the_grouped_kernel_cannot_read_go_expert_by_expert(
    width: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """44: as of 88 that two ranks cut."""
    whole, found = model(expert_ffn_hidden=width), list[str]()
    assert whole.moe is not None
    experts = Experts(whole, whole.moe)
    for name in ("grouped", "one_by_one"):
        monkeypatch.setattr(mixture_module, name, lambda *_, name=name: found.append(name))
    with FakeTensorMode(), torch.device("cuda"):
        for matrix in (experts.gate, experts.up, experts.down):
            matrix.weight = nn.Parameter(torch.empty(matrix.weight.shape, dtype=torch.bfloat16))
        experts(torch.empty(24, whole.hidden, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int64), torch.empty(24))
    assert found == [way]


@pytest.mark.parametrize(("hidden", "width"), [(16, 8), (16, 12), (12, 8), (16, 44)])
def test_the_grouped_kernel_is_asked_for_nothing_that_it_refuses(hidden: int, width: int) -> None:
    shapes = (4, width, hidden), (4, width, hidden), (4, hidden, width)
    matrices = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    x_rd, tokens_e = torch.zeros(16, hidden, dtype=torch.bfloat16), torch.tensor([3, 0, 9, 4])
    given = x_rd, tokens_e, torch.ones(16), matrices, weighted("swiglu")
    with nullcontext() if has_grouped_kernel(matrices) else pytest.raises(RuntimeError, match="16 byte"):
        grouped(*given)


def test_each_rank_draws_its_own_experts_as_a_whole_draw_has_them() -> None:
    whole = model()
    table = {p.name: p for p in all_parameters(whole)}
    for name in ("gate", "up", "down"):
        parameter = table[f"layers.1.ffn.experts.{name}.weight"]
        shard = tensor_shard(parameter, 2, 1, 4, 2)
        assert shard.offsets[0] == 4
        expected = rectangle(initial_value(whole, parameter, 3, torch.float64), shard)
        assert torch.equal(initial_rectangle(whole, parameter, shard, 3, torch.float64), expected)
        assert expected.std() > 0


def test_the_router_of_a_single_expert_learns_from_the_loss_unless_told_otherwise() -> None:
    assert MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=8).normalize_top_k
    told = MixtureOfExperts(experts=4, top_k=1, expert_ffn_hidden=8, normalize_top_k=True)
    assert told.normalize_top_k  # as in a checkpoint of Mixtral's kind
    module = mixture(top_k=1, balancing="none")
    module(torch.randn(2, 5, 16, dtype=torch.float64)).square().sum().backward()
    assert module.router.weight.grad is not None
    assert module.router.weight.grad.norm() > 0.01


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"top_k": 9}, "exceeds the 8 experts"),
        ({"groups": 3}, "must divide experts 8"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "exceeds the 2 experts in 1 groups"),
        ({"groups": 8, "top_groups": 4, "group_score": "two_best"}, "two experts in a group"),
    ],
)
def test_a_router_that_cannot_be_is_refused(moe: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**moe)


def test_experts_with_biases_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="no biases"):
        Transformer(model().model_copy(update={"bias": True}))
