"""Seconds one rank computes in one micro-batch: its layers, the embedding, the head with the loss. No communication.

Beside the device's seconds stand the host's: the launches of those kernels. On a CPU both are the same core's, so
launches are part of the work; a device queue runs them beside it (`estimate` takes the longer of the two).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bloomery.perf.activations import layer_kept_bytes
from bloomery.perf.case import FULL, PART, SELECTIVE, Case
from bloomery.perf.flops import window_share
from bloomery.perf.kernels import flash_attention_s, linear_s, memory_s, unfused_attention_s
from bloomery.perf.ranks import Held, Ranks
from bloomery.perf.stack import LARGE_TENSOR_BYTES, Passes
from bloomery.perf.table import Table
from bloomery.spec.cluster import ComputeFactor
from bloomery.spec.collective import by_recompute
from bloomery.spec.errors import InputError


@dataclass(frozen=True)
class Work(Table):
    """Seconds of compute for one micro-batch, shape (n,) each; `host_*`: of launches that run beside them, those of
    recomputation with the backward pass, where it happens. `accumulate`: what every micro-batch but a step's first adds
    to the backward pass; `moved_*`: transfers to and from the host's memory that the layers' compute does not hide."""

    forward: Any
    backward: Any
    recompute: Any
    host_forward: Any = 0.0
    host_backward: Any = 0.0
    accumulate: Any = 0.0
    moved_forward: Any = 0.0
    moved_backward: Any = 0.0


def stage_work(case: Case, ranks: Ranks) -> Work:
    """All that `ranks` (n,) or (kinds, n) compute in one micro-batch (all of their chunks), averaged over a step's."""
    parts, index = case.over(*PART)
    factor = case.accelerator.compute_factor.get(case.dtype, ComputeFactor())
    ends = _embedding(parts).take(index) * ranks.first + _head(parts).take(index) * ranks.last
    work = ends * factor.ends
    for lay, own in by_recompute(case.lay, ranks.shape):
        parts, index = case.on(lay).over(*PART)
        if case.model.moe is None or case.model.moe.first_dense_layers:
            layer = moved(parts, _layer(parts, case.dense_layer, moe=False) * factor.layers)
            work = work + layer.take(index) * own.dense_layers
        if case.model.moe is not None:
            layer = moved(parts, _layer(parts, case.moe_layer, moe=True) * factor.layers)
            work = work + layer.take(index) * own.moe_layers
    again = (case.micro_batches - 1) / case.micro_batches
    return replace(work, backward=work.backward + again * work.accumulate)


def _layer(case: Case, held: Held, *, moe: bool) -> Work:
    """One transformer layer."""
    attention_forward, attention_backward = _attention(case)
    written = _elementwise(case, moe)
    blocks = [_projections(case), _experts(case) if moe else _feed_forward(case), written, _again(case)]
    forward = attention_forward + sum(block[0] for block in blocks)
    backward = (
        attention_backward + sum(block[1] for block in blocks) + _casts(case, held, layer=True) + _joined(case, held)
    )
    experts: Any = case.model.moe.experts / case.lay.ep if moe and case.model.moe else 0
    narrow, tiles = case.dtype in ("float8", "float4"), np.where(case.lay.cp > 1, case.lay.cp, 0)
    kernels = case.stack.layer_kernels(experts=experts, narrow=narrow, tiles=tiles)
    work = _launched(case, forward, backward, kernels, written)
    attention_again = 0.0 if case.stack.flash_attention else attention_forward
    share = case.stack.selective_share
    selective = _outputs_again(case, moe) if share is None else attention_again + share * work.forward
    full = case.lay.recompute == FULL
    stops = case.stack.eager and not moe and case.dtype != "float8"
    again = work.forward - _down(case) if stops else work.forward
    recompute = np.where(full, again, np.where(case.lay.recompute == SELECTIVE, selective, 0.0))
    host_backward = work.host_backward + np.where(full, work.host_forward, 0.0)
    return replace(work, recompute=recompute, host_backward=host_backward, accumulate=_accumulation(case, held))


