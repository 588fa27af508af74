"""`Stack`: what the software adds to the hardware, as few numbers: fused or eager kernels, overlap, launches.

Traffic is counted in passes: one read or one write of a whole tensor. `hidden` passes are over tokens x hidden, `width`
over tokens x ffn width, `rotary` over tokens x (query + key) width, `logits` over tokens x vocabulary, `routed` over a
token's copies for experts x hidden (dispatch, combination, what the experts' inputs are added up from), `weighing` over
a token's copies x expert width (what goes into the last product, times the router's weights), each forward and
backward. `large_logits` is added to `logits` where they exceed `LARGE_TENSOR_BYTES`. `traffic` multiplies them all:
what a stack really moves over what was counted.

Host time is counted in units of the accelerator's `launch_s`, the Python and autograd around a launch included:
`kernels` of a layer, `expert_kernels` more where tokens are routed, `each_expert` for each expert that a rank holds
where their products are launched one by one (`narrow_kernels` times as many in 8 and 4 bit), `end_kernels` of embedding
and head, `collective_kernels` of one tensor-parallel collective (`waking_kernels` more where the rank's core idles
until it is there: it sleeps, caches are cold), `shard_kernels` of gathering one layer's parameters or reducing its
gradients where ZeRO 2 or 3 cuts them (FSDP's hooks; its copies are `shard_passes` over them),
`tile_kernels` of attention to the keys of one context-parallel rank (our engine's as 100 runs on two cores had them, in
today's unit). `host_factor` multiplies: slower or faster Python, or none (compiled graphs). `pipeline_stall_s` is what
each collective waits on the host, per tensor-parallel rank, while pipeline messages cross nodes.

Under ZeRO 2 and 3 a stack that `sums_whole` adds up whole gradients over a step's micro-batches and reduces them once,
as our engine does: its messages are a step's, its gradients are cut where there is one micro-batch alone.

`eager` keeps for the backward pass what plain PyTorch modules do, and works as our engine does (`perf.memory`).
One that `fuses` makes what stands between products again where these read it narrower than it is (1.3 B parameters in
float8 on an H200: 35.6 GiB, 42.4 if it were kept).
`weighs_outputs`: a router's weights multiply what experts give back, which is kept for it; else what goes into their
last product, which is kept anyway (Transformer Engine 2.1 on, its pull request 1468).
`kept` multiplies the bytes that a layer keeps for its backward pass, `logits_bytes` are those of one logit with its
copies, whole on every tensor-parallel rank where they are gathered. `gradient_bytes`: of accumulated gradients, where a
stack departs from its precision's.

`selective_share`: what selective recomputation repeats of a layer's forward pass beside unfused attention; None: the
outputs of norms and activation functions, as our engine does (`parallel.recompute`).
`expert_imbalance`: tokens of the fullest expert-parallel rank over the mean, which all ranks wait for; 1 is a router in
perfect balance (a run's metrics report how far its router is from it). `expert_spread`: how alike a router's choices
for different tokens are, by which what the fullest rank keeps follows from the number of ranks (`perf.activations`); 0
is that balance.

`expert_factor`: seconds of routed experts' products and of moving their tokens over the count (grouped products, their
permutation). `attention_factor`: the stack's attention kernel over the accelerator's usual one. `inner_overlap`: the
share of tensor- and context-parallel messages that runs beside compute; `expert_overlap`: of expert-parallel ones.

Four profiles stand here; measured ones are calibrated copies (`perf.profiles`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bloomery.spec.cluster import Accelerator
from bloomery.spec.model import Model

LARGE_TENSOR_BYTES = 32 * 2**20
"""glibc gives larger blocks back to the kernel when freed, so each use pays page faults again (malloc's largest dynamic
mmap threshold); device allocators do not."""


@dataclass(frozen=True)
class Passes:
    """Passes over one tensor in the forward and in the backward direction."""

    forward: float
    backward: float

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def over(self, elements: float) -> Passes:
        """What they read and write of a tensor of so many, in elements."""
        return Passes(self.forward * elements, self.backward * elements)


@dataclass(frozen=True)
class Stack:
    """A software profile. Overlap shares are of the compute that runs beside the message; 0 means none is hidden."""

    name: str
    flash_attention: bool
    dropout: bool
    rmsnorm: Passes
    layernorm: Passes
    residual: Passes
    projections: Passes
    gelu: Passes
    swiglu: Passes
    rotary: Passes
    softmax: Passes
    logits: Passes
    routed: Passes
    accumulate: float
    kernels: Passes
    expert_kernels: Passes
    selective_share: float | None
    collective_kernels: float
    shard_kernels: float
    shard_passes: float
    end_kernels: Passes
    large_logits: Passes
    gradient_overlap: float
    gather_overlap: float
    interference: float
    scatter_gather: bool
    traffic: float
    attention_factor: float
    host_factor: float
    inner_overlap: float
    pipeline_stall_s: float
    gradient_bytes: int | None
    eager: bool
    kept: float
    logits_bytes: float
    logits_gathered: bool
    saved_width: tuple[int, int]
    step_overhead_s: float
    serial_launch: bool
    expert_imbalance: float = 1.0
    expert_spread: float = 0.0
    each_expert: Passes = Passes(0, 0)
    narrow_kernels: float = 1.0
    expert_factor: float = 1.0
    expert_overlap: float = 0.0
    tile_kernels: Passes = Passes(0, 0)
    waking_kernels: float = 0.0
    fuses: bool = False
    weighs_outputs: bool = True
    weighing: Passes = Passes(0, 0)
    sums_whole: bool = False

    @property
    def whole_gradients(self) -> bool:
        """Whether a rank's gradients are summed as one buffer after the backward pass (Megatron's contiguous buffer),
        for want of anything to run beside them; else bucket by bucket, one a layer, as under ZeRO."""
        return not self.eager and not self.gradient_overlap

    def layer_kernels(self, *, experts: Any = 0, narrow: bool = False, tiles: Any = 0) -> Passes:
        """Kernels of one layer in each direction; `experts`: how many a rank holds; `tiles`: ranks to whose keys it
        attends one after the other."""
        plain, more, each = self.kernels, self.expert_kernels, experts * (self.narrow_kernels if narrow else 1.0)
        forward, backward = plain.forward, plain.backward
        if self.tile_kernels.forward and np.any(tiles):
            forward = forward + self.tile_kernels.forward * tiles
            backward = backward + self.tile_kernels.backward * tiles
        if np.any(experts):
            forward = forward + more.forward + self.each_expert.forward * each
            backward = backward + more.backward + self.each_expert.backward * each
        return Passes(forward, backward)

    def call_kernels(self, ranks_per_core: float) -> float:
        """Of one collective. Where ranks take turns on a core (seen of two), another one keeps it awake."""
        return self.collective_kernels + (self.waking_kernels if ranks_per_core == 1 else 0.0)

    def norm(self, model: Model) -> Passes:
        """Passes of one norm."""
        return self.rmsnorm if model.norm == "rmsnorm" else self.layernorm

    def activated(self, model: Model, moe: bool) -> Passes:
        """Elements of a token that activation functions of one layer, with experts or not, read and write."""
        passes = self.swiglu if model.gated else self.gelu
        if not moe or model.moe is None:
            return passes.over(model.ffn_hidden)
        routed, shared = (n * model.moe.expert_ffn_hidden for n in (model.moe.top_k, model.moe.shared_experts))
        return passes.over(routed + shared) + self.weighing.over(routed)

    def saved_widths(self, model: Model) -> int:
        """Tensors of tokens x ffn width kept for the backward pass."""
        return self.saved_width[1] if model.gated else self.saved_width[0]

    def routed_widths(self, model: Model) -> int:
        """The same of routed experts: ours keep what goes into the activation function and into the last product."""
        return self.saved_widths(model) if self.weighs_outputs else activation_inputs(model) + 1


def activation_inputs(model: Model) -> int:
    """Tensors of the ffn's width that the activation function reads: gate and up, or up alone."""
    return 2 if model.gated else 1


