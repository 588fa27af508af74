"""A training process on which one rank computes gradients with one bit wrong, in place of `bloomery.train.worker`.

MISCALCULATES is JSON: the rank, and its gradients that are wrong, counted over the life of a process: from .. to - 1.
"""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor

from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import Engine
from bloomery.train import worker


def main() -> int:
    """Train, the lowest bit of one number of some gradients turned over."""
    rank, first, stop = json.loads(os.environ["MISCALCULATES"])
    backward, count = Engine.backward_of, 0

    def wrong(self: Engine, micro: Batch) -> Tensor:
        nonlocal count
        loss = backward(self, micro)
        if int(os.environ["RANK"]) == rank and first <= count < stop:
            gradient = next(iter(self.parameters().values())).grad
            assert gradient is not None
            gradient.view(torch.int32).view(-1)[5] ^= 1
        count += 1
        return loss

    Engine.backward_of = wrong  # type: ignore[method-assign]
    return worker.main()
