"""The shortest scenario of `make slurm`: a launched run is put back in the queue and ends with the undisturbed bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from private_slurm import slurm, why_not
from scenarios import Scenario


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")
def test_a_requeued_run_on_two_hosts_ends_with_the_bits_of_an_undisturbed_one_on_one(tmp_path: Path) -> None:
    with slurm(tmp_path / "slurm") as site:
        scenario = Scenario(tmp_path, site)
        job = scenario.launch("requeued")
        scenario.reached("requeued", 12)
        site.call("scancel", "--signal=USR1", job)
        assert site.ended(job) == "COMPLETED", scenario.log("requeued", job)
        assert [event["requeues"] for event in scenario.events("requeued", "job_started")] == [0, 1]
    scenario.train("undisturbed")
    assert scenario.bits("requeued") == scenario.bits("undisturbed")
