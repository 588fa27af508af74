"""The engine: a model laid over a mesh, ready to run a step. `train` drives it and knows nothing of axes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bloomery.model.transformer import Transformer
from bloomery.parallel.apply import lay_out, stabilise
from bloomery.parallel.batch import Batch
from bloomery.parallel.collectives import Measure, TensorAxis
from bloomery.parallel.context import ContextAxis
from bloomery.parallel.data_parallel import sum_flat, sum_over_world, sum_whole
from bloomery.parallel.expert import Routed, mixtures, move_biases, summed_routing
from bloomery.parallel.formats import AUTOCAST, PARAMETERS, check_format
from bloomery.parallel.local import local_part
from bloomery.parallel.mesh import Mesh
from bloomery.parallel.update_shards import UpdateShards, rows_of
from bloomery.spec.errors import InputError
from bloomery.spec.float8 import DEFAULT, Float8
from bloomery.spec.layout import Layout
from bloomery.spec.layout_rules import check_layout
from bloomery.spec.model import Model
from bloomery.spec.modules import GROUPS, group_of
from bloomery.spec.parameters import Parameter, owning_name
from bloomery.spec.shard_table import Shard
from bloomery.spec.stabilisers import UNTOUCHED, Stabilisers

if TYPE_CHECKING:  # large imports, made where a layout needs them
    from bloomery.parallel.fully_sharded import FullySharded
    from bloomery.parallel.pipeline import Schedule


class Votes(NamedTuple):
    """What a rank has to say in a step, and after the message the number of ranks that say so.

    `stop`: asked to stop. `saved`: the checkpoint being written is written here. `save_failed`: it cannot be.
    `copy_failed`: nor can a copy in memory.
    """

    stop: int = 0
    saved: int = 0
    save_failed: int = 0
    copy_failed: int = 0


NO_VOTES = Votes()


@dataclass(frozen=True)
class StepStatistics:
    """What every rank agrees on after a step's backward, in one message. `groups`: norms by `spec.modules.GROUPS`.

    Of mixtures of experts: `router_loss` (not in `loss`), and by how much the fullest expert exceeds the mean.
    """

    loss: float
    grad_norm: float
    nonfinite: int
    votes: Votes
    groups: tuple[float, ...]
    router_loss: float = 0.0
    expert_imbalance: float = 0.0


@dataclass(frozen=True)
class LocalShard:
    """One parameter's rectangle on this rank. `parameter`: what the optimizer knows of it (under ZeRO 1 this rank's
    rows). `owner`: this rank, of all with the same rectangle, writes it."""

    shard: Shard
    parameter: nn.Parameter
    owner: bool

    def local(self, tensor: Tensor | None = None) -> Tensor:
        """The plain local tensor of the parameter, or of an optimizer moment laid out like it."""
        tensor = self.parameter if tensor is None else tensor
        return local_part(tensor).detach()


class Steps(Protocol):
    """An optimizer, or several that step as one."""

    def step(self) -> Any:
        """Move the parameters."""


class Engine:
    """Runs forward and backward of this rank's part of the global batch; see `build`."""

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        stages: dict[int, Transformer],
        axis: TensorAxis | None,
        context: ContextAxis | None,
    ) -> None:
        self.model, self.mesh, self.layout, self.axis, self.context = model, mesh, mesh.layout, axis, context
        self.stages = stages
        self.table: dict[str, Parameter] = {}
        self.n_targets = 1
        self.autocast_dtype: torch.dtype | None = None
        self.schedule: Schedule | None = None
        self._scheduled: tuple[int, int] | None = None
        self.parameter_dtype = torch.float32
        self.routed: Routed | None = None
        self.measure: Measure = lambda _: contextlib.nullcontext()
        self.update_shards: UpdateShards | None = None
        self.fully_sharded: FullySharded | None = None
        self.after_first_backward: Callable[[], None] | None = None
        self._constants: dict[str, tuple[list[float], Tensor]] = {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by global name (a tied head is its embedding)."""
        named = (pair for stage in self.stages.values() for pair in stage.named_parameters())
        return {owning_name(self.model, name): parameter for name, parameter in named}

    @property
    def tied_apart(self) -> bool:
        """Whether the first and the last pipeline rank each hold a tied embedding."""
        return self.model.tie_embeddings and self.layout.pp > 1 and not self.layout.v_shaped

    def updated(self) -> dict[str, nn.Parameter]:
        """What this rank's optimizer updates, by global name: its parameters, under ZeRO 1 its rows of them."""
        if self.update_shards is None:
            return self.parameters()
        return {name: self.update_shards.own(parameter) for name, parameter in self.parameters().items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.mesh.device.type, dtype=self.autocast_dtype)

    def expect(self, global_batch: int, seq_len: int) -> None:
        """Be ready for steps (or evaluations) of this size: only a pipeline's schedule depends on it. A new one asks
        its neighbours once whether shapes are known: a few bytes that no plan counts."""
        micro_batches = global_batch // (self.layout.dp * self.layout.micro_batch)
        if self.layout.pp == 1 or self._scheduled == (micro_batches, seq_len):
            return
        from bloomery.parallel.pipeline import build_schedule

        self._scheduled = (micro_batches, seq_len)
        self.schedule = build_schedule(
            self.stages,
            self.mesh,
            micro_batches=micro_batches,
            seq_len=seq_len,
            stream_dtype=self.autocast_dtype or self.parameter_dtype,
            loss_dtype=self.parameter_dtype,
            loss=self._mean,
            measure=self.measure,
        )

    def _mean(self, loss_sum: Tensor, _: Tensor) -> Tensor:
        """The last stage's output, with the targets that the schedule hands over once more."""
        return loss_sum / self.n_targets

    def own_part(self, batch: Batch) -> Batch:
        """This rank's tokens and targets of its data-parallel rank's sequences; documents are told of whole ones."""
        if batch.prefix_b is None and self.model.mask == "prefix":
            raise InputError("a prefix model needs to know where prefixes end", where="batch.prefix_b")
        if (context := self.context) is not None:
            return replace(batch, tokens_bs=context.own(batch.tokens_bs), targets_bs=context.own(batch.targets_bs))
        # PyTorch 2.11 checks how a pipeline's input lies in memory: tokens of sequences cut short do not lie as said.
        return replace(batch, tokens_bs=batch.tokens_bs.contiguous())

    def forward_backward(self, batch: Batch) -> Tensor:
        """Run every micro-batch of this data-parallel rank; gradients accumulate.

        Returns this rank's part of the mean loss (zero except on the last stage). Raises InputError where a prefix
        model is not told where prefixes end.
        """
        batch = self.own_part(batch)
        self.n_targets = batch.n_targets
        for mixture in mixtures(self.stages.values()):
            mixture.router.loss_share = 1 / (len(batch.tokens_bs) * self.layout.data_ranks * self.layout.tp)
        if self.schedule is None:
            return self._accumulate(batch)
        losses: list[Tensor] = []
        with self.measure("pp_comm"), self._autocast():
            first, last = 0 in self.stages, self.layout.n_stages - 1 in self.stages
            inputs = (batch.tokens_bs,) if first else ()
            target, found = (batch.targets_bs, losses) if last else (None, None)
            known = batch.told(tokens=self.model.value_embeddings, targets=last)
            self.schedule.step(*inputs, target=target, losses=found, return_outputs=False, **known)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.mesh.device)

    def _accumulate(self, batch: Batch) -> Tensor:
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        micro_batches = list(batch.split(self.layout.micro_batch))
        for number, micro in enumerate(micro_batches, start=1):
            if self.fully_sharded is not None:
                self.fully_sharded.begin(last=number == len(micro_batches), free=self.layout.zero_stage == 3)
            with self.measure("compute"):
                total += self.backward_of(micro)
            if number == 1 and self.after_first_backward is not None:
                self.after_first_backward()
        return total

    def backward_of(self, micro: Batch) -> Tensor:
        """One micro-batch through the only stage and back; gradients add up. Returns its part of the mean loss."""
        with self._autocast():
            loss: Tensor = self.stages[0](micro.tokens_bs, **micro.seen, targets_bs=micro.targets_bs) / self.n_targets
        loss.backward()
        return loss.detach()

    def reduce_gradients(self) -> None:
        """Sum what the backward pass left partial: what tp ranks hold alike, a tied embedding on both ends of a
        pipeline, then whole data-parallel gradients; and what the routers did."""
        layout = self.layout
        if self.axis is not None:
            partial = [
                local_part(parameter.grad)
                for name, parameter in self.parameters().items()
                if self.table[name].partial_over_tp(layout.sequence_parallel) and parameter.grad is not None
            ]
            if partial:
                sum_flat(partial, self.mesh.group("tp"), self.measure, "tp_comm")
        if self.tied_apart and "embedding.weight" in self.parameters():
            gradient = self.parameters()["embedding.weight"].grad
            assert gradient is not None
            with self.measure("pp_comm"):
                dist.all_reduce(local_part(gradient), group=self.mesh.group("ends"))
        if self.update_shards is not None:
            self.update_shards.reduce()
        elif layout.data_ranks > 1:
            sum_whole(list(self.stages.values()), self.mesh, self.measure)
        self.routed = summed_routing(self.stages.values(), self.mesh, self.measure)

    def update(self, optimizer: Steps) -> None:
        """The optimizer's step over what this rank updates; then every rank has the parameters it computes with."""
        optimizer.step()
        self.gather_updated()
        if self.routed is not None:
            move_biases(self.stages.values(), self.routed, self.mesh)

    def gather_updated(self) -> None:
        """Bring together what each rank updated (or loaded) alone: under ZeRO 1 the rows of whole parameters."""
        if self.update_shards is not None:
            self.update_shards.gather()

    def statistics(self, loss_part: Tensor, votes: Votes = NO_VOTES) -> StepStatistics:
        """Loss, global gradient norm and `votes`, in one all-reduce over the world; `nonfinite` counts ranks with a
        non-finite loss or gradient."""
        loss, bad, *rest = self.summed_statistics(loss_part, votes).tolist()
        counts, rest = rest[: len(Votes._fields)], rest[len(Votes._fields) :]
        squares, routing = rest[: len(GROUPS)], rest[len(GROUPS) :]
        groups = tuple(square**0.5 for square in squares)
        return StepStatistics(loss, sum(squares) ** 0.5, int(bad), Votes(*map(int, counts)), groups, *routing)

    def square_norms(self) -> tuple[list[str], Tensor]:
        """Names of what this rank updates and its squared gradient norms, divided by how many ranks hold the same."""
        named = {name: local_part(p.grad) for name, p in self.updated().items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(named.values()))).double()
        return list(named), norms.square() / self._constant("replicas", [self._replicas(name) for name in named])

    def _constant(self, what: str, values: list[float]) -> Tensor:
        """These numbers on the device, where they stay: a copy of new ones would wait for all that it has to do."""
        if what not in self._constants or self._constants[what][0] != values:
            self._constants[what] = (values, torch.tensor(values, dtype=torch.float64, device=self.mesh.device))
        return self._constants[what][1]

    def summed_statistics(self, loss_part: Tensor, votes: Votes = NO_VOTES) -> Tensor:
        """(loss, non-finite ranks, votes, squared gradient norms by group) over the world, float64."""
        names, each = self.square_norms()
        index = self._constant("groups", [GROUPS.index(group_of(name)) for name in names]).long()
        groups = torch.zeros(len(GROUPS), dtype=torch.float64, device=each.device).index_add_(0, index, each)
        squares = groups.sum()
        last_stage = self.layout.n_stages - 1 in self.stages
        loss = loss_part.double() / self.layout.tp if last_stage else torch.zeros_like(squares)
        nonfinite = (~torch.isfinite(squares) | ~torch.isfinite(loss)).double()
        said = self._constant("votes", list(votes))
        vector = torch.cat((torch.stack((loss.to(squares.device), nonfinite)), said, groups))
        if self.model.moe is not None:
            routed, nothing = self.routed, torch.zeros_like(squares)
            numbers = (nothing, nothing) if routed is None else (routed.loss, routed.imbalance)
            vector = torch.cat((vector, torch.stack(numbers)))
        return sum_over_world(vector, self.mesh, self.measure)

    def _replicas(self, name: str) -> int:
        parameter, layout = self.table[name], self.layout
        tp = layout.tp if parameter.tp_dim is None else 1
        if parameter.expert and layout.ep > 1:
            return tp * (layout.data_ranks // layout.ep if layout.zero_stage == 0 else layout.dp_replicas)
        ends = 2 if self.tied_apart and name == "embedding.weight" else 1
        return ends * tp * (layout.data_ranks if layout.zero_stage == 0 else layout.dp_replicas)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Summed loss and count of targets over the world. The local batch must be that of training.

        With pipeline stages PyTorch prepares its buffers anew at every change between training and evaluation, and
        sends a few bytes for it that no plan counts.
        """
        batch, self.n_targets = self.own_part(batch), 1
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        last_stage = self.layout.n_stages - 1 in self.stages
        with self._autocast():
            if self.schedule is None:
                for micro in batch.split(self.layout.micro_batch):
                    total += self.stages[0](micro.tokens_bs, **micro.seen, targets_bs=micro.targets_bs)
            else:
                losses: list[Tensor] = []
                inputs = (batch.tokens_bs,) if 0 in self.stages else ()
                known = batch.told(tokens=self.model.value_embeddings, targets=last_stage)
                target, found = (batch.targets_bs, losses) if last_stage else (None, None)
                self.schedule.eval(*inputs, target=target, losses=found, return_outputs=False, **known)
                total += sum(losses)
        if self.fully_sharded is not None:
            self.fully_sharded.free_gathered()
        count = (batch.targets_bs >= 0).sum().double() if last_stage else torch.zeros_like(total)
        vector = torch.stack((total, count)) / self.layout.tp
        loss, n = sum_over_world(vector, self.mesh, self.measure).tolist()
        return loss, round(n)

    def shards(self) -> Iterator[LocalShard]:
        """The rectangles of this rank: what a checkpoint writes and reads, for parameters and moments alike."""
        mesh, layout = self.mesh, self.layout
        for name, parameter in self.updated().items():
            entry = self.table[name]
            shard, owner = mesh.shard(entry), mesh.tp_rank == 0 or entry.tp_dim is not None
            if self.tied_apart and name == "embedding.weight":
                owner = owner and 0 in self.stages
            ranks, place, same = layout.shards, mesh.shard_rank, mesh.data_rank
            if entry.expert and layout.ep > 1:
                ranks, same = layout.shards // layout.ep, mesh.data_rank // layout.ep
                place = mesh.shard_rank // layout.ep
            if layout.zero_stage >= 2 or (layout.zero_stage == 1 and entry.kind != "buffer"):
                shard = _rows(shard, entry.data_dim if layout.zero_stage >= 2 else 0, ranks, place)
                owner = owner and mesh.replica == 0
            else:
                owner = owner and same == 0
            yield LocalShard(shard, parameter, owner)


def _rows(shard: Shard, dim: int, ranks: int, rank: int) -> Shard:
    """What one of `ranks` has of a rectangle that ZeRO cuts along `dim`."""
    start, count = rows_of(shard.shape[dim], ranks, rank)
    shape, offsets = list(shard.shape), list(shard.offsets)
    shape[dim] = count
    offsets[dim] += start
    return Shard(shard.name, shard.global_shape, tuple(shape), tuple(offsets))


def build(
    model: Model,
    layout: Layout,
    mesh: Mesh,
    *,
    seq_len: int,
    global_batch: int,
    dtype: str,
    seed: int,
    measure: Measure,
    compiled: bool = False,
    stabilisers: Stabilisers = UNTOUCHED,
    float8: Float8 = DEFAULT,
    start_scale: float = 1.0,
) -> Engine:
    """Lay `model` over `mesh`; `compiled`: its layers and loss by torch.compile, at their first use; `start_scale`: see
    `model.init`.

    Raises InputError for what the engine cannot run, before any memory is taken.
    """
    check_layout(model, layout, global_batch=global_batch, seq_len=seq_len, world_size=mesh.world_size, run=True)
    check_format(dtype, mesh.device, float8)
    axis = None
    if layout.tp > 1:
        axis = TensorAxis(mesh.group("tp"), layout.tp, mesh.tp_rank, layout.sequence_parallel, measure)
    context = None
    if layout.cp > 1:
        context = ContextAxis(mesh.group("cp"), layout.cp, mesh.cp_rank, layout.cp_method, measure)
    stages, table = lay_out(
        model, mesh, axis, context, dtype=PARAMETERS[dtype], seed=seed, start_scale=start_scale, measure=measure,
        compiled=compiled, float8=float8 if dtype == "float8" else None, narrow=AUTOCAST.get(dtype),
    )  # fmt: skip
    stabilise(stages.values(), stabilisers)
    engine = Engine(model, mesh, stages, axis, context)
    engine.table, engine.measure = table, measure
    if layout.zero_stage == 1:
        engine.update_shards = UpdateShards.of(list(stages.values()), mesh, measure)
    if layout.zero_stage >= 2 and layout.data_ranks > 1:
        from bloomery.parallel.fully_sharded import FullySharded

        engine.fully_sharded = FullySharded(stages.values())
    engine.autocast_dtype, engine.parameter_dtype = AUTOCAST.get(dtype), PARAMETERS[dtype]
    engine.expect(global_batch, seq_len)
    return engine
