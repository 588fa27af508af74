"""What a host says of itself: everything the checks judge, gathered in about a second. Imports no torch."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import resource
import socket
import tempfile
import time
from importlib import metadata
from pathlib import Path

import psutil

from bloomery.cluster.doctor.nvidia import Gpu, read_gpus, recent_xids
from bloomery.spec.base import Noun

WATCHED_S = 0.5
DISK_BYTES = 32 << 20
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
PACKAGES = (
    ("bloomery", "bloomery"),
    ("torch", "torch"),
    ("nccl", "nvidia-nccl-cu11"),
    ("nccl", "nvidia-nccl-cu12"),
    ("nccl", "nvidia-nccl-cu13"),
)
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Interface(Noun):
    """A network interface. `mbit_per_s`: 0 where it does not say; `device`: there is hardware behind it."""

    up: bool
    device: bool = True
    mbit_per_s: int = 0
    addresses: tuple[str, ...] = ()


class Busy(Noun):
    """A process that is not ours and computes now; `cores` of it."""

    pid: int
    name: str
    cores: float


class Disk(Noun):
    """The run folder's disk; `problem` where it could not be written."""

    folder: str
    free_bytes: int = 0
    write_bytes_per_s: float = 0.0
    sync_s: float = 0.0
    problem: str = ""


class Facts(Noun):
    """One host. `amd`: it has AMD's GPUs, which `gpus` does not list; `infiniband`: by `adapter:port` whether it is
    active; `cores_online`: of the machine, `cores_allowed`: of this process; `steal`, `others`: shares of all cores
    while it was watched; `files`, `locked_bytes`: soft and hard limits, -1 without one."""

    host: str
    versions: dict[str, str] = {}
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str = ""
    amd: bool = False
    xids: tuple[str, ...] = ()
    interfaces: dict[str, Interface] = {}
    variables: dict[str, str] = {}
    infiniband: dict[str, bool] = {}
    cores_online: int = 1
    cores_allowed: int = 1
    numa_nodes: int = 1
    numa_allowed: int = 1
    governors: tuple[str, ...] = ()
    steal: float = 0.0
    others: float = 0.0
    busiest: Busy | None = None
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    memory_limit_bytes: int | None = None
    shm_free_bytes: int | None = None
    files: tuple[int, int] = (1 << 20, 1 << 20)
    locked_bytes: tuple[int, int] = (-1, -1)
    hostname_addresses: tuple[str, ...] = ()
    hostname_problem: str = ""
    resolve_s: float = 0.0
    loopback_problem: str = ""
    disk: Disk = Disk(folder=".")


