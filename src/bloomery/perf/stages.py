"""What the stages of a layout mean for its pipeline ranks, in layers: the integer tables behind `Case.ranks`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bloomery.perf.orders import most_in_flight
from bloomery.spec.layout import BY_STAGE, RECOMPUTE, V_SCHEDULES, Layout, Schedule, stages_of
from bloomery.spec.model import Model
from bloomery.spec.splits import stage_on

ROUNDS = 3
"""Rounds of pp micro-batches after which an interleaved rank holds as much as it ever does."""
ROWS = 5 + ROUNDS
"""Rows of `stage_rows`; those of `recompute_rows` follow."""
NAMED = 3
"""Middle ranks that row 3 names."""
KINDS = 2 * BY_STAGE
"""Layers that recompute nothing, selectively, all; then the mixtures of experts among each of them."""


def stage_rows(model: Model, pp: int, schedule: Schedule, split: tuple[int, ...], width: int) -> np.ndarray:
    """(ROWS, width): layers of each rank, MoE layers of each rank, 1 where the last stage is, the ranks that `_named`
    says; and where a rank's chunks are not even, `behind` of interleaved ones, `held` or `held_on_a_v`, else zeros. On
    a V all ranks have as many chunks in flight."""
    answer, v_shaped = np.zeros((ROWS, width), dtype=np.int64), schedule in V_SCHEDULES
    starts = np.cumsum([0, *split])
    dense = model.moe.first_dense_layers if model.moe else model.layers
    moe = np.maximum(0, starts[1:] - np.maximum(starts[:-1], dense))
    home = stage_on(np.arange(len(split)) // pp, np.arange(len(split)) % pp, pp, v_shaped) % pp
    np.add.at(answer[0], home, split)
    np.add.at(answer[1], home, moe)
    answer[2, home[-1]] = 1
    weight = answer[0, :pp] * (1 if v_shaped else pp - np.arange(pp))
    depths = np.reshape(split, (-1, pp))
    if v_shaped and np.any(depths[0] != depths[1, ::-1]):
        weight = answer[5:ROWS, :pp] = held_on_a_v(schedule, depths[0], depths[1, ::-1])
    elif not v_shaped and len(depths) > 1 and min(split) < max(split):
        answer[4, :pp] = behind(depths)
        answer[5:ROWS, :pp] = [held(depths, 1 + rounds) for rounds in range(ROUNDS)]
        weight = answer[ROWS - 1, :pp]
    if pp > 2:
        answer[3, :NAMED] = _named(answer[0, :pp], answer[1, :pp], weight, last=v_shaped)
    return answer


def _named(layers: np.ndarray, moe: np.ndarray, weight: np.ndarray, *, last: bool) -> list[int]:
    """Middle ranks: the one with most layers, and of those with most mixtures among them, the earliest; the heaviest;
    and the heaviest without any of the dense layers that lead a mixture of experts. Whether it needs more memory than
    one that has them depends on how experts are cut. Of equally heavy ones the earliest, or the `last`: on a V those
    further down have more weights that wait for their gradients."""
    leading = (layers - moe) * moe.any()
    fullest = 1 + int((layers * (1 + layers.sum()) + moe)[1:-1].argmax())
    orders = [order[1:-1] for order in (weight, weight * (leading == 0))]
    places = [len(order) - 1 - int(order[::-1].argmax()) if last else int(order.argmax()) for order in orders]
    return [fullest, *(1 + place for place in places)]


def behind(depths: np.ndarray) -> np.ndarray:
    """(pp,): layers for whose time an interleaved rank waits in every round of a micro-batch, of its chunks' `depths`,
    (vpp, pp). The last rank hands a chunk on when the first one has run out of it, so all ranks are at the same chunk
    and wait for its deepest stage; but not the first and the last stage, which have more to do than their layers."""
    waits = depths.max(axis=1, keepdims=True) - depths
    waits[0, 0] = waits[-1, -1] = 0
    return waits.sum(axis=0)


def held(depths: np.ndarray, rounds: int) -> np.ndarray:
    """(pp,): the most layers, each once for every micro-batch in flight, that an interleaved rank holds in a step of so
    many rounds of pp micro-batches. `perf.orders` plays the same turns: p micro-batches of a chunk before the next one,
    backwards from the last chunk, n = 2(p - i - 1) + (v - 1)p + 1 chunks ahead of them."""
    vpp, pp = depths.shape
    place, every = np.arange(vpp)[:, None, None] * pp, vpp * pp
    ahead = np.minimum(2 * (pp - np.arange(pp) - 1) + (vpp - 1) * pp + 1, rounds * every)
    # Over one turn of the wheel; after the last forward pass less is held.
    gone = np.minimum(ahead + np.arange(every)[:, None], rounds * every)  # (turns, ranks)

    def passed(steps: np.ndarray, start: np.ndarray) -> np.ndarray:
        return steps // every * pp + np.clip(steps % every - start, 0, pp)

    counts = passed(gone, place) - passed(gone - ahead, place[::-1])
    return np.asarray((counts * depths[:, None, :]).sum(axis=0).max(axis=0))


def held_on_a_v(schedule: Schedule, down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """(pp,): the same of a V's ranks, whose chunks have `down` and `up` layers, in a step that fills it. In a steady
    turn of `perf.orders` rank i has 2p - i - 1 micro-batches of the first chunk in flight and i of the second; ZB-V
    goes forward with one chunk at a time, DualPipeV with both before either goes back."""
    pp = len(down)
    steady = (2 * pp - np.arange(pp) - 1) * down + np.arange(pp) * up
    return np.asarray(steady + (np.maximum(down, up) if schedule == "zbv" else down + up))


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
