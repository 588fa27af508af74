"""The engine: a model laid over a mesh, ready to run a step. `train` drives it and knows nothing of axes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bloomery.model.transformer import Transformer
from bloomery.parallel.apply import lay_out
from bloomery.parallel.collectives import Measure, TensorAxis
from bloomery.parallel.data_parallel import free_gathered, sum_flat, units
from bloomery.parallel.expert import Routed, mixtures, move_biases, summed_routing
from bloomery.parallel.mesh import Mesh
from bloomery.parallel.pipeline import Schedule, build_schedule
from bloomery.parallel.tensor import loss_sum
from bloomery.spec.layout import Layout, check_layout
from bloomery.spec.model import Model
from bloomery.spec.parameters import Parameter
from bloomery.spec.shard_table import Shard


@dataclass(frozen=True)
class StepStatistics:
    """What every rank agrees on after a step's backward, in one message.

    Of mixtures of experts: `router_loss` (not in `loss`), and by how much the fullest expert exceeds the mean.
    """

    loss: float
    grad_norm: float
    nonfinite: int
    stop: int
    router_loss: float = 0.0
    expert_imbalance: float = 0.0


@dataclass(frozen=True)
class LocalShard:
    """One parameter's rectangle on this rank. `owner`: this rank, of all with the same rectangle, writes it."""

    shard: Shard
    parameter: nn.Parameter
    owner: bool

    def local(self, tensor: Tensor | None = None) -> Tensor:
        """The plain local tensor of the parameter, or of an optimizer moment laid out like it."""
        tensor = self.parameter if tensor is None else tensor
        return _plain(tensor).detach()


