"""The seconds of a step by component, put together from tables: a micro-batch on each kind of rank, a pipeline message,
data parallelism. Each table has a row for each value of what it depends on; a layout gathers its rows and adds up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bloomery.perf.busy import busy_s, own_backward_s
from bloomery.perf.case import MESH, MICRO_BATCH, MODEL_STATE, Case
from bloomery.perf.collectives import Group, group_of
from bloomery.perf.compute import Work, cast_s, stage_work
from bloomery.perf.flops import model_flops, weights_share
from bloomery.perf.kernels import memory_s
from bloomery.perf.memory import updated_parameters
from bloomery.perf.messages import Inner, data_messages, inner_messages, sends, statistics_s, tied_s
from bloomery.perf.optimizer import muon_s, optimizer_s
from bloomery.perf.pipeline import (
    ends_before_first,
    ends_of_sends,
    felt_s,
    over_ranks,
    pipeline_s,
    rank_counts,
    stages_inside,
    stages_per_core,
    v_bubble_s,
)
from bloomery.perf.table import Lookup, Table
from bloomery.spec.collective import by_recompute


@dataclass(frozen=True)
class Kinds:
    """One micro-batch on each of a case's three kinds of rank, (3, k): what its tables below are made from."""

    case: Case

    @cached_property
    def work(self) -> Work:
        """Compute."""
        return stage_work(self.case, self.case.kinds)

    @cached_property
    def inner(self) -> Inner:
        """Messages inside it."""
        return inner_messages(self.case, self.case.kinds)

    @cached_property
    def busy(self) -> tuple[Any, Any]:
        """Seconds (forward, backward) with both."""
        return busy_s(self.case, self.work, self.inner)

    @cached_property
    def counts(self) -> np.ndarray:
        """How many ranks each kind stands for."""
        return rank_counts(self.case)


@dataclass(frozen=True)
class MicroBatch(Table):
    """Seconds of one micro-batch, of `count` in a step: on each of `Case.kinds` (3, k), with the `slack` in which it
    waits for the slowest; on the slowest rank or all `together` (k,). `drain`: a rank's backward pass, on average;
    `ranks`: `rank_counts`."""

    count: Any
    compute: Any
    backward: Any
    drain: Any
    slack: Any
    slowest: Any
    together: Any
    ranks: Any

    @classmethod
    def of(cls, kinds: Kinds) -> MicroBatch:
        """Of k cases of a layout without its interleaving and ZeRO stage."""
        case, counts = kinds.case, kinds.counts
        busy, backward = sum(kinds.busy), kinds.busy[1] - kinds.inner.backward
        layer_s = (busy / np.maximum(case.kinds.layers, 1)).min(axis=0)
        slowest = (busy + case.kinds.behind * layer_s).max(axis=0)
        return cls(
            count=case.micro_batches.astype(np.float64),
            compute=busy - (kinds.inner.forward + kinds.inner.backward),
            backward=backward,
            drain=over_ranks(counts, backward) / case.lay.pp,
            slack=slowest - busy,
            slowest=slowest,
            together=over_ranks(counts, busy),
            ranks=counts,
        )


@dataclass(frozen=True)
class Means(Table):
    """What all micro-batches of a step take by component, in seconds, on average over the ranks, (k,); `busy`: all."""

    compute: Any
    recompute: Any
    tensor: Any
    context: Any
    experts: Any
    busy: Any

    @classmethod
    def of(cls, kinds: Kinds) -> Means:
        """Of the cases of `MicroBatch`."""
        case, inner = kinds.case, kinds.inner
        busy, messages = sum(kinds.busy), inner.forward + inner.backward
        share = case.micro_batches / case.lay.pp

        def mean(seconds: Any) -> Any:
            return share * over_ranks(kinds.counts, seconds)

        return cls(
            compute=mean(busy - messages),
            recompute=mean(kinds.work.recompute),
            tensor=mean(messages - inner.context - inner.experts),
            context=mean(inner.context),
            experts=mean(inner.experts),
            busy=mean(busy),
        )


