"""NVIDIA devices as `nvidia-smi -q -x` and the kernel's log tell of them, by the names of old and new drivers."""

from __future__ import annotations

import re
import shutil
import subprocess
from xml.etree import ElementTree

from bloomery.spec.base import Noun

THROTTLES = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
REASONS = ("clocks_event_reasons/clocks_event_reason_", "clocks_throttle_reasons/clocks_throttle_reason_")
UNCORRECTED = (
    "sram_uncorrectable",
    "sram_uncorrectable_parity",
    "sram_uncorrectable_secded",
    "dram_uncorrectable",
    "double_bit/total",
)
RETIREMENTS = ("pending_retirement", "pending_blacklist")
NOTHING_TO_DO = ("", "none", "n/a", "not supported")
HEALTH = ("ecc_errors", "remapped_rows", "retired_pages", "gpu_recovery_action", "temperature", "fb_memory_usage")
"""Where a device speaks of its health. What it does not have reads N/A."""
UNTOLD = re.compile(r"error|err!", re.IGNORECASE)
"""What stands in the place of a value that could not be read."""
GONE = re.compile(r"is lost|requires reset", re.IGNORECASE)
"""What stands there for a device that does not answer any more."""
GRAPHICS_BYTES = 256 << 20
"""A display server has less; it takes nothing from training."""
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)[^)]*\): (\d+)(.*)")
LOADED = "NVRM: loading NVIDIA"
FATAL_XIDS = {
    "48": "double-bit memory error",
    "62": "micro-controller halted",
    "64": "row remapping failed",
    "74": "NVLink error",
    "79": "fell off the bus",
    "94": "contained memory error",
    "95": "uncontained memory error",
    "119": "GSP does not answer",
    "120": "GSP error",
    "140": "unrecovered memory error",
}
"""Xid errors after which a device needs a reset or a visit (NVIDIA, "XID Errors"); others are mostly programs' own. Of
63, a row to be remapped, the device itself tells until it is done."""
RECOVERY_XID = "154"
ACTION = re.compile(r"\bto (?:0x[0-9a-fA-F]+ )?\(?([\w ]+?)\)?\W*$")


class Gpu(Noun):
    """One device. `throttled`: the reasons active now; `uncorrected`: memory errors since the driver was loaded;
    `sram_exceeded`: of SRAM more than it may have; `recovery`: what the driver asks for; `untold`: what could not be
    read; `processes`: but those that only draw a screen."""

    index: int
    name: str
    throttled: tuple[str, ...] = ()
    uncorrected: int = 0
    remap_pending: bool = False
    remap_failed: bool = False
    retirement_pending: bool = False
    sram_exceeded: bool = False
    recovery: str = ""
    untold: tuple[str, ...] = ()
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
        done = _output(["nvidia-smi", "-q", "-x"], timeout_s=30)
    except subprocess.TimeoutExpired:
        return (), "nvidia-smi does not answer within 30 s", {}
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return (), f"nvidia-smi: {lines[-1] if lines else f'exit code {done.returncode}'}", {}
    return parse_gpus(done.stdout)


def _output(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """What a program says. It may cut a name of a process inside of a character."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s)


def parse_gpus(text: str) -> tuple[tuple[Gpu, ...], str, dict[str, str]]:
    """The same from the program's XML."""
    try:
        log = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        return (), f"nvidia-smi: unreadable ({error})", {}
    driver = log.findtext("driver_version")
    return tuple(_gpu(i, gpu) for i, gpu in enumerate(log.findall("gpu"))), "", {"driver": driver} if driver else {}


def _gpu(index: int, gpu: ElementTree.Element) -> Gpu:
    active = [name for name in THROTTLES if any(gpu.findtext(reason + name) == "Active" for reason in REASONS)]
    widths = "pci/pci_gpu_link_info/link_widths/"
    return Gpu(
        index=index,
        name=gpu.findtext("product_name") or "?",
        throttled=tuple(active),
        uncorrected=sum(_number(gpu, f"ecc_errors/volatile/{name}") for name in UNCORRECTED),
        remap_pending=gpu.findtext("remapped_rows/remapped_row_pending") == "Yes",
        remap_failed=gpu.findtext("remapped_rows/remapped_row_failure") == "Yes",
        retirement_pending=any(gpu.findtext(f"retired_pages/{name}") == "Yes" for name in RETIREMENTS),
        sram_exceeded=gpu.findtext("ecc_errors/aggregate/sram_threshold_exceeded") == "Yes",
        recovery=_recovery(gpu),
        untold=_untold(gpu),
        celsius=_number(gpu, "temperature/gpu_temp") or None,
        link=(_number(gpu, widths + "current_link_width"), _number(gpu, widths + "max_link_width")),
        used_bytes=_number(gpu, "fb_memory_usage/used") << 20,
        total_bytes=_number(gpu, "fb_memory_usage/total") << 20,
        processes=tuple(
            _number(process, "pid") for process in gpu.findall("processes/process_info") if not _draws(process)
        ),
    )


def _number(parent: ElementTree.Element, path: str) -> int:
    found = re.match(r"\d+", parent.findtext(path) or "")
    return int(found.group()) if found else 0


def _recovery(gpu: ElementTree.Element) -> str:
    action = (gpu.findtext("gpu_recovery_action") or "").strip(" []")
    gone = next((part.text for part in gpu.iter() if GONE.search(part.text or "")), None)
    if gone is not None:
        return gone.strip(" []")
    return "" if action.lower() in NOTHING_TO_DO or UNTOLD.search(action) else action


def _untold(gpu: ElementTree.Element) -> tuple[str, ...]:
    """The names of values of a device's health that could not be read."""
    parts = (part for path in HEALTH for top in gpu.findall(path) for part in top.iter())
    return tuple(dict.fromkeys(part.tag for part in parts if UNTOLD.search(part.text or "")))


def _draws(process: ElementTree.Element) -> bool:
    """Whether it only draws a screen, with little memory."""
    return process.findtext("type") == "G" and _number(process, "used_memory") << 20 <= GRAPHICS_BYTES


def recent_xids() -> tuple[str, ...]:
    """Fatal errors in the kernel's log, where we may read it."""
    try:
        done = _output(["dmesg"], timeout_s=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return fatal_xids(done.stdout)


def fatal_xids(log: str) -> tuple[str, ...]:
    """The fatal Xid errors of a kernel log, each once, with what they mean.

    Those from before the driver was last loaded are over, and those of a device of which it later says that nothing
    remains to be done: a host that was mended as advised is fit again.
    """
    found = dict[tuple[str, str], str]()
    for line in log.splitlines():
        if LOADED in line:
            found.clear()
        match = XID.search(line)
        if match is None:
            continue
        bus, number, rest = match.groups()
        action = _action(rest) if number == RECOVERY_XID else ""
        if action.lower() == "none":
            found = {one: means for one, means in found.items() if one[0] != bus}
        elif action:
            found[bus, number] = f"the driver asks for {action}"
        elif number in FATAL_XIDS:
            found[bus, number] = FATAL_XIDS[number]
    return tuple(f"{bus} Xid {number}: {means}" for (bus, number), means in found.items())


def _action(message: str) -> str:
    """What the driver now asks for, of `GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)`."""
    found = ACTION.search(message)
    return found.group(1) if found else "a recovery"
