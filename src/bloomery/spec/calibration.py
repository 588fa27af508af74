"""`Calibration`: what published runs say of hardware and software beyond their data sheets, as few numbers as will do.

`catalog/calibration.yaml` holds the fitted values with their provenance; a constant it does not name keeps the prior
that stands here as the field's default. `architectures` belong to the hardware (and its usual hosts and network),
`stacks` to the software. The planner fits them (`planner.calibrate`); catalog and performance model read them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field

from bloomery.spec.base import Noun
from bloomery.spec.cluster import OPERATIONS, Accelerator, Dtype, GemmEfficiency, Interval, Tier
from bloomery.spec.files import read_yaml, to_yaml

CEILING = 0.95
"""No product reaches more of its peak."""
PATH = Path(__file__).parent / "catalog" / "calibration.yaml"
NARROW: tuple[Dtype, ...] = ("bfloat16", "float16", "tf32", "float8", "float4")
"""Formats of the matrix units that share one efficiency surface; float8 and float4 have their own ceilings."""


class ArchitectureConstants(Noun):
    """One generation of accelerators. Priors: what kernels of any of them commonly reach."""

    gemm_ceiling: float = Field(default=0.75, gt=0, le=1, description="share of peak of a large product, 16-bit")
    gemm_ceiling_8bit: float = Field(default=0.60, gt=0, le=1, description="the same in 8 bit, casts included")
    gemm_ceiling_4bit: float = Field(
        default=0.40, gt=0, le=1, description="the same in 4 bit, a guess: no run was seen"
    )
    gemm_half: float = Field(default=80.0, gt=0, description="rows or columns at which a product has half its rate")
    gemm_k_half: float = Field(default=100.0, gt=0, description="the same of the inner dimension")
    memory_efficiency: float = Field(default=0.80, gt=0, le=1, description="share of the data sheet's bandwidth")
    attention: float = Field(default=0.48, gt=0, le=1, description="share of peak of fused attention")
    attention_width_half: float = Field(default=20.0, gt=0, description="head_dim at which it has half its rate")
    attention_seq_half: float = Field(default=300.0, gt=0, description="sequence length of the same")
    watts_per_tflops: float | None = Field(
        default=None, gt=0, description="board power over 16-bit peak of the device whose shares of peak these are"
    )
    power_exponent: float = Field(default=0.3, gt=0, description="how products gain from more board power than that")
    kernel_s: float = Field(default=2e-6, gt=0, description="device time of a kernel beyond its work")
    launch_s: float = Field(default=5e-6, gt=0, description="host time of a launch on the usual hosts")
    link_factor: float = Field(default=1.25, gt=0, description="time on the inner links over the data sheet's")
    link_latency_s: float = Field(default=6e-6, gt=0, description="one hop inside a node")
    network_factor: float = Field(default=1.2, gt=0, description="time on network cards over the data sheet's")
    network_latency_s: float = Field(default=1.2e-5, gt=0, description="one hop between nodes")

    def accelerator(self, bare: Accelerator) -> Accelerator:
        """A data-sheet accelerator with these constants; what it states of itself stands."""

        def surface(dtype: Dtype) -> GemmEfficiency:
            own = {"float8": self.gemm_ceiling_8bit, "float4": self.gemm_ceiling_4bit}
            ceiling = min(own.get(dtype, self.gemm_ceiling) * clock, CEILING)
            return GemmEfficiency(
                ceiling=ceiling, m_half=self.gemm_half, n_half=self.gemm_half, k_half=self.gemm_k_half
            )

        clock = self._clock(bare)
        dtypes = [dtype for dtype in NARROW if dtype in bare.peak_flops_per_s]
        values = {
            "gemm": {dtype: surface(dtype) for dtype in dtypes},
            "attention": dict.fromkeys(dtypes, min(self.attention * clock, CEILING)),
            "memory_efficiency": self.memory_efficiency,
            "kernel_s": self.kernel_s,
            "launch_s": self.launch_s,
        }
        stated = bare.model_fields_set
        if "attention" not in stated:
            widths = dict.fromkeys(dtypes, self.attention_width_half)
            values |= {"attention_width_half": widths, "attention_seq_half": self.attention_seq_half}
        return bare.model_copy(update={name: value for name, value in values.items() if name not in stated})

    def _clock(self, bare: Accelerator) -> float:
        """What its board power does to the rate of products, over that of the device whose shares of peak these are:
        large products run at the clock that the power allows (data sheets print peaks at the highest)."""
        peak = bare.peak_flops_per_s.get("float16")
        if self.watts_per_tflops is None or not peak or not bare.tdp_w:
            return 1.0
        return float((bare.tdp_w / (peak / 1e12) / self.watts_per_tflops) ** self.power_exponent)

    def link(self, tier: Tier, factor: float = 1.0) -> Tier:
        """The tier inside a node with its factor and latency; `factor`: a stack's over the usual."""
        factors = dict.fromkeys(OPERATIONS, self.link_factor * factor)
        return tier.model_copy(update={"op_factor": factors, "latency_s": self.link_latency_s})

    def network(self, tier: Tier, software: StackConstants) -> Tier:
        """The tier between nodes as a stack uses it: its factors are over the usual."""
        return tier.model_copy(
            update={
                "op_factor": dict.fromkeys(OPERATIONS, self.network_factor * software.network_factor),
                "latency_s": self.network_latency_s * software.network_latency_factor,
                "half_size_bytes": software.network_half_bytes,
            }
        )


