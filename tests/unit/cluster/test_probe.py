"""The probe refuses what it could not write before it measures for a minute."""

from __future__ import annotations

import shutil
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
