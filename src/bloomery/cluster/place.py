"""Which host of a run this is, as the launcher says: `--node 1/4 --rendezvous HOST:PORT`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bloomery.spec.errors import InputError

PORT = 29400
"""Where the first host listens unless another port is named."""
_LISTENING = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::(\d{1,5}))?")
"""An address with colons in brackets: without them its last group could be a port."""


def named_for_port(host: str) -> str:
    """A host as it stands before a colon and a port."""
    return f"[{host.strip('[]')}]" if ":" in host else host


@dataclass(frozen=True)
class Place:
    """Host number `node` (from 0) of `nodes`; the first one listens at `host`:`port`."""

    node: int = 0
    nodes: int = 1
    host: str = ""
    port: int = PORT

    @classmethod
    def parse(cls, node: str, rendezvous: str) -> Place:
        """From the options of `train`; both empty: the only host. Raises InputError."""
        if not node:
            if rendezvous:
                raise InputError("say also which host this is", where="--node", accepted="as in 0/4")
            return cls()
        number, slash, count = node.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise InputError("not a host's number and their count", where="--node", found=node, accepted="as in 0/4")
        if int(count) == 1:
            return cls()
        found = _LISTENING.fullmatch(rendezvous)
        address, name, port = found.groups() if found else ("", "", None)
        listens_at = int(port or PORT)
        if not found or not 0 < listens_at < 65536:
            raise InputError(
                "where the first host listens is needed",
                where="--rendezvous",
                found=rendezvous or None,
                accepted="HOST:PORT or [ADDRESS]:PORT, an address that all hosts reach",
            )
        return cls(int(number), int(count), address or name, listens_at)
