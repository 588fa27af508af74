"""Peak memory of one rank, by part.

State cut as by ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054); what layers keep is in `perf.activations`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from bloomery.perf.activations import Activations, activation_bytes, end_bytes, flights, in_flight, peak_in_flight
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

MEMORY_SPREAD = 0.08
"""Standard deviation of log(real / predicted peak memory) of published runs, fragmentation included."""


def chance_of_fitting(peak_bytes: float, limit_bytes: float) -> float:
    """Probability that a rank whose peak is predicted as `peak_bytes` keeps within the limit."""
    return 0.5 * (1 + math.erf(math.log(limit_bytes / peak_bytes) / MEMORY_SPREAD / math.sqrt(2)))


def memory_of(case: Case, ranks: Ranks) -> dict[str, np.ndarray]:
    """Peak bytes by part on `ranks`, shape (n,) each."""
    n = len(case.lay)
    parts = {**state_bytes(case, ranks), "logits": _logits(case, ranks)}
    parts["activations"] = activation_bytes(case, ranks, _gone_while_weights_wait(case, ranks, parts["logits"]))
    if case.stack.eager:
        fixed = Activations.of(case, ranks).fixed
        kept, fixed = parts["activations"] - fixed, fixed + parts["logits"]
        parts["gradients"] = _beside(case.micro_batches, in_flight(case, ranks), parts["gradients"], kept, fixed)
    parts["reserved"] = case.accelerator.reserved_bytes + _fragments(case) * sum(parts.values())
    return {name: np.broadcast_to(np.asarray(parts[name], dtype=np.float64), (n,)) for name in PARTS}


def _beside(micro_batches: np.ndarray, times: Any, gradients: Any, kept: Any, fixed: Any) -> Any:
    """Gradients at the peak of a rank of our engine, beside what it has `kept` of `times` micro-batches, and `fixed`.

    Those of a step's only micro-batch come as activations go: the peak is that of the larger. Where all micro-batches
    have gone forward when the first goes back, its activations have gone when gradients are whole.
    """
    before = np.where(micro_batches == 1, kept + fixed, np.where(micro_batches <= times, kept / times, 0.0))
    return np.maximum(gradients - before, 0.0)


def _fragments(case: Case) -> float:
    return FRAGMENTATION if case.accelerator.kind == "gpu" else 0.0


def _holders_by_block(case: Case) -> Iterator[tuple[slice, np.ndarray]]:
    """Peak bytes on each of `Case.holders`, shape (holders, m), of m layouts after another: the parts of `memory_of`
    for the layouts each tells apart."""
    # Gradients that are whole while micro-batches are still to come.
    state, state_of = case.over(*MODEL_STATE, *(("single",) if case.stack.sums_whole else ()))
    mixed = () if case.every_rank is None else ("recompute",)  # else no rank's count depends on it
    flight, flight_of = case.over("pp", "vpp", "schedule", "frees", "micro_batches", "stages", *mixed)
    kept, kept_of = case.over(*MICRO_BATCH, *(("frees",) if _window_opens(case) else ()))
    held = state_bytes(state, state.holders)
    gradients = held.pop("gradients") + 0.0 * state.holders.layers
    states = sum(held.values())
    moments = flights(flight, flight.holders)
    whole, logits = Activations.of(kept, kept.holders), _logits(kept, kept.holders)
    fixed, each = whole.fixed + logits, whole.each.where(moments[-1])
    gone = fixed * 0.0 + _gone_while_weights_wait(kept, kept.holders, logits)
    if not case.stack.eager:
        states, gradients = states + gradients, None
    for block in blocks(len(case.lay)):
        i, j, k = state_of[block], flight_of[block], kept_of[block]
        held_then = [moment.take(j) for moment in moments]
        left = gone.take(k, axis=1) if len(moments) > 1 else 0.0
        in_all, rest = peak_in_flight(held_then, each.take(k), left), fixed.take(k, axis=1)
        lasting = states.take(i, axis=1)
        if gradients is not None:
            times = held_then[0].times
            lasting += _beside(case.micro_batches[block], times, gradients.take(i, axis=1), in_all, rest)
        yield block, (lasting + in_all + rest) * (1.0 + _fragments(case)) + case.accelerator.reserved_bytes


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
    dense = ranks.dense_layers * case.dense_layer.dense(lay) + ranks.moe_layers * case.moe_layer.dense(lay)
    return dense + _ends(case, ranks), ranks.moe_layers * case.moe_layer.experts(lay)


def _ends(case: Case, ranks: Ranks) -> Any:
    """Elements outside layers on one rank; where it has both ends a tied head is its embedding."""
    head = np.where(ranks.first, case.head.dense(case.lay), case.lone_head.dense(case.lay))
    return ranks.first * case.embedding.dense(case.lay) + ranks.last * head


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
    window = (2 * layer + _ends(case, ranks)) * precision.gathered + layer * _reduced_gradient(case)
    # Megatron's and DeepSpeed's ZeRO 2 keep 16-bit weights whole anyway; FSDP keeps its shards beside the whole.
    shards = precision.parameter * _cut(case, dense, experts, lay.zero_stage >= 2)
    sharded = lay.zero_stage >= 2
    gathered = precision.gathered * (dense + experts)
    buffers = np.select([lay.zero_stage == 3, lay.zero_stage == 2], [window, gathered], 0.0)
    if case.stack.sums_whole:
        # Our FSDP reduces after the last micro-batch, in a pipeline after its backward pass: whole until then.
        sharded = sharded & case.single & (lay.pp == 1)
    if case.stack.eager and precision.stream < precision.parameter:
        # Autocast keeps narrow copies of the products' weights through a step. Those in float8 are cast at each;
        # those that ZeRO gathers are narrow (as `gathered` has it of experts left whole too).
        copied = experts if precision.operand < precision.stream else dense + experts - _looked_up(case, ranks)
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


def _reduced_gradient(case: Case) -> Any:
    """Bytes an element of the gradient of the layer under reduction, which is whole beside ZeRO 3's gathered weights.
    In a pipeline our engine reduces when no activations are left, and the peak is past."""
    return case.precision.gradient * np.where(case.lay.pp > 1, not case.stack.sums_whole, True)


def _looked_up(case: Case, ranks: Ranks) -> Any:
    """Elements of embeddings that are only looked up: no product reads them, as the head does one that is tied here."""
    alone = ranks.first & ~ranks.last if case.model.tie_embeddings else ranks.first
    return alone * case.embedding.dense(case.lay) + ranks.layers * case.values_by_token


def _logits(case: Case, ranks: Ranks) -> Any:
    """The last rank's logits with their float32 copy, softmax and gradient, for one micro-batch."""
    if case.stack.eager:
        # Where gradients are not whole anyway, the head's is, at once.
        head = ranks.last * (case.micro_batches == 1) * _head_gradient(case)
        back = head + _backward_working_bytes(case)
        loss = ranks.last * (_logits_of_a_chunk(case) + end_bytes(case) + _read_by_the_head(case))
        # What is made again, if anything, is there when the loss and what it held are gone; so is most of ZeRO 3's
        # window. Of offloaded layers the one at work stays.
        activations = Activations.of(case, ranks)
        later = activations.fixed - activations.moving / np.clip(ranks.layers, 1, 2)
        later = later + (_opened_after_the_loss(case, ranks) if _window_opens(case) else 0.0)
        return np.maximum(loss - later, back)
    cut = 1 if case.stack.logits_gathered else case.lay.tp
    return ranks.last * case.tokens * case.model.vocab / cut * case.stack.logits_bytes


