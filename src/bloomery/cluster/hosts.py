"""A run on several hosts: each has a supervisor with its share of the ranks, and the first host's leads.

The leader decides when all start and end; the others do as it says and report twice a second what their ranks do. One
whose connection ends, or whose host no longer answers, is lost. So a rank that dies or hangs anywhere is named,
everybody is killed at once, and the next start has a rendezvous of its own. All hosts must see the same run folder.
"""

from __future__ import annotations

import errno
import hmac
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bloomery.cluster.channel import (
    SECRET_FILE,
    Channel,
    LostError,
    free_port,
    listen,
    proof,
    the_secret,
)
from bloomery.cluster.interfaces import interface_of
from bloomery.cluster.place import Place
from bloomery.cluster.stopping import Stopping
from bloomery.cluster.world import Outcome, Share, World, pause, running, suspicion
from bloomery.ledger.heartbeat import Beat
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.job import STOPPED_BY_SIGNAL, read_job
from bloomery.spec.reliability import Supervision

PASSING = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
"""An address that this host does not have yet, a port that an earlier process has still."""
REPORT_EVERY_S = 0.5
ANSWER_WITHIN_S = 5.0
FAREWELL_S = 10.0
"""Given to the other hosts to end when the leader's own ranks have stopped."""


class TemporaryError(BloomeryError):
    """A host is gone: nothing is wrong with the run, the same command goes on. Exit code 75."""

    exit_code = STOPPED_BY_SIGNAL


class Member:
    """One other host, as the leader sees it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.outcome: Outcome | None = None
        self.beats: list[Beat] = []
        self.states: list[str] = []
        self.stacks: tuple[str, ...] = ()


class Leader:
    """The first host's side. `members` by host number; one that is lost is taken out until it joins again."""

    def __init__(self, place: Place, folder: Path, settings: Supervision, stopping: Stopping) -> None:
        self.place, self.settings, self.stopping = place, settings, stopping
        self.members: dict[int, Member] = {}
        self._secret = the_secret(folder)
        self._knocking: dict[Channel, str] = {}
        self._start = 0
        self._listener = _listening(place, settings.first_phase_s, stopping)

    def supervise(self, module: str, folder: Path, world_size: int, usual_s: tuple[float, ...]) -> Outcome:
        """One start on all hosts, from the gathering to the end. Raises TemporaryError when a host does not come."""
        if not self._gathered():
            return Outcome(STOPPED_BY_SIGNAL)
        self._start += 1
        each = world_size // self.place.nodes
        here = next(iter(self.members.values())).channel.here
        port = free_port(here)
        for number, member in list(self.members.items()):
            member.outcome, member.beats = None, [Beat(0, time.monotonic())] * each
            member.states, member.stacks = [""] * each, ()
            ranks = {"first": number * each, "ranks": each, "world_size": world_size, "usual_s": usual_s}
            self._tell(number, {"do": "start", "start": self._start, "port": port, **ranks})
        share = Share(range(each), world_size, _url(here, port), interface_of(here), usual_s=usual_s)
        with running(module, folder, share, self.settings, self.stopping) as world:
            outcome = Outcome(STOPPED_BY_SIGNAL) if self.stopping.asked else self._watched(world, each)
        self._broadcast({"do": "end"})
        return world.told(outcome)

    def _gathered(self) -> bool:
        """Wait until every host is there; False when a signal asks to stop before."""
        until = time.monotonic() + self.settings.first_phase_s
        while len(self.members) < self.place.nodes - 1:
            self._listen()
            if self.stopping.asked:
                return False
            if time.monotonic() > until:
                missing = [str(n) for n in range(1, self.place.nodes) if n not in self.members]
                raise TemporaryError(
                    f"host {', '.join(missing)} of {self.place.nodes} did not join at {self.place.host}:"
                    f"{self.place.port} within {self.settings.first_phase_s:g} s; the same command goes on"
                )
            pause()
        return True

    def _watched(self, world: World, each: int) -> Outcome:
        own: Outcome | None = None
        until = float("inf")
        while True:
            lost = self._listen()
            if lost is not None:
                cause = f"on host {lost}, which is lost"
                return Outcome(1, lost * each, cause, max(beat.step for beat in world.beats()))
            own = own or world.ended()
            ends = [own, *(self.members[number].outcome for number in sorted(self.members))]
            there = [end for end in ends if end is not None]
            if there:
                until = min(until, time.monotonic() + _patience_s(there, self.settings))
            if len(there) == len(ends) or time.monotonic() > until:
                return _conclusion(ends, each)
            hung = self._hung(world, own)
            if hung is not None:
                return hung
            pause()

    def _hung(self, world: World, own: Outcome | None) -> Outcome | None:
        """The hang that the signs of life of all hosts' ranks show together."""
        others = [self.members[number] for number in sorted(self.members)]
        if own is not None or any(member.outcome for member in others):
            return None
        beats = world.beats() + [beat for member in others for beat in member.beats]
        states = world.states() + [state for member in others for state in member.states]
        hung = world.hung(beats, states)
        if hung is None:
            return None
        self._broadcast({"do": "dump"})
        until = time.monotonic() + 4 * REPORT_EVERY_S
        while time.monotonic() < until and not all(member.stacks for member in others):
            self._listen()
            pause()
        return replace(hung, stacks=hung.stacks + tuple(text for member in others for text in member.stacks))

    def _listen(self) -> int | None:
        """Hear everybody, let in who can prove that it belongs here. Returns the number of a host just lost."""
        self._let_in()
        for number, member in list(self.members.items()):
            try:
                for message in member.channel.receive():
                    self._heard(member, message)
            except LostError:
                member.channel.close()
                del self.members[number]
                return number
        return None

    def _heard(self, member: Member, message: dict[str, Any]) -> None:
        """Take down a report; one of an earlier start comes too late."""
        if message.get("asked") and not self.stopping.asked:
            self.stopping.ask()
        if message.get("start") != self._start:
            return
        if "beats" in message:
            now = time.monotonic()
            member.beats = [
                Beat(changes, now - age_s, step, phase, tuple(longest))
                for changes, age_s, step, phase, longest in message["beats"]
            ]
            member.states = [str(state) for state in message["states"]]
        if "outcome" in message:
            member.outcome = Outcome(**{**message["outcome"], "stacks": ()})
        if "stacks" in message:
            member.stacks = tuple(str(text) for text in message["stacks"])

    def _let_in(self) -> None:
        try:
            channel = Channel(self._listener.accept()[0])
            self._knocking[channel] = secrets.token_hex(16)
            channel.send({"challenge": self._knocking[channel]})
        except BlockingIOError:
            pass
        except LostError:
            del self._knocking[channel]
        for channel, challenge in list(self._knocking.items()):
            try:
                messages = channel.receive()
                if not messages and time.monotonic() - channel.opened < ANSWER_WITHIN_S:
                    continue
                if not messages:
                    raise LostError("no answer")
                number, answer = messages[0].get("node"), str(messages[0].get("proof"))
                if not hmac.compare_digest(answer, proof(self._secret, challenge)):
                    raise LostError("a stranger")
                if not (isinstance(number, int) and 0 < number < self.place.nodes) or number in self.members:
                    channel.send({"do": "refused", "why": f"host {number} of {self.place.nodes} is there already"})
                    raise LostError("one too many")
                channel.send({"do": "welcome"})
                self.members[number] = Member(channel)
            except LostError:
                channel.close()
            del self._knocking[channel]

    def _tell(self, number: int, message: dict[str, Any]) -> None:
        """Send; one that cannot be told is found lost by the next `_listen`."""
        try:
            self.members[number].channel.send(message)
        except LostError:
            pass

    def _broadcast(self, message: dict[str, Any]) -> None:
        for number in list(self.members):
            self._tell(number, message)

    def dismiss(self) -> None:
        """The run has ended, well or not: the other hosts may go."""
        self._broadcast({"do": "leave"})
        until = time.monotonic() + FAREWELL_S
        while self.members and time.monotonic() < until:
            self._listen()
            pause()
        self._listener.close()