@dataclass(frozen=True)
class Turns(Table):
    """Seconds of one chunk's turns for one micro-batch where stages lie on a V, on average over the chunks, (k,)."""

    forward: Any
    inputs: Any
    weights: Any

    @classmethod
    def of(cls, kinds: Kinds) -> Turns:
        """Of the cases of `MicroBatch`; recomputed layers have their whole backward pass in `inputs`
        (`Layout.splits_backward`)."""
        case, (forward, backward) = kinds.case, kinds.busy
        split = weights_share(case.model, case.seq_len) * _kept_share(case)
        chunks = 2.0 * case.lay.pp
        weights = over_ranks(kinds.counts, split * own_backward_s(kinds.work, backward - kinds.inner.backward)) / chunks
        return cls(
            over_ranks(kinds.counts, forward) / chunks,
            over_ranks(kinds.counts, backward) / chunks - weights,
            weights,
        )


def _kept_share(case: Case) -> Any:
    """Of the layers of `Case.kinds`, those that neither recompute nor offload."""
    kinds = case.kinds
    whole = case.lay.offload == 0
    kept = sum(own.layers * (whole & (lay.recompute == 0)) for lay, own in by_recompute(case.lay, kinds.shape))
    return np.where(kinds.layers > 0, kept / np.maximum(kinds.layers, 1), whole & (case.lay.recompute == 0))


@dataclass(frozen=True)
class Sends(Table):
    """Pipeline messages of one micro-batch, in seconds: each rank waits for one transfer each way and chunk. The first
    rank sends forward for all of its chunks, the last one backward; every rank's share is the same. On a V those
    between its ends do. `occupied`: seconds in which those of stages on one node, which share cores, leave them to no
    other stage."""

    seconds: Any
    occupied: Any
    chunks: Any

    @classmethod
    def of(cls, case: Case) -> Sends:
        """Of k cases of a layout without its recomputation and ZeRO stage."""
        last, between = case.lay.pp - 1, np.minimum(1, case.lay.pp - 1)
        forward, backward = np.where(case.lay.v_shaped, between, 0), np.where(case.lay.v_shaped, between, last)

        def both(group: Group) -> Any:
            return sends(case, forward, group)[0] + sends(case, backward, group)[1]

        occupied = 0.0 * case.tokens
        if case.accelerator.ranks_per_core > 1:
            inside = stages_inside(case.cluster, case.lay)
            occupied = case.cluster.tiers[0].occupied * ends_of_sends(inside.size) * both(inside)
        return cls(both(group_of(case.lay, "pp")), occupied, case.lay.vpp.astype(np.float64))


SENDS = (*MESH, "outermost", "sequence_parallel", "micro_batch", "vpp", "v_shaped")


@dataclass(frozen=True)
class DataParallel(Table):
    """What follows the pipeline or runs beside it, in seconds, on each of `Case.kinds` (3, k) or as a whole (k,).

    `bucket`: one layer's share of a rank's gradients; `hooks`, `hooks_each`: what a rank does about parameters and
    gradients that are cut, a step and a micro-batch: the host's part, copies and casts; `ends`: how many ranks
    drain before the first one.
    """

    reduce: Any
    gather: Any
    gather_each: Any
    bucket: Any
    hooks: Any
    hooks_each: Any
    ends: Any
    optimizer: Any
    other: Any
    peak_flops_per_s: Any

    @classmethod
    def of(cls, case: Case) -> DataParallel:
        """Of k cases of a mesh and its ZeRO stage."""
        kinds, accelerator = case.kinds, case.accelerator
        data, stage = data_messages(case), case.lay.zero_stage
        hook_s = case.stack.shard_kernels * accelerator.launch_s * kinds.layers.max(axis=0)
        copied_s = [
            memory_s(accelerator, case.stack.shard_passes * np.max(n, 0)) for n in (data.copied, data.copied_each)
        ]
        updated = updated_parameters(case, kinds).max(axis=0)
        shard_s = cast_s(case, updated)
        return cls(
            reduce=data.reduce,
            gather=data.gather,
            gather_each=data.gather_each,
            bucket=1.0 / np.maximum(kinds.layers, 1),
            hooks=hook_s * np.select([stage == 3, stage == 2], [1, 2], 0) + shard_s * (stage == 2) + copied_s[0],
            hooks_each=(hook_s + shard_s) * np.where(stage == 3, 2, 0) + copied_s[1],
            ends=ends_before_first(case).astype(np.float64),
            optimizer=optimizer_s(case, updated) + muon_s(case).max(axis=0),
            other=statistics_s(case) + case.stack.step_overhead_s,
            peak_flops_per_s=case.lay.world_size * accelerator.peak(case.dtype),
        )