LINK_SHARE = 0.8
"""Of a data sheet's rate of the link to the host, what large copies from pinned memory get: a prior, not measured."""


def moved(case: Case, layer: Work) -> Work:
    """One layer's work, with what offloading its activations adds.

    Out while the next layer computes, back while the layer after it goes backward: of each transfer only what takes
    longer than that is felt. A CPU copies with the cores that compute, reading and writing. Raises InputError where the
    link to the host is not known.
    """
    if not np.any(case.lay.offload):
        return layer
    kept, _ = layer_kept_bytes(case, case.lay)
    kept = np.where(case.lay.offload == 1, kept, 0.0)
    device = case.accelerator
    if device.kind == "cpu":
        seconds = memory_s(device, 2 * kept)
        return replace(layer, moved_forward=seconds, moved_backward=seconds)
    if device.upload_bytes_per_s is None:
        problem = "offload needs upload_bytes_per_s: the rate of the link to the host is not known"
        raise InputError(problem, where=f"accelerator {device.name}")
    seconds = kept / (device.upload_bytes_per_s * (1.0 if device.probed else LINK_SHARE))
    behind = layer.backward + layer.recompute
    return replace(
        layer,
        moved_forward=np.maximum(seconds - layer.forward, 0.0),
        moved_backward=np.maximum(seconds - behind, 0.0),
    )


def _launched(case: Case, forward: Any, backward: Any, kernels: Passes, written: tuple[Any, Any] = (0.0, 0.0)) -> Work:
    """Kernels with their launches: added to the work where both are on the same core, beside it elsewhere. So is the
    memory that the host gives and takes back, in proportion to the seconds of what is `written`.

    On a device each kernel also takes `kernel_s` whatever its size: filling and draining its cores.
    """
    launch_s, kernel_s = case.accelerator.launch_s, case.accelerator.kernel_s
    if case.stack.serial_launch:
        given = [case.accelerator.allocation * seconds for seconds in written]
        forward = forward + kernels.forward * launch_s + given[0]
        return Work(forward, backward + kernels.backward * launch_s + given[1], 0.0)
    host = case.stack.host_factor * launch_s
    return Work(
        forward + kernels.forward * kernel_s,
        backward + kernels.backward * kernel_s,
        0.0,
        kernels.forward * host,
        kernels.backward * host,
    )


def _linear(case: Case, tokens: Any, n_in: Any, n_out: Any, batch: Any = 1, *, wide: bool = False) -> tuple[Any, Any]:
    """`wide`: in the format of attention, where products are narrower."""
    dtype, width = (case.wide_dtype, case.precision.stream) if wide else (case.dtype, case.precision.operand)
    return linear_s(case.accelerator, dtype, tokens, n_in, n_out, element_bytes=width, batch=batch)


