"""Measures this machine, for every way to cut it into ranks, or several hosts: all ranks at once, as in training."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from bloomery.cluster.hostfile import Hosts, here
from bloomery.cluster.measuring import Tell, run_ranks
from bloomery.cluster.probe_parts import accelerator, add_turn, groups, noise_of, slowed, tiers
from bloomery.cluster.world import threads_per_rank
from bloomery.ledger.environment import describe
from bloomery.spec.cluster import PROBED, Accelerator, Cluster, Cut, Storage
from bloomery.spec.errors import InputError
from bloomery.spec.files import to_yaml, write_atomically
from bloomery.spec.seal import sealed_text

Results = list[dict[str, Any]]
"""The figures of all ranks, in their order."""
WORKER = "bloomery.cluster.probe_worker"
STORAGE_BYTES = 64 << 20
SYNCS = 5
TURNS, TURNS_ON_GPUS = 3, 2
"""Of the reference models and links, one after the other over all sets of ranks; of more ranks than cores one less. A
GPU that other work does not share is as fast in one minute as in the next."""
WORKER_TIMEOUT_S = 300
"""Since the last word of any: a busy machine takes long over many steps, and all it has found would be thrown away."""


def probe(*, quick: bool, folder: Path, hosts: Hosts | None = None, progress: Tell = lambda _: None) -> Cluster:
    """Measure and return this machine as a `Cluster` with a measured cut for 1, 2, 4, ... ranks, or `hosts` as one with
    a tier between them. `folder`: where the disk is measured.

    Raises InputError for hosts of different sizes, BloomeryError when a measuring process fails.
    """
    if hosts is None:
        measured, crowd = dict[int, Results](), dict[int, Results]()
        for ranks in cut_sizes():
            progress(f"{_ranks(ranks)}, {threads_per_rank(ranks)} threads each")
            measured[ranks] = _measured(here(ranks), quick, progress)
        if not quick:
            own = {here(ranks): results for ranks, results in measured.items()}
            for number in range(2, turns(_gpu_count() > 0) + 1):
                _again(own, number, progress)
                _crowd(crowd, number, progress)
        cuts = [
            Cut(ranks=ranks, accelerator=accelerator(results), tiers=tiers(results, 1))
            for ranks, results in measured.items()
        ]
        results = [result for found in measured.values() for result in found]
        one, links, per_node = cuts[-1].accelerator, cuts[-1].tiers, cuts[-1].ranks
        cores = len(os.sched_getaffinity(0))
        cuts += [
            Cut(ranks=ranks, accelerator=crowded(one, ranks, cores, slowed(found)), tiers=tiers(found, 1))
            for ranks, found in crowd.items()
        ]
        parts: dict[str, Any] = {"name": "this-machine", "cuts": tuple(cuts), "nodes": 1}
    else:
        per_node = slots_of(hosts)
        progress(f"{len(hosts.hosts)} hosts of {per_node} ranks")
        results = _measured(hosts, quick, progress)
        for number in range(2, turns(results[0]["device"] == "cuda") + 1) if not quick else ():
            _again({hosts: results}, number, progress)
        parts = {"name": "these-hosts", "nodes": len(hosts.hosts)}
        one, links = accelerator(results), tiers(results, len(hosts.hosts))
    progress("storage")
    noise = noise_of(results)
    return Cluster(
        accelerators_per_node=per_node,
        accelerator=one,
        tiers=links,
        storage=measure_storage(folder),
        failures_per_1000_node_days=0.0,
        pue=1.0,
        process_start_s=median(result["started_s"] for result in results),
        noise=noise,
        source=PROBED,
        provenance=_provenance(results[-1], noise, hosts),
        **parts,
    )


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _measured(
    hosts: Hosts,
    quick: bool,
    progress: Tell,
    what: str = "all",
    dtypes: Sequence[str] = (),
    before: Results | None = None,
) -> Results:
    """`before`: of an earlier turn, by whose share of the cores messages are timed in all of them."""
    share = before[0]["core_share"] if before else None
    settings = {"quick": quick, "what": what, "dtypes": list(dtypes), "core_share": share}
    return run_ranks(WORKER, hosts, settings, WORKER_TIMEOUT_S, _inner(progress))


def _again(sets: dict[Hosts, Results], number: int, progress: Tell) -> None:
    """Reference models and links of every set of ranks once more, added to what was found.

    A machine that others share, or that was idle before, is faster in one minute than in the next, and so is one
    process than another: rounds that lie apart see it, repeats of one round do not.
    """
    for hosts, results in sets.items():
        of = turns(results[0]["device"] == "cuda")
        progress(f"{_ranks(len(results))}, again ({number} of {of})")
        add_turn(results, _measured(hosts, False, progress, "turn", list(results[0]["gemm"]), results))


def _crowd(sets: dict[int, Results], number: int, progress: Tell) -> None:
    """Links of more ranks than cores, and how much these slow each other down, added to what was found; the rest of
    what such a rank is follows from one with cores of its own."""
    cores = len(os.sched_getaffinity(0))
    for ranks in crowded_sizes():
        progress(f"{ranks} ranks on {cores} core{'s' if cores > 1 else ''} ({number - 1} of {TURNS - 1})")
        found = _measured(here(ranks), False, progress, "crowd", before=sets.get(ranks))
        if ranks in sets:
            add_turn(sets[ranks], found)
        else:
            sets[ranks] = found


def crowded(whole: Accelerator, ranks: int, cores: int, slower: float) -> Accelerator:
    """What each of more ranks than cores is while all work. `whole`: a rank with a core of its own; `slower`: what
    they take over an even share of the time."""
    ranks_per_core = ranks / cores
    share = ranks_per_core * slower
    rate = whole.optimizer_bytes_per_s
    changed = {
        "name": f"cpu-shared-by-{ranks_per_core:g}",
        "ranks_per_core": ranks_per_core,
        "peak_flops_per_s": {dtype: peak / share for dtype, peak in whole.peak_flops_per_s.items()},
        "memory_bandwidth_bytes_per_s": whole.memory_bandwidth_bytes_per_s / share,
        "memory_bytes": float(psutil.virtual_memory().available / ranks),
        "optimizer_bytes_per_s": None if rate is None else rate / share,
        "launch_s": whole.launch_s * share,
        "kernel_s": whole.kernel_s * share,
    }
    return whole.model_copy(update=changed)


def turns(gpus: bool) -> int:
    """Turns of a probe that is not quick."""
    return TURNS_ON_GPUS if gpus else TURNS


STEPS_OF_RANKS = 4
"""What a set of ranks tells of its kernels while it measures; each kind of link is told beside."""


def steps(hosts: Hosts | None, *, quick: bool) -> int:
    """How often `progress` is told something."""
    sets = [here(ranks) for ranks in cut_sizes()] if hosts is None else [hosts]
    rings = not _gpu_count()
    links = [len(groups(tuple(h.slots for h in one.hosts), rings=rings)) for one in sets]
    crowds = len(crowded_sizes()) if hosts is None else 0
    turn = sum(2 + kinds for kinds in links) + 3 * crowds
    return 1 + sum(1 + STEPS_OF_RANKS + kinds for kinds in links) + (0 if quick else (turns(not rings) - 1) * turn)


def _inner(progress: Tell) -> Tell:
    """Steps inside one set of ranks, told as such."""
    return lambda text: progress(f"  {text}")


def slots_of(hosts: Hosts) -> int:
    """Ranks on each host. Raises InputError when they differ: a `Cluster` has nodes of one kind."""
    slots = {host.slots for host in hosts.hosts}
    if len(slots) > 1:
        raise InputError(
            "hosts of different sizes are no cluster of one kind", found=sorted(slots), accepted="equal slots"
        )
    return slots.pop()


def _provenance(facts: dict[str, Any], noise: float, hosts: Hosts | None) -> dict[str, str]:
    environment = describe()
    names = {"hosts": " ".join(host.name for host in hosts.hosts)} if hosts else {}
    return names | {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": str(environment.get("cpu", "")),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch": str(facts["torch"]),
        "peak": "best matrix product of the cut, alone or as its reference models have it",
        "bfloat16": _bfloat16_note(facts),
        "noise": f"measured to {noise:.1%} (standard error of repeats, of the noisiest kind)",
    }


def _bfloat16_note(facts: dict[str, Any]) -> str:
    ratio = facts["bfloat16_ratio"]
    measured = "measured" if "bfloat16" in facts["gemm"] else "not measured, since nothing gains from it here"
    return f"a product runs at {ratio:.2f} of float32's rate; {measured}"


def cut_sizes() -> list[int]:
    """1, 2, 4, ... ranks up to the cores (at most 8); with GPUs, one rank for each."""
    gpus = _gpu_count()
    if gpus:
        return [gpus]
    cores = len(os.sched_getaffinity(0))
    return [ranks for ranks in (1, 2, 4, 8) if ranks <= cores]


def crowded_sizes() -> list[int]:
    """More ranks than cores, up to two on each or four in all (at most 8); none with GPUs."""
    cores = len(os.sched_getaffinity(0))
    return [] if _gpu_count() else list(range(cores + 1, min(max(2 * cores, 4), 8) + 1))


def _gpu_count() -> int:
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return visible_gpus(found.stdout, os.environ.get("CUDA_VISIBLE_DEVICES")) if found.returncode == 0 else 0


def visible_gpus(listing: str, chosen: str | None) -> int:
    """Devices that CUDA shows of those `nvidia-smi -L` lists. `chosen`: CUDA_VISIBLE_DEVICES, numbers or beginnings of
    UUIDs; what stands behind one that does not exist is not shown.

    >>> visible_gpus("GPU 0: NVIDIA RTX A2000 Laptop GPU (UUID: GPU-5c89)", "0,1")
    1
    """
    gpus = sum(line.startswith("GPU ") for line in listing.splitlines())
    if chosen is None:
        return gpus
    uuids = re.findall(r"UUID: ([\w-]+)", listing)

    def exists(one: str) -> bool:
        return int(one) < gpus if one.isdecimal() else bool(one) and any(uuid.startswith(one) for uuid in uuids)

    return sum(1 for _ in takewhile(exists, map(str.strip, chosen.split(","))))


def check_target(path: Path) -> None:
    """Raise InputError, before the minute of measuring, when the cluster file could not be written there."""
    if path.is_dir():
        raise InputError("a file is expected, this is a folder", where=str(path))
    folder = path.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < STORAGE_BYTES:
        problem = f"no space left: the disk is measured with {STORAGE_BYTES / 1e6:.0f} MB, {free / 1e6:.1f} MB are free"
        raise InputError(problem, where=str(folder))


def measure_storage(folder: Path) -> Storage:
    """Write and sync a large file, read it back once the kernel has dropped it from its cache, and sync small ones."""
    folder.mkdir(parents=True, exist_ok=True)
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as stream:
        started = time.perf_counter()
        for _ in range(STORAGE_BYTES >> 20):
            stream.write(block)
        os.fsync(stream.fileno())
        written = time.perf_counter()
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        stream.seek(0)
        started_to_read = time.perf_counter()
        while stream.read(1 << 20):
            pass
        read = time.perf_counter()
    return Storage(
        write_bytes_per_s=STORAGE_BYTES / (written - started),
        read_bytes_per_s=STORAGE_BYTES / (read - started_to_read),
        fsync_s=median(_sync_s(folder) for _ in range(SYNCS)),
    )


def _sync_s(folder: Path) -> float:
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as stream:
        stream.write(b"x" * 4096)
        started = time.perf_counter()
        os.fsync(stream.fileno())
        return time.perf_counter() - started


def write_cluster(cluster: Cluster, path: Path, written_by: str = PROBED) -> None:
    """Write the file a person can read; defaults are left out, numbers rounded to four digits."""
    values = _rounded(cluster.model_dump(mode="json", exclude_defaults=True))
    what = "This machine" if cluster.nodes == 1 else "These hosts"
    header = f"# {what}, as `{written_by}` found it. Rates in FLOP/s and bytes/s, times in seconds.\n"
    write_atomically(path, sealed_text(header + to_yaml(values)))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
