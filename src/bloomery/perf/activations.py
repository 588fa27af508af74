"""What layers keep of a micro-batch for its backward pass, and how many micro-batches a rank has in flight.

After Korthikanti et al. 2022 (arXiv 2205.05198), generalised to grouped queries, gated activations, flash attention and
any element width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from statistics import NormalDist
from typing import Any

import numpy as np

from bloomery.perf.case import DUALPIPEV, FULL, GPIPE, INTERLEAVED, SELECTIVE, ZBV, Case
from bloomery.perf.ranks import Ranks
from bloomery.perf.stack import activation_inputs
from bloomery.perf.table import Table
from bloomery.spec.collective import StageShape, by_recompute
from bloomery.spec.layout import BY_STAGE, LayoutBatch
from bloomery.spec.layout_rules import fits_compiler
from bloomery.spec.model import MixtureOfExperts


def kinds_of_layer(case: Case, own: StageShape) -> list[tuple[Case, Any]]:
    """Each kind of layer that `own` may hold, as the case of a model that ends with it, and how many it holds."""
    moe = case.model.moe
    if moe is None or not moe.first_dense_layers:
        return [(case, own.layers)]
    plain = replace(case, model=case.model.model_copy(update={"moe": None}))
    return [(case, own.moe_layers), (plain, own.dense_layers)]


def layer_activation_bytes(case: Case) -> tuple[Any, Any]:
    """Bytes the last layer keeps of a micro-batch: (everything, only the part selective recomputation drops), (n,).
    Our engine drops outputs of norms and activation functions, which a compiler makes again anyway where products read
    them in a narrower format; per operator a stack drops the share that it repeats; with unfused attention it drops the
    scores.

    With c-byte elements, e = query width, g = kv width: norms' inputs 2 sbh (stream); inputs of the two blocks 2 sbh c;
    queries, keys, values sb(e + 2g)c/t; attention's output sb e c/t; ffn sbf c/t per kept tensor; dropout masks 2 sbh.
    Unfused attention keeps its scores: 2c a s^2 b/t and one mask byte. For a plain layer in 16 bit this is the paper's
    sbh(10 + 24/t + 5as/(ht)), divided by t wholly under sequence parallelism; `Stack.kept` multiplies.
    """
    model, lay, stack, precision = case.model, case.lay, case.stack, case.precision
    inside = case.tokens / lay.tp
    outer = operators = _eager_outer_bytes(case) if stack.eager else _outer_bytes(case)
    attention = _attention_widths(case) * precision.stream
    if model.moe is not None:
        kept = 2 if stack.weighs_outputs else 1
        outer = outer + kept * model.moe.top_k * _routed_tokens(case) * model.hidden * precision.stream
    feed_forward, read = (width * inside * precision.stream for width in _feed_forward_widths(case))
    linear = stack.kept * (outer + attention + feed_forward)
    if stack.flash_attention:
        whole = linear + max(4, precision.stream) * model.heads * inside
        if stack.selective_share is not None:
            return whole, stack.selective_share * whole
        # Norms' inputs stay, and what activation functions read.
        again = stack.kept * (operators - _selective_outer_bytes(case) + feed_forward - read)
        gone = _fused(case) & (precision.operand < precision.stream)
        return whole - np.where(gone, again, 0.0), np.where(gone, 0.0, again)
    each = 2 * precision.stream + (1 if stack.dropout else 0)
    scores = stack.kept * each * model.heads * case.seq_len * inside
    return linear + scores, scores


def _feed_forward_widths(case: Case) -> tuple[Any, Any]:
    """Elements a token that the feed-forward block keeps inside, before tensor parallelism cuts it: all of them, and
    those that its activation function reads."""
    model, stack = case.model, case.stack
    kept, read = np.asarray(stack.saved_widths(model)), activation_inputs(model)
    if stack.fuses and model.gated:
        kept = np.where(_fused(case), kept, kept + 1)
    if (moe := model.moe) is None:
        return kept * model.ffn_hidden, read * model.ffn_hidden
    routed, shared = (experts * moe.expert_ffn_hidden for experts in (moe.top_k, moe.shared_experts))
    return kept * shared + stack.routed_widths(model) * routed, read * (routed + shared)


def _fused(case: Case) -> Any:
    """Where a compiler sees whole layers, (n,); what selective recomputation keeps is the same either way."""
    lay = case.lay
    return case.stack.fuses & fits_compiler(case.model, tp=lay.tp, cp=lay.cp, selective=0, offloaded=lay.offload)


def layer_kept_bytes(case: Case, lay: LayoutBatch) -> tuple[Any, Any]:
    """Bytes that one layer keeps of one micro-batch for its backward pass, and that it makes again then, (n,) each;
    `lay`: the case's layouts with the recomputation asked for."""
    whole, scores = layer_activation_bytes(case)
    inputs = case.stream_tokens * case.model.hidden * case.precision.stream
    full, selective = lay.recompute == FULL, lay.recompute == SELECTIVE
    kept = np.where(full, inputs, np.where(selective, whole - scores, whole))
    # A layer of our engine that is made again has its own input among those that are kept.
    return kept, np.where(full, whole - inputs if case.stack.eager else whole, np.where(selective, scores, 0.0))


