"""The doctor's hand on a host: answers questions, a JSON line each, until standard input ends. Imports no torch.

`facts` (folder), `clock`, `listen` (address), `connect` (to: address and port of each).
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bloomery.cluster.doctor.facts import gather

CONNECT_S = 5.0


def listen(address: str) -> dict[str, Any]:
    """Accept connections on a free port of the address this host is reached by, for as long as we live."""
    try:
        server = socket.create_server((address, 0))
    except OSError as error:
        return {"problem": f"{address} is no address of it ({error.strerror or error})"}
    threading.Thread(target=_accept, args=(server,), daemon=True).start()
    return {"port": server.getsockname()[1]}


def _accept(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        connection.close()


def connect(to: list[tuple[str, int]]) -> dict[str, Any]:
    """Connect to each; why not, empty where it went well."""
    problems = []
    for address, port in to:
        try:
            socket.create_connection((address, port), timeout=CONNECT_S).close()
            problems.append("")
        except OSError as error:
            problems.append((error.strerror or str(error)).lower())
    return {"problems": problems}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """One answer."""
    kind = question["ask"]
    if kind == "facts":
        return gather(Path(question["folder"])).model_dump(mode="json")
    if kind == "clock":
        return {"time": time.time()}
    if kind == "listen":
        return listen(question["address"])
    return connect(question["to"])


def main() -> None:
    """Answer until nobody asks."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
