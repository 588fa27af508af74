"""What nvidia-smi says is read by the names of old and new drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.cluster.doctor.nvidia import fatal_xids, parse_gpus, read_gpus

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


LOST = "[3.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n"
CHANGED = "[4.0] NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from "
ASKS = CHANGED + "0x0 (None) to 0x2 (Node Reboot Required)\n"


def test_an_error_inside_a_slice_of_a_gpu_counts() -> None:
    log = "NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: No"
    assert fatal_xids(log) == ("0000:01:00 Xid 94: contained memory error",)


def test_what_the_driver_asks_for_is_told() -> None:
    wanted = "0000:3b:00 Xid 154: the driver asks for Node Reboot Required"
    assert fatal_xids(ASKS) == (wanted,)
    assert fatal_xids("NVRM: Xid (PCI:0000:3b:00): 154: GPU recovery action changed to Node Reboot Required") == (
        wanted,
    )
    log = "NVRM: Xid (PCI:0000:3b:00): {}, x"
    assert [len(fatal_xids(log.format(number))) for number in (62, 140, 63)] == [1, 1, 0]


def test_errors_are_over_when_the_driver_was_loaded_anew_or_asks_for_nothing_more() -> None:
    loaded = "[9.0] NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    mended = CHANGED + "0x2 (Node Reboot Required) to 0x0 (None)\n"
    other = LOST.replace("3b", "4c")
    assert fatal_xids(LOST + ASKS + loaded) == ()
    assert len(fatal_xids(loaded + LOST + ASKS)) == 2
    assert fatal_xids(LOST + other + ASKS + mended) == ("0000:4c:00 Xid 79: fell off the bus",)


def test_faults_are_read_by_the_names_of_every_generation() -> None:
    (old, new, blind, drawing), _, _ = parse_gpus(
        """<nvidia_smi_log>
<gpu><ecc_errors><volatile><double_bit><device_memory>12</device_memory><total>12</total></double_bit></volatile>
 </ecc_errors><retired_pages><pending_retirement>Yes</pending_retirement></retired_pages></gpu>
<gpu><gpu_recovery_action>Reboot</gpu_recovery_action>
 <ecc_errors><aggregate><sram_threshold_exceeded>Yes</sram_threshold_exceeded></aggregate></ecc_errors></gpu>
<gpu><gpu_recovery_action>None</gpu_recovery_action>
 <ecc_errors><volatile><dram_uncorrectable>Unknown Error</dram_uncorrectable></volatile></ecc_errors>
 <temperature><gpu_temp>GPU is lost</gpu_temp></temperature></gpu>
<gpu><processes>
 <process_info><pid>1</pid><type>G</type><used_memory>20 MiB</used_memory></process_info>
 <process_info><pid>2</pid><type>G</type><used_memory>9000 MiB</used_memory></process_info>
 <process_info><pid>3</pid><type>C+G</type><used_memory>20 MiB</used_memory></process_info></processes></gpu>
</nvidia_smi_log>"""
    )
    assert (old.uncorrected, old.retirement_pending) == (12, True)
    assert (new.sram_exceeded, new.recovery, new.untold) == (True, "Reboot", ())
    assert (blind.recovery, blind.untold) == ("GPU is lost", ("dram_uncorrectable",))
    assert drawing.processes == (2, 3)


def test_a_name_that_is_cut_inside_a_character_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "<nvidia_smi_log><gpu><product_name>H100 训".encode()[:-1] + b"</product_name></gpu></nvidia_smi_log>"
    (tmp_path / "said").write_bytes(said)
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncat "{tmp_path}/said"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (gpu,), problem, _ = read_gpus()
    assert (gpu.name, problem) == ("H100 \N{REPLACEMENT CHARACTER}", "")
