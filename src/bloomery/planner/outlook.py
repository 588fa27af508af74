"""What a step time means for the whole run: days, money, energy, PF-days, and what failures add.

Formulas: 6 N D and 8 N D count 2 FLOP per parameter and token forward and 4 backward, the latter with one more forward
for recomputation (Kaplan 2001.08361; Narayanan 2104.04473); N is the parameters one token passes through. Failures:
`perf.goodput`, exact for exponential failures.
"""

from __future__ import annotations

from dataclasses import dataclass

from bloomery.perf.flops import PF_DAY
from bloomery.perf.goodput import (
    OF_NODE,
    PESSIMISTIC_FAILURES_PER_1000_NODE_DAYS,
    cluster_mtbf_s,
    ettr,
    optimal_interval_s,
    spare_nodes,
)
from bloomery.spec.cluster import Cluster
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import Run

DAY_S = 86_400.0
CHECKPOINT_BYTES_PER_PARAMETER = 12.0  # float32 master weight and two AdamW moments
STALL_S = 1.0  # an allowance for ranks to meet at a checkpoint and look after their copies
RESTART_S = 600.0  # an allowance for detection, scheduling and start-up; loading is counted on top


@dataclass(frozen=True)
class Outlook:
    """The whole run at a given step time. `days` is productive time, `days_with_failures` is days / goodput.

    `cost` is in the price list's currency (None without a price); `energy_kwh` takes every accelerator at its board
    power (None where unknown) times the PUE, so it is an upper bound for the accelerators and leaves out the hosts.
    Where failures leave no productive time at all (goodput 0), days, hours, cost and energy are None.
    `days_pessimistic`: with everything that ever stops a job counted (`perf.goodput`'s pessimistic rate) where that is
    more than the cluster's own rate; None on a cluster without failures. `spare_nodes`: beside those of the layout, so
    that it seldom waits for a repair; neither cost nor energy has them.
    """

    steps: int
    tokens: int
    days: float
    goodput: float
    days_with_failures: float | None
    days_pessimistic: float | None
    accelerator_hours: float | None
    cost: float | None
    energy_kwh: float | None
    checkpoint_interval_s: float | None
    checkpoint_stall_s: float | None
    restart_s: float | None
    spare_nodes: int


def pf_days(parameters: float, tokens: float, flops_per_parameter_token: float) -> float:
    """PF-days (8.64e19 FLOP) of `flops_per_parameter_token` (6, or 8 with recomputation) x N x D."""
    return flops_per_parameter_token * parameters * tokens / PF_DAY


def planned_tokens(run: Run) -> int:
    """The tokens of the budget: as given, or steps x batch x sequence."""
    if run.train.tokens is not None:
        return run.train.tokens
    return run.train.course.tokens(run.train.n_steps)


@dataclass(frozen=True)
class Recovery:
    """What failures cost a job: seconds that a checkpoint stalls it (C of `perf.goodput`), that a failure does (R), and
    from checkpoint to checkpoint; the share of wall time that is left."""

    stall_s: float
    restart_s: float
    interval_s: float
    goodput: float


def recovery(cluster: Cluster, parameters: int) -> Recovery | None:
    """How a job that takes all of `cluster` lives with failures, at the best checkpoint interval; None without any.

    As the engine saves: training stalls until every rank has a copy of its even share of 12 bytes a parameter on the
    host, and goes on while that is written. Until it is, a failure goes back to the checkpoint before, so that the time
    of writing counts with each restart, and checkpoints follow each other no faster.
    """
    if cluster.failures_per_1000_node_days == 0:
        return None
    size, device = CHECKPOINT_BYTES_PER_PARAMETER * parameters, cluster.accelerator
    copied_s = size / cluster.size / (device.upload_bytes_per_s or device.memory_bandwidth_bytes_per_s / 2)
    stall_s, write_s = STALL_S + copied_s, size / cluster.storage_bytes_per_s("write")
    restart_s = RESTART_S + size / cluster.storage_bytes_per_s("read") + write_s
    mtbf_s = cluster_mtbf_s(cluster)
    interval_s = max(float(optimal_interval_s(stall_s, mtbf_s)), write_s)
    return Recovery(stall_s, restart_s, interval_s, float(ettr(interval_s, stall_s, mtbf_s, restart_s)))


def goodput(cluster: Cluster, parameters: int) -> tuple[float, float | None]:
    """Productive share of wall time under failures, and the checkpoint interval in seconds that gives it.

    1 and None on a cluster without failures.
    """
    found = recovery(cluster, parameters)
    return (1.0, None) if found is None else (found.goodput, found.interval_s)


def _days_pessimistic(cluster: Cluster, parameters: int, productive_s: float) -> float | None:
    if cluster.failures_per_1000_node_days == 0:
        return None
    rate = max(cluster.failures_per_1000_node_days, PESSIMISTIC_FAILURES_PER_1000_NODE_DAYS)
    share, _ = goodput(cluster.model_copy(update={"failures_per_1000_node_days": rate}), parameters)
    return productive_s / share / DAY_S if share > 0 else None


def outlook(run: Run, cluster: Cluster, step_time_s: float) -> Outlook:
    """The whole run on `cluster` (cut to the layout's ranks) at `step_time_s` seconds per step on average."""
    productive_s = run.train.n_steps * step_time_s
    failing = recovery(cluster, parameter_count(run.model))
    share = 1.0 if failing is None else failing.goodput
    wall_s = productive_s / share if share > 0 else None
    hours = None if wall_s is None else cluster.size * wall_s / 3600.0
    price, tdp_w = cluster.price_per_accelerator_hour, cluster.accelerator.tdp_w
    return Outlook(
        steps=run.train.n_steps,
        tokens=planned_tokens(run),
        days=productive_s / DAY_S,
        goodput=share,
        days_with_failures=None if wall_s is None else wall_s / DAY_S,
        days_pessimistic=_days_pessimistic(cluster, parameter_count(run.model), productive_s),
        accelerator_hours=hours,
        cost=None if price is None or hours is None else hours * price,
        energy_kwh=hours * tdp_w * cluster.pue / 1000.0 if tdp_w and hours is not None else None,
        checkpoint_interval_s=None if failing is None else failing.interval_s,
        checkpoint_stall_s=None if failing is None else failing.stall_s,
        restart_s=None if failing is None else failing.restart_s,
        spare_nodes=spare_nodes(cluster.size / OF_NODE, cluster.failures_per_1000_node_days, cluster.repair_days),
    )
