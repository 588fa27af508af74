"""Peak memory of one rank, by part.

State cut as by ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054); what layers keep is in `perf.activations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bloomery.perf.activations import Activations, activation_bytes, end_bytes, in_flight
from bloomery.perf.case import MICRO_BATCH, MODEL_STATE, Case
from bloomery.perf.ranks import Held, Ranks
from bloomery.perf.table import blocks
from bloomery.spec.loss import loss_rows
from bloomery.spec.parameters import is_hidden_matrix, layer_parameters

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "reserved")
"""Keys of a memory table. `buffers`: gathered parameters; `logits`: with their softmax and gradient, or (our engine)
what the backward pass works on where that is more; `reserved`: context, communicators, allocator."""

FRAGMENTATION = 0.015
"""Of what is allocated, what a caching device allocator holds beside it and cannot use."""


def memory_of(case: Case, ranks: Ranks) -> dict[str, np.ndarray]:
    """Peak bytes by part on `ranks`, shape (n,) each."""
    n = len(case.lay)
    parts = {**state_bytes(case, ranks), "activations": activation_bytes(case, ranks), "logits": _logits(case, ranks)}
    if case.stack.eager:
        activations = Activations.of(case, ranks)
        flight, fixed = in_flight(case, ranks), activations.fixed + parts["logits"]
        parts["gradients"] = _beside(case.micro_batches, flight, parts["gradients"], activations.each, fixed)
    parts["reserved"] = case.accelerator.reserved_bytes + _fragments(case) * sum(parts.values())
    return {name: np.broadcast_to(np.asarray(parts[name], dtype=np.float64), (n,)) for name in PARTS}


def _beside(micro_batches: np.ndarray, times: Any, gradients: Any, each: Any, fixed: Any) -> Any:
    """Gradients at the peak of a rank of our engine, beside `times` micro-batches' activations (`each`) and `fixed`.

    Those of a step's only micro-batch come as activations go: the peak is that of the larger. Where all micro-batches
    have gone forward when the first goes back, its activations have gone when gradients are whole.
    """
    before = np.where(micro_batches == 1, times * each + fixed, np.where(micro_batches <= times, each, 0.0))
    return np.maximum(gradients - before, 0.0)


def _fragments(case: Case) -> float:
    return FRAGMENTATION if case.accelerator.kind == "gpu" else 0.0


def _holders_by_block(case: Case) -> Iterator[tuple[slice, np.ndarray]]:
    """Peak bytes on each of `Case.holders`, shape (holders, m), of m layouts after another: the parts of `memory_of` for the
    layouts each tells apart."""
    # The engine's gradients are whole while micro-batches are still to come.
    state, state_of = case.over(*MODEL_STATE, *(("micro_batches",) if case.stack.eager else ()))
    flight, flight_of = case.over("pp", "vpp", "schedule", "micro_batches", "stages")
    kept, kept_of = case.over(*MICRO_BATCH, *(("zero_stage",) if _window_opens(case) else ()))
    held = state_bytes(state, state.holders)
    gradients = held.pop("gradients") + 0.0 * state.holders.layers
    states = sum(held.values())
    times = in_flight(flight, flight.holders)
    whole = Activations.of(kept, kept.holders)
    fixed, each = whole.fixed + _logits(kept, kept.holders), whole.each
    if not case.stack.eager:
        states, gradients = states + gradients, None
    for block in blocks(len(case.lay)):
        i, j, k = state_of[block], flight_of[block], kept_of[block]
        flights, one, rest = times.take(j, axis=1), each.take(k, axis=1), fixed.take(k, axis=1)
        lasting = states.take(i, axis=1)
        if gradients is not None:
            lasting += _beside(case.micro_batches[block], flights, gradients.take(i, axis=1), one, rest)
        yield block, (lasting + flights * one + rest) * (1.0 + _fragments(case)) + case.accelerator.reserved_bytes


def holder_bytes(case: Case) -> np.ndarray:
    """Peak bytes on each of `Case.holders`, shape (holders, n)."""
    answer = np.empty(case.holders.layers.shape)
    for block, held_bytes in _holders_by_block(case):
        answer[:, block] = held_bytes
    return answer


def peak_bytes(case: Case) -> np.ndarray:
    """Peak bytes on the rank of each layout that needs most, shape (n,)."""
    answer = np.empty(len(case.lay))
    for block, held_bytes in _holders_by_block(case):
        answer[block] = held_bytes.max(axis=0)
    return answer


def worst_memory(case: Case) -> dict[str, np.ndarray]:
    """Peak bytes by part on the rank of each layout that needs most, shape (n,) each."""
    worst = holder_bytes(case).argmax(axis=0)
    index = np.take_along_axis(case.holders.index, worst[None], axis=0)[0]
    return memory_of(case, case.ranks(index))


def parameters_on(case: Case, ranks: Ranks) -> tuple[Any, Any]:
    """Elements on one rank before ZeRO, shape (n,): (outside routed experts, in routed experts)."""
    lay = case.lay
    head = np.where(ranks.first, case.head.dense(lay), case.lone_head.dense(lay))
    dense = ranks.dense_layers * case.dense_layer.dense(lay) + ranks.moe_layers * case.moe_layer.dense(lay)
    dense = dense + ranks.first * case.embedding.dense(lay) + ranks.last * head
    return dense, ranks.moe_layers * case.moe_layer.experts(lay)


def updated_parameters(case: Case, ranks: Ranks) -> Any:
    """Elements whose optimizer state one rank holds and updates, shape (n,)."""
    dense, experts = parameters_on(case, ranks)
    return _cut(case, dense, experts, case.lay.zero_stage >= 1)


def _cut(case: Case, dense: Any, experts: Any, where: np.ndarray) -> Any:
    """Elements after ZeRO cuts them over data-parallel (and context-parallel) ranks; experts over dp / ep of them."""
    data = case.lay.shards
    return np.where(where, dense / data + experts / np.maximum(data / case.lay.ep, 1), dense + experts)


def state_bytes(case: Case, ranks: Ranks) -> dict[str, Any]:
    """Parameters, gradients, optimizer state and the buffers of gathered parameters.

    ZeRO 2 here is FSDP that keeps gathered parameters until the step's end; ZeRO 3 gathers two layers at a time and
    what a stage holds outside its layers. Our engine leaves experts whole that no other rank of a replica has.
    """
    lay, precision = case.lay, case.precision
    dense, experts = parameters_on(case, ranks)
    whole = precision.parameter * (dense + experts)
    layer = _largest_layer(case, ranks)
    ends = ranks.first * case.embedding.dense(lay) + ranks.last * case.lone_head.dense(lay)
    # Besides the gathered weights, the gradient of the layer under reduction is whole.
    window = (2 * layer + ends) * precision.gathered + layer * precision.gradient
    # Megatron's and DeepSpeed's ZeRO 2 keep 16-bit weights whole anyway; FSDP keeps its shards beside the whole.
    shards = precision.parameter * _cut(case, dense, experts, lay.zero_stage >= 2)
    sharded = lay.zero_stage >= 2
    gathered = precision.gathered * (dense + experts)
    buffers = np.select([lay.zero_stage == 3, lay.zero_stage == 2], [window, gathered], 0.0)
    if case.stack.eager:
        # FSDP reduces after the last micro-batch: whole gradients until then.
        sharded = sharded & (case.micro_batches == 1)
        if precision.stream < precision.parameter:
            # Autocast keeps narrow copies of the weights through a step. Those in float8 are cast at each product;
            # those that ZeRO gathers are narrow (as `gathered` has it of experts left whole too).
            copied = experts if precision.operand < precision.stream else dense + experts
            alone = (lay.zero_stage == 3) & (lay.ep > 1) & (lay.shards == lay.ep)
            copied = np.where(lay.zero_stage >= 2, experts * alone, copied)
            buffers = buffers + precision.stream * copied
    states = precision.optimizer * _cut(case, dense, experts, lay.zero_stage >= 1)
    if case.optimizer == "muon":
        # One moment instead of two: that of the second is not kept for the layers' matrices.
        first, last = (
            Held.of([p for p in layer_parameters(case.model, layer) if is_hidden_matrix(p)])
            for layer in (0, case.model.layers - 1)
        )
        matrices = ranks.dense_layers * first.dense(lay) + ranks.moe_layers * last.dense(lay)
        experts = ranks.moe_layers * last.experts(lay)
        states = states - precision.norm * _cut(case, matrices, experts, lay.zero_stage >= 1)
    return {
        "parameters": np.where(lay.zero_stage >= 2, shards, whole),
        "gradients": precision.gradient * _cut(case, dense, experts, sharded),
        "optimizer": states,
        "buffers": buffers,
    }


def _logits(case: Case, ranks: Ranks) -> Any:
    """The last rank's logits with their float32 copy, softmax and gradient, for one micro-batch."""
    if case.stack.eager:
        head = ranks.last * case.precision.gradient * case.model.vocab / case.lay.tp * case.model.hidden
        back = head + _backward_working_bytes(case)
        loss = ranks.last * (_logits_of_a_chunk(case) + end_bytes(case) + _read_by_the_head(case))
        # What is made again, if anything, is there when the loss and what it held are gone; so is most of ZeRO 3's
        # window.
        later = Activations.of(case, ranks).fixed + (_opened_after_the_loss(case, ranks) if _window_opens(case) else 0)
        return np.maximum(loss - later, back) + _sent_back(case, ranks)
    cut = 1 if case.stack.logits_gathered else case.lay.tp
    return ranks.last * case.tokens * case.model.vocab / cut * case.stack.logits_bytes


