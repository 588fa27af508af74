"""Probe and doctor on real hosts: network namespaces with links of a set rate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from namespaces import Network, network

from bloomery.spec.catalog import read_cluster

RATES = {"100mbit": 100e6 / 8, "1gbit": 1e9 / 8}
CORE_SHARE = 0.45


def bloomery(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The console program."""
    return subprocess.run(
        [sys.executable, "-m", "bloomery", *map(str, arguments)], capture_output=True, text=True, timeout=600
    )


def doctor(hosts: Network, slots: int, shell: str, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings of a burn-in."""
    done = bloomery(
        "doctor", "--hosts", hosts.host_file(slots), "--shell", shell, "--burn-in", 4, "--history",
        folder / "doctor.jsonl", "--json",
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["findings"]


def named(findings: list[dict[str, Any]], check: str) -> set[str]:
    """The hosts with a fault in a check."""
    return {finding["host"] for finding in findings if finding["check"] == check and finding["verdict"] == "fault"}


@pytest.mark.parametrize("rate", RATES)
def test_the_probe_finds_the_rate_of_a_link_to_a_tenth(rate: str, tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    with network(("a", "b"), rate, tmp_path) as hosts:
        shell = hosts.shell(CORE_SHARE)
        done = bloomery("probe", "--quick", "--nodes", hosts.host_file(2), "--shell", shell, "--out", out)
    assert done.returncode == 0, done.stderr
    found = read_cluster(out)
    inside, between = found.tiers
    assert (found.nodes, found.accelerators_per_node) == (2, 2)
    assert between.bandwidth_bytes_per_s == pytest.approx(RATES[rate], rel=0.10)
    assert between.flat
    assert between.ports_per_node == 1
    assert inside.bandwidth_bytes_per_s > between.bandwidth_bytes_per_s


def test_a_host_with_a_slow_link_is_named_and_since_when(tmp_path: Path) -> None:
    with network(("a", "b", "c"), "1gbit", tmp_path) as hosts:
        shell = hosts.shell(CORE_SHARE)
        _, findings = doctor(hosts, 1, shell, tmp_path)
        assert named(findings, "burn-in") == set(), findings
        assert named(findings, "reachable") == named(findings, "clock") == named(findings, "alike") == set()
        hosts.shape("c", "100mbit")
        code, findings = doctor(hosts, 1, shell, tmp_path)
        assert (code, named(findings, "burn-in")) == (1, {"c"}), findings
        code, findings = doctor(hosts, 1, shell, tmp_path)
    (fault,) = [finding for finding in findings if finding["check"] == "burn-in" and finding["verdict"] == "fault"]
    assert fault["host"] == "c"
    assert "link" in fault["found"]
    assert "since" in fault["found"]


def test_a_host_with_a_slower_processor_is_named(tmp_path: Path) -> None:
    with network(("a", "b", "c", "d"), "1gbit", tmp_path) as hosts:
        code, findings = doctor(hosts, 1, hosts.shell(CORE_SHARE, d=CORE_SHARE / 3), tmp_path)
    assert (code, named(findings, "burn-in")) == (1, {"d"}), findings


def test_a_host_behind_a_firewall_is_named(tmp_path: Path) -> None:
    with network(("a", "b", "c"), "1gbit", tmp_path) as hosts:
        hosts.close("c")
        done = bloomery("doctor", "--hosts", hosts.host_file(1), "--shell", hosts.shell(CORE_SHARE), "--json")
        findings = json.loads(done.stdout)["findings"]
    assert done.returncode == 1
    assert named(findings, "reachable") == {"c"}, findings
