"""Profiles of the software that published runs used: its `Stack`, and what it does where a report is silent.

Recognised by the name of the software in a report's source, else by its age. What a profile's constants are is the
catalog's calibration to say (`spec.calibration`): few numbers with a meaning, fitted on published runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from bloomery.perf.stack import GPU, MEGATRON_2022, Passes, Stack
from bloomery.spec.calibration import StackConstants

USUAL = "usual"
"""The name of software that no report names, which the calibration has one set of constants for."""
FLASH_SINCE = 2023
"""The year from which training with fused attention was common."""
CORE_SINCE = 2024
"""The year from which Megatron-LM's own scripts train on Megatron-Core (its releases of 2023 had both)."""


@dataclass(frozen=True)
class Profile:
    """A stack and its defaults: recomputation, ZeRO stage, sequence parallelism, gated activation, stages by cost,
    chunks a rank at most where a pipeline interleaves (1: it cannot), whether one cuts a batch into as many
    micro-batches as it has stages, and whether selective recomputation takes a list of modules, up to whole blocks."""

    stack: Stack
    recompute: Literal["none", "selective", "full"] = "none"
    zero_stage: int = 0
    sequence_parallel: bool = False
    gated: bool = False
    balanced: bool = False
    chunks: int = 8
    as_many_as_stages: bool = False
    lists_modules: bool = False


PUBLISHED = replace(GPU, selective_share=0.0, sums_whole=False)
"""Runs with fused attention: Megatron's selective recomputation repeats its core, of which nothing is kept anyway.
FSDP and DeepSpeed reduce each micro-batch's gradients unless told otherwise."""

MEGATRON = Profile(replace(MEGATRON_2022, name="megatron"), recompute="full")
MEGATRON_DEEPSPEED = Profile(
    replace(MEGATRON_2022, name="megatron-deepspeed", gradient_bytes=2), recompute="full", chunks=1
)
"""DeepSpeed's engine accumulates and reduces gradients in the 16 bits of the weights."""
LATER_DEEPSPEED = replace(MEGATRON_DEEPSPEED, stack=replace(PUBLISHED, name="megatron-deepspeed", gradient_bytes=2))
"""The same engine around models of Megatron-Core's years: fused attention, no dropout, messages beside compute."""
MEGATRON_CORE = Profile(
    replace(PUBLISHED, name="megatron-core", each_expert=Passes(4, 8), narrow_kernels=3.0, weighs_outputs=False),
    zero_stage=1,
    sequence_parallel=True,
    lists_modules=True,
)
"""Transformer Engine's grouped products call cuBLAS for each expert (`nvte_multi_stream_cublas_gemm`), two products
forward and four back; a call counts as two launches, and three times in 8 bit, with casts and scales: the best of four
counts tried on published mixtures (bench/NOTES.md)."""
FSDP = Profile(
    replace(PUBLISHED, name="fsdp", selective_share=0.5),
    zero_stage=3,
    sequence_parallel=True,
    gated=True,
    chunks=2,
    as_many_as_stages=True,
)
"""torchtitan's defaults. Selective: per operator, every other matrix product is kept. Its pipelines cut a batch into
`pipeline_parallel_degree` micro-batches unless they are told another number (2024)."""
COMPOSER = Profile(replace(PUBLISHED, name="composer", logits_bytes=4.0), zero_stage=3)
"""LLM Foundry's loss is FlashAttention's fused one: logits and their gradient in 16 bit, no copies in 32."""
NANOTRON = Profile(
    replace(PUBLISHED, name="nanotron", gradient_overlap=0.0),
    sequence_parallel=True,
    gated=True,
    balanced=True,
    chunks=1,
)
NEOX = Profile(
    replace(
        PUBLISHED,
        name="neox",
        gradient_overlap=0.0,
        gradient_bytes=2,
        kept=2.0,
        logits_bytes=16.0,
        logits_gathered=True,
    ),
    zero_stage=1,
    gated=True,
    chunks=1,
)
"""Eager norms and rotary positions keep float32 copies; gradients are accumulated in 16 bit."""
NEOX_RMS = replace(NEOX, stack=replace(NEOX.stack, name="neox-rms", kept=1.5))
"""With a fused norm."""
INTERNEVO = Profile(replace(PUBLISHED, name="internevo"), zero_stage=1, gated=True)
XLA = Profile(replace(PUBLISHED, name="xla"), zero_stage=0)

