"""Peak memory of one rank, by part.

Activations after Korthikanti et al. 2022 (arXiv 2205.05198), generalised to grouped queries, gated activations, flash
attention and any element width; ZeRO after Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.perf.case import DUALPIPEV, FULL, GPIPE, INTERLEAVED, MICRO_BATCH, MODEL_STATE, SELECTIVE, ZBV, Case
from bloomery.perf.ranks import Held, Ranks
from bloomery.perf.table import blocks
from bloomery.spec.loss import loss_rows
from bloomery.spec.model import MixtureOfExperts
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
    """Peak bytes on each of `Case.holders`, shape (4, m), of m layouts after another: the parts of `memory_of` for the
    layouts each tells apart."""
    # The engine's gradients are whole while micro-batches are still to come.
    state, state_of = case.over(*MODEL_STATE, *(("micro_batches",) if case.stack.eager else ()))
    flight, flight_of = case.over("pp", "vpp", "schedule", "micro_batches", "stages")
    kept, kept_of = case.over(*MICRO_BATCH)
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
    """Peak bytes on each of `Case.holders`, shape (4, n)."""
    answer = np.empty((4, len(case.lay)))
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
    what a stage holds outside its layers.
    """
    lay, precision = case.lay, case.precision
    dense, experts = parameters_on(case, ranks)
    gathered = precision.parameter * (dense + experts)
    layer = np.where(ranks.moe_layers > 0, case.moe_layer.dense(lay) + case.moe_layer.experts(lay), 0.0)
    layer = np.maximum(layer, np.where(ranks.dense_layers > 0, case.dense_layer.dense(lay), 0.0))
    ends = ranks.first * case.embedding.dense(lay) + ranks.last * case.lone_head.dense(lay)
    # Besides the gathered weights, the gradient of the layer under reduction is whole.
    window = 2 * layer * precision.parameter + layer * precision.gradient + ends * precision.parameter
    # Megatron's and DeepSpeed's ZeRO 2 keep 16-bit weights whole anyway; FSDP keeps its shards beside the whole.
    shards = precision.parameter * _cut(case, dense, experts, lay.zero_stage >= 2)
    sharded = lay.zero_stage >= 2
    buffers = np.select([lay.zero_stage == 3, lay.zero_stage == 2], [window, gathered], 0.0)
    if case.stack.eager:
        # FSDP reduces after the last micro-batch: whole gradients until then.
        sharded = sharded & (case.micro_batches == 1)
        if precision.compute < precision.parameter:
            # Autocast keeps narrow copies of the weights through a step.
            buffers = buffers + precision.compute * (dense + experts)
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
        "parameters": np.where(lay.zero_stage >= 2, shards, gathered),
        "gradients": precision.gradient * _cut(case, dense, experts, sharded),
        "optimizer": states,
        "buffers": buffers,
    }


def layer_activation_bytes(case: Case) -> tuple[Any, Any]:
    """Bytes one layer keeps of one micro-batch: (everything, only the part selective recomputation drops), (n,) each.
    Our engine drops outputs of norms and activation functions; per operator a stack drops the share that it repeats;
    with unfused attention it drops the scores.

    With c-byte elements, e = query width, g = kv width: norms' inputs 2 sbh (stream); inputs of the two blocks 2 sbh c;
    queries, keys, values sb(e + 2g)c/t; attention's output sb e c/t; ffn sbf c/t per kept tensor; dropout masks 2 sbh.
    Unfused attention keeps its scores: 2c a s^2 b/t and one mask byte. For a plain layer in 16 bit this is the paper's
    sbh(10 + 24/t + 5as/(ht)), divided by t wholly under sequence parallelism; `Stack.kept` multiplies.
    """
    model, lay, stack, precision = case.model, case.lay, case.stack, case.precision
    inside = case.tokens / lay.tp
    outer = operators = _eager_outer_bytes(case) if stack.eager else _outer_bytes(case)
    attention = _attention_widths(case) * precision.compute
    width = model.ffn_hidden
    if model.moe is not None:
        width = (model.moe.top_k + model.moe.shared_experts) * model.moe.expert_ffn_hidden
        outer = outer + 2 * model.moe.top_k * _routed_tokens(case) * model.hidden * precision.compute
    feed_forward = stack.saved_widths(model) * inside * width * precision.compute
    linear = stack.kept * (outer + attention + feed_forward)
    if stack.flash_attention:
        whole = linear + max(4, precision.compute) * model.heads * inside
        if stack.selective_share is not None:
            return whole, stack.selective_share * whole
        # Norms' inputs stay, and those of the activation function: one tensor of the ffn's width, or gate and up.
        outputs = operators - _selective_outer_bytes(case)
        widths = stack.saved_widths(model) - (2 if model.gated else 1)
        return whole, stack.kept * (outputs + widths * inside * width * precision.compute)
    each = 2 * precision.compute + (1 if stack.dropout else 0)
    scores = stack.kept * each * model.heads * case.seq_len * inside
    return linear + scores, scores


