"""F20: a run that is left alone with faults of every kind, as often as a Poisson process brings them. `make soak`.

The command is given again when it ends as a scheduler's job does (stopped by a signal, killed); anything else it needs
counts as a manual action. Steps are slowed to a quarter of a second, so that faults fall into all of a run's states.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import runs
from runs import describe, final_bits, losses, make_data, train

from bloomery.cluster.supervisor import launch
from bloomery.ledger.goodput import goodput
from bloomery.ledger.sinks import read_lines
from bloomery.spec.commit import checkpoint_folders
from bloomery.spec.run import Run

STEP_S, SPEED = 0.25, 0.75
"""Seconds a step is made to take; share of the time that is expected to be steps, for the number of them."""
INSIDE: dict[str, dict[str, object]] = {
    "loop": {},
    "hold": {},
    "raises": {},
    "flip": {"bit": 22},
    "full": {"seconds": 4.0},
    "clock": {"seconds": 3600.0},
    "pause": {"seconds": 3.0},
}
OUTSIDE = ("kill", "stop", "term", "warn", "kill command", "flip on disk", "tear on disk", "second command")


def worker_faults(steps: int, draw: random.Random) -> list[dict[str, object]]:
    """What both runs meet: a NaN every 100 steps or so."""
    places = [draw.randrange(first + 30, first + 100) for first in range(0, steps - 100, 100)]
    return [{"kind": "nan", "rank": draw.randrange(2), "step": step} for step in places]


class Command:
    """The command, given again when it was killed or stopped by a signal."""

    def __init__(self, folder: Path, description: Path, faults: list[dict[str, object]]) -> None:
        self.folder, self.description, self.faults = folder, description, faults
        self.manual, self.given = 0, 0
        self.give()

    def give(self) -> None:
        """Start it."""
        self.given += 1
        self.process = self.started()

    def started(self) -> subprocess.Popen[bytes]:
        """A process of it."""
        words = [sys.executable, __file__, "--command", str(self.description)]
        planned = json.dumps([*self.faults, {"kind": "asked"}, {"kind": "slow", "bucket": "data", "seconds": STEP_S}])
        with (self.folder.parent / "soak.log").open("ab") as log:
            return subprocess.Popen(words, env={**os.environ, "CHAOS": planned}, stdout=log, stderr=log)

    def goes_on(self) -> bool:
        """False when the run has finished; gives the command again where it ended otherwise."""
        code = self.process.poll()
        if code == 0:
            return False
        if code is not None:
            self.manual += code not in (75, -signal.SIGKILL)
            self.give()
        return True

    def ranks(self) -> list[int]:
        """Process numbers."""
        path = self.folder / ".processes"
        return [pid for pid in json.loads(path.read_text()) if Path(f"/proc/{pid}").exists()] if path.exists() else []


def strike(command: Command, kind: str, draw: random.Random) -> bool:
    """Do one thing to a run from outside; False when there is nothing to do it to just now."""
    ranks, folders = command.ranks(), checkpoint_folders(command.folder / "checkpoints")
    if command.process.poll() is not None or len(ranks) < 2:
        return False
    rank = draw.randrange(2)
    if kind in INSIDE:
        (command.folder / f"asked_{rank}").write_text(json.dumps({"kind": kind, **INSIDE[kind]}))
    elif kind in ("kill", "stop"):
        os.kill(ranks[rank], signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    elif kind in ("term", "warn"):
        command.process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGUSR1)
    elif kind == "kill command":
        command.process.kill()
    elif kind == "second command":
        command.manual += command.started().wait() != 2
    elif len(folders) < 2:
        return False
    else:
        file = draw.choice(sorted(folders[0].iterdir()))
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content if kind == "flip on disk" else content[: draw.randrange(len(content))])
        os.kill(ranks[rank], signal.SIGKILL)
    return True


def soak(command: Command, per_hour: float, draw: random.Random, until: float) -> Counter[str]:
    """Faults by kind until the run has finished, or it is late and there are no more."""
    struck = Counter[str]()
    following = time.monotonic() + draw.expovariate(per_hour / 3600)
    while command.goes_on():
        if following < time.monotonic() < until:
            kind = draw.choice((*INSIDE, *OUTSIDE))
            try:
                done = strike(command, kind, draw)
            except (OSError, ProcessLookupError):
                done = False  # what it was meant for has just gone
            struck[kind] += done
            following = time.monotonic() + (draw.expovariate(per_hour / 3600) if done else 0.2)
        time.sleep(0.05)
    return struck


def run_soak(place: Path, minutes: float, per_hour: float) -> dict[str, object]:
    """The undisturbed run, the disturbed one, and what came of it."""
    draw = random.Random(f"{runs.SEED} soak")
    steps = max(120, int(minutes * 60 * SPEED / STEP_S))
    settings = {"steps": steps, "checkpoint_every": 12, "evaluate_every": 200, "supervision": {"restarts": 10_000}}
    data = make_data(place)
    nans = worker_faults(steps, draw)
    reference, _ = train(describe(place, "reference", data, {"dp": 2}, **settings), nans)
    described = describe(place, "run", data, {"dp": 2}, **settings)
    folder, description = Path(described.out) / described.name, place / "run.json"
    folder.mkdir()
    description.write_text(described.model_dump_json())
    began = time.monotonic()
    command = Command(folder, description, nans)
    struck = soak(command, per_hour, draw, began + 2 * minutes * 60)
    wall_s = time.monotonic() - began
    account = goodput(folder)
    assert account is not None and account.formula is not None
    usual = losses(reference)
    resumed = {event["step"] for event in read_lines(folder / "events.jsonl") if event["event"] == "resumed"}
    return {
        "seed": runs.SEED,
        "minutes": round(wall_s / 60, 1),
        "steps": steps,
        "faults": sum(struck.values()),
        "by_kind": dict(sorted(struck.items())),
        "commands": command.given,
        "resumed_from": len(resumed),
        "manual_actions": command.manual,
        "same_bits": final_bits(folder) == final_bits(reference),
        "same_losses": losses(folder) == usual,
        "ettr": round(account.ettr, 4),
        "ettr_formula": round(account.formula, 4),
        "ettr_over_all": round(steps * STEP_S / wall_s, 4),
        "seconds": {name: round(seconds, 1) for name, seconds in account.seconds.items()},
        "ledger_gap": round(account.gap, 5),
    }


def main() -> int:
    """Soak; exit code 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--per-hour", type=float, default=100.0, help="faults an hour, on average")
    parser.add_argument("--command", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="a new folder for both runs, to look at afterwards")
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    given = parser.parse_args()
    if given.command:
        return one_command(Run.model_validate_json(given.command.read_text()))
    with nullcontext(given.keep) if given.keep else tempfile.TemporaryDirectory(prefix="soak-") as place:
        Path(place).mkdir(exist_ok=True)
        found = run_soak(Path(place), given.minutes, given.per_hour)
    text = json.dumps(found, indent=1)
    print(text)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n")
    near = abs(float(str(found["ettr"])) - float(str(found["ettr_formula"]))) <= 0.02
    bits, within = "same" if found["same_bits"] else "OTHER", "within" if near else "NOT within"
    print(f"F20  {found['faults']} faults in {found['minutes']} min: {found['manual_actions']} manual actions (goal 0)")
    print(f"F20  {bits} bits, ETTR {found['ettr']} beside {found['ettr_formula']}, {within} 2 points")
    return 0 if found["same_bits"] and not found["manual_actions"] else 1


def one_command(described: Run) -> int:
    """What a user's `bloomery train` does, with ranks that can be harmed."""
    from bloomery.cluster import prepare
    from bloomery.spec.errors import BloomeryError

    try:
        folder, job = prepare.prepare_pretraining(described, world_size=None, fresh=False)
        return launch("faults", folder, job.layout.world_size)
    except BloomeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
