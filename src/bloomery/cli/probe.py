"""`bloomery probe`: measure this machine, or several hosts, and write a cluster file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from bloomery.spec.cluster import Accelerator, Cluster, Tier


def probe(
    out: Annotated[Path, typer.Option(help="The cluster file to write.")] = Path("machine.yaml"),
    quick: Annotated[bool, typer.Option("--quick", help="Less time, more noise.")] = False,
    nodes: Annotated[
        str, typer.Option(metavar="HOSTFILE|slurm", help="Measure these hosts together; slurm: the nodes of this job.")
    ] = "",
    shell: Annotated[str, typer.Option(help="What starts a command on a host (default: ssh, in a job srun).")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the cluster as JSON.")] = False,
) -> None:
    """Measure this machine: GEMM by shape, attention, memory, launches, links between processes and disk.

    Name the file it writes as `cluster:` in a run.yaml, or with `bloomery plan --cluster`. Let the machine be quiet.
    A line of a HOSTFILE is `HOST [slots=N] [address=A] [threads=N]`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from bloomery.cli.console import print_json
    from bloomery.cluster.hostfile import read_hosts
    from bloomery.cluster.probe import check_target, steps, write_cluster
    from bloomery.cluster.probe import probe as measure_machine

    check_target(out)
    hosts = read_hosts(nodes, shell) if nodes else None
    columns = (TextColumn("{task.description:44}"), BarColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("probe", total=steps(hosts, quick=quick))

        def tell(what: str) -> None:
            bar.update(task, description=f"probe: {what}", advance=1)

        cluster = measure_machine(quick=quick, folder=out.absolute().parent, hosts=hosts, progress=tell)
    write_cluster(cluster, out)
    if as_json:
        print_json(cluster.model_dump(mode="json"))
        return
    console = Console()
    console.print(_table(cluster, f"{out}: {cluster.provenance['cpu']}"))
    console.print(f"each figure is one rank's while all ranks work; {cluster.provenance['noise']}")
    console.print(f"bfloat16: {cluster.provenance['bfloat16']}")
    disk, start_s = cluster.storage, cluster.process_start_s or 0.0
    console.print(
        f"disk: write {cluster.storage_bytes_per_s('write') / 1e9:.2f} GB/s, "
        f"read {cluster.storage_bytes_per_s('read') / 1e9:.2f} GB/s, "
        f"sync {(disk.fsync_s or 0.0) * 1e3:.1f} ms; a process starts in {start_s:.1f} s"
    )


def _table(cluster: Cluster, title: str) -> Table:
    """A line for each measured cut of a machine, or for each tier between hosts."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("ranks", "float32", "bfloat16", "memory", "launch", "all-reduce", "latency"):
        table.add_column(column, justify="right")
    for cut in cluster.cuts:
        table.add_row(str(cut.ranks), *_rates(cut.accelerator), *_link(cut.tiers[0] if cut.ranks > 1 else None))
    if not cluster.cuts:
        for tier in cluster.tiers:
            table.add_row(f"{tier.name}, {tier.span}", *_rates(cluster.accelerator), *_link(tier))
    return table


def _rates(one: Accelerator) -> list[str]:
    flops = [one.peak_flops_per_s.get(dtype) for dtype in ("float32", "bfloat16")]
    return [
        *("-" if rate is None else f"{rate / 1e9:,.0f} GF/s" for rate in flops),
        f"{one.memory_bandwidth_bytes_per_s / 1e9:.1f} GB/s",
        f"{one.launch_s * 1e6:.1f} us",
    ]


def _link(tier: Tier | None) -> list[str]:
    if tier is None:
        return ["", ""]
    return [f"{tier.bandwidth_bytes_per_s / 1e9:.3g} GB/s", f"{tier.latency_s * 1e6:.0f} us"]
