"""Hosts for tests and benches: network namespaces of this machine, joined by a switch, each with a link of a set rate.

`on_host HOST COMMAND...` (a script, in the place of ssh) starts a command on one, with a share of a core to itself, or
on those of the machine's cores that are the host's own. Needs root, iproute2, tbf, taskset.

A share is a quota of each `PERIOD_US`, which a rank that waits for messages does not use up: such ranks compute faster
between their messages than others. Hosts with cores of their own have none of that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000
SUBNET = "10.199.77"
LATENCY = "100ms"
"""tbf's: how long a packet may wait before it is dropped; no delay is added."""
BURST = {"100mbit": "4kb", "1gbit": "32kb", "5gbit": "256kb"}
"""What may pass at once after a pause, which no real port lets pass: as little as still reaches the rate."""

SHARES = 200_000
"""Of the processor for a rank, where others have 1024: hosts of their own do not feel what else this machine does."""

ON_HOST = """#!/bin/sh
# on_host HOST COMMAND...: as ssh, into a network namespace, in a control group of its own.
host=$1; shift
case "$host" in
{hosts}
esac
group={group}-$$
mkdir "$group" && echo {shares} > "$group/cpu.shares"
echo {period} > "$group/cpu.cfs_period_us" && echo "$quota" > "$group/cpu.cfs_quota_us"
echo $$ > "$group/cgroup.procs"
exec taskset -c "$cores" ip netns exec "{prefix}$host" "$@"
"""


def reason_to_skip() -> str:
    """Why there can be no such hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None or shutil.which("taskset") is None:
        return "iproute2 or util-linux (taskset) is not installed"
    name = f"bl{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    shaped = subprocess.run(
        f"ip netns exec {name} tc qdisc add dev lo root tbf rate 1gbit burst 128kb latency {LATENCY}".split(),
        capture_output=True,
        text=True,
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    if not shaped.returncode and not CPU_GROUPS.is_dir():
        return f"no control groups for the processor at {CPU_GROUPS}"
    return f"no tbf: {shaped.stderr.strip()}" if shaped.returncode else ""


@dataclass(frozen=True)
class Network:
    """Hosts a, b, c, ... and what starts a command on one of them."""

    prefix: str
    names: tuple[str, ...]
    folder: Path

    def address(self, host: str) -> str:
        """What the others reach it by."""
        return f"{SUBNET}.{self.names.index(host) + 1}"

    def host_file(self, slots: int) -> Path:
        """A host file with all of them."""
        path = self.folder / "hosts"
        lines = [f"{name} slots={slots} address={self.address(name)} threads=1\n" for name in self.names]
        path.write_text("".join(lines))
        return path

    def shell(self, core_share: float | None, **of_its_own: float) -> str:
        """The script that starts commands, each with this share of a core, before whatever else this machine does;
        hosts named with another share have that one. None: each host has cores of its own, as many as the others, and
        its commands all of them."""
        every = sorted(os.sched_getaffinity(0))
        each = max(1, len(every) // len(self.names))
        lines = []
        for n, name in enumerate(self.names):
            own = every if core_share is not None else every[n * each : (n + 1) * each]
            if not own:
                raise RuntimeError(f"{len(every)} cores for {len(self.names)} hosts")
            share = of_its_own.get(name, core_share)
            quota = -1 if share is None else round(PERIOD_US * share)
            lines.append(f"{name}) quota={quota} cores={','.join(map(str, own))};;")
        text = ON_HOST.format(
            prefix=self.prefix,
            group=CPU_GROUPS / f"{self.prefix}rank",
            hosts="\n".join(lines),
            shares=SHARES,
            period=PERIOD_US,
        )
        path = self.folder / "on_host"
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def shape(self, host: str, rate: str) -> None:
        """Let the host send at most at `rate` (tc's words: 100mbit, 1gbit)."""
        burst = BURST.get(rate, "128kb")
        _on(self.prefix + host, "tc qdisc replace dev eth0 root tbf rate", rate, "burst", burst, "latency", LATENCY)

    def close(self, host: str) -> None:
        """Let nobody reach the host, as behind a firewall: what comes for its address goes nowhere."""
        _on(self.prefix + host, "ip addr del", f"{self.address(host)}/24", "dev eth0")
        _on(self.prefix + host, "ip addr add", f"{self.address(host)}/32", "dev lo")


@contextmanager
def network(names: tuple[str, ...], rate: str, folder: Path) -> Iterator[Network]:
    """Hosts on one switch, each sending at `rate`; removed at the end, with all that runs on them."""
    prefix = f"bl{os.getpid()}-"
    switch = f"{prefix}sw"
    made = Network(prefix, names, folder)
    try:
        _run("ip netns add", switch)
        _on(switch, "ip link add sw0 type bridge")
        _on(switch, "ip link set sw0 up")
        for name in names:
            space = prefix + name
            _run("ip netns add", space)
            _run("ip link add eth0 netns", space, "type veth peer name", f"to-{name}", "netns", switch)
            _on(switch, "ip link set", f"to-{name}", "master sw0 up")
            _on(space, "ip addr add", f"{made.address(name)}/24", "dev eth0")
            _on(space, "ip link set lo up")
            _on(space, "ip link set eth0 up")
            made.shape(name, rate)
        yield made
    finally:
        for space in (*(prefix + name for name in names), switch):
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            if pids:
                subprocess.run(["kill", "-9", *pids])
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        for group in CPU_GROUPS.glob(f"{prefix}rank-*"):
            subprocess.run(["rmdir", str(group)], capture_output=True)


def _run(*words: str) -> None:
    subprocess.run([part for word in words for part in word.split()], check=True, capture_output=True, text=True)


def _on(space: str, *words: str) -> None:
    _run("ip netns exec", space, *words)
