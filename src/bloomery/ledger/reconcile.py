"""Predicted beside measured: reads a run folder (plan, ledger, metrics) and says where every second of a step went.

What is compared is the steady step: the first steps after each start are left out (`WARM_UP`), so are steps with a
checkpoint or an evaluation in them, and of the rest the middle half by wall time is averaged. An average of whole steps
keeps the sum: the measured components add up to the measured step time, as medians taken one by one would not.

Three figures cannot be read from a clock and are said so: `ideal` is counted (model FLOPs at peak), `recompute` is the
plan's share of the measured compute time, and pipeline sends and bubble are measured together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bloomery.ledger.accounts import Accounts, read_accounts
from bloomery.ledger.cause import find_cause
from bloomery.ledger.sinks import read_lines
from bloomery.perf.result import Estimate
from bloomery.spec.components import COMPONENTS, KINDS, MESSAGES
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json

WARM_UP = 3
"""Steps after each start that are left out: allocator, page faults, thread pools and caches settle in them."""
PROFILED_STEP = WARM_UP + 2
"""The step of every run that is profiled, and left out too (`train.profiled_step`)."""
TOLERANCE = 0.005
"""Buckets must sum to wall time within this share (DESIGN rule 4)."""
BUCKETS = (
    "compute",
    "tp_comm",
    "cp_comm",
    "ep_comm",
    "pp_comm",
    "dp_comm",
    "optimizer",
    "data",
    "checkpoint",
    "snapshot",
    "evaluate",
    "logging",
    "startup",
    "compile",
    "profile",
    "recheck",
    "other",
)
_NOT_OF_A_STEP = ("checkpoint", "snapshot", "evaluate", "startup", "compile", "profile", "recheck")

WATERFALL: dict[str, tuple[str, tuple[str, ...]]] = {
    "kernel": ("kernels below peak", ("kernel",)),
    "recompute": ("recomputation", ("recompute",)),
    "pipeline": ("pipeline bubble and sends", ("pp_comm",)),
    "comm": ("exposed communication", ("tp_comm", "cp_comm", "ep_comm", "dp_comm")),
    "optimizer": ("optimizer", ("optimizer",)),
    "data": ("waiting for data", ("data",)),
    "checkpoint": ("checkpoint stalls", ("checkpoint",)),
    "other": ("everything else", ("other",)),
    "useful": ("useful: model FLOPs", ("ideal",)),
}
"""Peak FLOPs, what takes them away in order, and what is left; each entry's components."""


LEDGER_KEYS = {"rank", "step", "wall_s", "buckets"}


@dataclass(frozen=True)
class Compared:
    """One figure, predicted beside measured. `ratio` is measured / predicted, None where one is missing or zero."""

    predicted: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """measured / predicted."""
        if self.measured is None or not self.predicted:
            return None
        return self.measured / self.predicted

    def to_json(self) -> dict[str, float | None]:
        """Plain values with the ratio."""
        return {"predicted": self.predicted, "measured": self.measured, "ratio": self.ratio}


@dataclass(frozen=True)
class Component:
    """Seconds of one component in a steady step, average over ranks. `how`: measured, counted or shared out."""

    name: str
    meaning: str
    seconds: Compared
    how: str


@dataclass(frozen=True)
class RankTotal:
    """One rank over the whole run: seconds by bucket, wall time, the worst gap of any line, and memory."""

    rank: int
    pipeline_rank: int
    wall_s: float
    buckets: dict[str, float]
    worst_gap: float
    memory_bytes: Compared
    allocated_bytes: Compared


@dataclass(frozen=True)
class Share:
    """One bar of the efficiency waterfall, as shares of peak FLOPs."""

    name: str
    label: str
    share: Compared


