"""The model of the code beside the code: what ranks of a layout really hold, compute and send, and what was predicted.

One rank stands for each class: the first, a middle and the last pipeline rank. Each is executed without data by
`parallel.dry_run`; the performance model is asked about the same rank, for our engine's number formats.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np

from bloomery.parallel.dry_run import Message, Optimizers, RankAccount, adamw, dry_run
from bloomery.parallel.schedule_order import ScheduleOrder, most_held, schedule_order
from bloomery.perf.activations import Activations, in_flight, kinds_of_layer, layer_activation_bytes, mask_bytes
from bloomery.perf.case import FULL, Case
from bloomery.perf.flops import context_attention_share, forward_flops
from bloomery.perf.memory import memory_of, parameters_on, state_bytes
from bloomery.perf.precision import averaged, precision_of
from bloomery.perf.ranks import Ranks
from bloomery.perf.stack import stack_of
from bloomery.spec.cluster import Cluster, Dtype
from bloomery.spec.collective import by_recompute
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import attention_parameters
from bloomery.spec.shard_table import collectives, stage_parameters, tensor_shard

EXACT, CLOSE = 0.0, 0.01
"""Relative tolerances: parameters and messages must be equal, FLOPs and activations within 1 %."""


@dataclass(frozen=True)
class Line:
    """One quantity of one rank: found by execution, and predicted."""

    name: str
    unit: str
    executed: float
    predicted: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the two are as near as they must be."""
        return abs(self.executed - self.predicted) <= self.tolerance * abs(self.predicted)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "agrees": self.agrees}


@dataclass(frozen=True)
class MessageLine:
    """All messages of one axis and operation in one step: their number and total payload, executed and predicted."""

    axis: str
    op: str
    executed_count: int
    executed_bytes: int
    predicted_count: int
    predicted_bytes: int


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank when it holds most: what was executed in all, what is predicted, what its accelerator has.

    What operators take and give back no execution without data sees, and what the device reserves neither: the first
    may lie below the second, and a layout whose executed bytes alone are over the limit cannot run.
    """

    executed: float
    predicted: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether the accelerator can hold what was executed."""
        return self.executed <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "unit": "bytes", "fits": self.fits}


