"""Supervisors of several hosts act as one, whatever happens to a rank, a host or the leader. No torch here."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bloomery.cluster import hosts as hosts_of_a_run
from bloomery.cluster.channel import Channel, LostError, free_port, listen, proof, the_secret
from bloomery.cluster.hosts import Leader, TemporaryError, _conclusion
from bloomery.cluster.place import Place
from bloomery.cluster.stopping import Stopping
from bloomery.cluster.world import Outcome
from bloomery.ledger.sinks import read_lines
from bloomery.spec.errors import InputError
from bloomery.spec.job import CORRUPTED, GAVE_UP, Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.reliability import Supervision
from bloomery.spec.run import Optimizer

STUB = Path(__file__).parent / "stub_rank.py"
OK = ["ok"]


class Hosts:
    """Two hosts with two ranks each."""

    def __init__(self, folder: Path, acts: dict[int, list[str]]) -> None:
        self.folder = folder
        job = Job(
            name="pretrain", model=Model(layers=1, hidden=8, heads=1, vocab=8), layout=Layout(dp=4), dtype="float32",
            seed=0, seq_len=8, global_batch=4, steps=1, optimizer=Optimizer(), data="", heldout="",
        )  # fmt: skip
        (folder / "job.json").write_text(job.model_dump_json())
        (folder / "acts.json").write_text(json.dumps({rank: acts.get(rank, OK) for rank in range(4)}))
        self.where = f"127.0.0.1:{free_port('127.0.0.1')}"
        self.processes = [self.start(host) for host in (1, 0)][::-1]

    def start(self, host: int) -> subprocess.Popen[str]:
        """Start one."""
        command = [sys.executable, str(STUB), str(self.folder), f"{host}/2", self.where]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def codes(self) -> list[int]:
        """Exit codes, when both have ended; what they said of it is shown where a test fails."""
        for process in self.processes:
            print(process.communicate(timeout=180)[1], file=sys.stderr)
        return [process.returncode for process in self.processes]

    def told(self, start: int) -> list[dict[str, str]]:
        """What the ranks of one start were told."""
        return [json.loads((self.folder / f"rank_{rank}_start_{start}.json").read_text()) for rank in range(4)]

    def wait_for(self, start: int) -> None:
        """Until all ranks of a start are there."""
        until = time.monotonic() + 180
        while not all((self.folder / f"rank_{rank}_start_{start}.json").exists() for rank in range(4)):
            assert time.monotonic() < until
            time.sleep(0.02)


Make = Callable[[dict[int, list[str]]], Hosts]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Make]:
    """Makes two hosts, of which nothing is left."""
    made = list[Hosts]()

    def make(acts: dict[int, list[str]]) -> Hosts:
        made.append(Hosts(tmp_path, acts))
        return made[-1]

    yield make
    for process in [process for one in made for process in one.processes]:
        process.kill()
        process.communicate()


def test_each_host_gets_its_ranks_and_all_meet_at_one_place(hosts: Make) -> None:
    one = hosts({})
    assert one.codes() == [0, 0]
    told = one.told(1)
    assert [rank["LOCAL_RANK"] for rank in told] == ["0", "1", "0", "1"]
    assert {rank["WORLD_SIZE"] for rank in told} == {"4"}
    [meeting] = {rank["BLOOMERY_RENDEZVOUS"] for rank in told}
    assert meeting.startswith("tcp://127.0.0.1:") and meeting != f"tcp://{one.where}"
    assert {rank["GLOO_SOCKET_IFNAME"] for rank in told} == {"lo"}


def test_a_rank_killed_on_another_host_is_named_and_all_start_again_elsewhere(hosts: Make) -> None:
    one = hosts({3: ["kill", "ok"], 0: ["wait", "ok"]})
    assert one.codes() == [0, 0]
    [failure] = [event for event in read_lines(one.folder / "events.jsonl") if event["event"] == "worker_failed"]
    assert (failure["rank"], failure["cause"]) == (3, "killed by SIGKILL")
    assert one.told(1)[0]["BLOOMERY_RENDEZVOUS"] != one.told(2)[0]["BLOOMERY_RENDEZVOUS"]
    assert [line["code"] for line in read_lines(one.folder / "supervision.jsonl")] == [1, 0]


def test_a_signal_at_any_host_stops_all(hosts: Make) -> None:
    one = hosts({rank: ["wait"] for rank in range(4)})
    one.wait_for(1)
    one.processes[1].terminate()
    assert one.codes() == [75, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_a_job_stops_it_as_one_to_a_host_does(hosts: Make, number: int) -> None:
    """As `scancel --signal` or a terminal's Ctrl-C sends it: the process that ranks are forked from gets it too, and
    must outlive them."""
    one = hosts({rank: ["wait"] for rank in range(4)})
    one.wait_for(1)
    for pid in [other for process in one.processes for other in below(process.pid)]:
        os.kill(pid, number)
    assert one.codes() == [75, 0]
    assert not (one.folder / "events.jsonl").exists() or not [
        event for event in read_lines(one.folder / "events.jsonl") if event["event"] == "worker_failed"
    ]
    assert [line["code"] for line in read_lines(one.folder / "supervision.jsonl")] == [75]


@pytest.mark.parametrize(
    ("code", "cause"),
    [(GAVE_UP, "exit code 4"), (CORRUPTED, "exit code 5"), (2, "exit code 2"), (1, "killed by SIGKILL")],
)
def test_who_ended_first_of_hosts_that_end_together(code: int, cause: str) -> None:
    """A rank that only lost its peer is nobody's culprit."""
    lost, culprit = Outcome(1, 0, "exit code 1", 10), Outcome(code, 2, cause, 10)
    assert _conclusion([lost, culprit], 2) == _conclusion([culprit, lost], 2) == culprit


