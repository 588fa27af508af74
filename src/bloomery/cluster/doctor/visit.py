"""A whole visit: the needs of a run, the examination, the burn-in with its history."""

from __future__ import annotations

import datetime
from pathlib import Path

from bloomery.cluster.doctor.compare import burn_in, compared
from bloomery.cluster.doctor.examine import visit
from bloomery.cluster.doctor.finding import Finding
from bloomery.cluster.doctor.history import read_history, remember
from bloomery.cluster.doctor.needs import Needs
from bloomery.cluster.hostfile import Hosts
from bloomery.cluster.measuring import Tell
from bloomery.cluster.prepare import chosen_layout, predicted, run_folder
from bloomery.cluster.probe import cut_sizes
from bloomery.planner.search import run_dtype
from bloomery.spec.commit import checkpoint_bytes, checkpoints_to_come
from bloomery.spec.errors import BloomeryError
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import Run

DEFAULT_FOLDER = Path("runs") / "any"


def needs_of(run: Run | None, hosts: Hosts | None) -> tuple[Needs, Path]:
    """What a run asks of each host, and its folder; without a run as many ranks as there are slots, on this machine as
    the probe would start at most, and the folder of runs."""
    ranks = max(host.slots for host in hosts.hosts) if hosts else cut_sizes()[-1]
    count = len(hosts.hosts) if hosts else 1
    if run is None:
        return Needs(ranks=ranks, peers=ranks * count, hosts=count), DEFAULT_FOLDER
    layout = chosen_layout(run, None)
    dtype = run_dtype(run, run.cluster.cut(layout.world_size))
    folder = run_folder(run)
    train, cluster = run.train, run.cluster
    on_a_host = min(layout.world_size, cluster.accelerators_per_node)
    missing = checkpoints_to_come(
        folder / "checkpoints",
        keep=train.keep_checkpoints,
        every=train.checkpoint_every,
        steps=train.n_steps,
        keep_every=train.keep_every,
    )
    return Needs(
        ranks=ranks if hosts else on_a_host,
        gpus=on_a_host if cluster.accelerator.kind == "gpu" else 0,
        peers=layout.world_size,
        hosts=count,
        memory_bytes=predicted(run, layout, dtype)["estimate"]["memory_bytes"],
        disk_bytes=float(checkpoint_bytes(parameter_count(run.model), train.averaging.kept) * missing),
    ), folder


def examine(hosts: Hosts, folder: Path, needs: Needs, *, burn_in_s: float, history: Path, tell: Tell) -> list[Finding]:
    """Every finding; with `burn_in_s` seconds also those of a burn-in, which is remembered in `history`."""
    findings = visit(hosts, folder, needs, tell)
    if not burn_in_s:
        return findings
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    try:
        results = burn_in(hosts, burn_in_s, tell)
    except BloomeryError as error:
        remedy = "mend the faults above first, or try it with fewer hosts"
        return [*findings, Finding(check="burn-in", host="all", verdict="fault", found=str(error), remedy=remedy)]
    found, records = compared(hosts, results, read_history(history), now)
    remember(history, records)
    return findings + found
