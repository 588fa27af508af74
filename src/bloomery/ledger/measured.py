"""A finished run as a calibration reads it: its reconciliation as one `Measured`."""

from __future__ import annotations

from pathlib import Path

from bloomery.ledger.finished import finished
from bloomery.ledger.reconcile import Reconciliation, read_plan, reconcile
from bloomery.spec.catalog import read_run
from bloomery.spec.cluster import Cluster
from bloomery.spec.components import COMPUTE
from bloomery.spec.errors import InputError
from bloomery.spec.measured import Measured

LEAST_STEPS = 5
"""Steps without a checkpoint or an evaluation, the first ones left out: fewer say more of the moment than the run."""

SAME_PEAK = 2.0
"""Within this factor two probes may be of one device: it was busy, or a calibration has turned its rates."""


def machine(cluster: Cluster) -> str:
    """What tells one from another of the same name: every probe calls what it measures `this-machine`."""
    one = cluster.accelerator
    peak = max(one.peak_flops_per_s.values())
    return f"{cluster.accelerators_per_node} x {one.name} of {peak / 1e12:.3g} TFLOP/s"


def same_machine(one: Cluster, other: Cluster) -> bool:
    """Whether two probed clusters may be of the same machine; what was not probed says nothing of it."""
    a, b = one.accelerator, other.accelerator
    if not (a.probed and b.probed):
        return True
    ratios = [
        peak / b.peak_flops_per_s[dtype] for dtype, peak in a.peak_flops_per_s.items() if dtype in b.peak_flops_per_s
    ]
    alike = (a.name, one.accelerators_per_node) == (b.name, other.accelerators_per_node)
    return alike and all(1 / SAME_PEAK <= ratio <= SAME_PEAK for ratio in ratios)


def measured(run_dir: Path) -> tuple[Measured, Cluster]:
    """What a run took, and the cluster its plan was made on.

    Raises InputError where the folder is no run, has too few steps, or was not planned in its own number format.
    """
    if not (run_dir / "run.yaml").is_file():
        raise InputError("not a run folder (no run.yaml in it)", where=str(run_dir))
    run, found = read_run(run_dir / "run.yaml"), reconcile(run_dir)
    estimate = read_plan(run_dir)[1]
    if run.layout == "auto" or run.train.dtype not in ("auto", estimate.dtype):
        problem = "its plan is of another number format than it ran in"
        raise InputError(problem, where=str(run_dir), found=run.train.dtype, accepted=[estimate.dtype])
    if found.plain_steps < LEAST_STEPS:
        problem = "too few steps to calibrate on (the first ones and those with a pause do not count)"
        raise InputError(problem, where=str(run_dir), found=found.plain_steps, accepted=f"{LEAST_STEPS} or more")
    time = found.step_time_s
    assert time.measured is not None
    one = Measured(
        name=run.name,
        finished=finished(run_dir),
        model=run.model,
        layout=run.layout,
        dtype=estimate.dtype,  # type: ignore[arg-type]
        optimizer=run.train.optimizer.name,
        global_batch=run.train.global_batch,
        seq_len=run.train.seq_len,
        step_s=time.measured,
        noise=found.noise,
        seconds=_seconds(found),
        allocated_bytes=_largest([rank.allocated_bytes.measured for rank in found.ranks]),
        resident_bytes=_largest([rank.memory_bytes.measured for rank in found.ranks]),
        predicted_s=estimate.step_time_s,
        interval_s=(estimate.low_s, estimate.high_s),
    )
    return one, run.cluster


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _seconds(found: Reconciliation) -> dict[str, float]:
    """By `spec.measured.PARTS`, without those that are no part of this layout."""
    by_name = {one.name: one.seconds.measured or 0.0 for one in (*found.components, *found.kinds)}
    compute = sum(by_name.pop(name) for name in COMPUTE)
    other = by_name.pop("other") + by_name.pop("data")
    by_name.pop("checkpoint")
    return {name: value for name, value in by_name.items() if value} | {"compute": compute, "other": other}
