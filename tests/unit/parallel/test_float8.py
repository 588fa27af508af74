"""Float8 projections: as near to exact products as the format allows, whatever else a layer does; refused elsewhere.

On a machine with float8 units the same tests run there too.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from bloomery.model.projection import multiply
from bloomery.model.transformer import Transformer
from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import Engine, build
from bloomery.parallel.float8 import cast, float8_linear, multiply_in_float8, product
from bloomery.parallel.formats import has_float8_units
from bloomery.parallel.mesh import Mesh
from bloomery.parallel.tally import FlopTally, SavedTally
from bloomery.spec.errors import InputError
from bloomery.spec.float8 import Float8, Recipe
from bloomery.spec.layout import Layout
from bloomery.spec.model import MixtureOfExperts, Model

LLAMA = Model(layers=2, hidden=32, heads=2, kv_heads=1, ffn_hidden=64, vocab=64, max_seq_len=16)
GPT = LLAMA.model_copy(update={"activation": "gelu", "norm": "layernorm", "position": "learned", "bias": True})
MIXTURE = LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=16, shared_experts=1)})
RECIPES: tuple[Recipe, ...] = ("tensorwise", "rowwise")
E4M3_ERROR, E5M2_ERROR = 2**-4 / 3**0.5, 2**-3 / 3**0.5
"""Root mean square of a value's rounding in float8 over the value, at most: half a step of 3 or 2 bits of mantissa,
evenly spread. Errors of a product's operands are independent: their squares add up."""
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and has_float8_units(torch.device("cuda")) else [])]
devices = pytest.mark.parametrize("device", DEVICES)
recipes = pytest.mark.parametrize("recipe", RECIPES)


