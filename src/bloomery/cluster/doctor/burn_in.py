"""One rank of a burn-in, started by `measuring`: the same work on all at once, in turns, each part timed.

A turn is some laps (matrix products, a pass over memory, an all-reduce), then a message there and back between hosts,
two by two. A rank's own work is timed before it waits for anybody: the slow one shows, not those it holds up. Turns
spread every part over the whole time, so that what drifts or passes meets all ranks and links alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bloomery.cluster.doctor.pairs import rounds_of_pairs
from bloomery.cluster.meeting import Place, join, leave

PRODUCT = {"cpu": 384, "cuda": 4096}
"""Rows of a square matrix: some milliseconds of work on either kind of device."""
PRODUCTS = 6
STREAM_BYTES = 16 << 20
MESSAGE_BYTES = 256 << 10
PAIR_BYTES = (64 << 10, 2 << 20)
"""The shortest and the longest message of a pair: in between as long as its link takes PAIR_S for, one way."""
PAIR_S = 0.012
PAIR_TRIES = 3
WARM_UP_LAPS = 3


def main() -> None:
    """Join, burn, say it."""
    place = join()
    leave(burn(place, float(place.settings["seconds"]), int(place.settings["turns"])))


def burn(place: Place, seconds: float, turns: int) -> dict[str, Any]:
    """The number of laps, by part the usual seconds of one, and by the other host's number bytes/s to it and back; the
    last two turn by turn. `seconds` of laps in all."""
    laps, links = Laps(place), Links(place)
    for _ in range(turns):
        laps.turn(seconds / turns)
        links.turn()
    return {"laps": laps.count, "seconds": laps.seconds, "pairs": links.rates}


class Laps:
    """A rank's work: laps so far, and by part the usual seconds of each turn."""

    def __init__(self, place: Place) -> None:
        """Warms up."""
        device, rows = place.device, PRODUCT[place.device.type]
        x = torch.randn(rows, rows, device=device) / rows**0.5
        a, b = torch.randn(STREAM_BYTES // 4, device=device), torch.empty(STREAM_BYTES // 4, device=device)
        self.place, self.count = place, 0
        self._parts: dict[str, Callable[[], Any]] = {
            "product": partial(_products, x),
            "memory": partial(torch.add, a, 1.0, out=b),
        }
        if place.world_size > 1:
            message = torch.zeros(MESSAGE_BYTES // 4, device=device)
            self._parts["all_reduce"] = partial(dist.all_reduce, message)
        self.seconds: dict[str, list[float]] = {part: [] for part in self._parts}
        for _ in range(WARM_UP_LAPS):
            self._lap()

    def turn(self, seconds: float) -> None:
        """Laps for so long, at least one."""
        if self.place.world_size > 1:
            dist.barrier()
        ends = time.monotonic() + seconds
        laps = [self._lap()]
        while not _over(self.place, ends):
            laps.append(self._lap())
        self.count += len(laps)
        for part, taken in self.seconds.items():
            taken.append(usual([lap[part] for lap in laps]))

    def _lap(self) -> dict[str, float]:
        return {part: _timed(self.place.device, work) for part, work in self._parts.items()}


def usual(seconds: Sequence[float]) -> float:
    """The lower quartile: what else a machine does only slows laps, and the quick laps of a slow device are slow."""
    return sorted(seconds)[len(seconds) // 4]


def _products(x: torch.Tensor) -> None:
    y = x
    for _ in range(PRODUCTS):
        y = y @ x


def _timed(device: torch.device, work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _over(place: Place, ends: float) -> bool:
    """Whether rank 0's time is up, so that all make the same number of laps."""
    if place.world_size == 1:
        return time.monotonic() >= ends
    over = torch.tensor(float(time.monotonic() >= ends), device=place.device)
    dist.broadcast(over, 0)
    return bool(over)


@dataclass
class Peer:
    """Whom this rank exchanges a message with: host `host`'s first rank; `leads`: sends first."""

    host: int
    rank: int
    leads: bool
    message: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class Links:
    """Bytes/s from this host to others and back, by the other's number, turn by turn: the first rank of each host
    measures, disjoint pairs at once."""

    def __init__(self, place: Place) -> None:
        """Agrees with each peer how long the messages are."""
        self.place, self.rates = place, dict[int, list[float]]()
        self._rounds = _peers(place)
        for peer in self._meetings():
            shortest, longest = (torch.zeros(size // 4, device=place.device) for size in PAIR_BYTES)
            taken_s = min(_exchange(shortest, peer) for _ in range(PAIR_TRIES)) / 2
            size = torch.tensor(min(len(longest), max(len(shortest), int(len(shortest) * PAIR_S / taken_s))))
            size = size.to(place.device)
            dist.send(size, peer.rank) if peer.leads else dist.recv(size, peer.rank)
            peer.message = longest[: int(size)]
            self.rates[peer.host] = []

    def turn(self) -> None:
        """One message there and back with each peer."""
        for peer in self._meetings():
            self.rates[peer.host].append(2 * peer.message.nbytes / _exchange(peer.message, peer))

    def _meetings(self) -> Iterator[Peer]:
        """This rank's peers; all ranks begin a round together."""
        for peer in self._rounds:
            dist.barrier()
            if peer is not None:
                yield peer


def _peers(place: Place) -> list[Peer | None]:
    """This rank's peer in each round; None where it has none."""
    first = [sum(place.slots[:host]) for host in range(len(place.slots))]
    rounds = list[Peer | None]()
    for pairing in rounds_of_pairs(len(place.slots)):
        mine = None
        for one, other in pairing:
            if place.rank == first[one]:
                mine = Peer(other, first[other], leads=True)
            elif place.rank == first[other]:
                mine = Peer(one, first[one], leads=False)
        rounds.append(mine)
    return rounds


def _exchange(message: torch.Tensor, peer: Peer) -> float:
    """Seconds of a message there and back."""

    def there_and_back() -> None:
        for sends in (peer.leads, not peer.leads):
            dist.send(message, peer.rank) if sends else dist.recv(message, peer.rank)

    return _timed(message.device, there_and_back)


if __name__ == "__main__":
    main()
