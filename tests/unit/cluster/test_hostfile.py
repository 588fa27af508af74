"""A host file says which machines take part; what is wrong with it is one line that names the line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bloomery.cluster.hostfile import SRUN, Host, Hosts, here, parse_hosts, read_hosts, tasks_per_node
from bloomery.spec.errors import BloomeryError, InputError


def test_a_host_has_slots_an_address_and_threads() -> None:
    text = "# ours\n\nnode1 slots=8\nnode2 address=10.0.0.2 threads=4  # the old one\n"
    assert parse_hosts(text, "hosts") == (Host("node1", 8), Host("node2", 1, "10.0.0.2", 4))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("node1 slot=8", "did you mean 'slots'"),
        ("node1 slots=0", "slots=0"),
        ("node1 slots=many", "slots=many"),
        ("node1 8", "found '8'"),
        ("-oProxyCommand=x slots=2", "name comes first"),
        ("slots=8", "name comes first"),
        ("node0", "named before"),
        ("node1:2222", "the port in ~/.ssh/config"),
        ("me@node1:2222 slots=2", "the port in ~/.ssh/config"),
    ],
)
def test_a_wrong_line_is_named(line: str, words: str) -> None:
    with pytest.raises(InputError, match="hosts: line 2") as refused:
        parse_hosts(f"node0\n{line}\n", "hosts")
    assert words in str(refused.value)


def test_the_account_that_ssh_uses_is_no_part_of_an_address() -> None:
    mine, other, far = parse_hosts("me@node1\nme@node2 address=10.0.0.2\n2001:db8::1\n", "hosts")
    assert (mine.reached_by, other.reached_by, far.reached_by) == ("node1", "10.0.0.2", "2001:db8::1")
    assert "me@node1" in Hosts((mine,), ("ssh",)).command(mine, "some.module", {})


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no host in it"):
        parse_hosts("# nothing\n", "hosts")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_hosts(str(tmp_path / "binary"))
    with pytest.raises(InputError, match="no such host file"):
        read_hosts(str(tmp_path / "none"))


def test_a_shell_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1\n")
    with pytest.raises(InputError, match="no such program"):
        read_hosts(str(tmp_path / "hosts"), "no-such-shell -x")


def test_a_command_is_the_shell_the_host_and_plain_words() -> None:
    hosts = Hosts((Host("node1"),), ("ssh", "-q"))
    command = hosts.command(hosts.hosts[0], "some.module", {"A": "1"})
    assert command[:4] == ["ssh", "-q", "node1", "env"]
    assert "A=1" in command
    assert command[-3:] == [sys.executable, "-m", "some.module"]
    assert not any(letter in word for word in command for letter in "'\"$ ;")
    local = here(2)
    assert local.command(local.hosts[0], "some.module", {})[-2:] == ["-m", "some.module"]
    assert "ssh" not in local.command(local.hosts[0], "some.module", {})


def test_the_hosts_of_a_slurm_job_are_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(InputError, match="not inside a Slurm job"):
        read_hosts("slurm")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "4(x2)")
    listed = subprocess.CompletedProcess([], 0, stdout="n1\nn2\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: listed)
    assert read_hosts("slurm") == Hosts((Host("n1", 4), Host("n2", 4)), SRUN)
    assert tasks_per_node("2(x3),1", 4) == [2, 2, 2, 1]
    for wrong in ("", "2(x3", "two", "0"):
        with pytest.raises(InputError, match="SLURM_TASKS_PER_NODE"):
            tasks_per_node(wrong, 1)


def test_what_scontrol_says_against_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-")
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="scontrol: error: Invalid hostlist: n[1-\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BloomeryError, match=r"Invalid hostlist: n\[1-"):
        read_hosts("slurm")
