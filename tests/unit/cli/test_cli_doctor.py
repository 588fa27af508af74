"""The doctor's table holds a thousand hosts on a page, its exit code and JSON are a scheduler's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bloomery.cli import main as command_line
from bloomery.cli.doctor import rows
from bloomery.cluster.doctor import examine
from bloomery.cluster.doctor.facts import Facts
from bloomery.cluster.doctor.finding import Finding, Verdict


def finding(host: str, verdict: Verdict, check: str = "disk", found: str = "fast") -> Finding:
    """A line of the table."""
    return Finding(check=check, host=host, verdict=verdict, found=found, remedy="" if verdict == "good" else "mend it")


def test_good_hosts_share_a_line_and_every_fault_has_its_own() -> None:
    findings = [finding(f"n{i}", "good") for i in range(1000)]
    findings += [finding("bad", "fault", found="full"), finding("worse", "fault", found="gone")]
    assert [(hosts, verdict, found) for _, hosts, verdict, found, _ in rows(findings)] == [
        ("1000 hosts", "good", "fast"),
        ("bad", "fault", "full"),
        ("worse", "fault", "gone"),
    ]


@pytest.mark.parametrize(("shm_bytes", "code"), [(1 << 34, 0), (1 << 20, 1)])
def test_exit_code_and_json_say_whether_it_is_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, shm_bytes: int, code: int
) -> None:
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    facts = Facts(
        host="n1", versions=versions, shm_free_bytes=shm_bytes, memory_free_bytes=1 << 34, cores_online=64,
        cores_allowed=64,
    )  # fmt: skip
    disk = facts.disk.model_copy(update={"free_bytes": 10**12, "write_bytes_per_s": 1e9})
    monkeypatch.setattr(examine, "gather", lambda _: facts.model_copy(update={"disk": disk}))
    monkeypatch.chdir(tmp_path)
    for arguments in (["--json"], []):
        monkeypatch.setattr(sys, "argv", ["bloomery", "doctor", *arguments])
        try:
            command_line.main()
            ended = 0
        except SystemExit as end:
            ended = int(end.code or 0)
        assert ended == code
        out = capsys.readouterr().out
        if arguments:
            report = json.loads(out)
            assert report["fit"] == (code == 0)
            assert {one["check"] for one in report["findings"] if one["verdict"] == "fault"} == (
                {"shared memory"} if code else set()
            )
        else:
            assert ("not fit to train: 1 fault" if code else "fit to train") in out
    assert not list(tmp_path.iterdir())
