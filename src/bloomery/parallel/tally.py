"""What a step computes and keeps, counted while it runs: FLOPs by operator, and the tensors autograd saves.

Works on real tensors and on fake ones alike; what is sent is counted by `recorder`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bloomery.model.transformer import Transformer

aten = torch.ops.aten


def _attention(query_bhsk: Tensor, key_bhsk: Tensor, *_: Any, **__: Any) -> int:
    """Two products over the whole square, masked half included: the convention of `perf.flops`."""
    batch, heads, queries, width = query_bhsk.shape
    return 4 * batch * heads * queries * key_bhsk.shape[2] * width


def _attention_backward(_: Tensor, query_bhsk: Tensor, key_bhsk: Tensor, *__: Any, **___: Any) -> int:
    """Twice the forward: the kernel's own recomputation of the scores is not counted."""
    return 2 * _attention(query_bhsk, key_bhsk)


_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""PyTorch's own formulas, and those it lacks: products added in place, fused attention of CPUs."""


class FlopTally(TorchDispatchMode):
    """Adds up the FLOPs of every operator in the block: local shapes, matrix products and attention only."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


class SavedTally:
    """Bytes of the storages that autograd keeps for the backward pass, each counted once.

    `chunks`: saved inside the transformer layers of each of a rank's stages, in their order; `offloaded`: of these,
    copies on the host; `ends`: by embedding, final norm, head and loss. `weight_copies`: autocast's copies of weights.
    The weights themselves and whatever a recomputed layer makes again are not counted.
    """

    def __init__(self) -> None:
        self.ends, self.weight_copies, self.offloaded = 0, 0, 0
        self.chunks: Counter[int] = Counter()
        self._inside: int | None = None
        self._seen: dict[int, torch.UntypedStorage] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            # Kept alive here, so that no later storage gets the same address.
            self._seen[storage._cdata] = storage
            base = tensor if tensor._base is None else tensor._base
            if isinstance(base, nn.Parameter):
                pass
            elif _is_copy_of_weight(base):
                self.weight_copies += storage.nbytes()
            elif self._inside is not None:
                self.chunks[self._inside] += storage.nbytes()
                self.offloaded += storage.nbytes() if getattr(tensor, "offloaded", False) else 0
            else:
                self.ends += storage.nbytes()
        return tensor.detach()

    @property
    def layers(self) -> int:
        """Saved inside all layers."""
        return self.chunks.total()

    @contextmanager
    def over(self, stages: Iterable[Transformer]) -> Iterator[None]:
        """Count what is saved in this block while these stages run."""

        def enter(chunk: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
            # All layers share the view's tensors: the first to save them would be charged for all.
            for tensor in inputs[1].rotary or ():
                self._pack(tensor)
            self._inside = chunk

        def leave(*_: Any) -> None:
            self._inside = None

        handles = []
        for chunk, layer in ((chunk, layer) for chunk, stage in enumerate(stages) for layer in stage.blocks()):
            handles += [layer.register_forward_pre_hook(partial(enter, chunk)), layer.register_forward_hook(leave)]
        try:
            with saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()


def of_weights(tensor: Tensor) -> bool:
    """Whether this is a weight, a view of one, or a weight in another number format."""
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, nn.Parameter) or _is_copy_of_weight(base)


def _is_copy_of_weight(tensor: Tensor) -> bool:
    """True for a parameter converted to another number format."""
    node = tensor.grad_fn
    if node is None or not node.name().startswith("ToCopyBackward"):
        return False
    source = node.next_functions[0][0]
    return source is not None and isinstance(getattr(source, "variable", None), nn.Parameter)
