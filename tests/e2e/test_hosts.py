"""A run on two hosts, here two supervisors on the loopback: it ends with the bits of one host's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs

from bloomery.cluster.channel import free_port
from bloomery.spec.files import to_yaml


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards made once, and a run on one host."""
    folder = tmp_path_factory.mktemp("hosts")
    runs.make_data(folder)
    assert subprocess.run(command(folder, "alone"), stderr=subprocess.DEVNULL).returncode == 0
    return folder


def command(base: Path, name: str, *options: str, **train: object) -> list[str]:
    """Train a run of two ranks."""
    run = runs.describe(
        base, name, base / "shards", {"dp": 2}, **{"steps": 120, "supervision": {"hang_floor_s": 120.0}, **train}
    )
    (base / f"{name}.yaml").write_text(to_yaml(run.model_dump(mode="json")))
    return [sys.executable, "-m", "bloomery", "train", str(base / f"{name}.yaml"), *options]


class Hosts:
    """The two supervisors of a run."""

    def __init__(self, base: Path, name: str) -> None:
        where = f"127.0.0.1:{free_port('127.0.0.1')}"
        self.folder, self.errors = base / "runs" / name, [base / f"{name}.{host}.err" for host in range(2)]
        self.commands = [command(base, name, "--node", f"{host}/2", "--rendezvous", where) for host in range(2)]
        self.processes = [self.start(host) for host in range(2)]

    def start(self, host: int) -> subprocess.Popen[bytes]:
        """Start one."""
        with self.errors[host].open("ab") as stream:
            return subprocess.Popen(self.commands[host], stderr=stream)

    def wait(self) -> list[int]:
        """Both exit codes."""
        return [process.wait(timeout=240) for process in self.processes]

    def reached(self, step: int, resumes: int = 0) -> None:
        """Wait until a step was taken and a checkpoint is whole, after so many ranks have resumed."""
        until = time.monotonic() + 240
        while (
            max(runs.losses(self.folder), default=0) < step
            or len(runs.events(self.folder, "resumed")) < resumes
            or not any(self.folder.glob("checkpoints/step_*/commit.json"))
        ):
            assert time.monotonic() < until, "\n".join(path.read_text() for path in self.errors)
            time.sleep(0.02)


@pytest.fixture
def hosts(base: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two hosts at work, and none afterwards."""
    found = Hosts(base, request.node.name)
    yield found
    for process in found.processes:
        process.kill()
        process.wait()


def test_a_rank_and_then_a_host_are_lost_and_cost_no_bit(base: Path, hosts: Hosts) -> None:
    hosts.reached(5)
    [rank] = json.loads((hosts.folder / ".processes").read_text())
    os.kill(rank, signal.SIGKILL)
    hosts.reached(10, resumes=2)
    hosts.processes[1].kill()
    hosts.processes[1].wait()
    hosts.processes[1] = hosts.start(1)
    assert hosts.wait() == [0, 0], "\n".join(path.read_text() for path in hosts.errors)
    first, second = runs.events(hosts.folder, "worker_failed")
    assert (first["rank"], first["cause"]) == (0, "killed by SIGKILL")
    assert (second["rank"], second["cause"]) == (1, "on host 1, which is lost")
    assert runs.final_bits(hosts.folder) == runs.final_bits(base / "runs" / "alone")
    assert runs.losses(hosts.folder) == runs.losses(base / "runs" / "alone")


def test_any_hosts_signal_stops_all_after_saving_and_a_lost_leader_ends_all(base: Path, hosts: Hosts) -> None:
    hosts.reached(5)
    hosts.processes[1].terminate()
    assert hosts.wait() == [75, 0]
    last = max(runs.losses(hosts.folder))
    assert (hosts.folder / "checkpoints" / f"step_{last:06d}" / "commit.json").is_file()
    hosts.processes = [hosts.start(host) for host in range(2)]
    hosts.reached(last + 3)
    hosts.processes[0].kill()
    assert hosts.processes[1].wait(timeout=120) == 75
    assert "the first host, 127.0.0.1, is lost" in hosts.errors[1].read_text()