def _routed_tokens(case: Case) -> Any:
    """Tokens of which a rank has copies on their way to experts and back: every tensor-parallel rank of our engine has
    them whole."""
    return case.tokens if case.stack.eager else case.tokens / case.lay.tp


def _surplus_bytes(case: Case) -> Any:
    """What one layer keeps on the fullest rank (`Stack.expert_imbalance`) beyond what it keeps on average."""
    moe = case.model.moe
    if moe is None:
        return 0.0
    copies = 2 * _routed_tokens(case) * case.model.hidden
    inside = case.stack.saved_widths(case.model) * case.tokens / case.lay.tp * moe.expert_ffn_hidden
    whole = case.stack.kept * moe.top_k * (copies + inside) * case.precision.compute
    return (case.expert_imbalance - 1.0) * whole


def _attention_widths(case: Case) -> Any:
    """Elements of queries, keys, values and attention's output that one layer keeps, and of what norms inside it keep.

    Our engine pads the values of latent attention, and so what attention gives back; its RMSNorm keeps a figure a row
    beside its input.
    """
    model, mla, inside, eager = case.model, case.model.mla, case.tokens / case.lay.tp, case.stack.eager
    if mla is not None:
        query, key_value = mla.q_lora_rank, mla.kv_lora_rank
        figures = (1 if query else 0) + 1 if eager else 0
        latents = case.tokens * (2 * (query + key_value) + model.rotary_width + figures)
        heads = 4 * model.query_width if eager else model.query_width + model.kv_width + model.value_width
        return latents + inside * (heads + model.output_width)
    width = model.query_width + model.kv_width
    norms = width + (model.heads + model.kv_heads if eager else 0) if model.qk_norm else 0
    return inside * (2 * width + norms)


def _outer_bytes(case: Case) -> Any:
    """What a layer keeps outside its blocks: norms' inputs, inputs of the blocks, dropout masks; all cut under sequence
    parallelism."""
    precision = case.precision
    masks = 2 if case.stack.dropout else 0
    return case.stream_tokens * case.model.hidden * (2 * precision.stream + 2 * precision.compute + masks)


def _eager_outer_bytes(case: Case) -> Any:
    """The same of plain PyTorch modules, as the engine's saved tensors have it.

    RMSNorm keeps a figure a token beside its input (LayerNorm two); blocks keep their gathered input whole under
    sequence parallelism; autocast without tensor parallelism keeps a copy for each projection. All layers share one
    pair of rotary tables.
    """
    model, precision, h = case.model, case.precision, case.model.hidden
    norm = h + (1 if model.norm == "rmsnorm" else 2)
    norms = 2 * case.stream_tokens * precision.stream * norm
    narrowed = (case.lay.tp == 1) & (precision.compute < precision.stream)
    if model.moe is not None:
        return norms + case.tokens * _eager_mixture_inputs(case, model.moe, narrowed)
    copies = np.where(narrowed, 5 if model.gated else 4, 2)
    return norms + copies * case.tokens * h * precision.compute


def _selective_outer_bytes(case: Case) -> Any:
    """What our engine keeps of that when norms' outputs are made again: their inputs; of a mixture the router's scores,
    and its input where that is a copy in a wider format."""
    model, compute = case.model, case.precision.compute
    kept = 2 * case.stream_tokens * model.hidden * case.precision.stream
    if model.moe is None:
        return kept
    copy = model.hidden * 4 if compute < 4 else 0
    return kept + case.tokens * (copy + _routing_bytes(case, model.moe))


def _routing_bytes(case: Case, moe: MixtureOfExperts) -> Any:
    """Bytes a token of a router's scores, of the experts of a token and of both orders of the copies."""
    wide = max(4, case.precision.compute)
    return moe.experts * wide + moe.top_k * (3 * 8 + 2 * wide)


def _eager_mixture_inputs(case: Case, moe: MixtureOfExperts, narrowed: np.ndarray) -> Any:
    """Bytes a token that a layer with experts keeps as inputs of its blocks, and for its routing.

    The router reads its input in float32 at least, and keeps its scores; indices are 64-bit: the experts of a token
    and both orders of the copies.
    """
    h, compute = case.model.hidden, case.precision.compute
    wide = max(4, compute)
    shared = np.where(narrowed, 2 if case.model.gated else 1, int(compute < wide)) * (moe.shared_experts > 0)
    return (np.where(narrowed, 3, 1) + shared) * h * compute + h * wide + _routing_bytes(case, moe)


