"""Which host this is comes from two options, and who joins must prove that it can read the run's folder."""

from __future__ import annotations

import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from bloomery.cluster.channel import Channel, LostError, listen, proof, the_secret
from bloomery.cluster.hosts import _conclusion
from bloomery.cluster.interfaces import interface_of
from bloomery.cluster.place import PORT, Place
from bloomery.cluster.world import Outcome
from bloomery.spec.errors import InputError


@pytest.mark.parametrize(
    ("node", "rendezvous", "expected"),
    [
        ("", "", Place()),
        ("0/1", "anywhere:1", Place()),
        ("1/4", "n1:5000", Place(1, 4, "n1", 5000)),
        ("0/2", "n1", Place(0, 2, "n1", PORT)),
        ("0/2", "[fe80::1]:5000", Place(0, 2, "fe80::1", 5000)),
        ("0/2", "[2001:db8::1]", Place(0, 2, "2001:db8::1", PORT)),
    ],
)
def test_the_place_is_read(node: str, rendezvous: str, expected: Place) -> None:
    assert Place.parse(node, rendezvous) == expected


@pytest.mark.parametrize(
    ("node", "rendezvous"),
    [
        ("2/2", "a:1"),
        ("x/2", "a:1"),
        ("1", "a:1"),
        ("0/2", ""),
        ("0/2", "a:0"),
        ("", "a:1"),
        ("1/2", "2001:db8::1"),
        ("1/2", "2001:db8::1:29400"),
    ],
)
def test_a_wrong_place_is_refused(node: str, rendezvous: str) -> None:
    with pytest.raises(InputError, match=r"--node|--rendezvous"):
        Place.parse(node, rendezvous)


def pair() -> tuple[Channel, Channel]:
    """Both sides of a connection."""
    with listen("127.0.0.1", 0, 1) as listener:
        one = socket.create_connection(listener.getsockname())
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try:
                return Channel(one), Channel(listener.accept()[0])
            except BlockingIOError:
                time.sleep(0.01)
    raise AssertionError("no connection")


def received(channel: Channel) -> list[dict[str, object]]:
    """The next messages."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        messages = channel.receive()
        if messages:
            return messages
    raise AssertionError("no message")


def test_messages_arrive_whole_and_an_end_is_noticed() -> None:
    one, other = pair()
    assert other.receive() == []
    one.send({"a": 1})
    assert received(other) == [{"a": 1}]
    one.socket.sendall(b'{"b": 2}\n{"c"')
    assert received(other) == [{"b": 2}]
    one.socket.sendall(b": 3}\n")
    assert received(other) == [{"c": 3}]
    one.close()
    with pytest.raises(LostError):
        received(other)


@pytest.mark.parametrize("nonsense", [b"hello\n", b"[1]\n", b'{"a": ' + b"[" * 100_000 + b"\n", b"x" * 5_000_000])
def test_nonsense_ends_a_connection(nonsense: bytes) -> None:
    one, other = pair()
    one.socket.setblocking(True)

    def send() -> None:
        with suppress(OSError):  # nobody reads to the end
            one.socket.sendall(nonsense)

    sender = Thread(target=send)
    sender.start()
    with pytest.raises(LostError):
        received(other)
    other.socket.close()
    sender.join()


def test_the_secret_is_its_owners_and_stays(tmp_path: Path) -> None:
    secret = the_secret(tmp_path)
    assert len(secret) >= 32 and the_secret(tmp_path) == secret
    assert stat.S_IMODE((tmp_path / ".secret").stat().st_mode) == 0o600
    assert proof(secret, "a") != proof(secret, "b") != proof(b"other", "b")


def test_it_listens_on_the_named_address_alone() -> None:
    with listen("127.0.0.1", 0, 1) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == interface_of("localhost") == "lo"


def test_of_all_ends_the_rank_that_was_killed_is_the_culprit() -> None:
    good, stopped = Outcome(0, step=9), Outcome(75, 0, "exit code 75", 5)
    broken, killed = Outcome(1, 0, "exit code 1", 5), Outcome(1, 5, "killed by SIGKILL", 5)
    assert _conclusion([broken, killed], 4) is killed
    assert _conclusion([broken, None], 4) is broken
    assert _conclusion([good, good], 4) is good
    assert _conclusion([good, stopped], 4) is stopped
    assert _conclusion([stopped, None], 4) is stopped
    late = _conclusion([good, None], 4)
    assert (late.code, late.rank) == (1, 4)
