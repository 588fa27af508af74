"""What the stages of a layout mean for its pipeline ranks, in layers: the integer tables behind `Case.ranks`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bloomery.perf.orders import most_in_flight
from bloomery.spec.layout import BY_STAGE, RECOMPUTE, Layout, stages_of
from bloomery.spec.model import Model
from bloomery.spec.splits import stage_on

ROWS = 4
"""Rows of `stage_rows`; those of `recompute_rows` follow."""
KINDS = 2 * BY_STAGE
"""Layers that recompute nothing, selectively, all; then the mixtures of experts among each of them."""


def stage_rows(model: Model, pp: int, v_shaped: bool, split: tuple[int, ...], width: int) -> np.ndarray:
    """(4, width): layers of each rank, MoE layers of each rank, 1 where the last stage is, and in the last row the
    fullest and heaviest rank. On a V all ranks have as many micro-batches in flight."""
    answer = np.zeros((ROWS, width), dtype=np.int64)
    starts = np.cumsum([0, *split])
    dense = model.moe.first_dense_layers if model.moe else model.layers
    moe = np.maximum(0, starts[1:] - np.maximum(starts[:-1], dense))
    home = stage_on(np.arange(len(split)) // pp, np.arange(len(split)) % pp, pp, v_shaped) % pp
    np.add.at(answer[0], home, split)
    np.add.at(answer[1], home, moe)
    answer[2, home[-1]] = 1
    if pp > 2:
        middle = answer[0, 1 : pp - 1]
        flight = 1 if v_shaped else pp - np.arange(1, pp - 1)
        answer[3, :2] = 1 + int(middle.argmax()), 1 + int((middle * flight).argmax())
    return answer


def recompute_rows(model: Model, layouts: Sequence[Layout], micro_batches: Sequence[int], width: int) -> np.ndarray:
    """(layouts, 1 + 6 + 6 moments, width) of layouts that may recompute stage by stage: the most chunks that a rank has
    in flight, its layers by kind (`KINDS`), and vpp x what of them is in flight at every moment of `most_in_flight`
    (zeros after the last). Where a rank has one chunk, one micro-batch is counted: how many there are changes nothing.
    """
    each = []
    for layout, m in zip(layouts, micro_batches, strict=True):
        depths = [(len(layers), sum(map(model.is_routed, layers))) for layers in stages_of(model, layout)]
        each.append([_rank_rows(layout, depths, m, rank) for rank in range(layout.pp)])
    height = max(len(rows) for ranks in each for rows in ranks)
    table = np.zeros((len(layouts), height, width), dtype=np.int64)
    for i, ranks in enumerate(each):
        for rank, rows in enumerate(ranks):
            table[i, : len(rows), rank] = rows
    table[:, 0] = np.maximum(table[:, 0], 1)  # beyond the last rank there is none
    return table


def _rank_rows(layout: Layout, depths: Sequence[tuple[int, int]], micro_batches: int, rank: int) -> list[int]:
    """The column of one rank; `depths`: (layers, mixtures among them) of every stage."""
    chunks = np.zeros((layout.vpp, KINDS), dtype=np.int64)
    for chunk, stage in enumerate(layout.stages_on(rank)):
        kind = RECOMPUTE.index(layout.recomputes[stage])
        chunks[chunk, [kind, BY_STAGE + kind]] = depths[stage]
    moments = most_in_flight(layout, micro_batches, rank) if layout.vpp > 1 else ((1,),)
    most = max(sum(moment) for moment in moments)
    held = [layout.vpp * (chunks.T @ np.array(moment)) for moment in moments]
    return [most, *chunks.sum(axis=0).tolist(), *np.concatenate(held).tolist()]
