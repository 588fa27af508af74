"""Modules without memory, to be filled afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _NothingDrawn(TorchFunctionMode):
    """Normal random numbers for a tensor without memory are no work, but PyTorch imports its compiler for them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside have parameters on the meta device, which hold nothing."""
    with torch.device("meta"), _NothingDrawn():
        yield
