"""`bloomery probe`: measure this machine and write a cluster file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def probe(
    out: Annotated[Path, typer.Option(help="The cluster file to write.")] = Path("machine.yaml"),
    quick: Annotated[bool, typer.Option("--quick", help="Less time, more noise.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cluster as JSON.")] = False,
) -> None:
    """Measure this machine: GEMM by shape, attention, memory, launches, links between processes and disk.

    Name the file it writes as `cluster:` in a run.yaml, or with `bloomery plan --cluster`. Let the machine be quiet.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from bloomery.cli.console import print_json
    from bloomery.cluster.probe import check_target, cut_sizes, write_cluster
    from bloomery.cluster.probe import probe as measure_machine

    check_target(out)
    columns = (TextColumn("{task.description:32}"), BarColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("probe", total=len(cut_sizes()) + 1)
        started = False

        def tell(what: str) -> None:
            nonlocal started
            bar.update(task, description=f"probe: {what}", advance=1 if started else 0)
            started = True

        cluster = measure_machine(quick=quick, folder=out.absolute().parent, progress=tell)
        bar.update(task, advance=1, description="probe")
    write_cluster(cluster, out)
    if as_json:
        print_json(cluster.model_dump(mode="json"))
        return
    table = Table(title=f"{out}: {cluster.provenance['cpu']}")
    for column in ("ranks", "float32", "bfloat16", "memory", "launch", "all-reduce", "latency"):
        table.add_column(column, justify="right")
    for cut in cluster.cuts:
        one, tier = cut.accelerator, cut.tiers[0]
        alone = cut.ranks == 1
        table.add_row(
            str(cut.ranks),
            *(_rate(one.peak_flops_per_s.get(dtype)) for dtype in ("float32", "bfloat16")),
            f"{one.memory_bandwidth_bytes_per_s / 1e9:.1f} GB/s",
            f"{one.launch_s * 1e6:.1f} us",
            "" if alone else f"{tier.bandwidth_bytes_per_s / 1e9:.2f} GB/s",
            "" if alone else f"{tier.latency_s * 1e6:.0f} us",
        )
    console = Console()
    console.print(table)
    console.print(f"each figure is one rank's while all ranks of its cut work; {cluster.provenance['noise']}")
    console.print(f"bfloat16: {cluster.provenance['bfloat16']}")


def _rate(flops_per_s: float | None) -> str:
    return "-" if flops_per_s is None else f"{flops_per_s / 1e9:,.0f} GF/s"
