"""How fast a cluster trains a model of a given size: the planner's best layout, its MFU and what failures leave of it.

A size without a name is planned as `structure_near` it; the rate is then scaled by the small difference in parameters.
The global batch is DeepSeek LLM's optimum for the budget, at most Kaplan's critical batch, in as many sequences as the
accelerators can share evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from bloomery.planner.laws import TRAINING_FLOPS, critical_batch_tokens, law
from bloomery.planner.outlook import goodput
from bloomery.planner.search import plan
from bloomery.planner.structure import structure_near
from bloomery.spec.cluster import Cluster
from bloomery.spec.model import Model
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import Run, Train

DAY_S = 86_400.0
SEQ_LEN = 4096
SMALL_SEQ_LEN = 2048  # below a billion parameters


@dataclass(frozen=True)
class Machine:
    """Where and how a budget is spent. `model` fixes the structure (None: standard ones by size)."""

    cluster: Cluster
    model: Model | None = None
    seq_len: int | None = None
    global_batch: int | None = None

    def sizes(self) -> list[int]:
        """Numbers of accelerators one can plan for: measured cuts, or parts of a node and whole nodes, ascending.

        Whole nodes only in numbers without a prime factor above 7, and the whole cluster: others divide no batch.
        """
        if self.cluster.cuts:
            return list(self.cluster.world_sizes())
        node = self.cluster.accelerators_per_node
        parts = [part for part in range(1, node) if node % part == 0]
        nodes = [n for n in range(1, self.cluster.nodes) if _smooth(n)] + [self.cluster.nodes]
        return parts + [n * node for n in nodes]

    def largest(self) -> int:
        """All of the cluster."""
        return max(self.cluster.world_sizes())


@dataclass(frozen=True)
class Throughput:
    """What one size of model reaches. `tokens_per_s` is while training; days follow from it and `goodput`.

    `low_tokens_per_s`, `high_tokens_per_s`: the planner's 90 % interval. `data_parallel_limit`: ranks among which the
    critical batch can be shared at one sequence each. `obstacles`: what the engine cannot run of the layout today.
    """

    structure: str
    structure_parameters: int
    accelerators: int
    layout: str
    seq_len: int
    global_batch: int
    tokens_per_s: float
    low_tokens_per_s: float
    high_tokens_per_s: float
    mfu: float
    hfu: float
    goodput: float
    data_parallel: int
    critical_batch_tokens: float
    data_parallel_limit: int
    convention: str
    obstacles: tuple[str, ...]

    def days(self, tokens: float) -> float:
        """Wall-clock days for so many tokens, failures and checkpoints counted; infinite where nothing ever ends."""
        rate = self.tokens_per_s * self.goodput * DAY_S
        return tokens / rate if rate > 0 else float("inf")


def throughput(machine: Machine, parameters: float, tokens: float, accelerators: int) -> Throughput:
    """The best layout for `parameters` on `accelerators` of the cluster, and its rate.

    Raises LimitError when nothing fits in memory, InputError when no layout keeps the rules.
    """
    model = machine.model or structure_near(parameters)
    count = parameter_count(model)
    scale = parameter_count(model, active=True) / parameters
    seq_len = machine.seq_len or min(model.max_seq_len, SEQ_LEN if parameters >= 1e9 else SMALL_SEQ_LEN)
    critical = float(critical_batch_tokens(law("kaplan").loss(parameters, tokens)))
    batch = machine.global_batch or _batch(parameters, tokens, critical, seq_len, accelerators)
    cluster = machine.cluster
    train = Train(seq_len=seq_len, global_batch=batch, tokens=max(1, round(tokens)))
    run = Run(name="budget", model=model, cluster=cluster, train=train)
    best = plan(run, world_size=accelerators, top=1, runnable_only=cluster.accelerator.kind == "cpu").best[0]
    sequences = run.train.global_batch * seq_len
    share, _ = goodput(cluster.cut(accelerators), count)
    return Throughput(
        structure=model.name,
        structure_parameters=count,
        accelerators=accelerators,
        layout=best.layout.describe(),
        seq_len=seq_len,
        global_batch=batch,
        tokens_per_s=sequences / best.step_time_s * scale,
        low_tokens_per_s=sequences / best.estimate.high_s * scale,
        high_tokens_per_s=sequences / best.estimate.low_s * scale,
        mfu=best.estimate.mfu,
        hfu=best.estimate.hfu,
        goodput=share,
        data_parallel=best.layout.dp,
        critical_batch_tokens=critical,
        data_parallel_limit=max(1, int(critical // seq_len)),
        convention=best.estimate.convention,
        obstacles=best.obstacles,
    )


def optimal_batch_tokens(flops: Any) -> Any:
    """B_opt = 0.2920 C^0.3271 tokens (DeepSeek LLM 2024, 2401.02954, eq. 1); C in training FLOP."""
    return 0.2920 * flops**0.3271


def _batch(parameters: float, tokens: float, critical: float, seq_len: int, accelerators: int) -> int:
    """Sequences a step: at most the optimum; a multiple of the accelerators or of half, below them a divisor."""
    wanted = min(optimal_batch_tokens(TRAINING_FLOPS * parameters * tokens), critical) if isfinite(tokens) else critical
    sequences = max(1.0, wanted / seq_len)
    if sequences >= accelerators:
        halves = accelerators % 2 == 0 and sequences < 8 * accelerators and accelerators > 8
        unit = accelerators // 2 if halves else accelerators
        return unit * int(sequences // unit)
    return max(part for part in range(1, accelerators + 1) if accelerators % part == 0 and part <= sequences)


def _smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1
