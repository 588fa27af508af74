"""Profiles of the software that published runs used: its `Stack`, and what it does where a report is silent.

Recognised by the name of the software in a report's source or notes, else by its age. Few parameters with a meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from bloomery.perf.stack import GPU, MEGATRON_2022, Stack

FLASH_SINCE = 2023
"""The year from which training with fused attention was common."""


@dataclass(frozen=True)
class Profile:
    """A stack and its defaults: recomputation, ZeRO stage, sequence parallelism, gated activation, stages by cost."""

    stack: Stack
    recompute: str = "none"
    zero_stage: int = 0
    sequence_parallel: bool = False
    gated: bool = False
    balanced: bool = False


MEGATRON = Profile(MEGATRON_2022, recompute="full")
MEGATRON_CORE = Profile(replace(GPU, name="megatron-core"), zero_stage=1, sequence_parallel=True)
FSDP = Profile(replace(GPU, name="fsdp"), zero_stage=3, gated=True)
COMPOSER = Profile(replace(GPU, name="composer"), zero_stage=3)
NANOTRON = Profile(
    replace(GPU, name="nanotron", gradient_overlap=0.0, collective_kernels=60.0, pipeline_stall_s=5e-4),
    sequence_parallel=True,
    gated=True,
    balanced=True,
)
NEOX = Profile(replace(GPU, name="neox", gradient_overlap=0.0), zero_stage=1, gated=True)
INTERNEVO = Profile(replace(GPU, name="internevo"), zero_stage=1, gated=True)
XLA = Profile(replace(GPU, name="xla"), zero_stage=0)

KNOWN = (
    (r"aleph alpha|efficient parallelization layouts", NEOX),
    (r"nanotron|ultra-scale", NANOTRON),
    (r"llm-foundry|mosaicml|composer", COMPOSER),
    (r"torchtitan|fsdp|automodel|kempner", FSDP),
    (r"internevo|internlm", INTERNEVO),
    (r"jax|pax|maxtext|levanter|xla", XLA),
    (r"megatron-bridge|megatron-core|nemo|mlperf|dgx cloud|megascale|megatron-moe", MEGATRON_CORE),
    (r"megatron|deepspeed|korthikanti|vtrain|bigscience|bloom|glm-130b|dlperf|libai", MEGATRON),
)


def profile_of(source: str, notes: str, year: float | None, flash_attention: str) -> Profile:
    """The profile of a published run; `flash_attention`: 1, 0, or blank where the report is silent."""
    text = source.lower()
    found = next((profile for pattern, profile in KNOWN if re.search(pattern, text)), None)
    if found is None:
        found = MEGATRON if flash_attention == "0" or (year or FLASH_SINCE) < FLASH_SINCE else MEGATRON_CORE
    stack = found.stack
    fused = flash_attention == "1"
    if flash_attention and fused != stack.flash_attention:
        stack = replace(stack, flash_attention=fused, name=f"{stack.name}{'+' if fused else '-'}flash")
    return replace(found, stack=stack)