@dataclass(frozen=True)
class Reconciliation:
    """Everything the report shows of time and memory. Times are per optimizer step unless named otherwise."""

    run: str
    layout: str
    world_size: int
    dtype: str
    steps: int
    steady_steps: int
    plain_steps: int
    step_time_s: Compared
    interval_s: tuple[float, float]
    noise: float
    tokens_per_s: Compared
    mfu: Compared
    convention: str
    peak_flops_per_s: float
    peak_source: str
    components: tuple[Component, ...]
    kinds: tuple[Component, ...]
    in_all: dict[str, Compared]
    waterfall: tuple[Share, ...]
    ranks: tuple[RankTotal, ...]
    adds_up: bool
    worst_gap: float
    residual: str
    residual_s: float
    cause: str
    evidence: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, every `Compared` with its ratio."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if isinstance(value, Compared):
        return value.to_json()
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def read_plan(run_dir: Path) -> tuple[dict[str, Any], Estimate]:
    """`plan.json` and the estimate in it. Raises InputError when the folder is not a run."""
    path = run_dir / "plan.json"
    if not path.is_file():
        raise InputError("no run here: plan.json is missing", where=str(run_dir), accepted="the folder `train` wrote")
    try:
        plan = read_json(path)
        estimate = Estimate.from_json(plan["estimate"])
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"not a plan ({error})", where=str(path)) from None
    missing = ", ".join(name for name in COMPONENTS if name not in estimate.components)
    if missing:
        raise InputError(f"a plan of another version of Bloomery, without {missing}", where=str(path))
    return plan, estimate


def reconcile(run_dir: str | Path) -> Reconciliation:
    """Lay the ledger of `run_dir` beside its plan. Raises InputError when either is missing or has no step."""
    run_dir = Path(run_dir)
    plan, estimate = read_plan(run_dir)
    lines = [line for line in read_lines(run_dir / "ledger.jsonl") if line.keys() >= LEDGER_KEYS]
    # What was planned is a step of the run's own batch; those of a ramp before it are of other sizes.
    first = int(plan.get("first_step", 0))
    if not any(line["step"] > first for line in lines):
        problem = "no finished step" if not first else f"no step after the ramp's {first}"
        raise InputError(f"{problem} in ledger.jsonl: nothing to reconcile yet", where=str(run_dir))
    plain, notes = _plain_steps([line for line in lines if not 0 < line["step"] <= first])
    quarter = len(plain) // 4
    steady = plain[quarter : len(plain) - quarter]
    measured = _mean_buckets(steady)
    step_s = float(sum(measured.values()))
    n_steps = len({line["step"] for line in lines if line["step"] > 0})
    world_size = int(plan["world_size"])
    checkpoint_s = _sum(lines, "checkpoint") / world_size / n_steps
    components = _components(estimate, measured, checkpoint_s, world_size)
    accounts = read_accounts(run_dir)
    kinds = _kinds(estimate, accounts, measured.get("compute", 0.0))
    named = {one.name: _difference(one.seconds) for one in (*components, *(kinds if accounts.by_rank else ()))}
    finding = find_cause(named, estimate.step_time_s, steady, _noise(steady))
    ranks = _ranks(lines, plan, estimate, accounts)
    worst_gap = max(rank.worst_gap for rank in ranks)
    tokens = estimate.tokens_per_s * estimate.step_time_s
    ideal_s = estimate.model_flops / (estimate.peak_flops_per_s * world_size)
    if ideal_s > step_s:
        notes.append("measured above peak: the stated peak is too low for this machine (probe it again)")
    return Reconciliation(
        run=_run_name(run_dir),
        layout=estimate.layout,
        world_size=world_size,
        dtype=estimate.dtype,
        steps=n_steps,
        steady_steps=len(steady),
        plain_steps=len(plain),
        step_time_s=Compared(estimate.step_time_s, step_s),
        interval_s=(estimate.low_s, estimate.high_s),
        noise=_noise(steady),
        tokens_per_s=Compared(estimate.tokens_per_s, tokens / step_s),
        mfu=Compared(estimate.mfu, ideal_s / step_s if ideal_s <= step_s else None),
        convention=estimate.convention,
        peak_flops_per_s=estimate.peak_flops_per_s,
        peak_source=estimate.peak_source,
        components=components,
        kinds=kinds,
        in_all=_in_all(estimate, accounts),
        waterfall=_waterfall(components),
        ranks=ranks,
        adds_up=worst_gap <= TOLERANCE,
        worst_gap=worst_gap,
        residual=finding.name,
        residual_s=finding.difference_s,
        cause=finding.cause,
        evidence=finding.evidence,
        notes=tuple(notes),
    )