def _routed_tokens(case: Case) -> Any:
    """Tokens of which a rank has copies on their way to experts and back: every tensor-parallel rank of our engine has
    them whole."""
    return case.tokens if case.stack.eager else case.tokens / case.lay.tp


def _surplus_bytes(case: Case) -> Any:
    """What one layer keeps on the fullest rank beyond what it keeps on average: of the copies that came to its experts,
    the copies and what is inside. Those that a rank sends are as many as it has tokens."""
    moe = case.model.moe
    if moe is None:
        return 0.0
    copies = _routed_tokens(case) * case.model.hidden
    inside = case.stack.routed_widths(case.model) * case.tokens / case.lay.tp * moe.expert_ffn_hidden
    return _surplus(case, moe) * case.stack.kept * moe.top_k * (copies + inside) * case.precision.stream


def _surplus(case: Case, moe: MixtureOfExperts) -> Any:
    """By what share the fullest expert-parallel rank's copies exceed the mean, (n,).

    A token that draws k of e experts sends a rank with e / ep of them copies of relative variance
    (ep - 1)(e - k) / (k (e - 1)). Were tokens independent, nothing would be left of that; a new router likes the same
    experts for most of them, and `Stack.expert_spread` of its root stays. The fullest of ep ranks, whose deviations add
    up to nothing, is above the mean by the largest of so many normal ones (Blom 1958) times sqrt(ep / (ep - 1)).
    """
    if not case.stack.expert_spread:
        return 0.0
    sizes, index = np.unique(case.lay.ep, return_inverse=True)
    largest = [NormalDist().inv_cdf((ep - 0.375) / (ep + 0.25)) * ep**0.5 for ep in sizes.tolist()]
    variance = max(moe.experts - moe.top_k, 0) / (moe.top_k * max(moe.experts - 1, 1))
    return np.minimum(case.stack.expert_spread * variance**0.5 * np.array(largest), sizes - 1.0)[index]


def _attention_widths(case: Case) -> Any:
    """Elements of queries, keys, values and attention's output that one layer keeps, and of what norms inside it keep.

    Our engine pads the values of latent attention, and so what attention gives back; its RMSNorm keeps a figure a row
    beside its input.
    """
    model, mla, inside, eager = case.model, case.model.mla, case.tokens / case.lay.tp, case.stack.eager
    figure = max(4, case.precision.stream) / case.precision.stream
    if mla is not None:
        query, key_value = mla.q_lora_rank, mla.kv_lora_rank
        figures = figure * ((1 if query else 0) + 1) if eager else 0
        latents = case.tokens * (2 * (query + key_value) + model.rotary_width + figures)
        heads = 4 * model.query_width if eager else model.query_width + model.kv_width + model.value_width
        return latents + inside * (heads + model.output_width)
    width = model.query_width + model.kv_width
    norms = width + (figure * (model.heads + model.kv_heads) if eager else 0) if model.qk_norm else 0
    return inside * (2 * width + norms)


def _outer_bytes(case: Case) -> Any:
    """What a layer keeps outside its blocks: norms' inputs, inputs of the blocks, dropout masks; all cut under sequence
    parallelism."""
    precision = case.precision
    masks = 2 if case.stack.dropout else 0
    return case.stream_tokens * case.model.hidden * (4 * precision.stream + masks)