class Engine:
    """Runs forward and backward of this rank's part of the global batch; see `build`."""

    def __init__(self, model: Model, mesh: Mesh, stages: dict[int, Transformer], axis: TensorAxis | None) -> None:
        self.model, self.mesh, self.layout, self.axis = model, mesh, mesh.layout, axis
        self.stages = stages
        self.table: dict[str, Parameter] = {}
        self.n_targets = 1
        self.autocast_dtype: torch.dtype | None = None
        self.schedule: Schedule | None = None
        self.routed: Routed | None = None
        self.measure: Measure = lambda _: contextlib.nullcontext()

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by global name (a tied head is its embedding)."""
        return {name: parameter for stage in self.stages.values() for name, parameter in stage.named_parameters()}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.mesh.device.type, dtype=self.autocast_dtype)

    def schedule_for(self, micro_batches: int, seq_len: int, dtype: str) -> None:
        """Make the pipeline schedule of steps with so many micro-batches; without stages there is none to make."""
        if self.layout.pp == 1:
            return
        self.schedule = build_schedule(
            self.stages,
            self.mesh,
            micro_batches=micro_batches,
            seq_len=seq_len,
            stream_dtype=_DTYPES[dtype],
            logits_dtype=torch.bfloat16 if dtype == "bfloat16" else _DTYPES[dtype],
            loss=self._loss,
            measure=self.measure,
        )

    def _loss(self, logits_bsv: Tensor, targets_bs: Tensor) -> Tensor:
        return loss_sum(logits_bsv, targets_bs, self.axis) / self.n_targets

    def forward_backward(self, tokens_bs: Tensor, targets_bs: Tensor, n_targets: int) -> Tensor:
        """Run every micro-batch of this data-parallel rank; gradients accumulate.

        tokens, targets: (local batch, seq). `n_targets`: targets that count in the GLOBAL batch. Returns this rank's
        part of the mean loss (zero except on the last stage).
        """
        self.n_targets = n_targets
        layout = self.layout
        for mixture in mixtures(self.stages.values()):
            mixture.router.loss_share = 1 / (len(tokens_bs) * layout.dp * layout.cp * layout.tp)
        if self.schedule is None:
            return self._accumulate(tokens_bs, targets_bs)
        losses: list[Tensor] = []
        with self.measure("pp_comm"), self._autocast():
            first, last = 0 in self.stages, self.layout.pp * self.layout.vpp - 1 in self.stages
            inputs = (tokens_bs,) if first else ()
            target, seen = (targets_bs, losses) if last else (None, None)
            # Outputs not returned are not kept: the logits of all micro-batches would be.
            self.schedule.step(*inputs, target=target, losses=seen, return_outputs=False)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.mesh.device)

    def _accumulate(self, tokens_bs: Tensor, targets_bs: Tensor) -> Tensor:
        stage = self.stages[0]
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        micro = list(
            zip(tokens_bs.split(self.layout.micro_batch), targets_bs.split(self.layout.micro_batch), strict=True)
        )
        for number, (tokens, targets) in enumerate(micro, start=1):
            if isinstance(stage, FSDPModule):
                last = number == len(micro)
                stage.set_requires_gradient_sync(last)
                stage.set_is_last_backward(last)
                stage.set_reshard_after_backward(last or self.layout.zero_stage == 3)
            with self.measure("compute"):
                with self._autocast():
                    loss = self._loss(stage(tokens), targets)
                loss.backward()
            total += loss.detach()
        return total

    def reduce_gradients(self) -> None:
        """Sum what the backward pass left partial: replicated data parallelism, uncut tensors under tensor parallelism;
        and what the routers did."""
        layout = self.layout
        if layout.dp > 1 and layout.zero_stage < 2:
            for stage in self.stages.values():
                for axis, unit in units(stage, experts_apart=layout.ep > 1):
                    gradients = [parameter.grad for parameter in unit if parameter.grad is not None]
                    if axis == "dp" or layout.dp > layout.ep:
                        sum_flat(gradients, self.mesh.group(axis), self.measure, "dp_comm")
        if self.axis is not None:
            partial = [
                _plain(parameter.grad)
                for name, parameter in self.parameters().items()
                if self.table[name].partial_over_tp(layout.sequence_parallel) and parameter.grad is not None
            ]
            if partial:
                sum_flat(partial, self.mesh.group("tp"), self.measure, "tp_comm")
        self.routed = summed_routing(self.stages.values(), self.mesh, self.measure)

    def balance_experts(self) -> None:
        """After an optimizer step: move the biases that even out the experts' load."""
        if self.routed is not None:
            move_biases(self.stages.values(), self.routed, self.mesh)

    def statistics(self, loss_part: Tensor, stop: bool = False) -> StepStatistics:
        """Loss and global gradient norm, in one all-reduce over the world; squares are divided by their replicas.

        `nonfinite` counts ranks with a non-finite loss or gradient, `stop` those that were asked to stop.
        """
        loss_value, square_sum, bad, stops, *routing = self.summed_statistics(loss_part, stop).tolist()
        return StepStatistics(loss_value, square_sum**0.5, int(bad), int(stops), *routing)

    def summed_statistics(self, loss_part: Tensor, stop: bool = False) -> Tensor:
        """(loss, squared gradient norm, non-finite ranks, stopping ranks) over the world, not yet read; of a mixture of
        experts the router's loss and the imbalance too."""
        named = {name: _plain(p.grad) for name, p in self.parameters().items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(named.values()))).double()
        replicas = torch.tensor([self._replicas(name) for name in named], dtype=torch.float64, device=norms.device)
        squares = (norms.square() / replicas).sum()
        last_stage = self.layout.pp * self.layout.vpp - 1 in self.stages
        loss = loss_part.double() / self.layout.tp if last_stage else torch.zeros_like(squares)
        nonfinite = (~torch.isfinite(squares) | ~torch.isfinite(loss)).double()
        numbers = [loss.to(squares.device), squares, nonfinite, torch.full_like(squares, float(stop))]
        if self.model.moe is not None:
            routed, nothing = self.routed, torch.zeros_like(squares)
            numbers += [nothing, nothing] if routed is None else [routed.loss, routed.imbalance]
        vector = torch.stack(numbers)
        if self.mesh.world_size > 1:
            with self.measure("other"):
                dist.all_reduce(vector)
        return vector

    def _replicas(self, name: str) -> int:
        parameter, layout = self.table[name], self.layout
        tp = layout.tp if parameter.tp_dim is None else 1
        return tp * (layout.dp // (layout.ep if parameter.expert else 1) if layout.zero_stage < 2 else 1)

    def clip(self, max_norm: float, grad_norm: float) -> None:
        """Scale all gradients so that their global norm is at most `max_norm` (Pascanu et al. 2013)."""
        factor = max_norm / (grad_norm + 1e-6)
        if factor < 1:
            torch._foreach_mul_([_plain(p.grad) for p in self.parameters().values() if p.grad is not None], factor)

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Matrices and embeddings decay; norms and biases do not."""
        named = self.parameters()
        decays = [p for name, p in named.items() if self.table[name].kind in ("matrix", "embedding")]
        rest = [p for name, p in named.items() if self.table[name].kind in ("norm", "bias")]
        groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def evaluate(self, tokens_bs: Tensor, targets_bs: Tensor) -> tuple[float, int]:
        """Summed loss and count of targets over the world. The local batch must be that of training.

        With pipeline stages PyTorch prepares its buffers anew at every change between training and evaluation, and
        sends a few bytes for it that no plan counts.
        """
        self.n_targets = 1
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        last_stage = self.layout.pp * self.layout.vpp - 1 in self.stages
        with self._autocast():
            if self.schedule is None:
                for tokens, targets in zip(
                    tokens_bs.split(self.layout.micro_batch), targets_bs.split(self.layout.micro_batch), strict=True
                ):
                    total += self._loss(self.stages[0](tokens), targets)
            else:
                losses: list[Tensor] = []
                inputs = (tokens_bs,) if 0 in self.stages else ()
                target = targets_bs if last_stage else None
                self.schedule.eval(*inputs, target=target, losses=losses if last_stage else None)
                total += sum(losses)
        for stage in self.stages.values():
            free_gathered(stage)
        count = (targets_bs >= 0).sum().double() if last_stage else torch.zeros_like(total)
        vector = torch.stack((total, count)) / self.layout.tp
        if self.mesh.world_size > 1:
            dist.all_reduce(vector)
        loss, n = vector.tolist()
        return loss, round(n)

    def shards(self) -> Iterator[LocalShard]:
        """The rectangles of this rank: what a checkpoint writes and reads, for parameters and moments alike."""
        mesh, layout = self.mesh, self.layout
        for name, parameter in self.parameters().items():
            entry = self.table[name]
            shard = mesh.shard(entry)
            owner = mesh.tp_rank == 0 or entry.tp_dim is not None
            replica = mesh.dp_rank // (layout.ep if entry.expert else 1)
            if isinstance(parameter, DTensor):
                shard = _rows(shard, entry.data_dim, parameter.device_mesh.size(), replica)
            else:
                owner = owner and replica == 0
            yield LocalShard(shard, parameter, owner)


def _rows(shard: Shard, dim: int, ranks: int, rank: int) -> Shard:
    """What one of `ranks` has of a rectangle that ZeRO cuts along `dim`."""
    whole = shard.shape[dim]
    rows = -(-whole // ranks)
    start = min(rank * rows, whole)
    shape, offsets = list(shard.shape), list(shard.offsets)
    shape[dim] = min(rows, whole - start)
    offsets[dim] += start
    return Shard(shard.name, shard.global_shape, tuple(shape), tuple(offsets))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
"""Parameters' dtype: bfloat16 means float32 parameters and bfloat16 arithmetic (autocast)."""


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
) -> Engine:
    """Lay `model` over `mesh`. Raises InputError for what the engine cannot run, before any memory is taken."""
    check_layout(model, layout, global_batch=global_batch, seq_len=seq_len, world_size=mesh.world_size, run=True)
    axis = None
    if layout.tp > 1:
        axis = TensorAxis(mesh.group("tp"), layout.tp, mesh.tp_rank, layout.sequence_parallel, measure)
    stages, table = lay_out(model, mesh, axis, dtype=_DTYPES[dtype], seed=seed, measure=measure)
    engine = Engine(model, mesh, stages, axis)
    engine.table, engine.measure = table, measure
    engine.autocast_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    engine.schedule_for(global_batch // (layout.dp * layout.micro_batch), seq_len, dtype)
    return engine
