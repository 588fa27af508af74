"""Which jobs were launched for a run: `launch/jobs.jsonl` in its folder."""

from __future__ import annotations

import time
from pathlib import Path

from bloomery.ledger.sinks import JsonLines, read_lines
from bloomery.spec.errors import InputError


def _file(folder: Path) -> Path:
    return folder / "launch" / "jobs.jsonl"


def remember(folder: Path, site: str, job: str, log: Path) -> None:
    """A job was submitted. `log`: where its output goes, which for a run of an array is another run's folder."""
    lines = JsonLines(_file(folder))
    lines.write({"time": time.time(), "site": site, "job": job, "log": str(log)})
    lines.close()


def log_of(folder: Path, job: str) -> Path:
    """Where the output of a job of this run goes."""
    logs = [str(line["log"]) for line in read_lines(_file(folder)) if line.get("job") == job and "log" in line]
    return Path(logs[-1]) if logs else folder / "launch" / f"{job}.log"


def last_job(folder: Path, site: str, *, required: bool = True) -> str:
    """The newest job of a run at a site, empty where there is none. Raises InputError when one is `required`."""
    jobs = [str(line["job"]) for line in read_lines(_file(folder)) if line.get("site") == site]
    if not jobs and required:
        raise InputError(f"no job of this run was launched on {site}", where=str(folder))
    return jobs[-1] if jobs else ""
