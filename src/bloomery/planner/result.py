"""What a search answers: `Plan` and its `Row`s, plain values that become JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bloomery.perf.memory import chance_of_fitting
from bloomery.perf.result import Estimate
from bloomery.planner.enumerate import Refusal
from bloomery.planner.explain import MemoryRefusal
from bloomery.planner.outlook import Outlook
from bloomery.spec.cluster import Dtype
from bloomery.spec.components import COMPONENTS
from bloomery.spec.layout import Layout


@dataclass(frozen=True)
class Row:
    """One layout with its estimate. `name` is its rank or the name under which it is compared.

    `components` has the keys of `COMPONENTS`, in seconds, and adds up to the step time; `obstacles` says what the
    engine cannot run of it today (empty: it runs).
    """

    name: str
    layout: Layout
    estimate: Estimate
    outlook: Outlook
    memory_bytes: float
    memory_limit_bytes: float
    fits: bool
    shortage_bytes: float
    components: dict[str, float]
    obstacles: tuple[str, ...]

    @property
    def step_time_s(self) -> float:
        """Seconds per optimizer step."""
        return sum(self.components.values())

    @property
    def p_fits(self) -> float:
        """Probability that the rank that needs most keeps within its memory (`perf.memory.chance_of_fitting`)."""
        return chance_of_fitting(self.memory_bytes, self.memory_limit_bytes)

    @property
    def bottleneck(self) -> str:
        """The largest component beside the useful work itself."""
        return max((key for key in COMPONENTS if key != "ideal"), key=lambda key: self.components[key])

    @property
    def effective_efficiency(self) -> float:
        """MFU x goodput: the share of the peak FLOPs paid for that trained the model."""
        return self.estimate.mfu * self.outlook.goodput

    def to_json(self) -> dict[str, Any]:
        """Plain values; the whole estimate under `estimate`."""
        return {
            "name": self.name,
            "layout": self.layout.model_dump(mode="json"),
            "describe": self.layout.describe(),
            "world_size": self.layout.world_size,
            "step_time_s": self.step_time_s,
            "low_s": self.estimate.low_s,
            "high_s": self.estimate.high_s,
            "mfu": self.estimate.mfu,
            "hfu": self.estimate.hfu,
            "effective_efficiency": self.effective_efficiency,
            "memory_bytes": self.memory_bytes,
            "memory_limit_bytes": self.memory_limit_bytes,
            "fits": self.fits,
            "p_fits": self.p_fits,
            "shortage_bytes": self.shortage_bytes,
            "bottleneck": self.bottleneck,
            "components": self.components,
            "runs_today": not self.obstacles,
            "obstacles": list(self.obstacles),
            **asdict(self.outlook),
            "estimate": self.estimate.to_json(),
        }


@dataclass(frozen=True)
class Plan:
    """The answer to `plan`: `best` is ranked, one row a mesh; `compare` are the layouts that were asked for.

    PF-days are 8.64e19 FLOP, both by the 6 N D and by the 8 N D convention (recomputation counted), N being the
    parameters one token passes through.
    """

    run: str
    model: str
    cluster: str
    dtype: Dtype
    seq_len: int
    global_batch: int
    steps: int
    tokens: int
    parameters: int
    active_parameters: int
    pf_days_6nd: float
    pf_days_8nd: float
    runnable_only: bool
    world_sizes: tuple[int, ...]
    failures_per_1000_node_days: float
    failures_source: str
    repair_days: float
    best: tuple[Row, ...]
    compare: tuple[Row, ...]
    why: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    memory_refusals: tuple[MemoryRefusal, ...]
    n_enumerated: int
    n_valid: int
    n_feasible: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json` and for plan.json."""
        own = {name: value for name, value in vars(self).items() if name not in ("best", "compare")}
        own["refusals"] = [asdict(refusal) for refusal in self.refusals]
        own["memory_refusals"] = [refusal.to_json() for refusal in self.memory_refusals]
        own |= {name: list(own[name]) for name in ("why", "notes", "world_sizes")}
        return {
            **own,
            "best": [row.to_json() for row in self.best],
            "compare": [row.to_json() for row in self.compare],
        }
