"""Seconds of the optimizer: AdamW over everything, and what Muon takes beyond it, gathering whole matrices and
orthogonalising them.

Under Muon every rank orthogonalises all matrices of its pipeline stage: nothing is divided over tensor- or
data-parallel ranks but experts, over the expert-parallel ones.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from bloomery.perf.case import Case
from bloomery.perf.collectives import collective_s, group_of
from bloomery.perf.kernels import gemm_s, memory_s
from bloomery.spec.cluster import CollectiveName, Dtype
from bloomery.spec.data_messages import matrix_collectives
from bloomery.spec.parameters import is_hidden_matrix, layer_parameters

NEWTON_SCHULZ_STEPS = 5


def muon_s(case: Case) -> Any:
    """Seconds of one step on `Case.kinds`, shape (3, n); zero under another optimizer."""
    ranks = case.kinds
    if case.optimizer != "muon":
        return np.zeros(np.shape(ranks.layers))
    seconds = ranks.dense_layers * _layer_s(case, 0) + ranks.moe_layers * _layer_s(case, case.model.layers - 1)
    for row in matrix_collectives(case.model, case.lay, ranks.shape, parameter_bytes=case.precision.parameter):
        group = group_of(case.lay, "data" if row.axis == "dp" else row.axis)
        one = collective_s(case.cluster, cast(CollectiveName, row.op), group, row.bytes_each)
        seconds = seconds + row.count * one
    return seconds


def _layer_s(case: Case, layer: int) -> Any:
    """One layer's matrices, of experts those on a rank: X X^T, its square, and the product with X, of the smaller side
    r and the larger c."""
    accelerator, total = case.accelerator, np.zeros(len(case.lay))
    narrow = accelerator.kind != "cpu" and "bfloat16" in accelerator.peak_flops_per_s
    dtype: Dtype = "bfloat16" if narrow else "float32"
    wide = 2 if narrow else 4
    for parameter in layer_parameters(case.model, layer):
        if is_hidden_matrix(parameter):
            count: Any = parameter.shape[0] // case.lay.ep if parameter.expert else 1
            r, c = sorted(parameter.shape[-2:])
            for m, n, k in ((r, r, c), (r, r, r), (r, c, r)):
                total += count * float(gemm_s(accelerator, dtype, m, n, k, element_bytes=wide))
    return NEWTON_SCHULZ_STEPS * total


def optimizer_s(case: Case, parameters: Any) -> Any:
    """AdamW over so many elements, the gradient norm and clipping: all bound by memory."""
    rate = case.accelerator.optimizer_bytes_per_s
    n_bytes = (case.precision.adam_bytes + case.precision.clip_bytes) * parameters
    return n_bytes / rate if rate else memory_s(case.accelerator, n_bytes)
