"""A rank without torch, and the supervisor of a host that has such ranks: `stub_rank.py FOLDER I/N HOST:PORT`.

What a rank does at each start is in `acts.json`, by rank: `ok`, `kill` (itself), `wait` (for SIGTERM, then 75).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

TOLD = ("LOCAL_RANK", "WORLD_SIZE", "BLOOMERY_RENDEZVOUS", "GLOO_SOCKET_IFNAME")


def main() -> int:
    """One rank: say who it is, and act."""
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    acts = json.loads((folder / "acts.json").read_text())[rank]
    stopped = list[int]()
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    start = int((folder / ".fence").read_text())
    told = {
        name: os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "BLOOMERY_RENDEZVOUS", "GLOO_SOCKET_IFNAME")
    }
    (folder / f"rank_{rank}_start_{start}.json").write_text(json.dumps(told))
    act = acts[min(start, len(acts)) - 1]
    if act == "kill":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "wait":
        until = time.monotonic() + 30
        while not stopped and time.monotonic() < until:
            time.sleep(0.02)
        return 75 if stopped else 1
    time.sleep(0.3)
    return 0


def host() -> None:
    """One host's supervisor."""
    from bloomery.cluster import world
    from bloomery.cluster.hosts import follow_leader
    from bloomery.cluster.place import Place
    from bloomery.cluster.supervisor import launch

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to Ctrl-C
    world.PRELOADED[:] = ["bloomery.cluster.forked_from"]
    folder, place = Path(sys.argv[1]), Place.parse(sys.argv[2], sys.argv[3])
    if place.node:
        follow_leader("stub_rank", folder, place)
    else:
        sys.exit(launch("stub_rank", folder, 2 * place.nodes, place))


if __name__ == "__main__":
    from bloomery.cli.console import one_line_errors

    with one_line_errors():
        host()
