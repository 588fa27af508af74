"""Which machines take part, and the command that starts a process on one of them. Imports no torch.

A host file has a line for each host: its name, then `slots=N` (ranks on it, default 1), `address=A` (what the others
reach it by, default its name) and `threads=N` (of each rank, default its cores shared evenly); `#` starts a comment.
Processes are started by a remote shell, called as `SHELL HOST COMMAND...`: ssh, Slurm's srun, or `ip netns exec`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bloomery.spec.errors import BloomeryError, InputError, nearest_match
from bloomery.spec.files import read_text

SSH = ("ssh", "-o", "BatchMode=yes")
"""Never asks for a password; unknown keys of hosts are refused as the user's own settings say."""
SRUN = ("srun", "--overlap", "--ntasks=1", "--nodes=1", "--nodelist")
SLURM = "slurm"
"""In the place of a host file: the nodes of the Slurm job this runs in."""
SETTINGS = ("slots", "address", "threads")
LOOPBACK = "127.0.0.1"
_WITH_PORT = re.compile(r"[^:]+:\d+")
_TASKS = re.compile(r"([1-9]\d{0,5})(?:\(x([1-9]\d{0,5})\))?")


@dataclass(frozen=True)
class Host:
    """One machine. `slots`: ranks on it; `threads`: of each rank, None: its cores shared evenly."""

    name: str
    slots: int = 1
    address: str = ""
    threads: int | None = None

    @property
    def reached_by(self) -> str:
        """The address the others connect to; whose account ssh uses says nothing of it."""
        return self.address or self.name.rpartition("@")[2]


@dataclass(frozen=True)
class Hosts:
    """The machines in the order of their ranks; without a `shell` it is this one alone, and nothing leaves it."""

    hosts: tuple[Host, ...]
    shell: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks on all of them."""
        return sum(host.slots for host in self.hosts)

    def command(self, host: Host, module: str, environment: dict[str, str]) -> list[str]:
        """What starts a module of ours there; words without quotes, since ssh joins them to a line and others do not.

        A host has the same Python at the same path, as on a shared file system.
        """
        path = os.environ.get("PYTHONPATH")
        settings = {**environment, **({"PYTHONPATH": path} if path else {})}
        words = ["env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, "-m", module]
        return [*self.shell, host.name, *words] if self.shell else words


def here(slots: int) -> Hosts:
    """This machine, over loopback."""
    return Hosts((Host("localhost", slots, LOOPBACK),))


def read_hosts(source: str, shell: str = "") -> Hosts:
    """The hosts of a file, or of the Slurm job this runs in (`slurm`). `shell` replaces ssh or srun.

    Raises InputError that names the line.
    """
    if source == SLURM:
        return Hosts(_slurm_hosts(), tuple(shell.split()) or SRUN)
    path = Path(source)
    if not path.is_file():
        raise InputError("no such host file", where=source, accepted=f"a file with a host a line, or `{SLURM}`")
    hosts = parse_hosts(read_text(path), source)
    words = tuple(shell.split()) or SSH
    if shutil.which(words[0]) is None:
        raise InputError("no such program; it starts the processes on the hosts", where="--shell", found=words[0])
    return Hosts(hosts, words)


def parse_hosts(text: str, where: str) -> tuple[Host, ...]:
    """The hosts of a file's text. Raises InputError that names the line."""
    found = list[Host]()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _host(words, f"{where}: line {number}")
        if host.name in {other.name for other in found}:
            raise InputError("this host was named before", where=f"{where}: line {number}", found=host.name)
        found.append(host)
    if not found:
        raise InputError("no host in it", where=where, accepted="a line for each: HOST [slots=N] [address=A]")
    return tuple(found)


def _host(words: list[str], where: str) -> Host:
    name, values = words[0], dict[str, str]()
    if name.startswith("-") or "=" in name:
        raise InputError("a host's name comes first", where=where, found=name)
    if _WITH_PORT.fullmatch(name):
        raise InputError("a host takes no port here", where=where, found=name, accepted="the port in ~/.ssh/config")
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or not value or key not in SETTINGS:
            raise InputError(
                "unknown setting", where=where, found=word, accepted=SETTINGS, nearest=nearest_match(key, SETTINGS)
            )
        values[key] = value
    for key in ("slots", "threads"):
        if key in values and not (values[key].isdecimal() and int(values[key]) >= 1):
            raise InputError("a whole number from 1 is expected", where=where, found=f"{key}={values[key]}")
    threads = int(values["threads"]) if "threads" in values else None
    return Host(name, int(values.get("slots", "1")), values.get("address", ""), threads)


def _slurm_hosts() -> tuple[Host, ...]:
    """The nodes of the job, each with its tasks. Raises InputError outside of one."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise InputError("not inside a Slurm job (no SLURM_JOB_NODELIST)", where=SLURM, accepted="a host file")
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    if listed.returncode:
        raise BloomeryError(f"scontrol: {' '.join(listed.stderr.split()) or 'failed without a word'}")
    names = listed.stdout.split()
    tasks = tasks_per_node(os.environ.get("SLURM_TASKS_PER_NODE", "1"), len(names))
    return tuple(Host(name, slots) for name, slots in zip(names, tasks, strict=True))


def tasks_per_node(text: str, nodes: int) -> list[int]:
    """Slurm's short form, `2(x3),1`, written out. Raises InputError for anything else.

    >>> tasks_per_node("2(x3),1", 4)
    [2, 2, 2, 1]
    """
    counts = list[int]()
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None:
            raise InputError("not Slurm's tasks per node", where="SLURM_TASKS_PER_NODE", found=text, accepted="2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts if len(counts) == nodes else [counts[0]] * nodes
