"""What nvidia-smi says is read by the names of old and new drivers."""

from __future__ import annotations

import pytest

from bloomery.cluster.doctor.nvidia import fatal_xids, parse_gpus

LOG = """<?xml version="1.0" ?>
<nvidia_smi_log><driver_version>570.86.15</driver_version><attached_gpus>2</attached_gpus>
<gpu id="00000000:3B:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name>
 <pci><pci_gpu_link_info><link_widths><max_link_width>16x</max_link_width>
  <current_link_width>8x</current_link_width></link_widths></pci_gpu_link_info></pci>
 <{reasons}s><{reasons}_gpu_idle>Active</{reasons}_gpu_idle>
  <{reasons}_hw_slowdown>Active</{reasons}_hw_slowdown>
  <{reasons}_hw_thermal_slowdown>Not Active</{reasons}_hw_thermal_slowdown></{reasons}s>
 <fb_memory_usage><total>81559 MiB</total><used>512 MiB</used></fb_memory_usage>
 <ecc_errors><volatile><sram_correctable>7</sram_correctable><sram_uncorrectable_parity>1</sram_uncorrectable_parity>
  <sram_uncorrectable_secded>0</sram_uncorrectable_secded><dram_uncorrectable>2</dram_uncorrectable></volatile>
  <aggregate><dram_uncorrectable>90</dram_uncorrectable></aggregate></ecc_errors>
 <remapped_rows><remapped_row_pending>Yes</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>
 </remapped_rows><temperature><gpu_temp>33 C</gpu_temp></temperature>
 <processes><process_info><pid>4711</pid></process_info></processes></gpu>
<gpu id="00000000:4C:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name>
 <ecc_errors><volatile><dram_uncorrectable>N/A</dram_uncorrectable></volatile></ecc_errors>
 <remapped_rows>N/A</remapped_rows></gpu></nvidia_smi_log>"""


@pytest.mark.parametrize("reasons", ["clocks_event_reason", "clocks_throttle_reason"])
def test_errors_throttling_and_use_are_read(reasons: str) -> None:
    (first, second), problem, versions = parse_gpus(LOG.replace("{reasons}", reasons))
    assert (problem, versions) == ("", {"driver": "570.86.15"})
    assert first.throttled == ("hw_slowdown",)
    assert first.uncorrected == 3
    assert (first.remap_pending, first.remap_failed) == (True, False)
    assert (first.celsius, first.link, first.processes) == (33, (8, 16), (4711,))
    assert (first.used_bytes, first.total_bytes) == (512 << 20, 81559 << 20)
    assert (second.index, second.uncorrected, second.throttled, second.celsius) == (1, 0, (), None)


def test_what_is_no_xml_is_a_problem_and_no_crash() -> None:
    found, problem, _ = parse_gpus("Failed to initialize NVML: Driver/library version mismatch")
    assert found == ()
    assert "unreadable" in problem


def test_fatal_xids_are_found_in_the_kernel_log_and_programs_own_faults_are_not() -> None:
    log = """[1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.
[2.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.
[3.0] NVRM: Xid (PCI:0000:4c:00): 31, pid=9, MMU fault"""
    assert fatal_xids(log) == ("0000:3b:00 Xid 79: fell off the bus",)