GPU = Stack(
    name="gpu",
    flash_attention=True,
    dropout=False,
    rmsnorm=Passes(4, 8),
    layernorm=Passes(3, 5),
    residual=Passes(3, 3),
    projections=Passes(0, 3),
    gelu=Passes(3, 5),
    swiglu=Passes(5, 8),
    rotary=Passes(5, 6),
    softmax=Passes(6, 7),
    logits=Passes(8, 8),
    routed=Passes(4, 4),
    accumulate=0.0,
    kernels=Passes(120, 180),
    expert_kernels=Passes(100, 100),
    selective_share=None,
    collective_kernels=6.0,
    shard_kernels=0.0,
    shard_passes=0.0,
    end_kernels=Passes(100, 150),
    large_logits=Passes(0, 0),
    gradient_overlap=0.9,
    gather_overlap=0.9,
    interference=0.1,
    scatter_gather=True,
    traffic=1.0,
    attention_factor=1.0,
    host_factor=1.0,
    inner_overlap=0.0,
    pipeline_stall_s=0.0,
    gradient_bytes=None,
    eager=False,
    kept=1.0,
    logits_bytes=8.0,
    logits_gathered=False,
    saved_width=(2, 3),
    step_overhead_s=2e-3,
    serial_launch=False,
    sums_whole=True,
)
"""Flash attention, partly fused element-wise kernels, gradients reduced beside the backward pass (2023 on)."""