def _eager_outer_bytes(case: Case) -> Any:
    """The same of plain PyTorch modules, as the engine's saved tensors have it.

    RMSNorm keeps a figure a token beside its input, in 32 bit at least, LayerNorm two in its input's format; blocks
    keep their gathered input whole under sequence parallelism. All layers share one pair of rotary tables.
    """
    model, precision, h = case.model, case.precision, case.model.hidden
    figures = max(4, precision.stream) if model.norm == "rmsnorm" else 2 * precision.stream
    norms = 2 * case.stream_tokens * (h * precision.stream + figures)
    if model.moe is not None:
        return norms + case.tokens * _eager_mixture_inputs(case, model.moe)
    return norms + 2 * case.tokens * h * precision.stream


def _selective_outer_bytes(case: Case) -> Any:
    """What our engine keeps of that when norms' outputs are made again: their inputs; of a mixture the router's scores,
    and its input where that is a copy in a wider format."""
    model, width = case.model, case.precision.stream
    kept = 2 * case.stream_tokens * model.hidden * case.precision.stream
    if model.moe is None:
        return kept
    copy = model.hidden * 4 if width < 4 else 0
    return kept + case.tokens * (copy + _routing_bytes(case, model.moe))


def _routing_bytes(case: Case, moe: MixtureOfExperts) -> Any:
    """Bytes a token of a router's scores, of the experts of a token and of both orders of the copies."""
    wide = max(4, case.precision.stream)
    return moe.experts * wide + moe.top_k * (3 * 8 + 2 * wide)


def _eager_mixture_inputs(case: Case, moe: MixtureOfExperts) -> Any:
    """Bytes a token that a layer with experts keeps as inputs of its blocks, and for its routing.

    The router reads its input in float32 at least, and keeps its scores; indices are 64-bit: the experts of a token
    and both orders of the copies.
    """
    h, width = case.model.hidden, case.precision.stream
    wide = max(4, width)
    shared = int(width < wide and moe.shared_experts > 0)
    return (1 + shared) * h * width + h * wide + _routing_bytes(case, moe)


@dataclass(frozen=True)
class Flight(Table):
    """What a rank holds at one moment of the pipeline, as counts (n,) or (kinds, n), or bytes of one of each; None is
    nothing. `times`: micro-batches in flight, in units of all of its layers; `chunks`: the same in stages; `messages`
    between stages; `waiting`: micro-batches whose weights have yet to get their gradients, as `times`.
    """

    times: Any
    chunks: Any = None
    messages: Any = None
    waiting: Any = None

    @property
    def parts(self) -> tuple[Any, ...]:
        """In their order."""
        return self.times, self.chunks, self.messages, self.waiting

    def where(self, counts: Flight) -> Flight:
        """Of that alone which `counts` has any of."""
        return Flight(*(None if n is None else part for part, n in zip(self.parts, counts.parts, strict=True)))

    def bytes(self, each: Flight) -> Any:
        """Of so many, `each` of which takes so much."""
        pairs = zip(self.parts, each.parts, strict=True)
        return sum(count * size for count, size in pairs if count is not None and size is not None)


