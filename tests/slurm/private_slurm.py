"""A real Slurm of one's own: slurmctld, two slurmd and munged in a temporary folder, gone when the test is.

Nothing of the system is read or changed. Slurm 22.05 of Debian (`apt-get install slurm-wlm munge`), as root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bloomery.cluster.sites.slurm import GOING_ON

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")


def why_not() -> str:
    """Why there can be no Slurm here, empty when there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "a private slurmctld and slurmd need root"


def free_ports(count: int) -> list[int]:
    """Ports that nobody has."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def configuration(folder: Path, host: str) -> str:
    """`slurm.conf`: two nodes of this machine. Requeued jobs may start at once (`cred_expire`)."""
    control, first, second = free_ports(3)
    return f"""
ClusterName=bloomery
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=5
KillWait=15
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
MinJobAge=3600
InactiveLimit=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


class Slurm:
    """The running daemons."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground of its own session."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def node(self, name: str) -> None:
        """Start a node's daemon."""
        self.start(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str) -> None:
        """Take a daemon away, as a loss of power would."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def processes(self, node: str = "") -> list[int]:
        """All processes that this Slurm has started (their environment says so), or those of one node."""
        marks = [f"SLURM_CONF={self.folder}/slurm.conf", *([f"SLURMD_NODENAME={node}"] if node else [])]
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if all(mark.encode() in environment for mark in marks):
                found.append(int(path.parent.name))
        return found

    def power_off(self, node: str) -> None:
        """Kill a node's daemon and all that it runs, at once: the tasks, and the daemons that look after these."""
        tasks = self.processes(node)
        keepers = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in tasks}
        started = set(self.processes())
        self.daemons[node].kill()
        for pid in [*(keepers & started), *tasks]:
            kill(pid)
        self.kill(node)

    def call(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def state(self, job: str) -> str:
        """A job's state."""
        fields = dict(word.partition("=")[::2] for word in self.call("scontrol", "show", "job", job, "-o").split())
        return fields["JobState"]

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
        """Wait for a condition; what the daemons last said is part of the failure."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                logs = "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.log"))
                raise AssertionError(f"never: {what}\n{logs}")
            time.sleep(0.1)

    def ended(self, job: str) -> str:
        """Wait for a job's end. Returns its last state."""
        self.wait(lambda: self.state(job) not in GOING_ON, f"end of job {job}", 600)
        return self.state(job)


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A Slurm with two idle nodes."""
    folder.mkdir()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(configuration(folder, host))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    site = Slurm(folder)
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    try:
        site.start("munged", "munged", "-F", "--force", *(f"--{name}={path}" for name, path in files.items()))
        site.wait((folder / "munge.socket").exists, "munge", 60)
        site.start("slurmctld", "slurmctld", "-D", "-c")
        for name in ("n1", "n2"):
            site.node(name)
        site.wait(lambda: _idle(site) == 2, "two idle nodes", 120)
        yield site
    finally:
        _end(site)


def _idle(site: Slurm) -> int:
    try:
        return site.call("sinfo", "-h", "-N", "-o", "%T").split().count("idle")
    except RuntimeError:
        return 0


def _end(site: Slurm) -> None:
    """Cancel what runs, then the daemons, last of all munge and whatever they have left behind."""
    try:
        site.call("scancel", "--user=root")
    except RuntimeError:
        pass
    for name in reversed(list(site.daemons)):
        site.kill(name)
    for pid in site.processes():
        kill(pid)


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
