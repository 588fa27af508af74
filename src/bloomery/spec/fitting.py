"""The same training on another number of ranks: the layout nearest to a given one that fits, by the layout rules.

What a rank holds must not grow unless it has to: the model-parallel degrees stay as long as one replica of them fits
and data parallelism takes what is left; only when not even one fits are they cut. The global batch and so the order of
samples never change: fewer data-parallel ranks each do more micro-batches. Memory is the planner's and not judged here.
"""

from __future__ import annotations

from itertools import product
from math import gcd

import numpy as np
from pydantic import ValidationError

from bloomery.spec.errors import InputError
from bloomery.spec.layout import RECOMPUTE, Layout, LayoutBatch
from bloomery.spec.layout_rules import check_layout
from bloomery.spec.model import Model


def fitted(model: Model, layout: Layout, ranks: int, *, global_batch: int, seq_len: int) -> Layout | None:
    """The layout on at most `ranks` ranks that is nearest to `layout`; None where no layout keeps the rules.

    Data parallelism must divide the global batch: of 3 ranks and a batch of 8, two train and one waits.
    """
    shapes = [
        (tp, pp, cp, ranks // (tp * pp * cp))
        for tp, pp, cp in product(_divisors(layout.tp), range(1, layout.pp + 1), _divisors(layout.cp))
        if tp * pp * cp <= ranks
    ]
    own = (layout.tp, layout.pp, layout.cp)
    whole = [shape for shape in shapes if shape[:3] == own]
    rest = sorted((s for s in shapes if s[:3] != own), key=lambda s: (s[0] * s[1] * s[2], s[0], s[2]), reverse=True)
    for tp, pp, cp, most in whole + rest:
        for dp, micro_batch in product(range(most, 0, -1), _divisors(layout.micro_batch)):
            found = _resized(layout, tp=tp, pp=pp, cp=cp, dp=dp, micro_batch=micro_batch)
            if found is not None and _keeps_rules(model, found, global_batch, seq_len):
                return found
    return None


def with_batch(layout: Layout, global_batch: int) -> Layout:
    """`layout` for another global batch: one that its micro-batches do not divide is cut into smaller ones."""
    return layout.model_copy(update={"micro_batch": gcd(global_batch // layout.dp, layout.micro_batch)})


def with_batches(layouts: LayoutBatch, global_batch: int) -> LayoutBatch:
    """`with_batch` of many."""
    return layouts.having(micro_batch=np.gcd(global_batch // layouts.dp, layouts.micro_batch))


def _divisors(number: int) -> list[int]:
    """Largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def _resized(layout: Layout, *, tp: int, pp: int, cp: int, dp: int, micro_batch: int) -> Layout | None:
    """`layout` with other degrees, and what depends on them brought into line; None where that is not possible."""
    changes: dict[str, object] = {"tp": tp, "pp": pp, "cp": cp, "dp": dp, "micro_batch": micro_batch}
    replicas = layout.dp_replicas
    if dp % replicas or dp * cp // replicas < 2:
        replicas = changes["dp_replicas"] = 1
    changes["ep"] = next(ep for ep in _divisors(layout.ep) if dp // replicas % ep == 0)
    if dp * cp == 1:
        changes["zero_stage"] = 0
    if tp == 1:
        changes["sequence_parallel"] = False
    if pp != layout.pp:
        changes["stage_layers"] = None
        if not isinstance(layout.recompute, str):
            # What a run was planned to keep may not fit on fewer stages: all that one of them made again.
            changes["recompute"] = max(layout.recompute, key=RECOMPUTE.index)
    if pp == 1:
        changes |= {"vpp": 1, "schedule": "1f1b"}
    try:
        return Layout(**{**layout.model_dump(), **changes})
    except ValidationError:
        return None


def _keeps_rules(model: Model, layout: Layout, global_batch: int, seq_len: int) -> bool:
    try:
        check_layout(model, layout, global_batch=global_batch, seq_len=seq_len, run=True)
    except InputError:
        return False
    return True
