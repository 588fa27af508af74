"""Judgements of a host's GPUs: how many, in what state, with what memory, and who else uses them."""

from __future__ import annotations

from collections.abc import Iterator

from bloomery.cluster.doctor.facts import Facts
from bloomery.cluster.doctor.finding import Answer, good, gravest
from bloomery.cluster.doctor.needs import Needs
from bloomery.cluster.doctor.nvidia import Gpu

GIB = 1 << 30
HOT_CELSIUS = 88
IN_USE = 0.05


def gpus(facts: Facts, needs: Needs) -> Answer:
    """Enough of them; errors, throttling, heat, narrow links of each. The gravest of all, wherever it is."""
    if facts.gpu_problem:
        return "fault", facts.gpu_problem, "look at the driver (`nvidia-smi`, `dmesg`); reset or reboot the host"
    in_order = f"{len(facts.gpus)} in order" if facts.gpus else "none here"
    found = [*_number(facts, needs), *_logged(facts), *(answer for gpu in facts.gpus for answer in _state(gpu))]
    return gravest(found) or good(in_order)


def _number(facts: Facts, needs: Needs) -> Iterator[Answer]:
    """Whether the run has a GPU for each of its ranks here."""
    have = len(facts.gpus)
    if have < needs.gpus and not have and facts.amd:
        yield "unknown", f"AMD GPUs, of which nothing is read here; the run needs {needs.gpus}", ""
    elif have < needs.gpus:
        found = f"{have or 'no'} GPU{'s' * (have != 1)}, the run needs {needs.gpus} on a host"
        yield "fault", found, "choose a host that has them, or describe this one under `cluster:`"


def _logged(facts: Facts) -> Iterator[Answer]:
    """What the kernel's log says of them."""
    remedy = "drain the host; reset the GPU and load the driver anew, or reboot; send it in when it comes back"
    return (("fault", xid, remedy) for xid in facts.xids)


def _state(gpu: Gpu) -> Iterator[Answer]:
    """All that is to be said of one."""
    who = f"GPU {gpu.index}"
    if gpu.remap_failed or gpu.uncorrected:
        what = "row remapping failed" if gpu.remap_failed else f"{gpu.uncorrected} uncorrected memory errors"
        yield "fault", f"{who}: {what}", "reset the GPU; replace it when errors come back"
    if gpu.sram_exceeded:
        yield "fault", f"{who}: more SRAM errors than it may have", "replace it"
    if gpu.recovery:
        yield "fault", f"{who}: the driver asks for {gpu.recovery}", "drain the host and do that"
    if gpu.throttled:
        yield "fault", f"{who} slowed down: {', '.join(gpu.throttled)}", "look at cooling and power supply"
    if gpu.remap_pending or gpu.retirement_pending:
        what = "row waits to be remapped" if gpu.remap_pending else "page waits to be retired"
        yield "advice", f"{who}: a memory {what}", "reset the GPU before the next run"
    if (gpu.celsius or 0) >= HOT_CELSIUS:
        yield "advice", f"{who}: {gpu.celsius} °C", "look at the cooling; it will slow down"
    if gpu.link[0] < gpu.link[1]:
        yield "advice", f"{who}: PCIe x{gpu.link[0]} of x{gpu.link[1]}", "reseat the card; look at the slot"
    if gpu.untold:
        yield "unknown", f"{who} does not tell {', '.join(gpu.untold)}", ""


def gpu_use(facts: Facts, _: Needs) -> Answer:
    """Who else has memory of the devices: no fault of the machine, and none for a program that drains it."""
    for gpu in facts.gpus:
        if gpu.processes or gpu.used_bytes > IN_USE * max(gpu.total_bytes, 1):
            by = f" by process {gpu.processes[0]}" if gpu.processes else ""
            found = f"GPU {gpu.index}: {gpu.used_bytes / GIB:.1f} GiB in use{by}"
            return "fault", found, "end what uses it, or choose another"
    return good("by nobody else" if facts.gpus else "none here")


def gpu_memory(facts: Facts, needs: Needs) -> Answer:
    """What a rank needs, beside the smallest of them."""
    smallest = min((gpu.total_bytes for gpu in facts.gpus if gpu.total_bytes), default=0)
    if not smallest:
        return "unknown", "no GPU tells how much it has", ""
    found = f"{smallest / GIB:.1f} GiB on a GPU"
    if needs.memory_bytes > smallest:
        remedy = "GPUs with more, a layout with less memory, ZeRO"
        return "fault", f"{found}; a rank needs {needs.memory_bytes / GIB:.1f}", remedy
    return good(f"{found}, {needs.memory_bytes / GIB:.1f} needed")
