"""Lines of JSON between the supervisors of one run's hosts. No torch, nothing unpickled, messages of bounded size.

Who joins proves with an HMAC that it can read the run's folder: the secret lies there, readable by its owner alone, and
never goes over the wire. What follows is neither encrypted nor signed: like PyTorch's own traffic, it belongs on a
network that only trusted machines reach.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 4_000_000
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}
"""Of a host without power no farewell comes: the kernel asks after 5 s of silence, and gives up after 14 s."""
SECRET_FILE = ".secret"


class LostError(Exception):
    """The other side is gone or talks nonsense."""


class Channel:
    """One connection. Sending never waits: a peer that does not read is as good as gone."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.opened = time.monotonic()
        self._received = b""
        self._unread = deque[dict[str, Any]]()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises LostError."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise LostError(str(error)) from None

    def next(self) -> dict[str, Any] | None:
        """The oldest message not taken yet, None when there is none. Raises LostError when no more will come."""
        if not self._unread:
            self._unread.extend(self._arrived())
        return self._unread.popleft() if self._unread else None

    def receive(self) -> list[dict[str, Any]]:
        """All messages not taken yet. Raises LostError when no more will come."""
        self._unread.extend(self._arrived())
        messages = list(self._unread)
        self._unread.clear()
        return messages

    def _arrived(self) -> list[dict[str, Any]]:
        while _readable(self.socket):
            try:
                part = self.socket.recv(1 << 16)
            except OSError as error:
                raise LostError(str(error)) from None
            if not part and b"\n" in self._received:
                break
            if not part:
                raise LostError("the connection was closed")
            self._received += part
            if len(self._received) > MAX_LINE_BYTES:
                raise LostError("a message is too long")
        *lines, self._received = self._received.split(b"\n")
        return [_message(line) for line in lines]

    @property
    def here(self) -> str:
        """The address of this side."""
        return str(self.socket.getsockname()[0])

    @property
    def there(self) -> str:
        """The address of the other side."""
        return str(self.socket.getpeername()[0])

    def close(self) -> None:
        """Say no more."""
        self.socket.close()


def _readable(connection: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))


def _message(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LostError("not a message")
    return value


def the_secret(folder: Path) -> bytes:
    """The run's secret, made the first time."""
    path = folder / SECRET_FILE
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    return path.read_bytes()


def proof(secret: bytes, challenge: str) -> str:
    """What only a holder of the secret can answer."""
    return hmac.new(secret, challenge.encode(), "sha256").hexdigest()


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """Listen on the address that `host` has here, and on no other.

    A host's own name often stands for a loopback address in its /etc/hosts, where no other host would get through: then
    every interface is listened on. Raises OSError.
    """
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    address = str(where[0])
    loopback = address == "::1" or address.startswith("127.")
    if loopback and host not in (address, "localhost"):
        address = ""
    listener = socket.create_server((address, port), family=family, backlog=backlog)
    listener.setblocking(False)
    return listener


def free_port(address: str) -> int:
    """A port that nobody listens on at an address of this machine just now."""
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        return int(listener.getsockname()[1])