def gather(folder: Path) -> Facts:
    """This host's facts; `folder` is where runs will write."""
    watching = _Watch()
    hostname = platform.node()
    addresses, problem, resolve_s = _resolved(hostname)
    gpus, gpu_problem, driver = read_gpus()
    disk = measure_disk(folder)
    limits = {name: resource.getrlimit(name) for name in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)}
    steal, others, busiest = watching.ended()
    return Facts(
        host=hostname,
        versions=_versions() | driver,
        gpus=gpus,
        gpu_problem=gpu_problem,
        amd=Path("/dev/kfd").exists(),
        xids=recent_xids() if gpus else (),
        interfaces=_interfaces(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        infiniband=ports_of_adapters(Path("/sys/class/infiniband")),
        cores_online=os.cpu_count() or 1,
        cores_allowed=len(os.sched_getaffinity(0)),
        numa_nodes=len(_numa()) or 1,
        numa_allowed=sum(bool(cores & os.sched_getaffinity(0)) for cores in _numa()) or 1,
        governors=_governors(),
        steal=steal,
        others=others,
        busiest=busiest,
        memory_bytes=psutil.virtual_memory().total,
        memory_free_bytes=psutil.virtual_memory().available,
        memory_limit_bytes=_memory_limit(psutil.virtual_memory().total),
        shm_free_bytes=psutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        files=limits[resource.RLIMIT_NOFILE],
        locked_bytes=limits[resource.RLIMIT_MEMLOCK],
        hostname_addresses=addresses,
        hostname_problem=problem,
        resolve_s=resolve_s,
        loopback_problem=_loopback_problem(),
        disk=disk,
    )


class _Watch:
    """What the processors do between now and `ended`, and which process that is not ours does most of it."""

    def __init__(self) -> None:
        self.started, self.before = time.monotonic(), psutil.cpu_times()
        self.spent = {process.pid: spent for process, spent in _spent()}

    def ended(self) -> tuple[float, float, Busy | None]:
        """Shares of the cores that were stolen and that others used, and the busiest of them."""
        time.sleep(max(0.0, self.started + WATCHED_S - time.monotonic()))
        passed = time.monotonic() - self.started
        cores = os.cpu_count() or 1
        stolen = getattr(psutil.cpu_times(), "steal", 0.0) - getattr(self.before, "steal", 0.0)
        used = [(spent - self.spent.get(process.pid, spent), process) for process, spent in _spent()]
        total = sum(seconds for seconds, _ in used)
        seconds, process = max(used, key=lambda one: one[0], default=(0.0, None))
        busiest = None
        if process is not None and seconds > 0:
            busiest = Busy(pid=process.pid, name=process.info["name"] or "?", cores=round(seconds / passed, 2))
        return min(1.0, stolen / passed / cores), min(1.0, total / passed / cores), busiest


def _spent() -> list[tuple[psutil.Process, float]]:
    """Processor seconds of every process but this one and those that started it."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["name", "cpu_times"]):
        times = process.info["cpu_times"]
        if process.pid not in ours and times is not None:
            found.append((process, times.user + times.system))
    return found


def _versions() -> dict[str, str]:
    """Of what must go together. PyTorch's CUDA is read from its version file: importing it takes seconds."""
    found = {"python": platform.python_version()}
    for name, package in PACKAGES:
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cuda = _torch_cuda()
    return found | ({"cuda": cuda} if cuda else {})


def _torch_cuda() -> str:
    """The CUDA version PyTorch was built with; empty for a CPU build."""
    found = importlib.util.find_spec("torch")
    for place in found.submodule_search_locations or () if found else ():
        path = Path(place) / "version.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(value, ast.Constant):
                return str(value.value or "")
    return ""


def _interfaces() -> dict[str, Interface]:
    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    ip = (socket.AF_INET, socket.AF_INET6)
    return {
        name: Interface(
            up=state.isup,
            device=(Path("/sys/class/net") / name / "device").exists(),
            mbit_per_s=state.speed,
            addresses=tuple(a.address.partition("%")[0] for a in addresses.get(name, ()) if a.family in ip),
        )
        for name, state in states.items()
    }


def ports_of_adapters(folder: Path) -> dict[str, bool]:
    """Which ports of RDMA adapters are active, by `adapter:port`."""
    states = sorted(folder.glob("*/ports/*/state"))
    return {f"{path.parts[-4]}:{path.parts[-2]}": path.read_text().strip().endswith("ACTIVE") for path in states}


def _numa() -> list[set[int]]:
    """The cores of each NUMA node."""
    nodes = []
    for path in Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"):
        cores = set[int]()
        for part in path.read_text().strip().split(","):
            first, _, last = part.partition("-")
            cores |= set(range(int(first), int(last or first) + 1)) if first else set()
        nodes.append(cores)
    return nodes


def _governors() -> tuple[str, ...]:
    paths = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return tuple(sorted({path.read_text().strip() for path in paths}))


def _memory_limit(total: int) -> int | None:
    """What the control group allows, where that is less than the machine has."""
    for name in CGROUP_LIMITS:
        try:
            limit = int(Path(name).read_text())
        except (OSError, ValueError):
            continue
        if limit < total:
            return limit
    return None


def _resolved(hostname: str) -> tuple[tuple[str, ...], str, float]:
    started = time.monotonic()
    try:
        found, problem = {str(entry[4][0]) for entry in socket.getaddrinfo(hostname, None)}, ""
    except OSError as error:
        found, problem = set(), error.strerror or str(error)
    return tuple(sorted(found)), problem, time.monotonic() - started


def _loopback_problem() -> str:
    """Why a process cannot listen on loopback and another connect; empty when it can."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def measure_disk(folder: Path) -> Disk:
    """Write and sync a file in `folder`, or in the nearest parent of it that is there."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = psutil.disk_usage(str(existing)).free
    try:
        with tempfile.NamedTemporaryFile(dir=existing, buffering=0) as stream:
            stream.write(b"x" * 4096)
            started = time.perf_counter()
            os.fsync(stream.fileno())
            sync_s = time.perf_counter() - started
            block = os.urandom(1 << 20)
            started = time.perf_counter()
            for _ in range(DISK_BYTES >> 20):
                stream.write(block)
            os.fsync(stream.fileno())
            rate = DISK_BYTES / (time.perf_counter() - started)
    except OSError as error:
        return Disk(folder=str(existing), free_bytes=free, problem=error.strerror or str(error))
    return Disk(folder=str(existing), free_bytes=free, write_bytes_per_s=rate, sync_s=sync_s)