@dataclass(frozen=True)
class Activations:
    """Bytes of activations on some ranks, (n,) or (kinds, n): of the `layers` for each micro-batch in flight, of what a
    stage has `sent` and keeps until its gradient comes, and a `fixed` working set.

    Full recomputation keeps each layer's input (2sbh in 16 bit) and works on one layer at a time.
    """

    layers: Any
    sent: Any
    fixed: Any

    @property
    def each(self) -> Any:
        """Of one micro-batch in flight."""
        return self.layers + self.sent

    @classmethod
    def of(cls, case: Case, ranks: Ranks) -> Activations:
        """Of `ranks`."""
        whole, scores = layer_activation_bytes(case)
        inputs = case.stream_tokens * case.model.hidden * case.precision.stream
        recompute = case.lay.recompute
        kept = np.where(recompute == FULL, inputs, np.where(recompute == SELECTIVE, whole - scores, whole))
        again = np.where(recompute == SELECTIVE, scores, 0.0)
        layers = ranks.layers * kept + ranks.moe_layers * np.where(recompute == FULL, 0.0, _surplus_bytes(case))
        if not case.stack.eager:
            return cls(layers, 0.0, np.where(recompute == FULL, whole, again) + ranks.last * _end_bytes(case))
        # A layer that is made again has its own input among those that are kept; `_logits` knows of the ends.
        return cls(layers, np.where(ranks.last, 0.0, inputs), np.where(recompute == FULL, whole - inputs, again))


def _end_bytes(case: Case) -> Any:
    """The last norm's input and output."""
    return case.stream_tokens * case.model.hidden * (case.precision.stream + case.precision.compute)


def activation_bytes(case: Case, ranks: Ranks) -> Any:
    """Bytes of activations at the peak: what every micro-batch in flight keeps, and the working set."""
    activations = Activations.of(case, ranks)
    return in_flight(case, ranks) * activations.each + activations.fixed


def in_flight(case: Case, ranks: Ranks) -> Any:
    """Micro-batches whose activations pipeline rank i holds at once, in units of all of its layers, shape (n,).

    1F1B: min(m, p - i). GPipe: m. Interleaved: 2(p - i - 1) + (v - 1)p + 1 chunks of 1/v, which on the first rank is
    Korthikanti's p(1 + (p - 1)/(pv)); never more than all of them. ZB-V keeps 2p half chunks on every rank, which is
    1F1B's most (Qi et al. 2023, 2401.10241, section 6), DualPipeV one more (DeepSeek-V3, 2412.19437, table 2).
    """
    lay, m, index = case.lay, case.micro_batches, ranks.index
    chunks = np.minimum(2 * (lay.pp - index - 1) + (lay.vpp - 1) * lay.pp + 1, m * lay.vpp)
    one_by_one = np.minimum(m, lay.pp - index)
    if case.stack.eager:
        # The engine runs GPipe where there are fewer micro-batches than stages.
        one_by_one = np.where(m < lay.pp, m, one_by_one)
    kinds = [lay.schedule == kind for kind in (GPIPE, INTERLEAVED, ZBV, DUALPIPEV)]
    return np.select(kinds, [m, chunks / lay.vpp, lay.pp, lay.pp + 0.5], one_by_one)


def _logits(case: Case, ranks: Ranks) -> Any:
    """The last rank's logits with their float32 copy, softmax and gradient, for one micro-batch."""
    if case.stack.eager:
        head = ranks.last * case.precision.gradient * case.model.vocab / case.lay.tp * case.model.hidden
        back, loss = head + _backward_working_bytes(case), ranks.last * (_logits_of_a_chunk(case) + _end_bytes(case))
        # What is made again, if anything, is there when the loss and what it held are gone.
        return np.maximum(loss - Activations.of(case, ranks).fixed, back)
    cut = 1 if case.stack.logits_gathered else case.lay.tp
    return ranks.last * case.tokens * case.model.vocab / cut * case.stack.logits_bytes


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
    inside = (2 if model.gated else 1) * width / case.lay.tp * precision.compute
    stream = np.where(case.lay.pp > 1, 2, 1) * precision.stream + 2 * copies * precision.compute
    return case.tokens * (inside + stream * model.hidden)


def _logits_of_a_chunk(case: Case) -> Any:
    """What our engine's loss works on: logits of some rows (all of them where the vocabulary is cut) in float32 at
    least, a narrow copy for the products, and the head's gradient; later, without logits, this one and the scaled."""
    rows = np.where(case.lay.tp > 1, case.tokens, np.minimum(case.tokens, loss_rows("cpu")))
    compute = case.precision.compute
    each = max(4, compute) + (compute if compute < 4 else 0)
    vocab = case.model.vocab / case.lay.tp
    gradient = case.model.hidden * case.precision.gradient
    return vocab * (np.maximum(rows * each, gradient) + gradient)
