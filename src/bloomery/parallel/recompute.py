"""Recomputation: what the backward pass needs and the forward pass does not keep.

*full*: each layer keeps its input and runs again (Chen et al. 2016, arXiv 1604.06174).

*selective*: what is cheap to make again is not kept: the outputs of norms, the gathered inputs of blocks under sequence
parallelism, and the outputs of activation functions. They are made again when the first of their readers needs them in
the backward pass. Korthikanti et al. 2022 (arXiv 2205.05198) repeat the attention core, whose scores were large; fused
attention keeps no scores, and repeating it would save one number a head and token. Forward passes are bitwise those of
keeping; gradients may be added up in another order.

How: such an output carries its recipe (`_Recipe`), and whoever saves the output in a layer for its backward pass (a
matrix product) saves the recipe in its place. No graph or storage is changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from bloomery.model.mixture import Mixture
from bloomery.model.transformer import Transformer


def recompute_layers(stage: Transformer) -> None:
    """Keep only each layer's input; its activations are computed again in the backward pass."""
    for layer in stage.blocks():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def recompute_outputs(stage: Transformer) -> None:
    """Keep no outputs of norms and activation functions in any layer, experts' among them (gathered inputs: `tensor`,
    by `made_again`). Copies of tokens on their way to experts, and a router's scores, are kept: they cost messages."""
    for layer in stage.blocks():
        for norm in (layer.attention_norm, layer.ffn_norm):
            norm.forward = partial(_normalised, norm.forward, norm)  # type: ignore[method-assign]
        blocks = [layer.ffn.shared, layer.ffn.experts] if isinstance(layer.ffn, Mixture) else [layer.ffn]
        for block in blocks:
            if block is not None:
                block.activate = partial(made_again, block.activate)
        layer.forward = partial(_keeping_recipes, layer.forward)  # type: ignore[method-assign]


def _normalised(forward: Callable[[Tensor], Tensor], norm: nn.Module, x_bsd: Tensor) -> Tensor:
    return made_again(forward, x_bsd, weights=tuple(norm.parameters()))


class _Recipe:
    """How to make a value again: a function, and the graph's node that holds its inputs."""

    def __init__(self, function: Callable[..., Tensor], weights: tuple[nn.Parameter, ...], device_type: str) -> None:
        self.function, self.weights, self.device_type = function, weights, device_type
        self.autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        self.node: Callable[[], Any] = lambda: None
        self._made: tuple[list[Tensor], Tensor] | None = None

    def made(self) -> tuple[list[Tensor], Tensor]:
        """(inputs, value) with their graph, made at the first asking and kept until `forget`."""
        if self._made is None:
            inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.node().saved_tensors]
            enabled, dtype = self.autocast
            with torch.enable_grad(), torch.autocast(self.device_type, dtype, enabled=enabled, cache_enabled=False):
                self._made = inputs, self.function(*inputs)
        return self._made

    def forget(self) -> None:
        """Let go of the value; asked again, it is made again."""
        self._made = None


class _MadeAgain(torch.autograd.Function):
    """A recipe's function whose graph is not kept; its backward pass goes through a second run."""

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, n_inputs: int, *tensors: Tensor) -> Tensor:
        ctx.recipe, ctx.n_inputs = recipe, n_inputs
        ctx.save_for_backward(*tensors[:n_inputs])
        recipe.node = weakref.ref(ctx)
        return recipe.function(*tensors[:n_inputs])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        recipe: _Recipe = ctx.recipe
        inputs, value = recipe.made()
        recipe.forget()
        tensors = [*inputs, *recipe.weights]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, gradient))
        return None, None, *(next(found) if tensor.requires_grad else None for tensor in tensors)


def made_again(function: Callable[..., Tensor], *inputs: Tensor, weights: tuple[nn.Parameter, ...] = ()) -> Tensor:
    """`function(*inputs)`, whose value and inner graph are made again in the backward pass.

    `weights`: the parameters that the function reads beside its inputs. It must give the same value at each call, and
    memory of its own.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    recipe = _Recipe(function, weights, inputs[0].device.type)
    value: Tensor = _MadeAgain.apply(recipe, len(inputs), *inputs, *weights)
    base = _base(value)
    assert all(base is not _base(tensor) for tensor in inputs), "a view of an input is not made again"
    base.recipe = recipe  # type: ignore[attr-defined]
    return value


def _base(tensor: Tensor) -> Tensor:
    """What a view is a view of."""
    return tensor if tensor._base is None else tensor._base


@dataclass(frozen=True)
class _View:
    """Stands for a tensor that is a view of a recipe's value."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The view of the value made again."""
        return self.recipe.made()[1].detach().as_strided(self.size, self.stride, self.offset)


def _keeping_recipes(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run a layer; its operators save recipes where there are some, everything else as they would without."""
    if not torch.is_grad_enabled():
        return forward(*inputs)
    with _recipes_saved():
        return forward(*inputs)


Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def hooks_outside() -> Hooks:
    """The hooks for saved tensors in force here. Only the innermost are called: new ones call those that they hide,
    which may count or move what is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) or (Tensor.detach, _same)


def _recipes_saved() -> AbstractContextManager[Any]:
    pack_outside, unpack_outside = hooks_outside()

    def pack(tensor: Tensor) -> Any:
        recipe = getattr(_base(tensor), "recipe", None)
        if recipe is None:
            return pack_outside(tensor)
        return _View(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(saved: Any) -> Tensor:
        return saved.tensor() if isinstance(saved, _View) else unpack_outside(saved)

    return saved_tensors_hooks(pack, unpack)


def _same(tensor: Tensor) -> Tensor:
    return tensor
