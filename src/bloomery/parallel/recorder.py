"""What was really sent: records every collective that reaches PyTorch's c10d operators, whoever issued it.

Independent of our own collectives and of the plan; sees FSDP2's and the pipeline's messages too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bloomery.parallel.mesh import Mesh

_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "send": ("send", 0),
}
"""c10d operator: our name, and which argument is the payload (gather: its output; reduce-scatter: its input)."""

_NOT_SENT = {"recv_", "recv_any_source_", "wait_tensor", "check_for_nan"}
"""The other end of a send, and what moves nothing. Any operator named nowhere here is counted under its own name."""


class _Recorder(TorchDispatchMode):
    def __init__(self, axes: dict[str, str]) -> None:
        super().__init__()
        self.axes, self.seen = axes, Counter[tuple[str, str, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in _NOT_SENT:
            op, place = _OPERATORS.get(func._opname, (func._opname, 0))
            payload = args[place] if args else ()
            tensors = [payload] if isinstance(payload, Tensor) else [t for t in payload if isinstance(t, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.seen[(self._axis(args), op, size)] += 1
        return func(*args, **(kwargs or {}))

    def _axis(self, args: Any) -> str:
        for argument in args:
            if isinstance(argument, torch.ScriptObject):
                try:
                    return self.axes[str(dist.ProcessGroup.unbox(argument).group_name)]
                except (KeyError, RuntimeError, TypeError):
                    continue
        return "unknown"


@contextmanager
def record(mesh: Mesh) -> Iterator[Counter[tuple[str, str, int]]]:
    """Count (axis, op, payload bytes) of this rank's messages inside the block."""
    axes = {str(mesh.ends.group_name): "ends"} if mesh.ends is not None else {}
    axes |= {str(mesh.group(axis).group_name): axis for axis in mesh.axes}
    recorder = _Recorder(axes)
    with recorder:
        yield recorder.seen
