"""Judgements of one host from its facts: each check is a small pure function from facts and needs to a finding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from bloomery.cluster.doctor.devices import gpu_memory, gpu_use, gpus
from bloomery.cluster.doctor.facts import Facts
from bloomery.cluster.doctor.finding import Answer, Finding, Verdict, good
from bloomery.cluster.doctor.needs import Needs
from bloomery.cluster.doctor.network import network
from bloomery.spec import catalog
from bloomery.spec.files import parse_yaml

GB, GIB, MIB = 1e9, 1 << 30, 1 << 20
BUSY_ADVICE, BUSY_FAULT = 0.15, 0.5
STEAL_ADVICE, STEAL_FAULT = 0.02, 0.15
CONTAINER_SHM_BYTES = 64 * MIB
"""What container engines give /dev/shm by default; NCCL and data loaders die in it."""
ENOUGH_SHM_BYTES = GIB
FILES_OF_A_RANK = 256
ENOUGH_LOCKED = 0.5
"""Of the host's memory: more than RDMA registers of it."""
SLOW_DISK_BYTES_PER_S, SLOW_SYNC_S, SLOW_RESOLVE_S = 50e6, 0.5, 2.0


def judged(facts: Facts, needs: Needs) -> list[Finding]:
    """Every check of one host."""
    found = []
    for name, check in CHECKS.items():
        verdict, text, remedy = check(facts, needs)
        found.append(Finding(check=name, host=facts.host, verdict=verdict, found=text, remedy=remedy))
    return found


@cache
def _known() -> dict[str, Any]:
    path = Path(catalog.__file__).parent / "catalog" / "versions.yaml"
    table: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return table


def numbers(version: str) -> tuple[int, ...]:
    """A version's numbers, for comparing.

    >>> numbers("2.13.0+cu128")
    (2, 13, 0)
    """
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdecimal())


def versions(facts: Facts, _: Needs) -> Answer:
    """Python, torch, CUDA and the driver against the table of what goes together."""
    have, known = facts.versions, _known()
    listed = ", ".join(f"{name} {version}" for name, version in have.items())
    for name in ("python", "torch"):
        oldest = known[name]["oldest"]
        if name not in have:
            return "fault", f"no {name}", f"install {name} {oldest} or newer (`make setup`)"
        if numbers(have[name]) < numbers(oldest):
            return "fault", f"{name} {have[name]}", f"{name} {oldest} or newer is needed"
    cuda, driver = have.get("cuda", ""), have.get("driver", "")
    if driver and not cuda:
        return "fault", f"a GPU, and torch {have['torch']} built for CPUs", "install the CUDA build of torch"
    if cuda and not driver and not facts.gpu_problem:
        return "advice", f"torch built for CUDA {cuda}, no driver here", "install the driver, or the CPU build of torch"
    needed = known["driver_of_cuda"].get(cuda.partition(".")[0]) if cuda else None
    if cuda and driver and needed is None:
        return "unknown", f"CUDA {cuda} is not in the table; {listed}", ""
    if cuda and driver and needed and numbers(driver)[0] < needed:
        return (
            "fault",
            f"driver {driver} is too old for CUDA {cuda}",
            f"driver {needed} or newer, or torch for older CUDA",
        )
    return good(listed)


def affinity(facts: Facts, needs: Needs) -> Answer:
    """Cores for every rank, on every NUMA node."""
    allowed, online = facts.cores_allowed, facts.cores_online
    if allowed < needs.ranks:
        return "fault", f"{allowed} cores for {needs.ranks} ranks", "start fewer ranks, or ask for more cores a task"
    if facts.gpus and facts.numa_allowed < facts.numa_nodes:
        found = f"bound to {facts.numa_allowed} of {facts.numa_nodes} NUMA nodes"
        return "advice", found, "bind each rank to the node of its GPU, not all to one"
    if 2 * allowed <= online:
        return "advice", f"bound to {allowed} of {online} cores", "ask the scheduler for more cores a task"
    return good(f"{allowed} of {online} cores, {facts.numa_nodes} NUMA node{'s' * (facts.numa_nodes > 1)}")


def governor(facts: Facts, _: Needs) -> Answer:
    """Clock frequency on demand costs GPUs their host time, and a virtual machine its neighbours' share."""
    if facts.steal >= STEAL_ADVICE:
        verdict: Verdict = "fault" if facts.steal >= STEAL_FAULT else "advice"
        return verdict, f"{facts.steal:.0%} of the cores stolen by the hypervisor", "ask for dedicated cores"
    slow = [name for name in facts.governors if name in ("powersave", "ondemand", "conservative")]
    if slow:
        return "advice", f"cpu governor {slow[0]}", "`cpupower frequency-set -g performance`"
    return good(f"steal {facts.steal:.0%}, governor {', '.join(facts.governors) or 'not ours to see'}")


def load(facts: Facts, _: Needs) -> Answer:
    """What others compute here now."""
    busiest = f"; most by {facts.busiest.name} ({facts.busiest.pid})" if facts.busiest else ""
    found = f"{facts.others:.0%} of the cores used by others"
    if facts.others < BUSY_ADVICE:
        return good(found)
    verdict: Verdict = "fault" if facts.others >= BUSY_FAULT else "advice"
    return verdict, found + busiest, "end or move the other work; it slows every rank that waits for this one"