def _listening(place: Place, wait_s: float, stopping: Stopping) -> socket.socket:
    """Listen where the others look, tried again while name, address or port are those of a host that has just gone.

    Raises TemporaryError when that does not pass, InputError for what no waiting helps.
    """
    where, until, said = f"--rendezvous {place.host}:{place.port}", time.monotonic() + wait_s, False
    while True:
        try:
            return listen(place.host, place.port, place.nodes)
        except OSError as error:
            problem = f"cannot listen here ({(error.strerror or str(error)).lower()})"
            if not isinstance(error, socket.gaierror) and error.errno not in PASSING:
                raise InputError(problem, where=where) from None
        if stopping.asked:
            raise TemporaryError(f"{where}: {problem}; told to stop; the same command goes on")
        if time.monotonic() > until:
            raise TemporaryError(f"{where}: {problem}, tried for {wait_s:g} s; the same command goes on")
        if not said:
            print(f"{where}: {problem}; trying for {wait_s:g} s", file=sys.stderr, flush=True)
            said = True
        pause()


def _patience_s(there: list[Outcome], settings: Supervision) -> float:
    """How long to wait for the other hosts' ends after those that are there.

    A rank that dies takes its peers along: who died first is only known when all have had time to report.
    """
    worst = max(there, key=lambda end: end.code not in (0, STOPPED_BY_SIGNAL))
    if worst.code in (0, STOPPED_BY_SIGNAL):
        return FAREWELL_S if any(end.code for end in there) else settings.first_phase_s
    return 2 * REPORT_EVERY_S