@dataclass(frozen=True)
class Tied(Table):
    """Seconds in which a tied embedding's gradient is summed between the ends of the pipeline, (k,)."""

    seconds: Any


@dataclass(frozen=True)
class StepTimes:
    """The tables of a case, and which row of each a layout has."""

    case: Case

    @cached_property
    def _kinds(self) -> tuple[Kinds, np.ndarray]:
        case, index = self.case.over(*MICRO_BATCH)
        return Kinds(case), index

    @cached_property
    def _micro_batch(self) -> Lookup[MicroBatch]:
        kinds, index = self._kinds
        return Lookup(MicroBatch.of(kinds), index)

    @cached_property
    def _means(self) -> Lookup[Means]:
        kinds, index = self._kinds
        return Lookup(Means.of(kinds), index)

    @cached_property
    def _turns(self) -> Lookup[Turns]:
        kinds, index = self._kinds
        return Lookup(Turns.of(kinds), index)

    @cached_property
    def _sends(self) -> Lookup[Sends]:
        case, index = self.case.over(*SENDS)
        return Lookup(Sends.of(case), index)

    @cached_property
    def _data_parallel(self) -> Lookup[DataParallel]:
        case, index = self.case.over(*MODEL_STATE, *(("sequence_parallel",) if self.case.model.moe else ()))
        return Lookup(DataParallel.of(case), index)

    @cached_property
    def _tied_s(self) -> Lookup[Tied]:
        case, index = self.case.over(*MODEL_STATE)
        return Lookup(Tied(tied_s(case)), index)

    @property
    def compute_s(self) -> Any:
        """Seconds of a step's compute, the mean over ranks, without what messages beside it cost it, (n,)."""
        micro, data = self._micro_batch[slice(None)], self._data_parallel[slice(None)]
        return self._means[slice(None)].compute + data.hooks + micro.count * data.hooks_each

    def beside_s(self, block: slice) -> Any:
        """Seconds of some layouts' compute that no micro-batch's own work holds: the second of `_beside`."""
        return _beside(self.case, self._micro_batch[block], self._data_parallel[block], self._sends[block])[1]

    @cached_property
    def _sharing(self) -> tuple[np.ndarray, np.ndarray]:
        return stages_per_core(self.case.cluster, self.case.lay)

    def _sends_s(self, block: slice, micro: MicroBatch) -> Any:
        send, (some, every) = self._sends[block], (sharing[block] for sharing in self._sharing)
        if np.all(some == 1):
            return send.seconds
        felt = felt_s(micro.slowest, send.seconds, every, send.occupied)
        return np.where(every > 1, felt, send.seconds + send.occupied)

    def _path_s(self, block: slice, micro: MicroBatch, send: Sends, gathers_s: Any) -> Any:
        """Seconds from the first forward to the end of the last backward; `gathers_s`: what ZeRO 3 adds to one
        micro-batch on all ranks but the slowest, through which the pipeline fills and drains."""
        sends_s = self._sends_s(block, micro)
        path = pipeline_s(
            micro.count,
            send.chunks,
            self.case.lay.pp[block],
            slowest=micro.slowest + sends_s,
            together=micro.together + micro.ranks.sum(axis=0) * sends_s,
            sharing=self._sharing[0][block],
            apart=gathers_s,
        )
        folded = np.flatnonzero(self.case.lay.v_shaped[block])
        if not len(folded):
            return path
        lay, each = self.case.lay, send.seconds[folded] / 4
        turn = self._turns.table.take(self._turns.index[block][folded])
        schedule, pp = lay.schedule[block][folded], lay.pp[block][folded]
        split = np.where(lay.frees[block][folded], 0.0, turn.weights)  # as `Layout.splits_backward` has it
        inputs = turn.inputs + turn.weights - split
        bubble = v_bubble_s(schedule, pp, turn.forward + each, inputs + each, split)
        path[folded] = (micro.count * (micro.slowest + send.seconds))[folded] + bubble
        return path

    def _tied(self, block: slice) -> Any:
        return self._tied_s[block].seconds if self.case.model.tie_embeddings else 0.0

    def step_s(self, block: slice) -> Any:
        """Seconds of some layouts' steps: the pipeline's path, which holds what ranks compute and send meanwhile, and
        what it does not hide. `components` takes the same apart."""
        micro, data, send = self._micro_batch[block], self._data_parallel[block], self._sends[block]
        exposed, beside, gathers_s = _beside(self.case, micro, data, send)
        after = exposed + beside + data.optimizer + data.other
        if self.case.accelerator.skew:
            after = after + sum(self._waits(block).values())
        return self._path_s(block, micro, send, gathers_s) + self._tied(block) + after

    def _waits(self, block: slice) -> dict[str, Any]:
        """Seconds in which ranks wait for the slowest of them, at the messages that they send most often. A pipeline's
        stages are not counted: what one waits for another is in the path."""
        skew, lay = self.case.accelerator.skew, self.case.lay
        lost = skew * self._means[block].compute
        sizes = {"tp_comm": lay.tp, "cp_comm": lay.cp, "ep_comm": lay.ep, "dp_comm": lay.dp}
        found, left = {}, np.ones(np.shape(lost), dtype=bool)
        for name, size in sizes.items():
            shared = left & (size[block] > 1)
            found[name] = np.where(shared, lost, 0.0)
            left &= ~shared
        return found

    def components(self, block: slice) -> dict[str, Any]:
        """Seconds of some layouts' steps by component (`spec.components`), those that can be none left out."""
        micro, data, send = self._micro_batch[block], self._data_parallel[block], self._sends[block]
        mean, batch = self._means[block], self.case.global_batch
        batch = batch[block] if np.ndim(batch) else batch
        flops = model_flops(self.case.model, global_batch=batch, seq_len=self.case.seq_len)
        exposed, beside, gathers_s = _beside(self.case, micro, data, send)
        ideal, pp_comm = flops / data.peak_flops_per_s, micro.count * self._sends_s(block, micro)
        waits = self._waits(block)
        return {
            "ideal": ideal,
            "kernel": mean.compute - mean.recompute - ideal + beside,
            "recompute": mean.recompute,
            "tp_comm": mean.tensor + waits["tp_comm"],
            "cp_comm": mean.context + waits["cp_comm"],
            "ep_comm": mean.experts + waits["ep_comm"],
            "pp_comm": pp_comm + self._tied(block),
            "bubble": self._path_s(block, micro, send, gathers_s) - mean.busy - pp_comm,
            "dp_comm": exposed + waits["dp_comm"],
            "optimizer": data.optimizer,
            "other": data.other,
        }