def memory(facts: Facts, needs: Needs) -> Answer:
    """What is free, and what the control group leaves of it, for all ranks here; of a GPU, where a rank has one."""
    if needs.gpus:
        return gpu_memory(facts, needs)
    free, limit = facts.memory_free_bytes, facts.memory_limit_bytes
    room = free if limit is None else min(free, limit)
    found = f"{room / GIB:.1f} GiB free" + ("" if limit is None else f", control group {limit / GIB:.1f} GiB")
    need = needs.memory_bytes * needs.ranks
    if need > room:
        remedy = "raise the job's memory" if limit == room else "fewer ranks here, a layout with less memory, ZeRO"
        return "fault", f"{found}; {needs.ranks} ranks need {need / GIB:.1f}", remedy
    return good(found + (f", {need / GIB:.1f} needed" if need else ""))


def shared_memory(facts: Facts, _: Needs) -> Answer:
    """/dev/shm, through which ranks of a host and data loaders talk."""
    free = facts.shm_free_bytes
    if free is None:
        return "fault", "no /dev/shm", "mount it: `mount -t tmpfs tmpfs /dev/shm`"
    remedy = "`docker run --shm-size=8g` or --ipc=host; an emptyDir of medium Memory in Kubernetes"
    if free <= CONTAINER_SHM_BYTES:
        return "fault", f"/dev/shm has {free / MIB:.0f} MiB", remedy
    return (
        ("advice" if free < ENOUGH_SHM_BYTES else "good"),
        f"/dev/shm has {free / GIB:.1f} GiB",
        remedy * (free < ENOUGH_SHM_BYTES),
    )


def open_files(facts: Facts, needs: Needs) -> Answer:
    """A rank opens a socket to every other rank of each of its groups, and files besides."""
    soft, hard = facts.files
    need = FILES_OF_A_RANK + 8 * needs.peers
    if soft == -1 or soft >= need:
        return good(f"{soft if soft != -1 else 'no'} open files allowed")
    remedy = (
        f"`ulimit -n {need}`" if hard in (-1,) or hard >= need else f"nofile {need} in limits.conf or the unit file"
    )
    return "fault", f"{soft} open files, {need} needed", remedy


def locked_memory(facts: Facts, _: Needs) -> Answer:
    """RDMA registers memory, which must be allowed to be locked."""
    soft = facts.locked_bytes[0]
    if not facts.infiniband:
        return good("no RDMA adapter here")
    if soft == -1:
        return good("no limit")
    found = f"{soft / MIB:.0f} MiB of {facts.memory_bytes / MIB:.0f} may be locked"
    if soft >= ENOUGH_LOCKED * facts.memory_bytes:
        return good(found)
    return "fault", found, "memlock unlimited in limits.conf and for slurmd"


def disk(facts: Facts, needs: Needs) -> Answer:
    """Room for the checkpoints to come, and how fast they are written and synced."""
    there = facts.disk
    if there.problem:
        return "fault", f"{there.folder}: {there.problem}", "make it writable, or name another `out:`"
    rate, sync_ms = there.write_bytes_per_s / 1e6, there.sync_s * 1e3
    found = f"{there.free_bytes / GB:.1f} GB free, {rate:.0f} MB/s, sync {sync_ms:.0f} ms"
    if there.free_bytes < needs.disk_bytes:
        need = f"{needs.disk_bytes / GB:.1f} GB needed"
        return "fault", f"{found}; {need}", "free some space, or keep fewer (train.keep_checkpoints, train.keep_every)"
    if there.write_bytes_per_s < SLOW_DISK_BYTES_PER_S or there.sync_s > SLOW_SYNC_S:
        return "advice", found, "write runs to a faster disk; checkpoints will hold training up"
    return good(found)


def ports(facts: Facts, _: Needs) -> Answer:
    """Processes here can reach each other."""
    if facts.loopback_problem:
        return "fault", f"loopback: {facts.loopback_problem}", "`ip link set lo up`; allow loopback in the firewall"
    return good("loopback connects")


def name_service(facts: Facts, needs: Needs) -> Answer:
    """Gloo announces the address that the host's own name has, where no interface is named. Our own starts name one."""
    named = facts.variables.get("GLOO_SOCKET_IFNAME")
    away = [address for address in facts.hostname_addresses if not address.startswith("127.") and address != "::1"]
    if facts.hostname_problem and not named:
        return "advice", f"{facts.host}: {facts.hostname_problem}", f"add {facts.host} to /etc/hosts or DNS"
    if needs.hosts > 1 and not away and not named:
        found = f"{facts.host} is {', '.join(facts.hostname_addresses)}, which others cannot reach"
        return "advice", found, "give it its address in /etc/hosts, or set GLOO_SOCKET_IFNAME"
    if facts.resolve_s > SLOW_RESOLVE_S:
        return "advice", f"{facts.resolve_s:.1f} s to resolve {facts.host}", "add it to /etc/hosts; look at resolv.conf"
    known = ", ".join(facts.hostname_addresses) or "unknown"
    return good(f"{facts.host} is {known}{f', {named} is used' if named else ''}")


CHECKS: dict[str, Callable[[Facts, Needs], Answer]] = {
    "versions": versions,
    "GPUs": gpus,
    "GPU use": gpu_use,
    "network": network,
    "names": name_service,
    "ports": ports,
    "cores": affinity,
    "clock rate": governor,
    "other work": load,
    "memory": memory,
    "shared memory": shared_memory,
    "open files": open_files,
    "locked memory": locked_memory,
    "disk": disk,
}