def _run_name(run_dir: Path) -> str:
    """`run` or `run / stage` for an alignment stage's folder."""
    path = run_dir.resolve()
    return f"{path.parent.parent.name} / {path.name}" if path.parent.name == "align" else path.name


def _plain_steps(lines: Sequence[dict[str, Any]]) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """The steps to choose from, quickest first, each the lines of all its ranks; remarks on what had to be relaxed.

    A step that was run twice (a crash, then a resume) counts once, as it was run last.
    """
    since_start, kept, world = dict[int, int](), dict[int, dict[int, dict[str, Any]]](), {x["rank"] for x in lines}
    warm = dict[int, bool]()
    for line in lines:
        rank, step = line["rank"], line["step"]
        if step == -1:
            since_start[rank] = 0
        if step <= 0:
            continue
        since_start[rank] = since_start.get(rank, 0) + 1
        kept.setdefault(step, {})[rank] = line
        warm[step] = since_start[rank] <= WARM_UP
    whole = {step: list(ranks.values()) for step, ranks in kept.items() if len(ranks) == len(world)}
    plain = {step: rows for step, rows in whole.items() if not any(_has_pause(row) for row in rows)}
    notes = []
    chosen = [rows for step, rows in plain.items() if not warm[step]]
    if not chosen:
        notes.append(f"fewer than {WARM_UP + 1} plain steps: the first steps are part of the figures")
        chosen = list(plain.values()) or list(whole.values())
    if not chosen:
        raise InputError("no step was finished by every rank", where="ledger.jsonl")
    return sorted(chosen, key=lambda rows: float(np.mean([row["wall_s"] for row in rows]))), notes


def _has_pause(row: dict[str, Any]) -> bool:
    return any(
        row["buckets"].get(name, 0.0) > 0 for name in ("checkpoint", "evaluate", "compile", "profile", "recheck")
    )


