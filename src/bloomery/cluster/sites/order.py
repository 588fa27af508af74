"""What is to be started, the same for every site: the run with its layout, hosts, ranks per host, the commands."""

from __future__ import annotations

import posixpath
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bloomery.cluster.built_data import require_data
from bloomery.cluster.prepare import chosen_layout, data_folder, is_finished, run_folder
from bloomery.ledger.trackers import check_trackers
from bloomery.spec.errors import InputError
from bloomery.spec.files import to_yaml, write_atomically
from bloomery.spec.run import Run


@dataclass(frozen=True)
class Order:
    """One run to start on `nodes` hosts with `per_node` ranks each. `gpus`: accelerators per host, 0 on processors.

    `whole`: the layout takes every accelerator of its hosts. `submitted`: seconds since the epoch.
    """

    run: Run
    nodes: int
    per_node: int
    gpus: int
    whole: bool
    submitted: float

    @property
    def folder(self) -> Path:
        """The run's folder, absolute."""
        return run_folder(self.run).absolute()

    @property
    def description(self) -> Path:
        """The run as it was launched: what a user changes in the file later does not reach a job that waits."""
        return self.folder / "launch" / "run.yaml"

    def description_text(self) -> str:
        """The content of `description`."""
        return to_yaml(self.run.model_dump(mode="json"))

    def write_description(self) -> None:
        """Put `description` in its place."""
        write_atomically(self.description, self.description_text())


def order(run: Run, nodes: int | None) -> Order:
    """What to start for `run`; `nodes` instead of the cluster's number of hosts. Raises InputError."""
    check_trackers(run.train.metrics)
    layout = chosen_layout(run, None)
    world = layout.world_size
    if nodes is None:
        nodes = 1 if run.cluster.cuts else -(-world // run.cluster.accelerators_per_node)
    if nodes < 1 or world % nodes:
        counts = [count for count in range(1, world + 1) if world % count == 0]
        raise InputError(f"{world} ranks cannot be shared evenly", where="--nodes", found=nodes, accepted=counts)
    per_node = world // nodes
    return Order(
        run=run.model_copy(update={"layout": layout}),
        nodes=nodes,
        per_node=per_node,
        gpus=per_node if run.cluster.accelerator.kind == "gpu" else 0,
        whole=per_node >= run.cluster.accelerators_per_node or bool(run.cluster.cuts),
        submitted=time.time(),
    )


def check_here(one: Order) -> None:
    """What can be checked where this machine sees the run's folders. Raises InputError."""
    require_data(one.run, data_folder(one.run))
    if is_finished(one.folder):
        raise InputError(
            "already trained to its last step; `bloomery train --fresh` starts over", where=str(one.folder)
        )


def require_shared(run: Run, mounts: Sequence[str]) -> None:
    """Raise InputError for a folder that is on none of `mounts`: what is written there is lost with its host, and
    every start would begin at the first step.

    The run begins in the first of them, so relative folders are below it. Text and pairs are not asked about: shards
    have been made of them, and hosts read only those.
    """
    for where, folder in (("out", run.out), ("data.folder", run.data.folder)):
        place = PurePosixPath(posixpath.normpath(posixpath.join(mounts[0], folder)))
        if not any(place.is_relative_to(posixpath.normpath(mount)) for mount in mounts):
            problem = "not on the volume that all hosts share"
            raise InputError(problem, where=where, found=folder, accepted=f"a folder below {' or '.join(mounts)}")


def unfinished(orders: Sequence[Order]) -> list[int]:
    """The numbers of the runs of an array that have steps to go."""
    return [number for number, one in enumerate(orders) if not is_finished(one.folder)]


def with_absolute_folders(run: Run) -> Run:
    """The run with folders that mean the same from every working directory."""
    text = tuple(str(Path(name).expanduser().absolute()) for name in run.data.text)
    data = run.data.model_copy(update={"folder": str(data_folder(run).absolute()), "text": text})
    return run.model_copy(update={"data": data, "out": str(Path(run.out).absolute())})


def program() -> list[str]:
    """This very Bloomery, for hosts that see the same files."""
    return [sys.executable, "-m", "bloomery"]


def require_program(name: str, package: str) -> str:
    """The path of a site's own command. Raises InputError when this machine does not have it."""
    found = shutil.which(name)
    if found is None:
        raise InputError(
            f"{name} is not on this machine ({package}); --print shows what would be submitted", where="--on"
        )
    return found
