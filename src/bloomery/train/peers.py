"""Rank 0 follows the ledger that every rank appends to, and says when one is slower than its peers.

No message is sent for it: the lines are written anyway, and those of a step are all there when the next is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bloomery.ledger.sinks import Follower
from bloomery.ledger.stragglers import Finding, Stragglers
from bloomery.parallel.mesh import Mesh
from bloomery.spec.layout import Layout


class PeerWatch:
    """What `ledger.stragglers` finds in the lines of this start, with the hosts of those it names."""

    def __init__(self, ledger: Path, layout: Layout, least_share: float) -> None:
        inner = layout.data_ranks * layout.tp
        self._judge = Stragglers([rank // inner for rank in range(layout.world_size)], least_share)
        self._lines = Follower(ledger)
        self._hosts = dict[int, str]()

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """New incidents: `straggler`, or `straggler_over`, with what is known of it."""
        lines = self._lines.new()
        self._hosts.update({line["rank"]: line["host"] for line in lines if "host" in line})
        return [self._event(finding) for finding in self._judge.feed(lines)]

    def _event(self, finding: Finding) -> tuple[str, dict[str, Any]]:
        host = {} if finding.rank is None else {"host": self._hosts.get(finding.rank, "")}
        said = {**finding.to_json(), **host, "reason": finding.describe()}
        return ("straggler_over" if finding.over else "straggler"), said

    @property
    def remark(self) -> str:
        """The newest finding that holds, for the line at the terminal."""
        active = list(self._judge.active.values())
        if not active:
            return ""
        last = active[-1]
        who = "a link" if last.rank is None else f"rank {last.rank}"
        return f"{who} slow ({last.kind} {last.share:.0%})"


def watch_of(mesh: Mesh, folder: Path, least_share: float) -> PeerWatch | None:
    """Rank 0's watch, where there are others and the host's clock sees what ranks do."""
    if mesh.rank or mesh.world_size == 1 or mesh.device.type != "cpu" or least_share == 0:
        return None
    return PeerWatch(folder / "ledger.jsonl", mesh.layout, least_share)
