"""NVIDIA devices as `nvidia-smi -q -x` and the kernel's log tell of them, by the names of old and new drivers."""

from __future__ import annotations

import re
import shutil
import subprocess
from xml.etree import ElementTree

from bloomery.spec.base import Noun

THROTTLES = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
REASONS = ("clocks_event_reasons/clocks_event_reason_", "clocks_throttle_reasons/clocks_throttle_reason_")
UNCORRECTED = ("sram_uncorrectable", "sram_uncorrectable_parity", "sram_uncorrectable_secded", "dram_uncorrectable")
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
FATAL_XIDS = {
    "48": "double-bit memory error",
    "63": "memory row to be remapped",
    "64": "row remapping failed",
    "74": "NVLink error",
    "79": "fell off the bus",
    "94": "contained memory error",
    "95": "uncontained memory error",
    "119": "GSP does not answer",
    "120": "GSP error",
}
"""Xid errors after which a device needs a reset or a visit (NVIDIA, "XID Errors"); others are mostly programs' own."""


class Gpu(Noun):
    """One device. `throttled`: the reasons active now; `uncorrected`: memory errors since the driver was loaded."""

    index: int
    name: str
    throttled: tuple[str, ...] = ()
    uncorrected: int = 0
    remap_pending: bool = False
    remap_failed: bool = False
    celsius: int | None = None
    link: tuple[int, int] = (0, 0)
    used_bytes: int = 0
    total_bytes: int = 0
    processes: tuple[int, ...] = ()


def read_gpus() -> tuple[tuple[Gpu, ...], str, dict[str, str]]:
    """The devices, what went wrong with asking for them, and the driver's version."""
    if shutil.which("nvidia-smi") is None:
        return (), "", {}
    try:
        done = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return (), "nvidia-smi does not answer within 30 s", {}
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return (), f"nvidia-smi: {lines[-1] if lines else f'exit code {done.returncode}'}", {}
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> tuple[tuple[Gpu, ...], str, dict[str, str]]:
    """The same from the program's XML."""
    try:
        log = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        return (), f"nvidia-smi: unreadable ({error})", {}
    driver = log.findtext("driver_version")
    return tuple(_gpu(i, gpu) for i, gpu in enumerate(log.findall("gpu"))), "", {"driver": driver} if driver else {}


def _gpu(index: int, gpu: ElementTree.Element) -> Gpu:
    def number(path: str) -> int:
        found = re.match(r"\d+", gpu.findtext(path) or "")
        return int(found.group()) if found else 0

    active = [name for name in THROTTLES if any(gpu.findtext(reason + name) == "Active" for reason in REASONS)]
    widths = "pci/pci_gpu_link_info/link_widths/"
    return Gpu(
        index=index,
        name=gpu.findtext("product_name") or "?",
        throttled=tuple(active),
        uncorrected=sum(number(f"ecc_errors/volatile/{name}") for name in UNCORRECTED),
        remap_pending=gpu.findtext("remapped_rows/remapped_row_pending") == "Yes",
        remap_failed=gpu.findtext("remapped_rows/remapped_row_failure") == "Yes",
        celsius=number("temperature/gpu_temp") or None,
        link=(number(widths + "current_link_width"), number(widths + "max_link_width")),
        used_bytes=number("fb_memory_usage/used") << 20,
        total_bytes=number("fb_memory_usage/total") << 20,
        processes=tuple(int(pid.text or 0) for pid in gpu.findall("processes/process_info/pid")),
    )


def recent_xids() -> tuple[str, ...]:
    """Fatal errors in the kernel's log, where we may read it."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return fatal_xids(done.stdout)


def fatal_xids(log: str) -> tuple[str, ...]:
    """The fatal Xid errors of a kernel log, each once, with what they mean."""
    found = dict.fromkeys(match.groups() for match in XID.finditer(log) if match.group(2) in FATAL_XIDS)
    return tuple(f"{bus} Xid {number}: {FATAL_XIDS[number]}" for bus, number in found)