def below(pid: int) -> list[int]:
    """A process and all that it has started, the newest first."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [*(other for child in children for other in below(int(child))), pid]


def test_a_host_that_is_lost_is_waited_for_and_named(hosts: Make) -> None:
    one = hosts({rank: ["wait", "ok"] for rank in range(4)})
    one.wait_for(1)
    one.processes[1].kill()
    one.processes[1].communicate()
    one.processes[1] = one.start(1)
    assert one.codes() == [0, 0]
    [failure] = [event for event in read_lines(one.folder / "events.jsonl") if event["event"] == "worker_failed"]
    assert (failure["rank"], failure["cause"]) == (2, "on host 1, which is lost")


def test_without_its_leader_a_host_ends_and_leaves_nothing_behind(hosts: Make) -> None:
    one = hosts({rank: ["wait"] for rank in range(4)})
    one.wait_for(1)
    one.processes[0].kill()
    _, said = one.processes[1].communicate(timeout=180)
    assert one.processes[1].returncode == 75
    assert "the first host, 127.0.0.1, is lost" in said
    done = subprocess.run(["pgrep", "-f", str(one.folder)], capture_output=True, text=True)
    assert done.stdout == "", "orphans"


def test_a_leader_waits_for_its_name_its_address_and_its_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = [socket.gaierror(-2, "Name or service not known"), OSError(errno.EADDRNOTAVAIL, "no such address")]
    held = socket.create_server(("127.0.0.1", 0))
    port = held.getsockname()[1]

    def listen_when_free(*where: Any) -> socket.socket:
        if faults:
            raise faults.pop()
        try:
            return listen(*where)
        finally:
            held.close()

    monkeypatch.setattr(hosts_of_a_run, "listen", listen_when_free)
    Leader(Place(0, 2, "127.0.0.1", port), tmp_path, Supervision(), Stopping()).dismiss()
    assert not faults and capsys.readouterr().err.count("trying for") == 1


def test_a_port_that_stays_taken_is_temporary_and_one_that_is_forbidden_is_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, settings = Place(0, 2, "127.0.0.1", 1), Supervision(first_phase_s=0.2)
    for fault, error in ((errno.EADDRINUSE, TemporaryError), (errno.EACCES, InputError)):
        monkeypatch.setattr(hosts_of_a_run, "listen", raising(OSError(fault, "no")))
        with pytest.raises(error, match=r"--rendezvous 127\.0\.0\.1:1"):
            Leader(place, tmp_path, settings, Stopping())
    assert TemporaryError.exit_code == 75


def raising(error: OSError) -> Callable[..., socket.socket]:
    """A function that does nothing else."""

    def fail(*_: Any) -> socket.socket:
        raise error

    return fail


def test_only_who_can_read_the_folder_is_let_in(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    leader = Leader(Place(0, 2, "127.0.0.1", port), tmp_path, Supervision(), Stopping())
    open_ones = []  # one that is forgotten hangs up, and its place is free again
    for secret, joins in ((b"guessed", False), (the_secret(tmp_path), True), (the_secret(tmp_path), False)):
        channel = Channel(socket.create_connection(("127.0.0.1", port)))
        open_ones.append(channel)
        before = len(leader.members)
        challenge = answer_of(leader, channel)
        assert challenge is not None
        channel.send({"node": 1, "proof": proof(secret, challenge["challenge"])})
        answer = answer_of(leader, channel)
        assert (answer == {"do": "welcome"}) == joins
        assert len(leader.members) == before + joins
    leader.members.clear()
    leader.dismiss()


def answer_of(leader: Leader, channel: Channel) -> dict[str, str] | None:
    """What the leader says next; None when it hangs up."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        leader._listen()
        try:
            answer = channel.next()
        except LostError:
            return None
        if answer is not None:
            return answer
    raise AssertionError("no answer")
