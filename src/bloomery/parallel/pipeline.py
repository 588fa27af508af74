"""Pipeline stages on PyTorch's own schedules, with the time inside a stage told apart from the waiting around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
    schedules,
)
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FULL_BACKWARD,
    REDUCE_GRAD,
    RESHARD,
    SEND_B,
    SEND_F,
    UNSHARD,
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _Action,
    _PipelineScheduleRuntime,
)

from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure
from bloomery.parallel.mesh import Mesh
from bloomery.spec.layout import Layout


class MeasuredStage(PipelineStage):
    """A stage whose forward and backward are booked as compute; the rest of the schedule is pipeline waiting.

    What is received lives from its message to the end of its backward pass. PyTorch's own stage has a buffer for every
    micro-batch of a step from the start and for good: hundreds of them where a few are in flight.

    `splits`: whether the gradients of the weights wait for their own turn where the schedule has one. `graphs`: of the
    micro-batches that wait for it.
    """

    measure: Measure
    splits: bool
    graphs: dict[int, list[GradientEdge]]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch forward."""
        with self.measure("compute"):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if not self.has_backward:
            _empty(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """One micro-batch backward; without `full_backward` only towards the input, if it `splits`."""
        split = self.splits and not full_backward
        if split and self.has_backward:
            # PyTorch lets go of the outputs' graph here, and 2.11 would lose the functions of ours whose weights wait.
            self.graphs[bwd_chunk_id] = [get_gradient_edge(output) for output in self.fwd_cache[bwd_chunk_id][0]]
        with self.measure("compute"):
            super().backward_one_chunk(bwd_chunk_id, loss, not split, last_backward)
        if self.has_backward:
            if loss is not None:
                # The schedule keeps every loss to the step's end, and its graph would keep what was received.
                loss.detach_()
            _empty(self.args_recv_info[bwd_chunk_id])
            _empty(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The gradients of the weights of one micro-batch that went backward without them."""
        if self.splits:
            with self.measure("compute"):
                super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            self.graphs.pop(bwd_chunk_id, None)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """The gradient for the stage before on the same rank; none in an evaluation, where PyTorch's would raise."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """The gradient from the stage after on the same rank."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives of one micro-batch's activations, into memory taken now."""
        _allocate(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives of one micro-batch's gradients, into memory taken now; none in an evaluation."""
        if self.has_backward:
            _allocate(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        # PyTorch 2.11 asks for gradients once, of the buffers that it prepares; these here are new with every message.
        infos: Sequence[Any] = self.args_recv_info[fwd_chunk_id]
        for info in infos:
            info.buffer.requires_grad_(self.has_backward and torch.is_grad_enabled())
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_backward_infra(*args, **kwargs)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # PyTorch 2.11 greets every neighbour; the one of a V schedule is the rank itself, to which Gloo has no way.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device


def _allocate(infos: Sequence[Any], device: torch.device) -> None:
    """Give receive buffers memory where they have none."""
    for info in infos:
        buffer = _buffer(info)
        if buffer is not None and buffer.is_meta:
            info.buffer = torch.empty_like(buffer, device=device)


def _empty(infos: Sequence[Any]) -> None:
    """Let go of receive buffers: whoever still needs what is in them holds it."""
    for info in infos:
        buffer = _buffer(info)
        if buffer is not None:
            info.buffer = torch.empty_like(buffer, device="meta", requires_grad=False)


def _buffer(info: Any) -> Tensor | None:
    """Where an input is received; None for one of the whole model (PyTorch 2.11 has a class of its own for these)."""
    return getattr(info, "buffer", None)


Schedule = PipelineScheduleSingle | PipelineScheduleMulti


class _SeveralChunks(_PipelineScheduleRuntime):
    """A schedule of several stages a rank that lets go of what it sent.

    PyTorch's own holds every message, and so what was in it, to the end of the step. Here an activation's goes when its
    gradient has come, which says that it arrived; a gradient's when the next one goes, as in PyTorch's 1F1B.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sent: dict[tuple[int, int], list[dist.Work]] = {}
        self._sent_back: list[dist.Work] = []
        self._comp_type_to_function_map |= {SEND_F: self._send, SEND_B: self._send_back}

    def leave_gathering_to_layers(self) -> None:
        """ZeRO 3: each layer is gathered for its own turn, the schedule gathers nothing."""
        for rank, actions in self.pipeline_order_with_comms.items():
            kept = [action for action in actions if action.computation_type not in (UNSHARD, RESHARD)]
            self.pipeline_order_with_comms[rank] = kept
        # PyTorch computes on no stage that it has not gathered.
        self.unsharded_stages |= {stage.stage_index for stage in self._stages}

    def _stage_of(self, action: _Action) -> Any:
        return next(stage for stage in self._stages if stage.stage_index == action.stage_index)

    def _send(self, action: _Action, _: Any) -> None:
        micro_batch = action.microbatch_index
        assert micro_batch is not None
        works = schedules._batch_p2p(self._stage_of(action).get_fwd_send_ops(micro_batch))
        self._sent[action.stage_index, micro_batch] = works

    def _send_back(self, action: _Action, _: Any) -> None:
        before = self._sent_back
        self._sent_back = schedules._batch_p2p(self._stage_of(action).get_bwd_send_ops(action.microbatch_index))
        schedules._wait_batch_p2p(before)

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Any:
        # Asked of every micro-batch before it goes back, when its gradient is there.
        schedules._wait_batch_p2p(self._sent.pop((stage.stage_index, mb_index), []))
        return super()._maybe_get_loss(stage, mb_index)

    def _step_microbatches(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._step_microbatches(*args, **kwargs)
        schedules._wait_batch_p2p(self._sent_back)
        self._sent_back = []
        return found


class _Interleaved(_SeveralChunks, ScheduleInterleaved1F1B):
    pass


class _ZBV(_SeveralChunks, ScheduleZBVZeroBubble):
    pass


class _DualPipeV(_SeveralChunks, ScheduleDualPipeV):
    pass


_SEVERAL_CHUNKS: dict[str, type[_Interleaved | _ZBV | _DualPipeV]] = {
    "interleaved": _Interleaved,
    "zbv": _ZBV,
    "dualpipev": _DualPipeV,
}


def build_schedule(
    stages: dict[int, Transformer],
    mesh: Mesh,
    *,
    micro_batches: int,
    seq_len: int,
    stream_dtype: torch.dtype,
    loss_dtype: torch.dtype,
    loss: Callable[[Tensor, Tensor], Tensor],
    measure: Measure,
) -> Schedule:
    """The schedule over this rank's stages. Shapes are given, so nothing is inferred (or sent) at run time."""
    layout = mesh.layout
    n_stages = layout.n_stages
    measured = []
    for index, module in stages.items():
        model = module.model
        own_len = seq_len // layout.cp
        tokens = torch.empty(layout.micro_batch, own_len, dtype=torch.int64, device="meta")
        rows = own_len // layout.tp if layout.sequence_parallel else own_len
        stream = torch.empty(
            layout.micro_batch, rows, model.hidden, dtype=stream_dtype, device="meta", requires_grad=True
        )
        loss_sum = torch.empty((), dtype=loss_dtype, device="meta", requires_grad=True)
        stage = MeasuredStage(
            module,
            index,
            n_stages,
            mesh.device,
            input_args=tokens if index == 0 else stream,
            output_args=loss_sum if index == n_stages - 1 else stream,
            group=mesh.group("pp"),
        )
        stage.measure, stage.splits, stage.graphs = measure, layout.splits_backward(index), {}
        measured.append(stage)
    return schedule_over(layout, measured, micro_batches, loss)


def schedule_over(
    layout: Layout, stages: Sequence[Any], micro_batches: int, loss: Callable[[Tensor, Tensor], Tensor] | None
) -> Schedule:
    """PyTorch's schedule of that name over one rank's stages."""
    if layout.vpp > 1:
        several = _SEVERAL_CHUNKS[layout.schedule](list(stages), micro_batches, loss_fn=loss, scale_grads=False)
        if layout.zero_stage == 3:
            several.leave_gathering_to_layers()
        else:
            _gather_once(several)
        return several
    # PyTorch's 1F1B refuses fewer micro-batches than stages; all of them are then in flight anyway, as in GPipe.
    kind = ScheduleGPipe if layout.schedule == "gpipe" or micro_batches < layout.pp else Schedule1F1B
    return kind(stages[0], micro_batches, loss_fn=loss, scale_grads=False)


def _gather_once(schedule: Any) -> None:
    """Keep a stage's parameters gathered for the whole step, as ZeRO 2 means it.

    PyTorch keeps three stages of a rank gathered and gathers the others again at every turn: with more than three
    chunks that is up to one all-gather a chunk and micro-batch.
    """
    orders: dict[int, list[_Action]] = schedule.pipeline_order_with_comms
    for rank, actions in orders.items():
        first = {
            action.stage_index: place
            for place, action in reversed(list(enumerate(actions)))
            if action.computation_type == UNSHARD
        }
        last = {action.stage_index: place for place, action in enumerate(actions) if action.computation_type == RESHARD}
        orders[rank] = [
            action
            for place, action in enumerate(actions)
            if not (action.computation_type == UNSHARD and place != first[action.stage_index])
            and not (action.computation_type == RESHARD and place != last[action.stage_index])
        ]


def most_at_once(schedule: Any, pipeline_rank: int, stage_bytes: Mapping[int, int]) -> int:
    """The most bytes of whole gradients that the rank's stages have at one time in a step of this schedule.

    A stage has its `stage_bytes` from its first backward pass until it reduces them, after its last.
    """
    held: set[int] = set()
    most = 0
    for action in schedule.pipeline_order_with_comms[pipeline_rank]:
        for part in action.sub_actions or (action,):
            if part.computation_type in (FULL_BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT):
                held.add(part.stage_index)
            elif part.computation_type == REDUCE_GRAD:
                held.discard(part.stage_index)
        most = max(most, sum(stage_bytes[stage] for stage in held))
    return most


def expect_given_shapes(schedule: Schedule) -> None:
    """Skip the vote before the first step on whether shapes were given: they are, and on a fake group nobody votes.

    PyTorch 2.11 takes given shapes without a vote; neighbours only greet each other, which no plan counts either.
    """
    if not hasattr(schedule, "_warmup_p2p"):
        for stage in _stages(schedule):
            stage._get_init_p2p_neighbors_ops = list
        return
    from torch.distributed.pipelining._utils import InferenceMode

    def skip(stages: list[PipelineStage], has_backward: bool, p2p_done: bool) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    schedule._warmup_p2p = skip  # type: ignore[method-assign,assignment]


def receive_buffers_bytes(schedule: Schedule) -> int:
    """Bytes set aside for messages between two steps (PyTorch's own stages keep a buffer for every micro-batch)."""
    tables = [table for stage in _stages(schedule) for table in (stage.args_recv_info, stage.grad_recv_info)]
    buffers = [_buffer(info) for table in tables for infos in table.values() for info in infos]
    held = [buffer for buffer in buffers if buffer is not None and not buffer.is_meta]
    return sum(buffer.numel() * buffer.element_size() for buffer in held)


def _stages(schedule: Any) -> list[Any]:
    """A rank's stages."""
    return schedule._stages if isinstance(schedule, PipelineScheduleMulti) else [schedule._stage]