def _read_by_the_head(case: Case) -> Any:
    """The gradient of what our engine's head reads, which the loss makes in the forward pass, and under sequence
    parallelism what it reads, gathered."""
    whole = np.where(case.lay.sequence_parallel == 1, 2, 1) * case.tokens
    return whole * case.model.hidden * case.precision.stream


def _sent_back(case: Case, ranks: Ranks) -> Any:
    """The gradient that a stage of our engine has sent to the one before: PyTorch's schedule holds it through the next
    micro-batch. There is one as soon as fewer micro-batches are in flight than a step has."""
    sends = ~ranks.first & (case.micro_batches > case.lay.pp - ranks.index)
    return np.where(sends, case.stream_tokens * case.model.hidden * case.precision.stream, 0.0)


def _window_opens(case: Case) -> bool:
    """Whether some layouts have a window of ZeRO 3 in which gathered weights are as wide as their shards."""
    zero = vars(case.lay).get("zero_stage")
    return case.stack.eager and case.precision.stream == case.precision.parameter and bool(np.any(zero == 3))


def _opened_after_the_loss(case: Case, ranks: Ranks) -> Any:
    """Of ZeRO 3's window (`state_bytes`) what is not there when the loss is computed: the last layer's weights are
    given back, only the buffer that brought them stays until the next comes; nothing is reduced."""
    more = case.precision.parameter + case.precision.gradient
    return np.where(case.lay.zero_stage == 3, _largest_layer(case, ranks) * more, 0.0)


