"""Floating-point operations of training, exact by part; and the conventions under which they are reported.

A multiply-add is 2 FLOP. Backward is twice the forward (one product for inputs, one for weights). Element-wise work is
not counted, as everywhere in the field.

* MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): model FLOPs only, full (not causal) attention, without
  recomputation: 3 x forward, which is 6N + 12LHQT per token up to the embedding lookup. `causal=True` halves the
  attention products.
* HFU (Korthikanti et al. 2022, arXiv 2205.05198): the same plus recomputed forward work. A flash kernel's own inner
  recomputation is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bloomery.spec.model import Model
from bloomery.spec.parameters import attention_parameters, parameter_count

PF_DAY = 8.64e19
"""FLOP in one PF-day: 1e15 FLOP/s for 86400 s."""

CONVENTION = "MFU: 3 x forward FLOPs, full attention, no recomputation; HFU: with recomputation; dense peak"


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one sequence forward, by part, over all layers. `attention`: scores and their product with values."""

    projections: float
    attention: float
    feed_forward: float
    router: float
    head: float

    @property
    def layers(self) -> float:
        """Everything inside the layers: what full recomputation repeats."""
        return self.projections + self.attention + self.feed_forward + self.router

    @property
    def total(self) -> float:
        """All parts."""
        return self.layers + self.head


def forward_flops(model: Model, seq_len: int, *, causal: bool = False) -> ForwardFlops:
    """FLOPs of one forward pass over one sequence of `seq_len` tokens.

    Per layer and sequence: 2s(h(a+2g)d + adh) projections, 4 s^2 a d attention (half when `causal`), 2shf x 2 or 3
    feed-forward; 2shV head (Narayanan et al. 2021, arXiv 2104.04473, appendix). Latent attention: 2s for each element
    of its matrices, keys and values expanded, as in training. A sliding window leaves `window_share` of the attention.
    """
    s, h = seq_len, model.hidden
    projections = 2 * s * sum(p.size for p in attention_parameters(model, "") if p.kind == "matrix")
    attention = 2 * s * s * (model.query_width + model.output_width) * (0.5 if causal else 1.0)
    attention *= window_share(model, seq_len)
    matrices = 3 if model.gated else 2
    dense_layers, routed_layers, width, router = model.layers, 0, 0, 0
    if model.moe is not None:
        dense_layers = min(model.moe.first_dense_layers, model.layers)
        routed_layers = model.layers - dense_layers
        width = (model.moe.top_k + model.moe.shared_experts) * model.moe.expert_ffn_hidden
        router = 2 * s * h * model.moe.experts
    feed_forward = 2 * s * h * matrices * (dense_layers * model.ffn_hidden + routed_layers * width)
    return ForwardFlops(
        projections=float(model.layers * projections),
        attention=float(model.layers * attention),
        feed_forward=float(feed_forward),
        router=float(routed_layers * router),
        head=float(2 * s * h * model.vocab),
    )


def context_attention_share(model: Model, cp: int) -> float:
    """The share of the whole square's attention products that `cp` context-parallel ranks together really compute.

    Each computes its own block whole, hidden half included, as one rank alone does with the square; of another rank's
    block it skips the half that its queries cannot see, unless a prefix lets them. MFU counts the square all the same.
    """
    return 1.0 if model.mask == "prefix" else (cp + 1) / (2 * cp)


def window_share(model: Model, seq_len: int) -> float:
    """Of the pairs that causal attention sees in a sequence, those within the model's sliding window."""
    if model.sliding_window is None or model.sliding_window >= seq_len:
        return 1.0
    return 1.0 - (1.0 - model.sliding_window / seq_len) ** 2


def backward_flops(model: Model, seq_len: int, *, causal: bool = False) -> float:
    """FLOPs of one backward pass over one sequence: twice the forward."""
    return 2 * forward_flops(model, seq_len, causal=causal).total


def weights_share(model: Model, seq_len: int) -> float:
    """Of a layer's backward FLOPs, those of gradients of weights: half, except of attention, which has no weights."""
    forward = forward_flops(model, seq_len)
    return (forward.layers - forward.attention) / (2 * forward.layers)


def head_in_layers(model: Model, seq_len: int) -> float:
    """FLOPs of the head over those of a layer, on average over the layers."""
    forward = forward_flops(model, seq_len)
    return forward.head * model.layers / forward.layers


def model_flops(model: Model, *, global_batch: int, seq_len: int, causal: bool = False) -> float:
    """FLOPs of one optimizer step without recomputation; full attention unless `causal`."""
    return 3 * global_batch * forward_flops(model, seq_len, causal=causal).total


def recomputed_flops(
    model: Model, recompute: np.ndarray, *, global_batch: int, seq_len: int, causal: bool = False
) -> np.ndarray:
    """FLOPs of recomputation in one step, shape (n,); `recompute` indexes `spec.layout.RECOMPUTE`.

    Full: one more forward of every layer. Selective: one more forward of the attention core (Korthikanti).
    """
    forward = forward_flops(model, seq_len, causal=causal)
    return global_batch * np.choose(recompute, [0.0, forward.attention, forward.layers])


def six_n(model: Model, tokens: float) -> float:
    """6 N D: the usual FLOPs of training without recomputation; N counts what one token passes through."""
    return 6.0 * parameter_count(model, active=True) * tokens


def eight_n(model: Model, tokens: float) -> float:
    """8 N D: the same with every forward computed twice (full recomputation)."""
    return 8.0 * parameter_count(model, active=True) * tokens


def pf_days(flops: float) -> float:
    """FLOPs in PF-days."""
    return flops / PF_DAY