class StackConstants(Noun):
    """One training software, over what its kernels and messages were counted to cost. Prior: as counted."""

    traffic: float = Field(default=1.0, gt=0, description="memory traffic of its element-wise kernels over the count")
    attention_factor: float = Field(default=1.0, gt=0, description="rate of its attention kernel over the usual one's")
    host_factor: float = Field(default=1.0, gt=0, description="host time of its launches over the usual")
    expert_factor: float = Field(default=1.3, gt=0, description="time of routed experts and their tokens' moves, over")
    inner_overlap: float = Field(default=0.1, gt=0, le=1, description="share of messages inside layers hidden")
    expert_overlap: float = Field(default=0.1, gt=0, le=1, description="share of messages to experts hidden")
    gradient_overlap: float = Field(default=0.5, gt=0, le=1, description="share of the backward pass that hides them")
    step_overhead_s: float = Field(default=2e-3, gt=0, description="seconds of a step outside model and optimizer")
    pipeline_stall_s: float = Field(default=3e-5, gt=0, description="wait of a collective behind pipeline messages")
    link_factor: float = Field(default=1.0, gt=0, description="its messages inside a node over the usual")
    network_factor: float = Field(default=1.0, gt=0, description="its messages between nodes (site and software)")
    network_latency_factor: float = Field(default=1.0, gt=0, description="the latency of its site's network")
    network_half_bytes: float = Field(default=2e6, gt=0, description="a message between nodes at half its rate")


PRIOR_INTERVAL = Interval(low=0.80, high=1.45)
"""Before anything was left out and predicted: models of this kind err on the fast side."""


class Calibration(Noun):
    """Everything fitted, by name; `generations` maps the first word of an accelerator's name to its architecture."""

    generations: dict[str, str] = {}
    architectures: dict[str, ArchitectureConstants] = {}
    stacks: dict[str, StackConstants] = {}
    usual: StackConstants = Field(default=StackConstants(), description="of software that no run named")
    intervals: dict[str, Interval] = {}
    sources: tuple[str, ...] = Field(default=(), description="whose runs it was fitted to")
    provenance: dict[str, str] = {}

    def architecture_of(self, accelerator_name: str) -> str:
        """The name of an accelerator's architecture; its own first word where none is listed."""
        first = accelerator_name.split("-")[0]
        return self.generations.get(first, first)

    def architecture(self, accelerator_name: str) -> ArchitectureConstants:
        """The constants of an accelerator's architecture, or the priors."""
        return self.architectures.get(self.architecture_of(accelerator_name), ArchitectureConstants())

    def interval(self, kind: str) -> Interval:
        """Of the sources that it was `fitted` to, or of the `prior` for any other."""
        return self.intervals.get(kind, PRIOR_INTERVAL)

    def stack(self, name: str) -> StackConstants:
        """The constants of a stack, or what is usual."""
        return self.stacks.get(name, self.usual)


@cache
def calibration() -> Calibration:
    """The catalog's calibration."""
    return read_calibration(PATH)


def read_calibration(path: Path) -> Calibration:
    """A calibration file. Raises InputError for what it must not say."""
    return Calibration.checked(read_yaml(path), where=path.name)


HEADER = "# Fitted by bench/calibrate.py (see docs/accuracy.md). Names and units: spec/calibration.py.\n"


def calibration_yaml(table: Calibration) -> str:
    """The file `read_calibration` reads back, numbers rounded to three digits."""
    values = table.model_dump(exclude_defaults=True)
    tables = [*values.get("architectures", {}).values(), *values.get("stacks", {}).values(), values.get("usual", {})]
    for fields in tables:
        fields.update({name: float(f"{value:.3g}") for name, value in fields.items()})
    return HEADER + to_yaml(values)
