"""A real Slurm does to a launched run what sites do: it goes on by itself and ends with the undisturbed bits.

`make slurm` runs all of this; `make test` only the shortest scenario (tests/e2e/test_launch_slurm.py).
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest
from private_slurm import Slurm, slurm, why_not
from scenarios import Scenario

from bloomery.ledger.goodput import goodput

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """One Slurm for all."""
    with slurm(tmp_path_factory.mktemp("site") / "slurm") as running:
        yield running


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory, site: Slurm) -> Scenario:
    """Runs to launch, and what one that nothing disturbs ends with."""
    return Scenario(tmp_path_factory.mktemp("runs"), site)


@pytest.fixture(scope="module")
def undisturbed(scenario: Scenario) -> str:
    """The bits of a run on two hosts that nothing happens to."""
    job = scenario.launch("undisturbed")
    assert scenario.site.ended(job) == "COMPLETED", scenario.log("undisturbed", job)
    return scenario.bits("undisturbed")


def test_two_hosts_end_with_the_bits_of_one(scenario: Scenario, undisturbed: str) -> None:
    scenario.train("alone")
    assert scenario.bits("alone") == undisturbed
    assert scenario.losses("alone") == scenario.losses("undisturbed")


def test_the_follower_shows_the_line_of_a_local_run_and_ends_with_the_job(scenario: Scenario) -> None:
    path = scenario.describe("followed")
    done = scenario.call("launch", path, "--on", "slurm")
    assert done.returncode == 0, done.stderr
    assert "submitted job" in done.stderr and "completed" in done.stderr
    assert f"pretrain step {scenario.steps}/{scenario.steps}  loss" in done.stderr


def test_the_follower_may_leave_and_come_back(scenario: Scenario) -> None:
    path = scenario.describe("left")
    with scenario.start("launch", path, "--on", "slurm") as follower:
        scenario.reached("left", 3)
        follower.send_signal(signal.SIGINT)
        _, said = follower.communicate(timeout=120)
    assert follower.returncode == 130
    assert "goes on" in said and "--follow" in said and "scancel" in said
    done = scenario.call("launch", path, "--on", "slurm", "--follow")
    assert done.returncode == 0, done.stderr
    assert f"pretrain step {scenario.steps}/{scenario.steps}" in done.stderr


def test_requeued_it_goes_on_bit_for_bit_and_says_what_the_queue_cost(scenario: Scenario, undisturbed: str) -> None:
    job = scenario.launch("requeued")
    scenario.reached("requeued", 5)
    scenario.site.call("scancel", "--signal=USR1", job)  # what --signal sends ahead of the time limit
    scenario.site.wait(lambda: len(scenario.events("requeued", "job_started")) == 2, "a second start")
    assert scenario.site.ended(job) == "COMPLETED", scenario.log("requeued", job)
    assert scenario.bits("requeued") == undisturbed
    first, second = scenario.events("requeued", "job_started")
    assert (first["launcher"], first["job"], first["requeues"], second["requeues"]) == ("slurm", job, 0, 1)
    found = goodput(scenario.folder("requeued"))
    assert found is not None and (found.jobs, found.failures) == (2, 0)
    assert found.seconds["queue"] == pytest.approx(first["queued_s"] + second["queued_s"])
    assert found.seconds["queue"] > 0
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, rel=0.005)


def test_the_time_limit_is_met_before_it_strikes(scenario: Scenario) -> None:
    """Slurm's least limit is a minute, and it looks every half minute: notice comes 10 to 40 s into each job."""
    job = scenario.launch("limited", "--set", "launch.slurm.time=1", "--set", "launch.slurm.notice_s=20", steps=700)
    assert scenario.site.ended(job) == "COMPLETED", scenario.log("limited", job)
    assert len(scenario.events("limited", "job_started")) > 1
    scenario.train("unlimited", steps=700)
    assert scenario.bits("limited") == scenario.bits("unlimited")


def test_cancelled_it_saves_and_stays_cancelled(scenario: Scenario, undisturbed: str) -> None:
    job = scenario.launch("cancelled")
    scenario.reached("cancelled", 5)
    scenario.site.call("scancel", job)
    assert scenario.site.ended(job) == "CANCELLED", scenario.log("cancelled", job)
    last = max(scenario.losses("cancelled"))
    assert (scenario.folder("cancelled") / "checkpoints" / f"step_{last:06d}" / "commit.json").is_file()
    again = scenario.launch("cancelled")
    assert scenario.site.ended(again) == "COMPLETED"
    assert scenario.bits("cancelled") == undisturbed


def test_a_node_that_fails_costs_no_bit(scenario: Scenario, undisturbed: str) -> None:
    job = scenario.launch("node")
    scenario.reached("node", 5)
    scenario.site.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    scenario.site.wait(lambda: scenario.site.state(job) == "PENDING", "the job back in the queue")
    assert scenario.site.ended(job) == "COMPLETED", scenario.log("node", job)
    assert scenario.bits("node") == undisturbed


def test_a_node_without_power_comes_back(scenario: Scenario, undisturbed: str) -> None:
    job = scenario.launch("power")
    scenario.reached("power", 5)
    scenario.site.power_off("n2")
    scenario.site.wait(lambda: scenario.site.state(job) == "PENDING", "the job back in the queue")
    scenario.site.node("n2")
    assert scenario.site.ended(job) == "COMPLETED", scenario.log("power", job)
    assert scenario.bits("power") == undisturbed


def test_a_second_job_on_the_same_folder_is_refused(scenario: Scenario) -> None:
    script = scenario.printed("twice", "--nodes", "1")
    first = scenario.launch("twice", "--nodes", "1")
    scenario.reached("twice", 3)
    refused = scenario.call("launch", scenario.described("twice"), "--on", "slurm", "--detach")
    assert refused.returncode == 2 and f"job {first} of this run is still there" in refused.stderr
    second = scenario.submit(script)
    assert scenario.site.ended(second) == "FAILED"
    assert "another process" in scenario.log("twice", second)
    assert scenario.site.ended(first) == "COMPLETED", scenario.log("twice", first)


def test_a_sweep_is_one_array_job(scenario: Scenario) -> None:
    path = scenario.describe("sweep", steps=4)
    done = scenario.call("launch", path, "--on", "slurm", "--nodes", "1", "--array", "train.seed=1,2,3", "--json")
    assert done.returncode == 0, done.stderr
    scenario.site.wait(lambda: not scenario.site.call("squeue", "-h"), "the end of the array")
    finals = {scenario.losses(f"sweep-{number}")[4] for number in range(3)}
    assert len(finals) == 3


def test_every_task_of_a_sweep_goes_on_by_itself(scenario: Scenario) -> None:
    path = scenario.describe("stopped")
    sweep = ("--nodes", "1", "--array", "train.seed=1,2", "--json")
    done = scenario.call("launch", path, "--on", "slurm", *sweep)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)["job"]
    names = [f"stopped-{number}" for number in range(2)]
    for name in names:
        scenario.reached(name, 5)
    for number, name in enumerate(names):
        scenario.site.call("scancel", "--signal=USR1", f"{job}_{number}")
        scenario.site.wait(lambda name=name: len(scenario.events(name, "job_started")) == 2, f"{name} started again")
    scenario.site.wait(lambda: not scenario.site.call("squeue", "-h"), "the end of the array")
    for name in names:
        assert max(scenario.losses(name)) == scenario.steps