KNOWN = (
    (r"aleph ?alpha|efficient parallelization layouts|\bneox\b|gpt ?neox", NEOX),
    (r"nanotron|ultra ?scale", NANOTRON),
    (r"llm ?foundry|mosaicml|composer", COMPOSER),
    (r"torchtitan|fsdp|automodel|kempner", FSDP),
    (r"internevo|internlm", INTERNEVO),
    (r"\bjax|\bpax|maxtext|levanter|\bxla", XLA),
    (r"megatron (bridge|moe)|(megatron|\bm) ?core\b|nemo|ml ?perf|dgx ?c(loud)?\b|megascale", MEGATRON_CORE),
    (r"deepspeed|vtrain|bigscience|bloom|glm ?130b", MEGATRON_DEEPSPEED),
    (r"megatron|korthikanti|activation recomputation|dlperf|libai", MEGATRON),
)
"""Names in a source, its hyphens and underscores read as spaces."""

FSDP_COMPILED = replace(FSDP, stack=replace(FSDP.stack, name="fsdp-compiled"))
XLA_TE = replace(XLA, stack=replace(XLA.stack, name="xla-te"))
"""With Transformer Engine's kernels."""

MEGATRON_CORE_2606 = replace(MEGATRON_CORE, stack=replace(MEGATRON_CORE.stack, name="megatron-core-26.06"))
"""From NeMo's container 26.06 on: mixtures on linked racks take a quarter less."""

VARIANTS = (
    (FSDP, r"torch\.compile", FSDP_COMPILED),
    (NEOX, r"rms kernel", NEOX_RMS),
    (XLA, r"\bte-", XLA_TE),
    (MEGATRON_CORE, r"(26\.(0[6-9]|1[0-2])|2[7-9]\.\d\d)(\.\d+)? nemo container", MEGATRON_CORE_2606),
)
"""(profile, words in a report's notes or reference, what it then is): the same software with other kernels."""


def profile_of(
    source: str, words: str, year: float | None, flash_attention: bool | None, *, eight_bit: bool = False
) -> Profile:
    """The profile of a published run; `words`: its notes and reference; `flash_attention`: None where it is silent;
    `eight_bit`: whether the accelerator has units for 8-bit floats, as none had in Megatron's early years."""
    text = re.sub(r"[-_\s]+", " ", source.lower())
    found = next((profile for pattern, profile in KNOWN if re.search(pattern, text)), None)
    if found is None:
        before = flash_attention is False or (year or FLASH_SINCE) < FLASH_SINCE
        found = _unnamed(MEGATRON if before else MEGATRON_CORE)
    recent = eight_bit or (year or 0) >= CORE_SINCE
    if found is MEGATRON and recent:
        found = MEGATRON_CORE
    if found is MEGATRON_DEEPSPEED and recent and flash_attention is not False:
        found = LATER_DEEPSPEED
    for plain, pattern, variant in VARIANTS:
        if found is plain and re.search(pattern, words.lower()):
            found = variant
    if flash_attention is not None and flash_attention != found.stack.flash_attention:
        return replace(found, stack=replace(found.stack, flash_attention=flash_attention))
    return found


def _unnamed(alike: Profile) -> Profile:
    """Software that nothing tells of: it does what most did at its time, its constants are the usual ones."""
    return replace(alike, stack=replace(alike.stack, name=USUAL))


def calibrated(stack: Stack, constants: StackConstants) -> Stack:
    """The stack with its constants; what never overlaps stays so."""
    overlap = constants.gradient_overlap if stack.gradient_overlap else 0.0
    return replace(
        stack,
        traffic=constants.traffic,
        attention_factor=constants.attention_factor,
        host_factor=constants.host_factor,
        expert_factor=constants.expert_factor,
        inner_overlap=constants.inner_overlap,
        expert_overlap=constants.expert_overlap,
        gradient_overlap=overlap,
        gather_overlap=overlap,
        step_overhead_s=constants.step_overhead_s,
        pipeline_stall_s=constants.pipeline_stall_s,
    )
