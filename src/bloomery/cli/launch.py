"""`bloomery launch RUN.yaml --on slurm|kubernetes|skypilot|ssh`: start a run where a scheduler says when and where."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bloomery.cluster.sites.order import Order
    from bloomery.spec.run import Run


class Site(StrEnum):
    """Where to."""

    SLURM = "slurm"
    KUBERNETES = "kubernetes"
    SKYPILOT = "skypilot"
    SSH = "ssh"


def _site(name: str) -> Site:
    if name in list(Site):
        return Site(name)
    here = "; on this machine a run starts with `bloomery train RUN.yaml`" if name == "local" else ""
    raise typer.BadParameter(f"{name!r} is not one of {', '.join(Site)}{here}")


def launch(
    run_files: Annotated[list[Path], typer.Argument(metavar="RUN.yaml...", help="Several: one array job (slurm).")],
    on: Annotated[
        Site,
        typer.Option(
            parser=_site, metavar=f"[{'|'.join(Site)}]", help="Whose hosts; settings are under `launch` in RUN.yaml."
        ),
    ],
    nodes: Annotated[int | None, typer.Option(min=1, help="Hosts (default: as the cluster has them).")] = None,
    hosts: Annotated[Path | None, typer.Option(metavar="HOSTFILE", help="For ssh: one host a line.")] = None,
    array: Annotated[str, typer.Option(metavar="KEY=A,B,...", help="A run for each value, as one array job.")] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key, as in launch.slurm.partition=gpu; repeatable."),
    ] = None,
    show: Annotated[bool, typer.Option("--print", "--dry-run", help="Only show what would be submitted.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and leave.")] = False,
    again: Annotated[
        bool, typer.Option("--follow", help="Follow the job launched before, or say how; submit nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the job as JSON; implies --detach.")] = False,
) -> None:
    """Start a run on a scheduler's hosts, follow it with the line of a local run, and let it outlive the follower.

    Ctrl-C leaves the job running; by ssh all hosts save and stop. A job stopped ahead of its time limit saves and goes
    on by itself, bit for bit.
    """
    from bloomery.cluster.sites.order import order
    from bloomery.spec.catalog import read_run
    from bloomery.spec.errors import InputError

    _check_options(on, hosts, show=show, again=again, as_json=as_json)
    assignments = set_ or []
    runs = [read_run(path, assignments) for path in run_files]
    if array:
        runs = [run for path in run_files for run in _sweep(path, assignments, array)]
    if len(runs) > 1 and on is not Site.SLURM:
        raise InputError("only slurm starts several runs at once", where="--on", found=on.value)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise InputError("every run of an array needs a name of its own", where="name", found=", ".join(names))
    if on is Site.SLURM:
        _slurm([order(_absolute(run), nodes) for run in runs], run_files, show, detach or as_json, again, as_json)
    elif again:
        _tell_how_to_follow(runs[0], on)
    elif on is Site.SSH:
        _ssh(_absolute(runs[0]), nodes, hosts, show=show)
    else:
        _manifest(order(runs[0], nodes), on, show=show, as_json=as_json)


def _check_options(on: Site, hosts: Path | None, *, show: bool, again: bool, as_json: bool) -> None:
    """Raise InputError for options that contradict each other, before anything is submitted."""
    from bloomery.spec.errors import InputError

    if show + again + as_json > 1:
        raise InputError("one of them at a time", where="--print, --follow, --json")
    if hosts is not None and on is not Site.SSH:
        raise InputError(
            "only ssh is told its hosts", where="--hosts", found=str(hosts), accepted="--nodes N, how many"
        )
    if on is Site.SSH and (again or as_json):
        problem = "by ssh a run is followed where it was launched; `bloomery watch RUN_DIR` looks at it from elsewhere"
        raise InputError(problem, where="--follow" if again else "--json")


def _tell_how_to_follow(run: Run, site: Site) -> None:
    from bloomery.cluster.sites import kubernetes, skypilot

    print((kubernetes if site is Site.KUBERNETES else skypilot).how_to_follow(run))


def _absolute(run: Run) -> Run:
    from bloomery.cluster.sites.order import with_absolute_folders

    return with_absolute_folders(run)


def _sweep(path: Path, assignments: list[str], array: str) -> list[Run]:
    """One run for each value of a key, named by the run and the value's number, all on the data of the run itself."""
    from bloomery.cluster.prepare import data_folder
    from bloomery.spec.catalog import read_run
    from bloomery.spec.errors import InputError

    key, equals, values = array.partition("=")
    if not equals or not all(values.split(",")):
        raise InputError("a key and its values are expected", where="--array", found=array, accepted="KEY=A,B,...")
    shared = str(data_folder(read_run(path, assignments)))
    runs = []
    for number, value in enumerate(values.split(",")):
        run = read_run(path, [*assignments, f"{key}={value}"])
        changes: dict[str, object] = {"name": f"{run.name}-{number}"}
        if not key.startswith("data."):
            changes["data"] = run.data.model_copy(update={"folder": shared})
        runs.append(run.model_copy(update=changes))
    return runs