def _conclusion(ends: list[Outcome | None], each: int) -> Outcome:
    """How a start ended, from the ends of all hosts' ranks: the errors of most follow from the culprit's."""
    there = [end for end in ends if end is not None]
    bad = [end for end in there if end.code not in (0, STOPPED_BY_SIGNAL)]
    if bad:
        return min(bad, key=lambda end: suspicion(end.cause, end.code))
    stopped = next((end for end in there if end.code), None)
    if stopped is None and len(there) < len(ends):
        return Outcome(1, ends.index(None) * each, "did not end with the others", there[0].step)
    return stopped or there[0]


def _url(address: str, port: int) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


@contextmanager
def leading(place: Place, folder: Path, settings: Supervision, stopping: Stopping) -> Iterator[Leader | None]:
    """The other hosts of a run while it goes; None where there are none."""
    if place.nodes == 1:
        yield None
        return
    leader = Leader(place, folder, settings, stopping)
    try:
        yield leader
    finally:
        leader.dismiss()


def follow_leader(module: str, folder: Path, place: Place) -> None:
    """What every host but the first does: run its share of the ranks as the leader says, until it says that it is over.

    Ends well however the run ends: the leader's exit code tells that. Raises TemporaryError when the leader is lost.
    """
    with Stopping().handled() as stopping:
        channel = _join(folder, place, stopping)
        if channel is None:
            raise SystemExit(STOPPED_BY_SIGNAL)
        try:
            while True:
                order = _next_order(channel, stopping)
                if order["do"] == "leave" or _serve(module, folder, channel, order, stopping):
                    return
        except LostError as error:
            raise TemporaryError(f"{folder}: the first host, {place.host}, is lost ({error})") from None
        finally:
            channel.close()


def _join(folder: Path, place: Place, stopping: Stopping) -> Channel | None:
    """The connection to the leader, tried until it is there; None when a signal asks to stop before."""
    wait_s = Supervision().first_phase_s
    until, problem = time.monotonic() + wait_s, ""
    while time.monotonic() < until and not stopping.asked:
        try:
            channel = Channel(socket.create_connection((place.host, place.port), timeout=5))
            challenge = str(_reply(channel)["challenge"])
            channel.send({"node": place.node, "proof": proof((folder / SECRET_FILE).read_bytes(), challenge)})
            reply = _reply(channel)
            if reply.get("do") == "refused":
                raise InputError(str(reply["why"]), where="--node", found=place.node)
            if reply.get("do") == "welcome":
                return channel
        except FileNotFoundError:
            problem = f"{folder} is not the folder that the first host has: all hosts must see the same one"
        except (OSError, LostError, KeyError) as error:
            problem = str(error).lower()
        time.sleep(REPORT_EVERY_S)
    if stopping.asked:
        return None
    raise TemporaryError(
        f"host {place.node} could not join {place.host}:{place.port} within {wait_s:g} s: {problem or 'no answer'}"
    )


def _reply(channel: Channel) -> dict[str, Any]:
    until = time.monotonic() + ANSWER_WITHIN_S
    while time.monotonic() < until:
        message = channel.next()
        if message is not None:
            return message
        pause()
    raise LostError("no answer")


def _next_order(channel: Channel, stopping: Stopping, said: float = 0.0) -> dict[str, Any]:
    """Wait for an order that changes something."""
    while True:
        message = channel.next()
        if message is not None and message.get("do") in ("start", "leave"):
            return message
        if time.monotonic() - said > REPORT_EVERY_S:
            said = time.monotonic()
            channel.send({"asked": stopping.asked})
        pause()


def _serve(module: str, folder: Path, channel: Channel, order: dict[str, Any], stopping: Stopping) -> bool:
    """This host's ranks in one start. Returns True when it was the last one."""
    ranks = range(order["first"], order["first"] + order["ranks"])
    url, interface = _url(channel.there, order["port"]), interface_of(channel.here)
    share = Share(ranks, order["world_size"], url, interface, usual_s=tuple(order["usual_s"]))
    start, told, said = {"start": order["start"]}, False, 0.0
    with running(module, folder, share, read_job(folder).supervision, stopping) as world:
        while True:
            told_to = (channel.next() or {}).get("do")
            if told_to in ("end", "leave"):
                return bool(told_to == "leave")
            if told_to == "dump":
                channel.send({**start, "stacks": world.stacks()})
            outcome = None if told else world.ended()
            if outcome is not None:
                told = True
                channel.send({**start, "outcome": asdict(outcome)})
            if time.monotonic() - said > REPORT_EVERY_S:
                said = time.monotonic()
                beats = [(b.changes, said - b.since, b.step, b.phase, b.longest_s) for b in world.beats()]
                channel.send({**start, "beats": beats, "states": world.states(), "asked": stopping.asked})
            pause()