@dataclass(frozen=True)
class Activations:
    """Bytes of activations on some ranks, (n,) or (kinds, n): of the `layers` for each micro-batch in flight, of what a
    stage has `received` where its layers are offloaded, of what its layers read alike in every stage (`shared`: our
    engine's rotary tables and masks), of a `message` between stages, of the gradients that `waiting` weights need, and
    a `fixed` working set, of which `moving`: the offloaded layer at work and the one that comes or goes.

    Full recomputation keeps each layer's input (2sbh in 16 bit) and works on one layer at a time. What is offloaded is
    in the host's memory while in flight; a CPU's is the same memory.
    """

    layers: Any
    received: Any
    shared: Any
    message: Any
    waiting: Any
    fixed: Any
    moving: Any

    @property
    def each(self) -> Flight:
        """Of one of everything in flight."""
        return Flight(self.layers + self.received, self.shared, self.message, self.waiting)

    @classmethod
    def of(cls, case: Case, ranks: Ranks) -> Activations:
        """Of `ranks`."""
        surplus, zeros = _surplus_bytes(case), np.zeros(ranks.layers.shape)
        layers, again, moving, waiting = zeros, zeros, zeros, zeros
        for lay, own in by_recompute(case.lay, ranks.shape_held):
            layers = layers + own.moe_layers * np.where(lay.recompute == FULL, 0.0, surplus)
            waits = (lay.recompute == 0) & (lay.offload == 0)  # as `Layout.splits_backward` has it
            for one, held in kinds_of_layer(case, own):
                kept, made = layer_kept_bytes(one, lay)
                layers = layers + held * kept
                again = np.maximum(again, np.where(held > 0, made, 0.0))
                moving = np.maximum(moving, np.where(held > 0, kept, 0.0))
                waiting = waiting + held * np.where(waits, _waiting_bytes(one), 0.0)
        if ranks.held is not None:  # over a step's moments
            layers, again, moving, waiting = (part.max(axis=0) for part in (layers, again, moving, waiting))
        inputs, received = case.stream_tokens * case.model.hidden * case.precision.stream, zeros
        if np.any(case.lay.offload):
            offloaded = case.lay.offload == 1
            moving = np.where(offloaded, np.minimum(ranks.layers, 2) * moving, 0.0)
            if case.accelerator.kind != "cpu":
                layers = np.where(offloaded, 0.0, layers)
                received = np.where(offloaded & ~ranks.first, inputs, 0.0)
        else:
            moving = zeros
        ends = 0.0 if case.stack.eager else ranks.last * end_bytes(case)  # of ours `_logits` knows them
        skip = inputs * case.model.embedding_skip  # the embedding that all layers read again, kept once
        shared = zeros + _rotary_tables_bytes(case) + mask_bytes(case) + skip if case.stack.eager else None
        message = zeros + inputs if case.stack.eager else None
        # Its gradient is added up layer by layer.
        return cls(layers, received, shared, message, waiting, again + moving + ends + skip, moving)


def _waiting_bytes(case: Case) -> Any:
    """Gradients that one layer holds between its backward pass towards the input and that for its weights: of what
    every product and every norm gave. None of what it kept may go before.

    With c-byte elements, e = query width, g = kv width: norms' outputs 2 sbh c, what the two blocks gave 2 sbh c,
    queries, keys, values sb(e + 2g)c/t, the ffn's products sbf c/t for gate and up.
    """
    model, precision = case.model, case.precision
    width, copies = model.ffn_hidden, 1
    if (moe := model.moe) is not None:
        copies = moe.top_k + moe.shared_experts
        width = copies * moe.expert_ffn_hidden
    inside = model.query_width + 2 * model.kv_width + (2 if model.gated else 1) * width
    outside = (1 + copies) * case.stream_tokens + 2 * case.tokens
    return (outside * model.hidden + case.tokens / case.lay.tp * inside) * precision.stream


def _rotary_tables_bytes(case: Case) -> Any:
    """Cos and sin of the positions of one micro-batch on one context-parallel rank."""
    model = case.model
    width = model.rotary_width if model.position == "rope" else 0
    return 2 * case.seq_len / case.lay.cp * width * case.precision.stream


def mask_bytes(case: Case) -> Any:
    """What our engine's attention adds to scores where it is not plainly causal, for all heads and layers alike: one
    for all sequences of a micro-batch under a window, one each under prefixes and of documents."""
    model, lay = case.model, case.lay
    each = model.mask == "prefix" or case.documents
    if not each and (model.sliding_window or case.seq_len) >= case.seq_len:
        return 0.0
    masks = lay.micro_batch if each else 1
    return masks * case.seq_len / lay.cp * case.seq_len * case.precision.stream


def end_bytes(case: Case) -> Any:
    """The last norm's input and output."""
    return case.stream_tokens * case.model.hidden * 2 * case.precision.stream


def activation_bytes(case: Case, ranks: Ranks, gone: Any = 0.0) -> Any:
    """Bytes of activations at the peak: what every micro-batch in flight keeps, and the working set; `gone` as in
    `peak_in_flight`."""
    activations = Activations.of(case, ranks)
    return peak_in_flight(flights(case, ranks), activations.each, gone) + activations.fixed


