"""The rows of the shard table about parameters and gradients: sums and gathers over the ranks that hold the same ones.

Source of the volumes: ZeRO Rajbhandari et al. 2020 (arXiv 1910.02054). `shard_table` lists them with all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from bloomery.spec.collective import Collective, Rows, StageShape
from bloomery.spec.expert_messages import expert_replicas, routing_row
from bloomery.spec.layout import LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.parameters import (
    Parameter,
    embedding_parameters,
    head_parameters,
    is_hidden_matrix,
    layer_parameters,
)


def tied_collectives(model: Model, lay: LayoutBatch, shape: StageShape, *, gradient_bytes: int) -> list[Collective]:
    """The gradient of a tied embedding is summed once a step between the first and the last stage, which both hold it
    (Shoeybi et al. 2019, section 3); on one rank, as on a V, both use the same parameter and nothing is sent.
    Where ZeRO has cut it, the size is that on the fullest rank: where rows do not divide evenly others have fewer."""
    rows = Rows()
    if model.tie_embeddings:
        cut = np.where((lay.data_ranks > 1) & (lay.zero_stage >= 2), lay.shards, 1)
        embedding = _padded([embedding_parameters(model)[0]], lay.tp, cut) // cut
        apart = (lay.pp > 1) & (np.asarray(shape.first) != shape.last)
        rows.add("tied_embedding", "ends", "all_reduce", "step", apart, embedding * gradient_bytes)
    return rows.rows


def _padded(parameters: Iterable[Parameter], tp: Any, dp: Any) -> Any:
    """Elements of these parameters on one tp rank with ZeRO's dimension padded to a multiple of dp (as FSDP2)."""
    total: Any = 0
    for (shape, tp_dim, dim), copies in Counter((p.shape, p.tp_dim, p.data_dim) for p in parameters).items():
        rows = shape[dim] // tp if tp_dim == dim else shape[dim] + 0 * dp
        rest = prod(shape) // shape[dim] // (tp if tp_dim not in (None, dim) else 1)
        total = total + copies * -(-rows // dp) * dp * rest
    return total


def _padded_experts(parameters: Iterable[Parameter], tp: Any, ranks: Any, ep: Any) -> Any:
    """The same of stacked experts of one ep rank, padded in whole experts."""
    total: Any = 0
    for p in parameters:
        each = p.size // p.shape[0] // (1 if p.tp_dim is None else tp)
        total = total + -(-(p.shape[0] // ep) // ranks) * ranks * each
    return total


def _local(parameters: Iterable[Parameter], tp: Any) -> Any:
    """Elements of these parameters on one tp rank."""
    counted = Counter((p.size, p.tp_dim is not None) for p in parameters)
    return sum((copies * (size // (tp if cut else 1)) for (size, cut), copies in counted.items()), 0 * tp)


@dataclass(frozen=True)
class _Unit:
    """What one message carries: parts with how often each is there (or where), 1/`share` of them on a rank; `ranks` on
    `axis` have it, `held` such units lie on a rank. `buffers` are gathered like the rest but have no gradients."""

    site: str
    axis: str
    ranks: Any
    held: Any
    parts: list[tuple[Sequence[Parameter], Any]]
    share: Any = 1
    buffers: Sequence[Parameter] = ()

    def elements(self, tp: Any) -> Any:
        """On one rank, before ZeRO."""
        return sum(_local(part, tp) * there for part, there in self.parts) // self.share

    def padded(self, tp: Any, first: Any, *, wide: bool = False) -> Any:
        """The same, each tensor padded to rows for all ranks; `first`: where experts are cut in dimension 0, (n,);
        `wide`: only of those (`Parameter.wide`)."""
        total: Any = 0
        for whole, there in self.parts:
            part = [p for p in whole if p.wide] if wide else whole
            size = _padded(part, tp, self.ranks) // self.share
            if any(p.expert for p in part):
                size = np.where(first, _padded_experts(part, tp, self.ranks, self.share), size)
            total = total + size * there
        return total


def _kinds(model: Model, shape: StageShape) -> list[tuple[Any, tuple[Parameter, ...]]]:
    """The layers of a rank, all alike or dense ones before mixtures of experts: how many, and the parameters of one."""
    last = layer_parameters(model, model.layers - 1)
    if model.is_routed(model.layers - 1) and not model.is_routed(0):
        return [(shape.layers - shape.moe_layers, layer_parameters(model, 0)), (shape.moe_layers, last)]
    return [(shape.layers, last)]


def _units(model: Model, lay: LayoutBatch, shape: StageShape) -> Iterator[_Unit]:
    """Each layer, the experts of a layer where they lie on ranks of their own, what stands outside the layers."""
    for held, parameters in _kinds(model, shape):
        experts = [p for p in parameters if p.expert]
        buffers = [p for p in parameters if p.kind == "buffer"]
        parts: list[tuple[Sequence[Parameter], Any]] = [
            ([p for p in parameters if not p.expert and p.kind != "buffer"], 1)
        ]
        if experts:
            replicas, apart = expert_replicas(lay), lay.ep > 1
            yield _Unit("experts", "edp", replicas, held * apart, [(experts, 1)], lay.ep)
            parts.append((experts, ~apart))
        yield _Unit("layer", "dp", lay.shards, held, parts, buffers=buffers)
    for ends, there in _end_units(model, lay, shape):
        yield _Unit("ends", "dp", lay.shards, there, ends)


def data_collectives(
    model: Model, lay: LayoutBatch, shape: StageShape, *, stream_bytes: int, parameter_bytes: int, gradient_bytes: int
) -> list[Collective]:
    """Gradients and parameters over ranks that hold the same ones (dp x cp). Units: each layer, and what a stage holds
    outside its layers; experts on ep ranks by themselves, over the ranks that have the same.

    Replicated: one all-reduce a unit and step. ZeRO 1: gradients are reduce-scattered after the step's last micro-batch
    and updated parameters gathered. ZeRO 2: one gather and one reduce-scatter a step. ZeRO 3: gathers for each
    micro-batch's forward and backward. With replicas each rank's gradients are also summed over them (HSDP).

    Both gather what they compute with: in the stream's format where that is narrower, but for what is `Parameter.wide`;
    ZeRO 1 what the optimizer has updated.
    """
    narrow_bytes = min(parameter_bytes, stream_bytes)
    rows, third = Rows(), Rows("micro_batch")
    cut, replicated = (lay.data_ranks > 1) & (lay.zero_stage >= 1), (lay.data_ranks > 1) & (lay.zero_stage == 0)
    across = cut & (lay.dp_replicas > 1)
    for unit in _units(model, lay, shape):
        site, axis = f"zero.{unit.site}", unit.axis
        reduced = unit.elements(lay.tp) * gradient_bytes
        # Experts that no other rank of a replica has are summed over the replicas alone, whole.
        rows.add(site, "replica", "all_reduce", "backward", across * unit.held * (unit.ranks == 1), reduced)
        held = unit.held * (unit.ranks > 1)
        rows.add(f"gradients.{unit.site}", axis, "all_reduce", "step", replicated * held, reduced)
        if not np.any(cut):
            continue
        padded = unit.padded(lay.tp, lay.zero_stage == 1)
        # FSDP gathers what it wraps, buffers too; ZeRO 1 what optimizers move.
        wide, buffers = unit.padded(lay.tp, False, wide=True), _padded(unit.buffers, lay.tp, lay.shards)
        as_computed = (padded - wide) * narrow_bytes + (wide + buffers) * parameter_bytes
        gathered = np.where(lay.zero_stage >= 2, as_computed, padded * parameter_bytes)
        reduced = padded * gradient_bytes
        rows.add(site, axis, "reduce_scatter", "backward", cut * held, reduced)
        rows.add(site, "replica", "all_reduce", "backward", across * held, reduced // unit.ranks)
        rows.add(site, axis, "all_gather", "step", cut * (lay.zero_stage == 1) * held, gathered)
        rows.add(site, axis, "all_gather", "forward", cut * (lay.zero_stage == 2) * held, gathered)
        third.add(site, axis, "all_gather", "forward", cut * (lay.zero_stage == 3) * held, gathered)
        if unit.site != "ends":
            # What lies outside the layers stays gathered until a backward pass has ended; in a pipeline whatever comes
            # next gathers it again: as often as there are micro-batches.
            third.add(site, axis, "all_gather", "backward", cut * (lay.zero_stage == 3) * held, gathered)
    for row in routing_row(model, lay, shape.moe_layers):
        rows.add(*row)
    return rows.rows + third.rows


def norm_collectives(model: Model, lay: LayoutBatch, shape: StageShape, *, gradient_bytes: int) -> list[Collective]:
    """Gradients of uncut parameters, summed once a step over the tensor-parallel ranks: of all under sequence
    parallelism, where each rank has seen its own tokens; else of those where it has seen its heads or its experts.
    """
    rows = Rows()
    # Under ZeRO each data-parallel rank holds its rows of them; where rows do not divide evenly, rank 0's (the most).
    cut = np.where(lay.norms_sharded, lay.shards, 1)
    norms: Any = 0
    for held, part in [*_kinds(model, shape), *((there, part) for part, there in _ends(model, shape))]:
        every, some = (
            _padded([p for p in part if p.partial_over_tp(sequence)], lay.tp, cut) // cut for sequence in (True, False)
        )
        norms = norms + np.where(lay.sequence_parallel == 1, every, some) * held
    summed = (lay.tp > 1) & (norms > 0)
    rows.add("norm_gradients", "tp", "all_reduce", "step", summed, norms * gradient_bytes)
    return rows.rows


def matrix_collectives(model: Model, lay: LayoutBatch, shape: StageShape, *, parameter_bytes: int) -> list[Collective]:
    """Muon orthogonalises whole matrices: each layer's momentum is gathered over the ranks that ZeRO, then those that
    tensor parallelism cut it over; experts stay on their expert-parallel rank."""
    rows, sharded = Rows(), (lay.data_ranks > 1) & (lay.zero_stage >= 1)
    apart, replicas = lay.ep > 1, expert_replicas(lay)
    for held, layer in _kinds(model, shape):
        matrices = [p for p in layer if is_hidden_matrix(p) and not p.expert]
        experts = [p for p in layer if is_hidden_matrix(p) and p.expert]
        units = [_Unit("rows", "dp", lay.shards, held, [(matrices, 1), (experts, ~apart)])]
        if experts:
            units.append(_Unit("experts", "edp", replicas, held * apart * (replicas > 1), [(experts, 1)], lay.ep))
        for unit in units:
            n_bytes = unit.padded(lay.tp, lay.zero_stage == 1) * parameter_bytes
            rows.add(f"matrices.{unit.site}", unit.axis, "all_gather", "step", sharded * unit.held, n_bytes)
        sizes = (sum(p.size for p in part if p.tp_dim is not None) for part in (matrices, experts))
        whole_bytes = (next(sizes) + next(sizes) // lay.ep) * parameter_bytes
        rows.add("matrices.whole", "tp", "all_gather", "step", (lay.tp > 1) * held, whole_bytes)
    return rows.rows


def _ends(model: Model, shape: StageShape) -> list[tuple[Sequence[Parameter], Any]]:
    """What a stage holds outside its layers, and where it does."""
    return [(embedding_parameters(model), shape.first), (head_parameters(model), shape.last)]


def _end_units(
    model: Model, lay: LayoutBatch, shape: StageShape
) -> list[tuple[list[tuple[Sequence[Parameter], Any]], Any]]:
    """What stages hold outside their layers, one unit a stage, and where there is one. A single stage has both ends in
    one unit; a last stage on another rank than the first has its own copy of a tied embedding."""
    alone = (lay.pp == 1) & np.asarray(shape.last)
    first: list[tuple[Sequence[Parameter], Any]]
    first = [(embedding_parameters(model), np.asarray(shape.first)), (head_parameters(model), alone)]
    last_only = np.asarray(shape.last) & ~alone
    last: list[tuple[Sequence[Parameter], Any]] = [(head_parameters(model), last_only)]
    if model.tie_embeddings:
        last.append((embedding_parameters(model)[:1], last_only & ~np.asarray(shape.first)))
    return [(first, np.asarray(shape.first)), (last, last_only)]
