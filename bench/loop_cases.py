"""The runs of `make loop`: layouts x micro-batches x recomputation x two sizes, on 1 to 4 processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SMALL = {"layers": 4, "hidden": 128, "heads": 4, "ffn_hidden": 384, "vocab": 2048, "max_seq_len": 256}
LARGE = {"layers": 6, "hidden": 192, "heads": 4, "ffn_hidden": 512, "vocab": 4096, "max_seq_len": 256}
EXPERTS = {"experts": 8, "top_k": 2, "expert_ffn_hidden": 192}
MODELS: dict[str, dict[str, Any]] = {
    "small": {"name": "loop-small", **SMALL},
    "large": {"name": "loop-large", **LARGE},
    "small-moe": {"name": "loop-small-moe", **SMALL, "moe": EXPERTS},
    "large-moe": {"name": "loop-large-moe", **LARGE, "moe": {**EXPERTS, "expert_ffn_hidden": 256}},
}


@dataclass(frozen=True)
class LoopCase:
    """One run: a model of `MODELS` and a layout as `--layout` reads it."""

    model: str
    layout: str

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.model}-{self.layout.replace(',', '-').replace('=', '') or 'dp1'}"


CASES = (
    LoopCase("large", "micro_batch=4"),
    LoopCase("large", "micro_batch=8,recompute=full"),
    LoopCase("small", "micro_batch=4"),
    LoopCase("large", "dp=2,micro_batch=4"),
    LoopCase("small", "dp=2,micro_batch=2,zero_stage=1"),
    LoopCase("large", "dp=2,micro_batch=2,zero_stage=2"),
    LoopCase("large", "dp=2,micro_batch=4,zero_stage=3,recompute=selective"),
    LoopCase("small", "dp=2,micro_batch=4,zero_stage=3"),
    LoopCase("large", "tp=2,micro_batch=4"),
    LoopCase("large", "tp=2,micro_batch=2,sequence_parallel=true"),
    LoopCase("small", "tp=2,micro_batch=8,recompute=full"),
    LoopCase("large", "pp=2,micro_batch=1"),
    LoopCase("large", "pp=2,micro_batch=2,recompute=selective"),
    LoopCase("small", "pp=2,micro_batch=4"),
    LoopCase("large", "cp=2,micro_batch=4"),
    LoopCase("small", "cp=2,micro_batch=2,cp_method=all_gather"),
    LoopCase("large-moe", "dp=2,ep=2,micro_batch=2"),
    LoopCase("small-moe", "dp=2,ep=2,micro_batch=4"),
    LoopCase("small-moe", "micro_batch=4"),
    LoopCase("large", "dp=4,micro_batch=2"),
    LoopCase("large", "tp=2,dp=2,micro_batch=4,zero_stage=2"),
    LoopCase("large", "tp=2,pp=2,micro_batch=2"),
    LoopCase("large", "pp=2,dp=2,micro_batch=2"),
    LoopCase("small", "pp=4,micro_batch=1"),
    LoopCase("large", "tp=4,micro_batch=4"),
    LoopCase("large", "pp=3,micro_batch=2"),
    LoopCase("small", "cp=2,dp=2,micro_batch=2,zero_stage=3"),
    LoopCase("large-moe", "dp=4,ep=4,micro_batch=2"),
)
"""In the order they run: every other one is calibrated on, the rest are held out."""
QUICK = (0, 3, 8, 11)
"""Of these, what a quick look runs."""