def _beside(case: Case, micro: MicroBatch, data: DataParallel, send: Sends) -> tuple[Any, Any, Any]:
    """(exposed seconds of gradient reduction and parameter gathering, compute lost to what runs beside it and to what
    hooks do about what is cut, what ZeRO 3 adds to a micro-batch on all ranks but the slowest with it).

    Reduction hides behind the last micro-batch's backward of the last chunk, gathering behind what that leaves of all
    compute and, each micro-batch's, while a rank waits for the slowest; the last bucket (one layer's share) never hides
    behind compute. A later stage also hides in the pipeline's draining.
    """
    stack = case.stack
    gathers = data.gather + micro.count * data.gather_each
    reduce, gather = data.reduce, gathers
    if stack.gradient_overlap:
        room = micro.backward * (stack.gradient_overlap / send.chunks)
        reduce = np.maximum(data.reduce - room, data.reduce * data.bucket)
        room = np.maximum(micro.compute * (stack.gather_overlap * micro.count) - (data.reduce - reduce), 0.0)
        gather = np.maximum(gathers - room, gathers * (data.bucket / 2))
    drained, waited = data.ends * (micro.drain / send.chunks), micro.count * micro.slack * (data.gather_each > 0)
    exposed = (np.maximum(reduce - drained, 0.0) + np.maximum(gather - waited, 0.0)).max(axis=0)
    each = np.where(data.gather_each > 0, gather, 0.0) / micro.count + data.hooks_each
    others = over_ranks(micro.ranks, each) - np.maximum(each - micro.slack, 0.0).max(axis=0)
    lost = stack.interference * (data.reduce + gathers - reduce - gather).max(axis=0)
    return exposed, lost + data.hooks + micro.count * data.hooks_each, others
