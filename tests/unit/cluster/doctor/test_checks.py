"""Facts in, verdicts out: a host in order is found in order, and each fault alone is found, with a remedy."""

from __future__ import annotations

from typing import Any

import pytest

from bloomery.cluster.doctor.checks import CHECKS, judged
from bloomery.cluster.doctor.facts import Busy, Disk, Facts, Interface, gather
from bloomery.cluster.doctor.finding import worst
from bloomery.cluster.doctor.needs import Needs
from bloomery.cluster.doctor.nvidia import Gpu

GIB = 1 << 30
LINKS = {
    "lo": Interface(up=True, addresses=("127.0.0.1",)),
    "eth0": Interface(up=True, mbit_per_s=1000, addresses=("10.0.0.1",)),
    "ib0": Interface(up=True, mbit_per_s=200_000, addresses=("10.1.0.1",)),
    "eth1": Interface(up=False),
}
WELL = Facts(
    host="n1",
    versions={"python": "3.11.7", "torch": "2.13.0+cu128", "cuda": "12.8", "driver": "570.86.15", "nccl": "2.27.3"},
    gpus=tuple(Gpu(index=i, name="H100", link=(16, 16), total_bytes=80 * GIB) for i in range(8)),
    interfaces=LINKS,
    infiniband={"mlx5_0:1": True, "mlx5_1:1": False},
    cores_online=64,
    cores_allowed=64,
    numa_nodes=2,
    numa_allowed=2,
    governors=("performance",),
    memory_bytes=512 * GIB,
    memory_free_bytes=500 * GIB,
    shm_free_bytes=250 * GIB,
    hostname_addresses=("10.0.0.1",),
    disk=Disk(folder="/runs", free_bytes=10**13, write_bytes_per_s=2e9, sync_s=0.001),
)
NEEDS = Needs(ranks=8, gpus=8, peers=64, hosts=8, memory_bytes=40 * GIB, disk_bytes=1e12)


def test_a_host_in_order_is_found_in_order() -> None:
    findings = judged(WELL, NEEDS)
    assert [finding.check for finding in findings] == list(CHECKS)
    assert {finding.verdict for finding in findings} == {"good"}, findings
    assert not any(finding.remedy for finding in findings)
    assert worst(findings) == "good"


def gpu(**values: Any) -> dict[str, Any]:
    """The facts with another GPU 5."""
    return {"gpus": (*WELL.gpus[:5], WELL.gpus[5].model_copy(update=values), *WELL.gpus[6:])}


def disk(**values: Any) -> dict[str, Any]:
    """The facts with another disk."""
    return {"disk": WELL.disk.model_copy(update=values)}


def version(**values: Any) -> dict[str, Any]:
    """The facts with other versions; None: not installed."""
    return {"versions": {k: v for k, v in {**WELL.versions, **values}.items() if v is not None}}