def _summed(pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _projections(case: Case) -> tuple[Any, Any]:
    """Query, key, value and output. Fused stacks multiply query, key and value at once; eager ones one by one.

    Latent attention multiplies down to its latents on every tensor-parallel rank alike, and up to its own heads.
    """
    model, tp, h = case.model, case.lay.tp, case.model.hidden
    out = _linear(case, case.tokens, model.output_width / tp, h)
    if model.mla is not None:
        mla = model.mla
        up = model.heads * (mla.qk_nope_head_dim + mla.v_head_dim) / tp
        pairs = [_linear(case, case.tokens, h, mla.kv_lora_rank + mla.qk_rope_head_dim), out]
        pairs.append(_linear(case, case.tokens, mla.kv_lora_rank, up))
        pairs.append(_linear(case, case.tokens, mla.q_lora_rank or h, model.query_width / tp))
        if mla.q_lora_rank:
            pairs.append(_linear(case, case.tokens, h, mla.q_lora_rank))
        return _summed(pairs)
    if not case.stack.serial_launch:
        return _summed([_linear(case, case.tokens, h, (model.query_width + 2 * model.kv_width) / tp), out])
    q, k = (_linear(case, case.tokens, h, width / tp) for width in (model.query_width, model.kv_width))
    return _summed([q, k, k, out])


def _feed_forward(case: Case) -> tuple[Any, Any]:
    model, width = case.model, case.model.ffn_hidden / case.lay.tp
    into = _linear(case, case.tokens, model.hidden, width)
    pairs = [into, into] if model.gated else [into]
    return _summed([*pairs, _linear(case, case.tokens, width, model.hidden)])


def _down(case: Case) -> Any:
    """Seconds of the last product of a layer forward: PyTorch's recomputation stops before it, nothing needs it (its
    own product; of one in float8 it learns when it is done)."""
    return _linear(case, case.tokens, case.model.ffn_hidden / case.lay.tp, case.model.hidden)[0]


NARROW_EXPERT = 2880
"""The widest expert of runs that `Stack.expert_factor` was fitted to. What grouped products cost beyond plain ones is
taken to grow no more from there on: one as wide as a dense block's is nearly as good."""


def _experts(case: Case) -> tuple[Any, Any]:
    """Routed experts on the fullest rank (`Stack.expert_imbalance`), shared experts, and the router itself.

    Our engine leaves routed experts in 16 bit when projections are in 8.
    """
    model, lay = case.model, case.lay
    assert model.moe is not None
    here = model.moe.experts / lay.ep
    rows = case.expert_tokens * model.moe.top_k / here * case.expert_imbalance
    width = model.moe.expert_ffn_hidden / lay.expert_tp
    copies = 2 if model.gated else 1
    wide = case.stack.eager
    pairs = [_linear(case, rows, model.hidden, width, here * copies, wide=wide)]
    pairs.append(_linear(case, rows, width, model.hidden, here, wide=wide))
    beyond = 1.0 + (case.stack.expert_factor - 1.0) * np.minimum(1.0, NARROW_EXPERT / width)
    pairs = [(beyond * forward, beyond * backward) for forward, backward in pairs]
    pairs.append(_linear(case, case.tokens, model.hidden, model.moe.experts))
    if model.moe.shared_experts:
        shared = model.moe.shared_experts * model.moe.expert_ffn_hidden / lay.tp
        pairs.append(_linear(case, case.tokens, model.hidden, shared, copies))
        pairs.append(_linear(case, case.tokens, shared, model.hidden))
    return _summed(pairs)


def _attention(case: Case) -> tuple[Any, Any]:
    model, lay, stack = case.model, case.lay, case.stack
    if stack.flash_attention:
        # The engine's masks skip nothing, and it pads values to the width of keys.
        width = model.query_width if stack.eager else (model.query_width + model.output_width) / 2
        seen = window_share(model, case.seq_len)
        width = width * (1.0 if stack.eager else seen) / (lay.tp * lay.cp)
        causal = model.mask == "causal" and not (stack.eager and seen < 1)
        forward, backward = flash_attention_s(
            case.accelerator,
            case.wide_dtype,
            case.seq_len,
            width,
            lay.micro_batch,
            head_dim=model.head_dim if stack.eager else (model.head_dim + model.value_head_dim) / 2,
            causal=causal,
            queries=case.seq_len / lay.cp,
        )
        return forward / stack.attention_factor, backward / stack.attention_factor
    return unfused_attention_s(
        case.accelerator,
        case.wide_dtype,
        case.seq_len,
        (model.head_dim, model.value_head_dim),
        model.heads * lay.micro_batch / (lay.tp * lay.cp),
        element_bytes=case.precision.stream,
        softmax_passes=(stack.traffic * stack.softmax.forward, stack.traffic * stack.softmax.backward),
    )


def _elementwise(case: Case, moe: bool) -> tuple[Any, Any]:
    """Norms, residual additions, activation function, rotary positions, casts: (forward, backward) seconds."""
    model, stack, precision = case.model, case.stack, case.precision
    stream = case.stream_tokens * model.hidden * precision.stream
    whole = case.tokens * model.hidden * precision.stream
    inside = case.tokens * precision.stream / case.lay.tp
    copies: Any = 0.0
    if moe and model.moe is not None:
        copies = stack.expert_factor * model.moe.top_k * case.expert_tokens * model.hidden * precision.stream
    heads = model.heads + (1 if model.mla else model.kv_heads)
    turned = heads * model.rotary_width if model.position == "rope" else 0
    norm, activation = stack.norm(model), stack.activated(model, moe)
    inner, casts = _inner_norm_bytes(case), _cast_bytes(case, moe)

    def seconds(
        cast: Any, norm: float, residual: float, projections: float, activation: float, rotary: float, routed: float
    ) -> Any:
        n_bytes = 2 * (norm + residual) * stream + projections * whole + routed * copies
        n_bytes = n_bytes + (activation + rotary * turned) * inside + norm * inner + cast
        return memory_s(case.accelerator, stack.traffic * n_bytes)

    parts = (norm, stack.residual, stack.projections, activation, stack.rotary, stack.routed)
    forward, backward = ([getattr(part, way) for part in parts] for way in ("forward", "backward"))
    return seconds(casts[0], *forward), seconds(casts[1], *backward)


def _outputs_again(case: Case, moe: bool) -> Any:
    """Seconds of norms and activation functions forward: what our engine's selective recomputation repeats."""
    model, stack = case.model, case.stack
    norms = 2 * stack.norm(model).forward * case.stream_tokens * model.hidden * case.precision.stream
    inside = stack.activated(model, moe).forward * case.tokens * case.precision.stream / case.lay.tp
    given = 1 + case.accelerator.allocation if stack.serial_launch else 1
    return given * memory_s(case.accelerator, stack.traffic * (norms + inside))


def _inner_norm_bytes(case: Case) -> Any:
    """What the norms inside attention go over once: queries and keys, or the latents, whole on every rank."""
    model, precision = case.model, case.precision
    if model.mla is not None:
        return case.tokens * precision.stream * (model.mla.q_lora_rank + model.mla.kv_lora_rank)
    normed = model.query_width + model.kv_width if model.qk_norm else 0
    return case.tokens * precision.stream / case.lay.tp * normed


def _cast_bytes(case: Case, moe: bool) -> tuple[Any, Any]:
    """Casts of a layer (forward, backward): the input of each projection is read wide and written narrow.

    Our engine scales each operand to its range (`parallel.float8`), so it reads it twice: inputs and weights in both
    passes, gradients of outputs with two casts, one for each product they are in.
    """
    model, lay, wide, narrow = case.model, case.lay, case.precision.stream, case.precision.operand
    if narrow >= wide:
        return 0.0, 0.0
    if not case.stack.fuses:
        each = (5 if model.gated else 4) * case.tokens * model.hidden * (wide + narrow)
        return each, each
    held, ffn = (case.moe_layer, 0) if moe else (case.dense_layer, model.ffn_hidden)
    if moe and model.moe is not None:
        ffn = model.moe.shared_experts * model.moe.expert_ffn_hidden
    inputs = case.tokens * (2 * model.hidden + (model.output_width + ffn) / lay.tp)
    inside = model.query_width + 2 * model.kv_width + (2 if model.gated else 1) * ffn
    outputs = case.tokens * (2 * model.hidden + inside / lay.tp)
    weights = held.dense(lay) - case.values_by_token
    forward = inputs * (2 * wide + narrow) + weights * (2 * case.precision.parameter + narrow)
    return forward, forward + outputs * (3 * wide + 2 * narrow)


def _accumulation(case: Case, held: Held) -> Any:
    """Adding a micro-batch's weight gradients to those before it."""
    return memory_s(case.accelerator, _elements(case, held) * (case.stack.accumulate * case.precision.gradient))


def _casts(case: Case, held: Held, *, layer: bool = False) -> Any:
    """Autocast's copies of the weights, unless they are gathered narrow, and their gradients back to wide ones. (Of
    experts that ZeRO leaves whole the copies are not counted.) `layer`: its tables are no weights, and in 8 bit dense
    ones are cast for each product instead."""
    elements = np.where(case.lay.gathers, 1, 2) * _elements(case, held)
    if layer:
        elements = elements - np.where(case.lay.gathers, 0, 2) * case.values_by_token
    if layer and case.stack.fuses and case.precision.operand < case.precision.stream:
        elements = elements - np.where(case.lay.gathers, 0, 1) * (held.dense(case.lay) - case.values_by_token)
    return cast_s(case, elements)


def cast_s(case: Case, elements: Any) -> Any:
    """Seconds in which weights become narrower for arithmetic, or their gradients wide; 0 where they are as narrow."""
    precision = case.precision
    if precision.gathered == precision.parameter:
        return 0.0
    return memory_s(case.accelerator, elements * (precision.parameter + precision.gathered))


def _joined(case: Case, held: Held) -> Any:
    """Gradients of experts one by one become one tensor."""
    if not case.stack.eager:
        return 0.0
    return memory_s(case.accelerator, 2 * case.precision.gradient * held.experts(case.lay))


def _elements(case: Case, held: Held) -> Any:
    """Of some parameters on one rank."""
    return held.dense(case.lay) + held.experts(case.lay)


def _embedding(case: Case) -> Work:
    """Look-up forward; backward writes the rows' gradients."""
    stream = case.tokens * case.model.hidden * case.precision.stream
    lookup = memory_s(case.accelerator, 2 * stream)
    backward = memory_s(case.accelerator, 3 * stream)
    if case.stack.serial_launch:
        # Eager PyTorch makes a dense gradient: zeros for the whole table before rows are added.
        table = case.embedding.dense(case.lay) * case.precision.gradient
        backward = backward + memory_s(case.accelerator, table)
    return _end(case, lookup, backward, case.embedding)


def _again(case: Case) -> tuple[Any, Any]:
    """What a layer reads of tokens again (forward, backward): values by token, looked up and added as an embedding is,
    and the embedding itself, whose gradient is added up over layers."""
    model, seconds = case.model, [0.0 * case.tokens, 0.0 * case.tokens]
    if model.value_embeddings:
        values = case.tokens * model.value_width / case.lay.tp * case.precision.stream
        table = case.values_by_token * case.precision.gradient if case.stack.serial_launch else 0.0
        seconds = [memory_s(case.accelerator, 5 * values), memory_s(case.accelerator, 3 * values + table)]
    if model.embedding_skip:
        stream = case.stream_tokens * model.hidden * case.precision.stream
        seconds = [part + memory_s(case.accelerator, 5 * stream) for part in seconds]
    return seconds[0], seconds[1]


def _head(case: Case) -> Work:
    """Last norm, projection to the vocabulary, softmax and cross entropy (in float32 at least)."""
    model, stack, tp, width = case.model, case.stack, case.lay.tp, case.precision.stream
    product = linear_s(
        case.accelerator, case.wide_dtype, case.tokens, model.hidden, model.vocab / tp, element_bytes=width
    )
    forward, backward = product
    if stack.eager:
        # The engine makes the gradients of the loss with the loss, chunk by chunk.
        forward, backward = forward + backward, 0.0 * backward
    stream = case.stream_tokens * model.hidden * case.precision.stream
    logits = case.tokens * model.vocab / tp * max(4, case.precision.stream)
    norm = stack.norm(model)
    large = np.where(logits > LARGE_TENSOR_BYTES, 1.0, 0.0)
    passes = stack.logits.forward + large * stack.large_logits.forward
    passes_back = stack.logits.backward + large * stack.large_logits.backward
    forward = forward + memory_s(case.accelerator, stack.traffic * (norm.forward * stream + passes * logits))
    backward = backward + memory_s(case.accelerator, stack.traffic * (norm.backward * stream + passes_back * logits))
    return _end(case, forward, backward, case.head)


def _end(case: Case, forward: Any, backward: Any, held: Held) -> Work:
    """The embedding's or the head's work with its launches (half of `end_kernels` each)."""
    half = Passes(case.stack.end_kernels.forward / 2, case.stack.end_kernels.backward / 2)
    work = _launched(case, forward, backward + _casts(case, held), half)
    return replace(work, accumulate=_accumulation(case, held))
