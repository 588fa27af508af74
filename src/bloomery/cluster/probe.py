"""Measures this machine: for every way to cut it into ranks, all ranks measure at once, as they will train."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil

from bloomery.cluster.probe_fit import attention_efficiency, calibrated, fit_gemm, fit_tier, optimizer_rate, spread
from bloomery.cluster.world import threads_per_rank
from bloomery.ledger.environment import describe
from bloomery.spec.cluster import PROBED, Accelerator, Cluster, Cut, Storage, Tier
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.files import to_yaml, write_atomically
from bloomery.spec.seal import sealed_text

ATTENTION_SHAPE = (4, 8, 256, 32)
STORAGE_BYTES = 64 << 20
WORKER_TIMEOUT_S = 180

Progress = Callable[[str], None]


def probe(*, quick: bool, folder: Path, progress: Progress = lambda _: None) -> Cluster:
    """Measure and return this machine as a `Cluster` with a measured cut for 1, 2, 4, ... ranks.

    Raises BloomeryError when a measuring process fails.
    """
    cores = len(os.sched_getaffinity(0))
    cuts, noises, facts = list[Cut](), list[float](), dict[str, Any]()
    for ranks in cut_sizes():
        progress(f"{ranks} rank{'s' if ranks > 1 else ''}, {threads_per_rank(ranks)} threads each")
        results = measure(ranks, quick)
        facts = results[0]
        cuts.append(Cut(ranks=ranks, accelerator=_accelerator(results, ranks), tiers=(_tier(results, ranks),)))
        noises += [spread(row["s"]) for result in results for row in result["gemm"]["float32"] if row["m"] >= 1024]
    progress("storage")
    environment = describe()
    return Cluster(
        name="this-machine",
        nodes=1,
        accelerators_per_node=cuts[-1].ranks,
        accelerator=cuts[-1].accelerator,
        tiers=cuts[-1].tiers,
        cuts=tuple(cuts),
        storage=measure_storage(folder),
        failures_per_1000_node_days=0.0,
        pue=1.0,
        source=PROBED,
        provenance={
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "cpu": str(environment.get("cpu", "")),
            "cores": str(cores),
            "torch": str(facts["torch"]),
            "peak": "best measured matrix product of the cut",
            "bfloat16": _bfloat16_note(facts),
            "noise": f"repeated products differ by {median(noises):.1%} (median of spread)",
        },
    )


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


def _gpu_count() -> int:
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except OSError:
        return 0
    return found.stdout.count("GPU ") if found.returncode == 0 else 0


def measure(ranks: int, quick: bool) -> list[dict[str, Any]]:
    """Run the measuring processes of one cut; their figures by rank."""
    with tempfile.TemporaryDirectory(prefix="bloomery-probe-") as scratch:
        workers = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "OMP_NUM_THREADS": str(threads_per_rank(ranks)),
                "OMP_WAIT_POLICY": "passive",
                "GLOO_SOCKET_IFNAME": "lo",
                "BLOOMERY_RENDEZVOUS": f"file://{scratch}/rendezvous",
                "PYTHONWARNINGS": "ignore",
            }
            command = [sys.executable, "-m", "bloomery.cluster.probe_worker", "quick" if quick else "full"]
            workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        try:
            outputs = [worker.communicate(timeout=WORKER_TIMEOUT_S) for worker in workers]
        except subprocess.TimeoutExpired:
            raise BloomeryError(
                f"probe: {ranks} measuring processes took more than {WORKER_TIMEOUT_S} s; is the machine busy?"
            ) from None
        finally:
            for worker in workers:
                worker.kill()
    results = []
    for rank, (worker, (out, error)) in enumerate(zip(workers, outputs, strict=True)):
        lines = [line for line in out.decode().splitlines() if line.startswith("PROBE ")]
        if worker.returncode or not lines:
            last = (error.decode().strip().splitlines() or ["no message"])[-1]
            raise BloomeryError(f"probe: rank {rank} of {ranks} failed: {last}")
        results.append(json.loads(lines[0].removeprefix("PROBE ")))
    return results


def _accelerator(results: list[dict[str, Any]], ranks: int) -> Accelerator:
    """What one rank is: the mean over ranks that measured at the same time."""
    first = results[0]
    cuda = first["device"] == "cuda"
    fits = {dtype: [fit_gemm(result["gemm"][dtype]) for result in results] for dtype in first["gemm"]}
    peaks: dict[Any, float] = {dtype: mean(peak for peak, _ in found) for dtype, found in fits.items()}
    surfaces: dict[Any, Any] = {dtype: found[0][1] for dtype, found in fits.items()}
    if not cuda:
        peaks["float64"] = peaks["float32"] / 2
    attention: dict[Any, float] = {
        dtype: mean(attention_efficiency(r["attention"][dtype], ATTENTION_SHAPE, peaks[dtype]) for r in results)
        for dtype in first["attention"]
    }
    streams = [[row["bytes"] / median(row["s"]) for row in result["elementwise"]] for result in results]
    fastest, typical = max(map(max, streams)), mean(median(rates) for rates in streams)
    memory = first["device_bytes"] if cuda else psutil.virtual_memory().available / ranks
    parts = Accelerator(
        name=first["device_name"] if cuda else f"cpu-{threads_per_rank(ranks)}-threads",
        kind="gpu" if cuda else "cpu",
        peak_flops_per_s=peaks,
        memory_bytes=float(memory),
        memory_bandwidth_bytes_per_s=fastest,
        memory_efficiency=typical / fastest,
        launch_s=mean(median(result["launch_s"]) for result in results),
        gemm=surfaces,
        attention=attention,
        optimizer_bytes_per_s=mean(optimizer_rate(r["reference"]["float32"][-1]["optimizer"]) for r in results),
        source=PROBED,
    )
    reference_s: dict[Any, Any] = {dtype: _reference_s(results, dtype) for dtype in first["reference"]}
    return calibrated(parts, reference_s)


def _reference_s(results: list[dict[str, Any]], dtype: str) -> list[float]:
    """Seconds of compute of each reference model: the mean over ranks of their medians."""
    by_rank = [[median(model["compute"]) for model in result["reference"][dtype]] for result in results]
    return [mean(times) for times in zip(*by_rank, strict=True)]


def _tier(results: list[dict[str, Any]], ranks: int) -> Tier:
    """The links between the ranks; the slowest rank counts."""
    if ranks == 1:
        return Tier(name="none", span=1, bandwidth_bytes_per_s=1e9, ports_per_node=1, latency_s=0.0)
    slowest = [max(rows, key=lambda row: median(row["s"])) for rows in zip(*(r["links"] for r in results), strict=True)]
    return fit_tier(slowest, ranks)


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
    """Write with fsync, and read back (from cache: an upper bound), in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder) as stream:
        started = time.perf_counter()
        for _ in range(STORAGE_BYTES >> 20):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        written = time.perf_counter()
        stream.seek(0)
        while stream.read(1 << 20):
            pass
        read = time.perf_counter()
    return Storage(
        write_bytes_per_s=STORAGE_BYTES / (written - started), read_bytes_per_s=STORAGE_BYTES / (read - written)
    )


def write_cluster(cluster: Cluster, path: Path) -> None:
    """Write the file a person can read; defaults are left out, numbers rounded to four digits."""
    values = _rounded(cluster.model_dump(mode="json", exclude_defaults=True))
    header = "# This machine, as `bloomery probe` measured it. Rates in FLOP/s and bytes/s, times in seconds.\n"
    write_atomically(path, sealed_text(header + to_yaml(values)))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