@dataclass(frozen=True)
class RankClass:
    """A kind of rank (`first`, `middle`, `last` or `only` in the pipeline) and one rank that stands for it."""

    name: str
    account: RankAccount
    lines: tuple[Line, ...]
    peak: Peak
    messages: tuple[MessageLine, ...]
    messages_agree: bool

    @property
    def agrees(self) -> bool:
        """Whether everything does; messages message by message, each with its size."""
        return self.messages_agree and all(line.agrees for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        account = asdict(self.account)
        account["messages"] = [[*message, count] for message, count in sorted(self.account.messages.items())]
        return {
            "name": self.name,
            "agrees": self.agrees,
            "lines": [line.to_json() for line in self.lines],
            "peak": self.peak.to_json(),
            "messages": [asdict(line) for line in self.messages],
            "messages_agree": self.messages_agree,
            "account": account,
        }


@dataclass(frozen=True)
class DryRun:
    """Every rank class of a layout, the order of its pipeline's messages, and what a reader should know."""

    model: str
    layout: Layout
    dtype: str
    classes: tuple[RankClass, ...]
    order: ScheduleOrder
    notes: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether execution and prediction agree in everything and the pipeline comes to its end."""
        return not self.order.problems and all(one.agrees for one in self.classes)

    @property
    def fits(self) -> bool:
        """Whether every rank can hold what was executed."""
        return all(one.peak.fits for one in self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "layout": self.layout.model_dump(mode="json"),
            "world_size": self.layout.world_size,
            "dtype": self.dtype,
            "agrees": self.agrees,
            "fits": self.fits,
            "classes": [one.to_json() for one in self.classes],
            "schedule": asdict(self.order),
            "notes": list(self.notes),
        }


def compare(
    model: Model,
    layout: Layout,
    cluster: Cluster,
    *,
    seq_len: int,
    global_batch: int,
    dtype: Dtype,
    optimizer: str = "adamw",
    optimizers: Optimizers = adamw,
    averages_per_step: float = 0.0,
    documents: bool = False,
) -> DryRun:
    """Execute a rank of each class without data and set the performance model's answers beside it.

    `optimizer`: its name in a run, `optimizers`: what makes it; `averages_per_step`: how often its average of the
    weights is updated (0: there is none); `documents`: tokens see their own document's alone. Raises InputError for
    what the engine cannot run.
    """
    order = schedule_order(model, layout, global_batch // (layout.dp * layout.micro_batch))
    ours = cluster.model_copy(update={"accelerator": cluster.accelerator.model_copy(update={"kind": "cpu"})})
    balanced = replace(stack_of(ours.accelerator), expert_spread=0.0)  # as experts are without data
    case = Case.of(
        model, ours, LayoutBatch.of([layout]), global_batch=global_batch, seq_len=seq_len, dtype=dtype, stack=balanced,
        optimizer=optimizer, averages_per_step=averages_per_step, documents=documents,
    )  # fmt: skip
    classes = []
    for name, pipeline_rank in rank_classes(layout).items():
        rank = pipeline_rank * layout.tp * layout.data_ranks
        account = dry_run(
            model, layout, rank, global_batch=global_batch, seq_len=seq_len, dtype=dtype, optimizers=optimizers,
            documents=documents,
        )  # fmt: skip
        executed = merged(Counter(account.messages), layout)
        planned = merged(planned_messages(case, pipeline_rank), layout)
        moments = order.in_flight[pipeline_rank]
        lines, peak = tuple(compared_lines(case, account, moments)), peak_of(case, account, moments)
        classes.append(RankClass(name, account, lines, peak, _totals(executed, planned), executed == planned))
    return DryRun(model.name, layout, dtype, tuple(classes), order, tuple(_notes(cluster, case, classes)))


def rank_classes(layout: Layout) -> dict[str, int]:
    """The pipeline rank that stands for each class."""
    if layout.pp == 1:
        return {"only": 0}
    middle = {"middle": layout.pp // 2} if layout.pp > 2 else {}
    return {"first": 0, **middle, "last": layout.pp - 1}


def planned_messages(case: Case, pipeline_rank: int) -> Counter[Message]:
    """What the shard table says this rank sends in one step."""
    precision = case.precision
    rows = collectives(
        case.model,
        case.lay,
        pipeline_rank=pipeline_rank,
        global_batch=case.global_batch,
        seq_len=case.seq_len,
        stream_bytes=precision.stream,
        parameter_bytes=precision.parameter,
        gradient_bytes=precision.gradient,
        optimizer=case.optimizer,
    )
    counted = Counter[Message]()
    for row in rows:
        if row.count[0]:
            counted[(row.axis, row.op, int(row.bytes_each[0]))] += int(row.count[0])
    return counted


def merged(counted: Counter[Message], layout: Layout) -> Counter[Message]:
    """An axis that spans every rank shares the world's process group: both are called world then; the pair of ends
    lies on the pipeline's axis, and of two ranks it is its group."""
    sizes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.shards, "pp": layout.pp, "ep": layout.ep}
    whole = {axis for axis, size in sizes.items() if size == layout.world_size}
    answer = Counter[Message]()
    for (name, op, size), count in counted.items():
        axis = "pp" if name == "ends" else name
        answer[("world" if axis in whole else axis, op, size)] += count
    return answer


def _totals(executed: Counter[Message], planned: Counter[Message]) -> tuple[MessageLine, ...]:
    lines = []
    for axis, op in sorted({message[:2] for message in (*executed, *planned)}):
        sums = []
        for side in (executed, planned):
            found = [(count, message[2]) for message, count in side.items() if message[:2] == (axis, op)]
            sums += [sum(count for count, _ in found), sum(count * size for count, size in found)]
        lines.append(MessageLine(axis, op, *sums))
    return tuple(lines)


