"""Starts one measuring process for each rank of some hosts, follows them, and reads each one's figures.

A process gets its place as one JSON line on standard input and answers in lines on standard output: `PORT n` (rank 0:
where the others meet), `JOINED`, `TELL text` (rank 0: what it is at), `RESULT {...}`. It ends when its standard input
does, so nothing lives on where this process was killed. Imports no torch.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from bloomery.cluster.hostfile import Host, Hosts
from bloomery.cluster.world import READ_AT_IMPORT
from bloomery.spec.errors import BloomeryError

Tell = Callable[[str], None]
ENDED = ("ENDED", "")


class _Rank:
    """One process and the thread that reads what it says."""

    def __init__(self, rank: int, host: Host, command: list[str], said: queue.Queue[tuple[int, str, str]]) -> None:
        self.rank, self.host = rank, host
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin = self.process.stdin
        self.errors = list[str]()
        self._listeners = [
            threading.Thread(target=self._listen, args=(self.process.stdout, said), daemon=True),
            threading.Thread(target=self._collect, args=(self.process.stderr,), daemon=True),
        ]
        for listener in self._listeners:
            listener.start()

    def _listen(self, lines: IO[str], said: queue.Queue[tuple[int, str, str]]) -> None:
        for line in lines:
            word, _, rest = line.rstrip("\n").partition(" ")
            said.put((self.rank, word, rest))
        self.process.wait()
        said.put((self.rank, *ENDED))

    def _collect(self, lines: IO[str]) -> None:
        self.errors += [line.strip() for line in lines if line.strip()]

    def send(self, value: dict[str, Any]) -> None:
        """One JSON line on its standard input; one that has ended already is noticed by its end."""
        with suppress(BrokenPipeError):
            self.stdin.write(json.dumps(value) + "\n")
            self.stdin.flush()

    def problem(self) -> str:
        """Its last words."""
        self._listeners[1].join(timeout=1)
        code = self.process.returncode
        return self.errors[-1] if self.errors else f"exit code {code}" if code else "it gave no figures"

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # closing tries once more to say what a dead rank did not read
            self.stdin.close()


def run_ranks(
    module: str, hosts: Hosts, settings: dict[str, Any], timeout_s: float, tell: Tell = lambda _: None
) -> list[dict[str, Any]]:
    """The figures of each rank, in order, with `started_s`: until it had imported and met the others.

    Raises BloomeryError that names rank and host when one fails, or when none says anything for `timeout_s`.
    """
    said = queue.Queue[tuple[int, str, str]]()
    places = [(host, local) for host in hosts.hosts for local in range(host.slots)]
    ranks = list[_Rank]()
    try:
        for rank, (host, local) in enumerate(places):
            ranks.append(_Rank(rank, host, hosts.command(host, module, READ_AT_IMPORT), said))
            ranks[rank].send(
                {
                    **settings,
                    "rank": rank,
                    "world_size": len(places),
                    "local_rank": local,
                    "host": hosts.hosts.index(host),
                    "slots": [each.slots for each in hosts.hosts],
                    "address": host.reached_by,
                    "threads": host.threads,
                }
            )
        return _followed(ranks, said, timeout_s, tell)
    finally:
        for one in ranks:
            one.end()


def _followed(
    ranks: list[_Rank], said: queue.Queue[tuple[int, str, str]], timeout_s: float, tell: Tell
) -> list[dict[str, Any]]:
    results = dict[int, dict[str, Any]]()
    began, joined_s = time.monotonic(), dict[int, float]()
    while len(results) < len(ranks):
        try:
            rank, word, rest = said.get(timeout=timeout_s)
        except queue.Empty:
            late = ", ".join(f"{one.rank} on {one.host.name}" for one in ranks if one.rank not in results)
            raise BloomeryError(
                f"rank {late}: no figures, and no word for {timeout_s:.0f} s; is the machine busy?"
            ) from None
        if word == "JOINED":
            joined_s[rank] = time.monotonic() - began
        elif word == "PORT":
            for one in ranks[1:]:
                one.send({"meet": ranks[0].host.reached_by, "port": int(rest)})
        elif word == "TELL":
            tell(rest)
        elif word == "RESULT":
            results[rank] = json.loads(rest) | {"started_s": joined_s[rank]}
        elif (word, rest) == ENDED and rank not in results:
            one = ranks[rank]
            raise BloomeryError(f"rank {rank} of {len(ranks)} on {one.host.name} failed: {one.problem()}")
    return [results[rank] for rank in range(len(ranks))]