def _largest_layer(case: Case, ranks: Ranks) -> Any:
    """Elements of the largest of a rank's layers, shape (n,)."""
    routed = case.moe_layer.dense(case.lay) + case.moe_layer.experts(case.lay)
    layer = np.where(ranks.moe_layers > 0, routed, 0.0)
    return np.maximum(layer, np.where(ranks.dense_layers > 0, case.dense_layer.dense(case.lay), 0.0))


def _backward_working_bytes(case: Case) -> Any:
    """What our engine holds at the fullest moment of the first layer that goes back, beside everything the forward pass
    kept: the gradients of a gated product and of its two factors, but no longer the product (of an activation and its
    input where nothing is gated), of one routed expert at a time, and of the copies that go to all; the gradient of the
    stream, and where it came from."""
    model, precision = case.model, case.precision
    width: Any = model.ffn_hidden
    copies = 0
    if (moe := model.moe) is not None:
        width, copies = (moe.top_k * case.lay.ep / moe.experts + moe.shared_experts) * moe.expert_ffn_hidden, moe.top_k
    inside = (2 if model.gated else 1) * width / case.lay.tp * precision.stream
    stream = np.where(case.lay.pp > 1, 2, 1) * precision.stream + 2 * copies * precision.stream
    return case.tokens * (inside + stream * model.hidden)


def _logits_of_a_chunk(case: Case) -> Any:
    """What our engine's loss works on: logits of some rows (all of them where the vocabulary is cut) in float32 at
    least, a narrow copy for the products, and the head's gradient; later, without logits, this one and the scaled."""
    rows = np.where(case.lay.tp > 1, case.tokens, np.minimum(case.tokens, loss_rows(case.accelerator.kind)))
    width = case.precision.stream
    each = max(4, width) + (width if width < 4 else 0)
    vocab = case.model.vocab / case.lay.tp
    gradient = case.model.hidden * case.precision.gradient
    return vocab * (np.maximum(rows * each, gradient) + gradient)
