"""`bloomery doctor`: is this machine or cluster fit to train?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bloomery.cluster.doctor.finding import Finding, Verdict

FEW = 4
MARKS = {"good": "[green]good[/]", "advice": "[yellow]advice[/]", "fault": "[red]FAULT[/]", "unknown": "unknown"}


def doctor(
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN.yaml", help="Examine for this run: its ranks, memory and disk.")
    ] = None,
    hosts: Annotated[
        str, typer.Option(metavar="HOSTFILE|slurm", help="Examine these hosts; slurm: the nodes of this job.")
    ] = "",
    shell: Annotated[str, typer.Option(help="What starts a command on a host (default: ssh, in a job srun).")] = "",
    burn_in: Annotated[
        float, typer.Option("--burn-in", min=0, metavar="SECONDS", help="All ranks work this long; the slow are named.")
    ] = 0.0,
    history: Annotated[
        Path | None, typer.Option(help="Where burn-ins are remembered (default: runs/doctor.jsonl).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for a scheduler.")] = False,
) -> None:
    """Is this machine or cluster fit to train? One line a check, with the remedy; exit code 0 fit, 1 not, 2 bad input.

    Nothing is changed or written but, after a burn-in, its history.
    """
    from bloomery.cli.console import print_json
    from bloomery.cluster.doctor.finding import worst
    from bloomery.cluster.doctor.visit import examine, needs_of
    from bloomery.cluster.hostfile import here, read_hosts
    from bloomery.spec.catalog import read_run

    described = None if run is None else read_run(run, [])
    there = read_hosts(hosts, shell) if hosts else None
    needs, folder = needs_of(described, there)
    there = there or here(needs.ranks)
    where = history or folder.parent / "doctor.jsonl"
    findings = examine(there, folder, needs, burn_in_s=burn_in, history=where, tell=_tell)
    verdict = worst(findings)
    if as_json:
        print_json(
            {
                "fit": verdict != "fault",
                "verdict": verdict,
                "findings": [finding.model_dump(mode="json") for finding in findings],
            }
        )
    else:
        _print(findings)
    if verdict == "fault":
        raise SystemExit(1)


def _tell(text: str) -> None:
    """What is being done, where somebody watches."""
    import sys

    if sys.stderr.isatty():
        print(f"doctor: {text}", file=sys.stderr, flush=True)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    several = len({finding.host for finding in findings} - {"all"}) > 1
    table = Table(show_lines=False)
    for column in ("check", *(["host"] if several else []), "verdict", "found", "remedy"):
        table.add_column(column)
    for check, hosts, verdict, found, remedy in rows(findings):
        table.add_row(check, *([hosts] if several else []), MARKS[verdict], found, remedy)
    console = Console()
    console.width = min(console.width, 100)
    console.print(table)
    faults = [one for one in findings if one.verdict == "fault"]
    advice = sum(one.verdict == "advice" for one in findings)
    extra = f", {advice} thing{'s' * (advice != 1)} could be better" if advice else ""
    if not faults:
        console.print(f"fit to train{extra}")
        return
    where = f" on {', '.join(dict.fromkeys(one.host for one in faults))}" if several else ""
    console.print(f"not fit to train: {len(faults)} fault{'s' * (len(faults) != 1)}{where}{extra}")


def rows(findings: list[Finding]) -> list[tuple[str, str, Verdict, str, str]]:
    """Check, hosts, verdict, found and remedy of each line: hosts of which a check says the same good thing share one,
    so that a thousand of them are a page. Faults and advice stand for themselves."""
    order = list(dict.fromkeys(finding.check for finding in findings))
    lines = []
    for check in order:
        mine = [finding for finding in findings if finding.check == check]
        good = [finding for finding in mine if finding.verdict == "good"]
        if good:
            kinds = list(dict.fromkeys(finding.found for finding in good))
            found = kinds[0] if len(kinds) == 1 else f"{kinds[0]}; {len(kinds) - 1} other"
            lines.append((check, _few([finding.host for finding in good]), good[0].verdict, found, ""))
        lines += [(check, one.host, one.verdict, one.found, one.remedy) for one in mine if one.verdict != "good"]
    return lines


def _few(hosts: list[str]) -> str:
    """Some names, or how many."""
    return ", ".join(hosts) if len(hosts) <= FEW else f"{len(hosts)} hosts"