def _gone_while_weights_wait(case: Case, ranks: Ranks, logits: Any) -> Any:
    """Of `logits` (`_logits`) what is no longer there when a micro-batch has gone back and its weights wait: all but
    the gradients of the head, of its input and of the last norm's."""
    left = ranks.last * (_head_gradient(case) + end_bytes(case))
    return logits - left if case.stack.eager else np.maximum(logits - left, 0.0)


def _head_gradient(case: Case) -> Any:
    """Bytes of the gradient of the head's weights."""
    return case.precision.gradient * case.model.vocab / case.lay.tp * case.model.hidden


def _read_by_the_head(case: Case) -> Any:
    """The gradient of what our engine's head reads, which the loss makes in the forward pass, and under sequence
    parallelism what it reads, gathered."""
    whole = np.where(case.lay.sequence_parallel == 1, 2, 1) * case.tokens
    return whole * case.model.hidden * case.precision.stream


def _window_opens(case: Case) -> bool:
    """Whether some layouts have a window of ZeRO 3."""
    return case.stack.eager and bool(np.any(getattr(case.lay, "frees", False)))


def _opened_after_the_loss(case: Case, ranks: Ranks) -> Any:
    """Of ZeRO 3's window (`state_bytes`) what is not there when the loss is computed: the last layer's weights are
    given back, only the buffer that brought them stays until the next comes; nothing is reduced."""
    more = case.precision.gathered + _reduced_gradient(case)
    return np.where(case.lay.frees, _largest_layer(case, ranks) * more, 0.0)


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
