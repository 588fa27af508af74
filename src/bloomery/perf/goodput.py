"""What failures leave of the time: checkpoint intervals and ETTR, the productive share of wall time.

Symbols: C seconds a checkpoint stalls training (not how long its writing takes); M mean seconds between failures of the
whole job; R seconds from a failure until steps run again (detection, restart, loading, warm-up); tau seconds of useful
work between checkpoints. All functions take numbers or arrays.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bloomery.spec.cluster import Cluster

DAY_S = 86_400.0
PESSIMISTIC_FAILURES_PER_1000_NODE_DAYS = 24.0
"""Everything that stopped a job, not only failures with a hardware cause (Kokolis et al. 2024, arXiv 2410.21680)."""

OF_NODE = 8
"""Accelerators in a node of those that failure rates are counted by."""
SMALL_SHARE = 1e-8
SHORT_SHARE = 0.01
"""Of the time that a job may wait for a node, all of its spares being under repair."""


def mean_time_between_failures_s(nodes: Any, failures_per_1000_node_days: Any) -> Any:
    """M of a job on `nodes` nodes of 8 accelerators: infinite where nothing fails.

    16384 GPUs in 2048 nodes at 6.5 failures per 1000 node-days fail every 1.8 h (arXiv 2410.21680).
    """
    rate = np.asarray(nodes, dtype=np.float64) * failures_per_1000_node_days / (1000.0 * DAY_S)
    return np.divide(1.0, rate, out=np.full_like(rate, np.inf), where=rate > 0)[()]


def young_interval_s(checkpoint_s: Any, mtbf_s: Any) -> Any:
    """Young's interval sqrt(2 C M) (Young 1974): right while C and R are small against M."""
    return np.sqrt(2.0 * np.asarray(checkpoint_s) * mtbf_s)


def optimal_interval_s(checkpoint_s: Any, mtbf_s: Any) -> Any:
    """The interval with the largest `ettr`: e^((tau+C)/M) (1 - tau/M) = 1, whatever R, which is solved by Lambert's W:
    tau = M (1 + W(-e^(-1 - C/M))) (Daly 2006, section 4). Young's is its first order."""
    from scipy.special import lambertw

    c, m = np.broadcast_arrays(np.asarray(checkpoint_s, dtype=np.float64), np.asarray(mtbf_s, dtype=np.float64))
    finite = np.where(np.isinf(m), 1.0, m)
    exact = finite * (1.0 + lambertw(-np.exp(-1.0 - c / finite)).real)
    # Near its branch point W has lost the digits of a C that is nothing beside M; there the first order is exact.
    tau = np.where(c < SMALL_SHARE * finite, young_interval_s(c, finite), exact)
    return np.where(np.isinf(m), np.inf, tau)[()]


def availability_interval_s(checkpoint_s: Any, mtbf_s: Any, restart_s: Any) -> Any:
    """C + sqrt(2 (M + R) C + C^2) (Saxena et al. 2024, arXiv 2410.18124): counted from checkpoint to checkpoint."""
    c = np.asarray(checkpoint_s)
    return c + np.sqrt(2.0 * (np.asarray(mtbf_s) + restart_s) * c + c**2)


def ettr(interval_s: Any, checkpoint_s: Any, mtbf_s: Any, restart_s: Any) -> Any:
    """Productive share of wall time, exact for exponential failures: tau / (M e^(R/M) (e^((tau+C)/M) - 1)) (Daly 2006).

    1 / (1 + C/tau) where nothing ever fails (M infinite).
    """
    tau, c, r, m = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (interval_s, checkpoint_s, restart_s, mtbf_s))
    )
    never = np.isinf(m)
    finite = np.where(never, 1.0, m)
    with np.errstate(over="ignore"):
        spent = np.where(never, tau + c, finite * np.exp(r / finite * ~never) * np.expm1((tau + c) / finite * ~never))
    return (tau / spent)[()]


def ettr_of_steps(
    interval_s: Any, checkpoint_s: Any, running_s: Any, restart_s: Any, *, intervals_back: Any = 0.0
) -> Any:
    """The same where failures are counted while steps run, every `running_s` (M) of that time.

    tau (1 - q N) / ((M + R) N) with N = e^((tau+C)/M) - 1: an interval meets N failures, each of which costs R (Daly
    2006, with none in R) and goes back q intervals (`intervals_back`) behind the newest checkpoint, because that one
    is damaged: T = (M + R) N becomes U = T + q N U, since what is done again can fail again. 0 where q N reaches one.
    A recovery that is itself cut short is a longer R here, and another failure in `ettr`.
    """
    tau, c, r, m = (np.asarray(x, dtype=np.float64) for x in (interval_s, checkpoint_s, restart_s, running_s))
    failures = np.expm1((tau + c) / m)
    return (tau / ((m + r) * failures) * np.maximum(0.0, 1.0 - intervals_back * failures))[()]


def ettr_first_order(interval_s: Any, checkpoint_s: Any, mtbf_s: Any, restart_s: Any) -> Any:
    """The same to first order: tau/(tau + C) (1 - (R + (tau + C)/2)/M)."""
    tau, c = np.asarray(interval_s, dtype=np.float64), np.asarray(checkpoint_s)
    return tau / (tau + c) * (1.0 - (restart_s + (tau + c) / 2.0) / mtbf_s)


def best_ettr(checkpoint_s: Any, mtbf_s: Any, restart_s: Any) -> Any:
    """ETTR at `optimal_interval_s`."""
    return ettr(optimal_interval_s(checkpoint_s, mtbf_s), checkpoint_s, mtbf_s, restart_s)


def goodput(ettr_share: Any, *, skipped_share: Any = 0.0, straggler_slowdown: Any = 0.0) -> Any:
    """ETTR x (1 - skipped steps / steps) x (1 - slow-down by the slowest rank)."""
    return ettr_share * (1.0 - np.asarray(skipped_share)) * (1.0 - np.asarray(straggler_slowdown))


def spare_nodes(nodes: float, failures_per_1000_node_days: float, repair_days: float) -> int:
    """Spares k that keep a job on `nodes` nodes of 8 accelerators whole while failed ones are repaired, all but
    `SHORT_SHARE` of the time.

    The smallest k with P(Poisson(nodes x rate x repair) > k) < `SHORT_SHARE`: nodes under repair are those of an
    infinite server (Palm's theorem), Poisson whatever the distribution of repair times.
    """
    under_repair = nodes * failures_per_1000_node_days / 1000.0 * repair_days
    if math.exp(-under_repair) >= 1.0 - SHORT_SHARE:
        return 0
    from scipy.special import pdtrik

    return math.ceil(pdtrik(1.0 - SHORT_SHARE, under_repair))


def cluster_mtbf_s(cluster: Cluster, *, pessimistic: bool = False) -> float:
    """M of a job on the whole of `cluster` at its own failure rate, or at the pessimistic one."""
    rate = PESSIMISTIC_FAILURES_PER_1000_NODE_DAYS if pessimistic else cluster.failures_per_1000_node_days
    return float(mean_time_between_failures_s(cluster.size / OF_NODE, rate))