def _slurm(orders: list[Order], run_files: list[Path], show: bool, detach: bool, again: bool, as_json: bool) -> None:
    """Print, submit or follow."""
    import sys

    from bloomery.cli.console import print_json
    from bloomery.cluster.sites import slurm
    from bloomery.cluster.sites.jobs import last_job, remember
    from bloomery.cluster.sites.order import unfinished
    from bloomery.spec.files import write_atomically

    folder = orders[0].folder / "launch"
    log = folder / ("%A_%a.log" if len(orders) > 1 else "%j.log")
    if again:
        job = last_job(orders[0].folder, "slurm")
        _follow(orders[0], job, run_files)
        return
    left = unfinished(orders) or list(range(len(orders)))  # where none is left, each says so below
    text = slurm.script(orders, log, left)
    if show:
        print(text, end="")
        return
    if len(left) < len(orders):
        done = ", ".join(one.run.name for number, one in enumerate(orders) if number not in left)
        print(f"already trained to the last step, not started: {done}", file=sys.stderr)
    started = {number: orders[number] for number in left}
    for one in started.values():
        _check_and_describe(one)
    write_atomically(folder / "job.sh", text)
    job = slurm.submit(folder / "job.sh")
    for number, one in started.items():
        name = f"{job}_{number}" if len(orders) > 1 else job
        remember(one.folder, "slurm", name, folder / f"{name}.log")
    folders = [str(one.folder) for one in started.values()]
    if as_json:
        print_json({"job": job, "script": str(folder / "job.sh"), "runs": folders})
    elif len(orders) > 1:
        print(f"job {job}, {len(folders)} runs; `bloomery watch {' '.join(folders)}` shows them", file=sys.stderr)
    else:
        print(f"submitted job {job}, {orders[0].nodes} host(s), log {folder / job}.log", file=sys.stderr)
        if not detach:
            _follow(orders[0], job, run_files)


def _check_and_describe(one: Order) -> None:
    """Write down what is to be started. Raises InputError where it cannot be, or is there already."""
    from bloomery.cluster.sites import slurm
    from bloomery.cluster.sites.jobs import last_job
    from bloomery.cluster.sites.order import check_here
    from bloomery.spec.errors import InputError

    check_here(one)
    earlier = last_job(one.folder, "slurm", required=False)
    if earlier and slurm.status(earlier).code is None:
        problem = f"job {earlier} of this run is still there; --follow follows it, `scancel {earlier}` ends it"
        raise InputError(problem, where=str(one.folder))
    one.write_description()


def _follow(one: Order, job: str, run_files: list[Path]) -> None:
    """Until the job has ended. Raises SystemExit with its code."""
    import sys

    from bloomery.cluster.prepare import is_finished
    from bloomery.cluster.sites import slurm
    from bloomery.cluster.sites.follow import follow
    from bloomery.cluster.sites.jobs import log_of

    try:
        last = follow(one.folder, log_of(one.folder, job), lambda: slurm.status(job), f"job {job}")
    except KeyboardInterrupt:
        again = f"bloomery launch {' '.join(map(str, run_files))} --on slurm --follow"
        print(f"\njob {job} goes on; `{again}` follows it again, `scancel {job}` ends it", file=sys.stderr)
        raise SystemExit(130) from None
    if last.code and not is_finished(one.folder):
        raise SystemExit(last.code)


def _ssh(run: Run, nodes: int | None, hosts: Path | None, *, show: bool) -> None:
    from bloomery.cluster.sites import ssh
    from bloomery.cluster.sites.order import check_here, order
    from bloomery.spec.errors import InputError

    if hosts is None:
        raise InputError("names the hosts, one a line", where="--hosts", accepted="a file")
    names = ssh.read_hosts(hosts)
    one = order(run, nodes or len(names))
    if one.nodes > len(names):
        raise InputError(f"{one.nodes} hosts are needed, {len(names)} are named", where=str(hosts))
    commands = ssh.commands(one, names[: one.nodes])
    if show:
        print("\n".join(ssh.shown(command) for command in commands))
        return
    check_here(one)
    one.write_description()
    code = ssh.run(commands, names)
    if code:
        raise SystemExit(code)


def _manifest(one: Order, site: Site, *, show: bool, as_json: bool) -> None:
    """Kubernetes and SkyPilot: write what they read, and hand it to their own command."""
    import sys

    from bloomery.cli.console import print_json
    from bloomery.cluster.sites import kubernetes, skypilot

    where = kubernetes if site is Site.KUBERNETES else skypilot
    if show:
        print(where.text(one), end="")
        return
    path = where.submit(one)
    if as_json:
        print_json({"manifest": str(path), "follow": where.how_to_follow(one.run)})
    else:
        print(f"submitted {path}; follow it with `{where.how_to_follow(one.run)}`", file=sys.stderr)