def rank_flops(case: Case, account: RankAccount) -> float:
    """FLOPs of one rank in one step, as `perf.flops` counts them: its layers, and the head on the last stage.

    The engine's recomputation stops before a layer's last product, whose result nothing needs, unless that is in
    float8: PyTorch then learns what it keeps when it is done. Its masks skip nothing,
    so a sliding window saves nothing; values of latent attention are padded to the width of keys, and projections down
    to latents are the same on every tensor-parallel rank.
    """
    model, lay = case.model.model_copy(update={"sliding_window": None}), case.lay
    tp, cp = int(lay.tp[0]), int(lay.cp[0])
    alike = sum(p.size for p in attention_parameters(model, "") if p.kind == "matrix" and p.tp_partial)
    padded = case.seq_len * (model.query_width - model.output_width)
    ranks = case.ranks(np.array([account.pipeline_rank]))
    total = 0.0
    kinds = [(one.recompute[0] == FULL, own) for one, own in by_recompute(lay, ranks.shape)]
    held: list[tuple[Any, Any, MixtureOfExperts | None]] = [(full, own.dense_layers[0], None) for full, own in kinds]
    held += [(full, own.moe_layers[0], model.moe) for full, own in kinds if model.moe is not None]
    for full, layers, moe in held:
        one = model.model_copy(update={"layers": 1, "moe": moe and moe.model_copy(update={"first_dense_layers": 0})})
        forward = forward_flops(one, case.seq_len)
        # Every tensor-parallel rank routes all tokens, and projects them down to all latents.
        whole = forward.router + 2 * case.seq_len * alike
        skipped = forward.attention * (1 - context_attention_share(model, cp))
        layer = (forward.layers - skipped - whole + 2 * case.seq_len * padded) / tp + whole
        width = model.ffn_hidden if moe is None else moe.shared_experts * moe.expert_ffn_hidden
        down = 2 * case.seq_len * model.hidden * width / tp if case.dtype != "float8" else 0.0
        total += layers * (3 * layer + (layer - down if full else 0.0))
    head = 3 * forward_flops(model, case.seq_len).head * ranks.last[0]
    return float(account.micro_batches * int(lay.micro_batch[0]) * (total + head / tp) / cp)


def compared_lines(case: Case, account: RankAccount, moments: tuple[tuple[int, ...], ...]) -> list[Line]:
    """Everything but messages. `moments`: micro-batches in flight by chunk over a step, from the schedule."""
    ranks = case.ranks(np.array([account.pipeline_rank]))
    memory = _memory_on(case, account)
    held = sum(float(part[0]) for part in parameters_on(case, ranks))
    kinds = _kinds_of_layer(case, ranks)
    layout = case.lay.layout(0)
    recomputed = {layout.recomputes[stage] for stage in layout.stages_on(account.pipeline_rank)}
    # The first layer of a stage to keep the mask is charged for it; one that is made again keeps it then, and under
    # context parallelism autograd knows of none.
    mask = float(np.ravel(mask_bytes(case))[0]) if layout.cp == 1 else 0.0
    masks = mask * sum(layout.recomputes[stage] != "full" for stage in layout.stages_on(account.pipeline_rank))
    if case.model.embedding_skip:  # the embedding too
        masks += float(np.ravel(case.stream_tokens * case.model.hidden * case.precision.stream)[0])
    whole = float(np.ravel(state_bytes(case, ranks)["gradients"])[0])
    # Where rows do not divide evenly over data-parallel ranks, rank 0 holds the most and the model says the mean.
    state = CLOSE + uneven_rows(case.model, layout, account.pipeline_rank) if layout.zero_stage >= 1 else EXACT
    found = [
        Line("parameters before ZeRO", "elements", account.parameters, held, EXACT),
        Line("parameters", "bytes", account.parameter_bytes, memory["parameters"], state),
        Line("gradients", "bytes", _gradients(account), whole, state),
        Line("optimizer", "bytes", account.optimizer_bytes, memory["optimizer"], state),
        Line("FLOPs", "FLOP", account.flops, rank_flops(case, account), CLOSE),
    ]
    if recomputed in ({"none"}, {"selective"}):
        kept = sum(n * (one - ("selective" in recomputed) * dropped) for n, one, dropped in kinds)
        each = account.layer_activation_bytes / account.layers
        found.append(Line("activations of a layer", "bytes", each, (kept + masks) / account.layers, CLOSE))
    activations = Activations.of(case, ranks)
    in_layers = float((in_flight(case, ranks) * (activations.layers + masks) + activations.moving)[0])
    if layout.offload != "none":
        on_host = float(activations.layers[0])
        found.append(Line("activations on the host", "bytes", account.offloaded_bytes, on_host, CLOSE))
    again = 0.0
    if recomputed != {"none"}:
        again = max(one + mask if "full" in recomputed else dropped for _, one, dropped in kinds)
    found.append(Line("activations in flight", "bytes", _in_flight(account, moments), in_layers + again, CLOSE))
    return found