def _mean_buckets(steps: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """Mean seconds by bucket over steps and ranks, without what is no part of a step; `other` takes any gap."""
    rows = [row for ranks in steps for row in ranks]
    names = {name for row in rows for name in row["buckets"]} - set(_NOT_OF_A_STEP)
    means = {name: float(np.mean([row["buckets"].get(name, 0.0) for row in rows])) for name in sorted(names)}
    wall = float(np.mean([row["wall_s"] - sum(row["buckets"].get(n, 0.0) for n in _NOT_OF_A_STEP) for row in rows]))
    means["other"] = means.get("other", 0.0) + wall - sum(means.values())
    return means


def _components(
    estimate: Estimate, measured: dict[str, float], checkpoint_s: float, world_size: int
) -> tuple[Component, ...]:
    """The table. `pp_comm` holds sends and bubble together, as they are measured."""
    expected = estimate.components
    compute_s = measured.get("compute", 0.0)
    ideal_s = estimate.model_flops / (estimate.peak_flops_per_s * world_size)
    planned_compute = expected["ideal"] + expected["kernel"] + expected["recompute"]
    recompute_s = compute_s * expected["recompute"] / planned_compute if planned_compute > 0 else 0.0
    figures: dict[str, tuple[float, float, str]] = {
        "ideal": (expected["ideal"], ideal_s, "counted"),
        "kernel": (expected["kernel"], compute_s - ideal_s - recompute_s, "measured"),
        "recompute": (expected["recompute"], recompute_s, "shared out"),
        "tp_comm": (expected["tp_comm"], measured.get("tp_comm", 0.0), "measured"),
        "cp_comm": (expected["cp_comm"], measured.get("cp_comm", 0.0), "measured"),
        "ep_comm": (expected["ep_comm"], measured.get("ep_comm", 0.0), "measured"),
        "pp_comm": (expected["pp_comm"] + expected["bubble"], measured.get("pp_comm", 0.0), "measured"),
        "dp_comm": (expected["dp_comm"], measured.get("dp_comm", 0.0), "measured"),
        "optimizer": (expected["optimizer"], measured.get("optimizer", 0.0), "measured"),
        "data": (expected["data"], measured.get("data", 0.0), "measured"),
        "other": (expected["other"], measured.get("other", 0.0) + measured.get("logging", 0.0), "measured"),
        "checkpoint": (expected["checkpoint"], checkpoint_s, "measured, spread over all steps"),
    }
    meaning = {**COMPONENTS, "pp_comm": "pipeline bubble and exposed sends (measured together)"}
    return tuple(Component(name, meaning[name], Compared(*pair[:2]), pair[2]) for name, pair in figures.items())


def _kinds(estimate: Estimate, accounts: Accounts, compute_s: float) -> tuple[Component, ...]:
    """The compute by kind of work: its measured seconds, in the shares that the profiled step had."""
    shares = accounts.kind_shares
    return tuple(
        Component(
            kind,
            meaning,
            Compared(estimate.compute.get(kind), shares[kind] * compute_s if shares else None),
            "shares of the profiled step",
        )
        for kind, meaning in KINDS.items()
    )


def _in_all(estimate: Estimate, accounts: Accounts) -> dict[str, Compared]:
    """Seconds in which messages of each dimension are under way, hidden or not."""
    found = accounts.in_all
    both = {name: Compared(estimate.in_all.get(name), found.get(name)) for name in MESSAGES}
    return {name: pair for name, pair in both.items() if pair.predicted or pair.measured}


def _noise(steps: Sequence[Sequence[dict[str, Any]]]) -> float:
    """How far the averaged steps lie apart: standard deviation over mean of their wall times."""
    walls = [float(np.mean([row["wall_s"] for row in rows])) for rows in steps]
    return float(np.std(walls) / np.mean(walls))


def _difference(pair: Compared) -> float:
    return (pair.measured or 0.0) - (pair.predicted or 0.0)


def _waterfall(components: Sequence[Component]) -> tuple[Share, ...]:
    """Shares of peak FLOPs, predicted and measured; each side adds up to 1."""
    by_name = {component.name: component.seconds for component in components}
    whole = [sum(getattr(pair, side) or 0.0 for pair in by_name.values()) for side in ("predicted", "measured")]
    shares = []
    for name, (label, parts) in WATERFALL.items():
        predicted = sum(by_name[part].predicted or 0.0 for part in parts) / whole[0]
        measured = sum(by_name[part].measured or 0.0 for part in parts) / whole[1]
        shares.append(Share(name, label, Compared(predicted, measured)))
    return tuple(shares)


def _sum(lines: Sequence[dict[str, Any]], bucket: str) -> float:
    return float(sum(line["buckets"].get(bucket, 0.0) for line in lines))


def _ranks(
    lines: Sequence[dict[str, Any]], plan: dict[str, Any], estimate: Estimate, accounts: Accounts
) -> tuple[RankTotal, ...]:
    """Totals of every rank over the whole run, start-up and end included."""
    world_size, stages = int(plan["world_size"]), estimate.memory.children
    totals = []
    for rank in sorted({int(line["rank"]) for line in lines}):
        mine = [line for line in lines if line["rank"] == rank]
        names = {name for line in mine for name in line["buckets"]}
        order = [name for name in BUCKETS if name in names] + sorted(names - set(BUCKETS))
        buckets = {name: _sum(mine, name) for name in order}
        gap = max(abs(sum(x["buckets"].values()) - x["wall_s"]) / max(x["wall_s"], 1e-9) for x in mine)
        pipeline_rank = rank * max(len(stages), 1) // world_size
        peak = max((line.get("peak_memory_bytes") or 0 for line in mine), default=0)
        stage = stages[pipeline_rank] if stages else estimate.memory
        wall = float(sum(line["wall_s"] for line in mine))
        memory = Compared(stage.value, float(peak) if peak else None)
        tensors = stage.value - sum(part.value for part in stage.children if part.name == "reserved")
        allocated = Compared(tensors, accounts.allocated_bytes(rank))
        totals.append(RankTotal(rank, pipeline_rank, wall, buckets, float(gap), memory, allocated))
    return tuple(totals)


def memory_parts(estimate: Estimate) -> list[dict[str, Any]]:
    """The predicted memory tree of each pipeline rank as plain values."""
    return [asdict(stage) for stage in estimate.memory.children]