def error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def linear(device: str, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """A bfloat16 input, a float32 weight and the output."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(48, 128, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        return x, weight, float8_linear(x * 1, weight, recipe)


@devices
@recipes
def test_all_three_products_are_as_exact_as_the_format(device: str, recipe: Recipe) -> None:
    x, weight, y = linear(device, recipe)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert x.grad is not None and weight.grad is not None
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide = gradient.double()
    of_gradient = E4M3_ERROR if recipe == "rowwise" else E5M2_ERROR
    assert error(y, x.double() @ weight.double().t()) < 2**0.5 * E4M3_ERROR
    assert error(x.grad, wide @ weight.double()) < (of_gradient**2 + E4M3_ERROR**2) ** 0.5
    exact = wide.flatten(0, 1).t() @ x.double().flatten(0, 1)
    assert error(weight.grad, exact) < (of_gradient**2 + E4M3_ERROR**2) ** 0.5


@devices
def test_a_large_value_costs_its_own_row_alone_under_rowwise(device: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 64, device=device), torch.randn(16, 64, device=device)
    a[3, 5] = 2.0**20
    others = torch.arange(16, device=device) != 3
    exact = (a @ b.t())[others]
    assert error(product(a, b, "rowwise")[others], exact) < 2**0.5 * E4M3_ERROR
    assert error(product(a, b, "tensorwise")[others], exact) > 0.5


@devices
@recipes
def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(device: str, recipe: Recipe) -> None:
    b = torch.randn(16, 32, device=device)
    assert torch.equal(product(torch.zeros_like(b), b, recipe), torch.zeros(16, 16, device=device).bfloat16())
    for bad in (torch.nan, torch.inf):
        a = torch.randn(16, 32, device=device)
        a[2, 3] = bad
        assert not product(a, b, recipe)[2].isfinite().any()


@recipes
def test_scales_are_powers_of_two_and_bring_values_up_to_the_range(recipe: Recipe) -> None:
    x = torch.randn(16, 32) * torch.logspace(-6, 6, 16)[:, None]
    data, unit = cast(x, torch.float8_e4m3fn, recipe)
    assert torch.equal(unit.log2(), unit.log2().round())
    assert unit.shape == ((16, 1) if recipe == "rowwise" else ())
    largest = data.float().abs().amax(-1 if recipe == "rowwise" else (0, 1))
    assert ((largest > 448 / 2 - 16) & (largest <= 448)).all()


@recipes
def test_each_half_of_a_backward_pass_makes_its_own_product(recipe: Recipe) -> None:
    x, weight, y = linear("cpu", recipe)
    one = 2 * 64 * 128 * 48
    with FlopTally() as for_inputs:
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    with FlopTally() as for_weights:
        torch.autograd.grad(y.sum(), weight)
    assert (for_inputs.total, for_weights.total) == (one, one)


@recipes
def test_the_numbers_are_those_of_torchao(recipe: Recipe) -> None:
    float8 = pytest.importorskip("torchao.float8")
    from dataclasses import replace

    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True, round_scales_to_power_of_2=True)
    x, weight, y = linear("cpu", recipe)
    plain = nn.Sequential(nn.Linear(128, 48, bias=False))
    plain[0].weight = nn.Parameter(weight.detach().clone())
    theirs = float8.convert_to_float8_training(plain, config=config)
    again, gradient = x.detach().clone().requires_grad_(), torch.randn_like(y)
    expected = theirs(again)
    y.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, again.grad)
    assert torch.equal(weight.grad, theirs[0].weight.grad)


def engine_of(model: Model, dtype: str, layout: str = "", recipe: Recipe = "tensorwise", **options: bool) -> Engine:
    """One process's engine, emulated."""
    cut = Layout.parse(layout) if layout else Layout(micro_batch=2)
    return build(
        model, cut, Mesh(cut, torch.device("cpu"), 0, None), seq_len=16, global_batch=2, dtype=dtype, seed=0,
        measure=lambda _: nullcontext(), float8=Float8(recipe=recipe, emulate=True), **options,
    )  # fmt: skip


def step(engine: Engine) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients and bytes kept in layers of one batch."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 64, (2, 2, 16)).unbind(0)
    tally = SavedTally()
    with tally.over(engine.stages.values()):
        loss = float(engine.forward_backward(Batch(tokens, targets, 32)))
    return loss, {name: p.grad for name, p in engine.parameters().items() if p.grad is not None}, tally.layers


@recipes
@pytest.mark.parametrize("model", [LLAMA, GPT, MIXTURE], ids=["llama", "gpt", "mixture"])
def test_a_step_is_near_the_one_in_float32(model: Model, recipe: Recipe) -> None:
    loss, gradients, _ = step(engine_of(model, "float8", recipe=recipe))
    exact_loss, exact, _ = step(engine_of(model, "float32"))
    assert loss == pytest.approx(exact_loss, rel=2e-3)
    assert gradients.keys() == exact.keys()
    found, wanted = (torch.cat([g.flatten() for g in side.values()]) for side in (gradients, exact))
    assert found.dtype == torch.float32
    assert error(found, wanted) < 3 * E5M2_ERROR


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing_and_keeps_less(recompute: str) -> None:
    loss, gradients, kept = step(engine_of(LLAMA, "float8"))
    again, found, less = step(engine_of(LLAMA, "float8", f"micro_batch=2,recompute={recompute}"))
    assert again == loss
    assert less < 0.8 * kept
    for name, gradient in gradients.items():
        assert error(found[name], gradient) < 1e-2, name


def test_a_projection_keeps_the_input_that_others_read_too() -> None:
    assert step(engine_of(LLAMA, "float8"))[2] == step(engine_of(LLAMA, "bfloat16"))[2]


def test_what_does_not_divide_and_routed_experts_stay_in_bfloat16() -> None:
    odd = LLAMA.model_copy(update={"ffn_hidden": 40})
    for model, n_multiplied in ((LLAMA, 7), (odd, 4), (MIXTURE, 7)):
        stage = Transformer(model)
        multiply_in_float8(stage, "tensorwise")
        (layer, _) = stage.blocks()
        assert sum(getattr(module, "multiply", multiply) is not multiply for module in layer.modules()) == n_multiplied


def test_it_is_refused_where_there_are_no_units() -> None:
    layout = Layout(micro_batch=2)
    with pytest.raises(InputError, match=r"train.dtype: this CPU has no float8 units.*float64, float32, bfloat16$"):
        build(
            LLAMA, layout, Mesh(layout, torch.device("cpu"), 0, None), seq_len=16, global_batch=2, dtype="float8",
            seed=0, measure=lambda _: nullcontext(),
        )  # fmt: skip