MEGATRON_2022 = Stack(
    name="megatron-2022",
    flash_attention=False,
    dropout=True,
    rmsnorm=Passes(2, 4),
    layernorm=Passes(2, 4),
    residual=Passes(3.5, 2.5),
    projections=Passes(0, 0),
    gelu=Passes(2, 3),
    swiglu=Passes(3, 5),
    rotary=Passes(2, 2),
    softmax=Passes(4.5, 5.5),
    logits=Passes(8, 6),
    routed=Passes(4, 4),
    accumulate=0.0,
    kernels=Passes(180, 170),
    expert_kernels=Passes(100, 100),
    selective_share=0.0,
    collective_kernels=6.0,
    shard_kernels=0.0,
    shard_passes=0.0,
    end_kernels=Passes(150, 250),
    large_logits=Passes(0, 0),
    gradient_overlap=0.0,
    gather_overlap=0.0,
    interference=0.0,
    scatter_gather=True,
    traffic=1.0,
    attention_factor=1.0,
    host_factor=1.0,
    inner_overlap=0.0,
    pipeline_stall_s=0.0,
    gradient_bytes=None,
    eager=False,
    kept=1.0,
    logits_bytes=6.0,
    logits_gathered=False,
    saved_width=(2, 3),
    step_overhead_s=2e-3,
    serial_launch=False,
)
"""Megatron-LM as published in 2021-2022: unfused attention with dropout, gradients reduced after the backward pass."""

EAGER_CPU = Stack(
    name="eager-cpu",
    flash_attention=True,
    dropout=False,
    rmsnorm=Passes(5, 12),
    layernorm=Passes(3, 6),
    residual=Passes(3, 3),
    projections=Passes(0, 9),
    gelu=Passes(3, 5),
    swiglu=Passes(5, 9),
    rotary=Passes(5, 5),
    softmax=Passes(6, 8),
    logits=Passes(9, 0),
    routed=Passes(7, 12.5),
    accumulate=3.0,
    kernels=Passes(130, 175),
    expert_kernels=Passes(260, 370),
    selective_share=None,
    collective_kernels=8.0,
    shard_kernels=315.0,
    shard_passes=4.0,
    end_kernels=Passes(87, 130),
    large_logits=Passes(0, 0),
    gradient_overlap=0.0,
    gather_overlap=0.0,
    interference=0.0,
    scatter_gather=False,
    traffic=1.0,
    attention_factor=1.0,
    host_factor=1.0,
    inner_overlap=0.0,
    pipeline_stall_s=0.0,
    gradient_bytes=None,
    eager=True,
    sums_whole=True,
    kept=1.0,
    logits_bytes=6.0,
    logits_gathered=False,
    saved_width=(2, 4),
    step_overhead_s=2e-3,
    expert_imbalance=1.25,
    expert_spread=0.3,
    weighs_outputs=False,
    weighing=Passes(2, 11),
    serial_launch=True,
    tile_kernels=Passes(44, 74),
    waking_kernels=34.0,
)
"""Our engine on CPU: eager PyTorch, one kernel after the other, gloo on the same cores (so nothing is hidden).

`collective_kernels`: a layer of width 64 on a process group that sends nothing, 0 to 8 a call more than without. Both
together: what such a call took in runs on two cores, each its rank's own; of two ranks a core `waking_kernels` was not
found (`bench/NOTES.md`).

`routed`, `weighing`: counted by a dispatch mode, the latter of gated experts (2 and 8 of others).

`expert_imbalance`: of three runs of `bench/loop.py`, 8 experts over 2 or 4 ranks, in a router's first steps (1.05, 1.34
and 1.42 times the mean, over all layers). `expert_spread`: the fifth step of both mixtures of `bench/loop.py` with six
seeds, their experts dealt out over 2, 4 and 8 ranks (0.35, 0.28 and 0.27; single seeds 0.1 to 0.7).
"""


COMPILED_GPU = replace(
    EAGER_CPU,
    name="compiled-gpu",
    rmsnorm=Passes(1.5, 6),
    layernorm=Passes(1.5, 6),
    residual=Passes(3, 1),
    projections=Passes(0, 1),
    gelu=Passes(2, 4),
    swiglu=Passes(3, 6),
    rotary=Passes(2, 2),
    softmax=Passes(2, 2),
    logits=Passes(4.5, 0),
    routed=Passes(4, 4),
    accumulate=3.0,
    kernels=Passes(30, 60),
    expert_kernels=Passes(100, 100),
    collective_kernels=42.0,
    end_kernels=Passes(30, 60),
    tile_kernels=Passes(0, 0),
    waking_kernels=0.0,
    saved_width=(2, 3),
    serial_launch=False,
    fuses=True,
)
"""Our engine on GPUs, layers compiled one by one: what stands between products is one kernel, launched beside the
device's work. Passes are counted from what Inductor fuses; a probe measures what they take. Messages are not hidden;
a call of one takes the host what it takes on CPUs (not measured).
Layouts that are not compiled (`layout_rules.fits_compiler`) have the memory of plain operators, but these passes."""


def stack_of(accelerator: Accelerator) -> Stack:
    """The default profile of this accelerator: our engine's where it was probed, for that is what runs there."""
    if accelerator.kind == "cpu":
        return EAGER_CPU
    return COMPILED_GPU if accelerator.probed else GPU