def uneven_rows(model: Model, layout: Layout, pipeline_rank: int) -> float:
    """By what share rank 0 of those that ZeRO cuts over holds more elements than they do on average."""
    most, mean = 0.0, 0.0
    for parameter in stage_parameters(model, layout, pipeline_rank):
        shape = tensor_shard(parameter, layout.tp, 0, layout.ep).shape
        ranks = max(layout.shards // (layout.ep if parameter.expert else 1), 1)
        rows = shape[parameter.data_dim if layout.zero_stage >= 2 else 0]
        most += prod(shape) / rows * -(-rows // ranks)
        mean += prod(shape) / ranks
    return most / mean - 1


def _kinds_of_layer(case: Case, ranks: Ranks) -> list[tuple[float, float, float]]:
    """The layers of each kind on a rank, what one of them keeps, and what of it selective recomputation drops."""
    found = []
    for one, held in kinds_of_layer(case, ranks.shape):
        n, kept, dropped = (float(np.ravel(part)[0]) for part in (held, *layer_activation_bytes(one)))
        found += [(n, kept, dropped)] if n else []
    return found


def peak_of(case: Case, account: RankAccount, moments: tuple[tuple[int, ...], ...]) -> Peak:
    """All that a rank holds at once. What ZeRO gathers is as planned: the messages that bring it are compared.

    Gradients come as activations go: where all micro-batches have gone forward when the first goes back, its
    activations are gone when its gradients are whole. What the loss held is gone when a layer is made again, and when
    ZeRO 3's window opens for the way back.
    """
    memory = _memory_on(case, account)
    later = account.working_bytes + (memory["buffers"] if case.lay.zero_stage[0] == 3 else 0.0)
    kept = _in_flight(account, moments) + max(account.end_activation_bytes - later, 0.0)
    all_forward = any(min(counts) == account.micro_batches for counts in moments)
    gone = kept / account.micro_batches if all_forward else 0.0
    gathered = memory["buffers"] if case.lay.zero_stage[0] >= 2 else account.weight_copies_bytes
    lasting = account.parameter_bytes + account.optimizer_bytes + account.receive_buffers_bytes + gathered
    executed = lasting + kept + max(_gradients(account) - gone, 0.0)
    return Peak(executed, sum(memory.values()), case.accelerator.memory_bytes)


def _memory_on(case: Case, account: RankAccount) -> dict[str, float]:
    """What is predicted of the rank's peak, by part."""
    ranks = case.ranks(np.array([account.pipeline_rank]))
    return {part: float(values[0]) for part, values in memory_of(case, ranks).items()}


def _gradients(account: RankAccount) -> int:
    """Bytes of gradients where most of them are there: whole ones, while micro-batches are added up."""
    return max(account.gradient_bytes, account.whole_gradient_bytes)


def _in_flight(account: RankAccount, moments: tuple[tuple[int, ...], ...]) -> float:
    """Bytes of the layers' activations when most micro-batches are in flight, with what is made again or moves."""
    moving = min(2, account.layers) * account.offloaded_bytes / account.layers
    return most_held(moments, account.chunk_activation_bytes) + account.working_bytes + moving


def _notes(cluster: Cluster, case: Case, classes: list[RankClass]) -> list[str]:
    notes = ["executed on fake tensors with the CPU's kernels; nothing was allocated or sent"]
    layout = case.lay.layout(0)
    for one in classes if layout.zero_stage else ():
        more = uneven_rows(case.model, layout, one.account.pipeline_rank)
        if more > CLOSE:
            uneven = f"rows do not divide evenly over {layout.shards} ranks; the fullest holds {more:.1%} more"
            notes.append(f"{one.name}: {uneven} than the mean, which the plan counts")
    assumed = averaged(precision_of(cluster.accelerator, case.dtype), case.precision.averages_per_step)
    if assumed != case.precision:
        widths = [
            f"{one.parameter} B a weight, {one.gradient} a gradient, {one.optimizer} of optimizer state"
            for one in (assumed, case.precision)
        ]
        notes.append(f"the plan for {cluster.accelerator.name} assumes {widths[0]}; the engine holds {widths[1]}")
    notes += [
        f"{one.name}: the pipeline keeps {one.account.receive_buffers_bytes / 1e9:.3g} GB of receive buffers between "
        "steps, which no plan counts"
        for one in classes
        if one.account.receive_buffers_bytes
    ]
    return notes
