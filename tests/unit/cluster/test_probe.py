"""The probe refuses what it could not write before it measures for a minute."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bloomery.cluster import probe
from bloomery.spec.errors import InputError


def test_a_folder_is_no_cluster_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is a folder"):
        probe.check_target(tmp_path)


def test_a_full_disk_is_said_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(probe.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="no space left"):
        probe.check_target(tmp_path / "machine.yaml")


LAPTOP = "GPU 0: NVIDIA RTX A2000 8GB Laptop GPU (UUID: GPU-7d0e6f3a-5b0d-11ee-be56-0242ac120002)\n"
FOUR = "".join(f"GPU {i}: NVIDIA A100-SXM4-40GB (UUID: GPU-{i}{i}{i}{i}c89-1111)\n" for i in range(4))
SLICED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c)
  MIG 3g.20gb     Device  0: (UUID: MIG-11aa)
  MIG 3g.20gb     Device  1: (UUID: MIG-22bb)
"""


@pytest.mark.parametrize(
    ("listing", "chosen", "count"),
    [
        ("", None, 0),
        ("No devices were found\n", "0", 0),
        (LAPTOP, None, 1),
        (LAPTOP, "0", 1),
        (FOUR, None, 4),
        (FOUR, "", 0),
        (FOUR, "2", 1),
        (FOUR, "3, 1", 2),
        (FOUR, "0,1,2,3,4", 4),
        (FOUR, "0,-1,2", 1),
        (FOUR, "-1", 0),
        (FOUR, "NoDevFiles", 0),
        (FOUR, "GPU-2222c89-1111,GPU-0000", 2),
        (FOUR, "GPU-9999,0", 0),
        (SLICED, None, 1),
        (SLICED, "MIG-22bb", 1),
    ],
)
def test_gpus_are_counted_as_cuda_will_show_them(listing: str, chosen: str | None, count: int) -> None:
    assert probe.visible_gpus(listing, chosen) == count


def test_a_driver_that_does_not_answer_shows_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(probe.subprocess, "run", hang)
    assert probe.cut_sizes()[0] == 1
