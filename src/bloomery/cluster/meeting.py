"""The other end of `measuring`: a measuring process finds its place, meets the others, and says what it measured.

The store that ranks meet at listens on the address of rank 0's host alone, messages go over the interface that has it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from bloomery.cluster.interfaces import interface_of
from bloomery.cluster.world import threads_per_rank

JOIN_TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Place:
    """Which rank this is. `slots`: ranks of each host; `host`: the number of this one; `settings`: the caller's own."""

    rank: int
    world_size: int
    local_rank: int
    host: int
    slots: tuple[int, ...]
    device: torch.device
    settings: dict[str, Any]

    def tell(self, text: str) -> None:
        """What is being done now, said once for all ranks."""
        if self.rank == 0:
            _say("TELL", text)


def join() -> Place:
    """Read this process's place, set its threads and device, and join the others (gloo on CPU, NCCL on CUDA)."""
    values = json.loads(sys.stdin.readline())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", values["local_rank"]) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(values["threads"] or threads_per_rank(values["slots"][values["host"]]))
    place = Place(
        values["rank"],
        values["world_size"],
        values["local_rank"],
        values["host"],
        tuple(values["slots"]),
        device,
        values,
    )
    if place.world_size > 1:
        _meet(place, values["address"])
    threading.Thread(target=_end_with_input, daemon=True).start()
    _say("JOINED", "")
    return place


def leave(result: dict[str, Any]) -> None:
    """Say the figures and leave the others."""
    _say("RESULT", json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def _say(word: str, rest: str) -> None:
    print(word, rest, flush=True)


def _end_with_input() -> None:
    """End when the process that started this one does: a remote shell closes standard input then."""
    while sys.stdin.readline():
        pass
    os._exit(1)


def _meet(place: Place, address: str) -> None:
    interface = interface_of(address)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # NCCL takes a bare name for a beginning of names
    if place.rank == 0:
        listening = socket.create_server((address, 0), backlog=place.world_size)
        port = listening.getsockname()[1]
        _say("PORT", str(port))
        store = TCPStore(
            address, port, place.world_size, True, JOIN_TIMEOUT, False, master_listen_fd=listening.detach()
        )
    else:
        there = json.loads(sys.stdin.readline())
        store = TCPStore(there["meet"], there["port"], place.world_size, False, JOIN_TIMEOUT, False)
    cuda = place.device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=JOIN_TIMEOUT,
        device_id=place.device if cuda else None,  # barriers, the first messages of all, would have to guess it
    )
