"""A running average of the weights, beside them: steadier than the last ones, at the price of one more copy.

*ema*: after each update the average moves by 1 - decay towards the weights (Polyak & Juditsky 1992; for networks
Morales-Brotons et al. 2024, arXiv 2411.18704); until there were 1 / (1 - decay) updates it is their plain mean, or the
first weights, the worst, would keep most of the weight. *uniform*: the plain mean of the weights since `start`, what
latest-weight averaging (Kaddour 2022, 2209.14981) and averaging instead of decay (Hägele et al. 2024, 2405.18392) take
over a window; here the window is all that comes after `start`.

The average is laid out like the optimizer's moments, so checkpoints carry it and load it under any layout. When an
update is due, and how far it goes, are functions of the step alone: a resumed run has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bloomery.parallel.engine import Engine
from bloomery.spec.run import Averaging


class Average:
    """The average of what one rank updates; empty until it begins."""

    def __init__(self, engine: Engine, settings: Averaging, n_steps: int) -> None:
        self.engine, self.settings = engine, settings
        self.first = settings.first_step(n_steps)
        self.kept = dict[nn.Parameter, Tensor]()

    @property
    def begun(self) -> bool:
        """Whether there is one."""
        return bool(self.kept)

    def share(self, done: int) -> float | None:
        """How far the average moves towards the weights after `done` steps; None where no update is due."""
        number, rest = divmod(done - self.first, self.settings.every)
        if self.settings.method == "none" or number < 0 or rest:
            return None
        mean = 1 / (number + 1)
        return max(mean, 1 - self.settings.decay) if self.settings.method == "ema" else mean

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take the weights in, after `done` steps, where that is due."""
        share = self.share(done)
        if share is None:
            return
        items = [item for item in self.engine.shards() if self.engine.table[item.shard.name].kind != "buffer"]
        kept = [self.kept.get(item.parameter) for item in items]
        pairs = zip(items, kept, strict=True)
        averages = [item.local(self.begin(item.parameter) if known is None else known) for item, known in pairs]
        torch._foreach_lerp_(averages, [item.local() for item in items], share)

    def begin(self, parameter: nn.Parameter) -> Tensor:
        """A place for the average of one parameter (a router's bias, which no optimizer moves, has none)."""
        self.kept[parameter] = torch.zeros_like(parameter, requires_grad=False)
        return self.kept[parameter]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The engine computes with the average inside and with the weights, bit by bit, again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for item in self.engine.shards():
            if item.parameter in self.kept:
                weight, average = item.local(), item.local(self.kept[item.parameter])
                before = weight.clone()
                weight.copy_(average)
                average.copy_(before)
        self.engine.gather_updated()