def peak_in_flight(moments: Sequence[Flight], each: Flight, gone: Any = 0.0) -> Any:
    """The most bytes in flight at any of `moments` (`flights`); `gone`: what else is no longer there at those at which
    weights wait, where any do."""
    fullest, *waiting = moments
    then = (moment.bytes(each) - np.where(np.greater(moment.waiting, 0), gone, 0.0) for moment in waiting)
    return reduce(np.maximum, [fullest.bytes(each), *then])


def flights(case: Case, ranks: Ranks) -> list[Flight]:
    """What pipeline ranks hold when most micro-batches are in flight, then at the moments at which weights wait.

    On ZB-V one micro-batch waits for its weights' turn beside all that are in flight; at the step's end the last p + i
    chunks of rank i go back without such a turn in between, until 2i + 1 wait. DualPipeV, which splits fewer of its
    backward passes, never holds more than before them.
    """
    lay, times = case.lay, in_flight(case, ranks)
    fullest = Flight(times)
    if case.stack.eager:
        fullest = Flight(times, times * lay.vpp, _messages_held(case, ranks, times))
    waits = (lay.schedule == ZBV) & ~lay.frees  # as `Layout.splits_backward` has it
    if not np.any(waits):
        return [fullest]
    going = replace(fullest, waiting=np.where(waits, 0.5, 0.0))
    at_the_end = np.where(waits, (lay.pp + ranks.index) / 2, times)
    return [fullest, going, replace(fullest, times=at_the_end, waiting=np.where(waits, ranks.index + 0.5, 0.0))]


def _messages_held(case: Case, ranks: Ranks, times: Any) -> Any:
    """Messages of our engine's ranks with so many micro-batches in flight (`in_flight`).

    Of every chunk in flight, but the last stage's and what stays on the rank at the tip of a V, what it sent on; as
    soon as fewer are in flight than a step has, the gradient sent back last; interleaved, what comes for the next.
    """
    lay = case.lay
    several, chunks = lay.vpp > 1, times * lay.vpp
    tip = np.isin(lay.schedule, (ZBV, DUALPIPEV)) & (ranks.index == lay.pp - 1)
    # Of the last of several chunks one is in flight.
    sent = np.where(several, np.where(tip, chunks / 2, chunks - ranks.last), np.where(ranks.last, 0.0, times))
    sent_back = (several | ~ranks.first) & (case.micro_batches > times)
    return sent + sent_back + ((lay.schedule == INTERLEAVED) & ~ranks.first)


def in_flight(case: Case, ranks: Ranks) -> Any:
    """Micro-batches whose activations pipeline rank i holds at once, in units of all of its layers, shape (n,).

    1F1B: min(m, p - i). GPipe: m, where there is a pipeline. Interleaved: 2(p - i - 1) + (v - 1)p + 1 chunks of 1/v,
    which on the first rank is Korthikanti's p(1 + (p - 1)/(pv)); never more than all of them. ZB-V keeps 2p half chunks
    on every rank, which is 1F1B's most (Qi et al. 2023, 2401.10241, section 6), DualPipeV one more (DeepSeek-V3,
    2412.19437, table 2). Where chunks are not even, `stages.held` or `stages.held_on_a_v`, unless they recompute
    differently and `Ranks.held` counts each chunk's own layers.
    """
    lay, m, index = case.lay, case.micro_batches, ranks.index
    chunks = np.minimum(2 * (lay.pp - index - 1) + (lay.vpp - 1) * lay.pp + 1, m * lay.vpp)
    one_by_one = np.minimum(m, lay.pp - index)
    if case.stack.eager:
        # The engine runs GPipe where there are fewer micro-batches than stages.
        one_by_one = np.where(m < lay.pp, m, one_by_one)
    rounds = np.clip(-(-m // lay.pp), 1, len(ranks.most_held)) - 1
    most_held = np.take_along_axis(ranks.most_held, np.broadcast_to(rounds, ranks.layers.shape)[None], axis=0)[0]
    uneven = most_held > 0
    if ranks.held is not None:
        uneven = uneven & (lay.recompute != BY_STAGE)
    kinds = [lay.schedule == kind for kind in (GPIPE, INTERLEAVED, ZBV, DUALPIPEV)]
    even = np.select(kinds, [np.where(lay.pp > 1, m, 1), chunks / lay.vpp, lay.pp, lay.pp + 0.5], one_by_one)
    return np.where(uneven, np.minimum(most_held / np.maximum(ranks.layers, 1), m), even)