@pytest.mark.parametrize(
    ("changed", "check", "verdict", "words"),
    [
        (version(driver="520.61.05"), "versions", "fault", "520.61.05 is too old for CUDA 12.8"),
        (version(driver="579.1", cuda="13.0"), "versions", "fault", "too old"),
        (version(driver="580.65.06", cuda="13.0"), "versions", "good", ""),
        (version(driver="450.80.02", cuda="11.8"), "versions", "good", ""),
        (version(cuda="17.0"), "versions", "unknown", "not in the table"),
        (version(cuda=None), "versions", "fault", "built for CPUs"),
        (version(driver=None), "versions", "advice", "no driver"),
        (version(torch="2.10.1"), "versions", "fault", "2.10.1"),
        (version(torch=None), "versions", "fault", "no torch"),
        (version(python="3.10.2"), "versions", "fault", "3.10.2"),
        ({"gpu_problem": "nvidia-smi: no devices were found"}, "GPUs", "fault", "no devices"),
        ({"xids": ("0000:3b:00 Xid 79: fell off the bus",)}, "GPUs", "fault", "fell off the bus"),
        ({"gpus": WELL.gpus[:7]}, "GPUs", "fault", "7 GPUs, the run needs 8"),
        (gpu(sram_exceeded=True), "GPUs", "fault", "more SRAM errors than"),
        (gpu(recovery="Reboot"), "GPUs", "fault", "GPU 5: the driver asks for Reboot"),
        (gpu(retirement_pending=True), "GPUs", "advice", "waits to be retired"),
        (gpu(untold=("dram_uncorrectable",)), "GPUs", "unknown", "GPU 5 does not tell dram_uncorrectable"),
        (gpu(uncorrected=2), "GPUs", "fault", "2 uncorrected"),
        (gpu(remap_failed=True), "GPUs", "fault", "remapping failed"),
        (gpu(remap_pending=True), "GPUs", "advice", "waits to be remapped"),
        (gpu(throttled=("hw_thermal_slowdown",)), "GPUs", "fault", "hw_thermal_slowdown"),
        (gpu(celsius=91), "GPUs", "advice", "91"),
        (gpu(link=(8, 16)), "GPUs", "advice", "x8 of x16"),
        (gpu(used_bytes=30 * GIB, processes=(4711,)), "GPU use", "fault", "4711"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "eth7"}}, "network", "fault", "no interface eth7"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "=eth1"}}, "network", "fault", "eth1 is down"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "eth0"}}, "network", "advice", "while ib0"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "ib0"}}, "network", "good", ""),
        ({"variables": {"NCCL_SOCKET_IFNAME": "^lo"}}, "network", "good", ""),
        ({"variables": {"NCCL_IB_HCA": "mlx5_3"}}, "network", "fault", "no adapter mlx5_3"),
        ({"interfaces": {"lo": LINKS["lo"]}}, "network", "fault", "no interface but loopback"),
        ({"hostname_addresses": ("127.0.1.1",)}, "names", "advice", "others cannot reach"),
        ({"hostname_addresses": (), "hostname_problem": "not known"}, "names", "advice", "not known"),
        ({"hostname_problem": "x", "variables": {"GLOO_SOCKET_IFNAME": "ib0"}}, "names", "good", ""),
        ({"resolve_s": 5.0}, "names", "advice", "5.0 s"),
        ({"loopback_problem": "refused"}, "ports", "fault", "refused"),
        ({"cores_allowed": 4}, "cores", "fault", "4 cores for 8 ranks"),
        ({"cores_allowed": 16}, "cores", "advice", "16 of 64"),
        ({"numa_allowed": 1, "cores_allowed": 40}, "cores", "advice", "1 of 2 NUMA"),
        ({"governors": ("powersave",)}, "clock rate", "advice", "powersave"),
        ({"steal": 0.05}, "clock rate", "advice", "5%"),
        ({"steal": 0.4}, "clock rate", "fault", "40%"),
        ({"others": 0.3}, "other work", "advice", "30%"),
        ({"others": 0.9, "busiest": Busy(pid=7, name="blender", cores=60)}, "other work", "fault", "blender (7)"),
        (gpu(total_bytes=24 * GIB), "memory", "fault", "24.0 GiB on a GPU; a rank needs 40.0"),
        ({"memory_free_bytes": 30 * GIB}, "memory", "good", "80.0 GiB on a GPU, 40.0 needed"),
        ({"shm_free_bytes": 64 << 20}, "shared memory", "fault", "64 MiB"),
        ({"shm_free_bytes": 512 << 20}, "shared memory", "advice", "0.5 GiB"),
        ({"shm_free_bytes": None}, "shared memory", "fault", "no /dev/shm"),
        ({"files": (256, 256)}, "open files", "fault", "768 needed"),
        ({"files": (-1, -1)}, "open files", "good", ""),
        ({"locked_bytes": (8 << 20, 8 << 20)}, "locked memory", "fault", "8 MiB"),
        ({"locked_bytes": (400 * GIB, 400 * GIB)}, "locked memory", "good", ""),
        ({"infiniband": {}, "locked_bytes": (8 << 20, 8 << 20)}, "locked memory", "good", ""),
        (disk(free_bytes=10**11), "disk", "fault", "1000.0 GB needed"),
        (disk(problem="read-only file system"), "disk", "fault", "read-only"),
        (disk(sync_s=1.5), "disk", "advice", "1500 ms"),
        (disk(write_bytes_per_s=2e7), "disk", "advice", "20 MB/s"),
    ],
)
def test_each_fault_alone_is_found_and_no_other(changed: dict[str, Any], check: str, verdict: str, words: str) -> None:
    by_check = {finding.check: finding for finding in judged(WELL.model_copy(update=changed), NEEDS)}
    found = by_check.pop(check)
    assert (found.verdict, words in found.found) == (verdict, True), found
    assert bool(found.remedy) == (verdict in ("advice", "fault"))
    own = {"gpus", "versions"} & set(changed)
    others = {name: f for name, f in by_check.items() if f.verdict != "good" and not (own and name == "versions")}
    assert not others


def test_a_run_on_cpus_needs_memory_of_the_host_and_one_on_gpus_needs_gpus() -> None:
    def found(needs: Needs, **changed: Any) -> dict[str, str]:
        return {one.check: f"{one.verdict}: {one.found}" for one in judged(WELL.model_copy(update=changed), needs)}

    on_cpus = NEEDS.model_copy(update={"gpus": 0})
    assert "fault: 300.0 GiB free; 8 ranks need 320.0" in found(on_cpus, memory_free_bytes=300 * GIB)["memory"]
    assert found(on_cpus, gpus=(), memory_limit_bytes=64 * GIB)["memory"].startswith("fault")
    assert found(on_cpus, gpus=())["GPUs"] == "good: none here"
    bare = found(NEEDS, gpus=(), memory_free_bytes=GIB)
    assert bare["GPUs"] == "fault: no GPUs, the run needs 8 on a host"
    assert bare["memory"].startswith("unknown")
    assert found(NEEDS, gpus=(), amd=True)["GPUs"].startswith("unknown: AMD GPUs")


def test_the_facts_of_this_machine_can_be_gathered_and_sent(tmp_path: Any) -> None:
    facts = gather(tmp_path / "not" / "yet")
    assert facts.disk.folder == str(tmp_path)
    assert facts.disk.write_bytes_per_s > 0
    assert 0 <= facts.others <= 1
    assert "torch" in facts.versions
    assert Facts.checked(facts.model_dump(mode="json")) == facts
