"""The doctor's visit: asks every host for its facts, lets hosts try each other, and burns in where that is wanted."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from bloomery.cluster.doctor.checks import judged
from bloomery.cluster.doctor.facts import Facts, gather
from bloomery.cluster.doctor.finding import Finding
from bloomery.cluster.doctor.needs import Needs
from bloomery.cluster.doctor.peers import Offset, alike, best_offset, clocks, reachable
from bloomery.cluster.hostfile import Host, Hosts
from bloomery.cluster.measuring import Tell
from bloomery.cluster.world import READ_AT_IMPORT
from bloomery.ledger.sinks import parse_lines
from bloomery.spec.errors import BloomeryError

T = TypeVar("T")
AGENT = "bloomery.cluster.doctor.agent"
ANSWER_S = 60.0
CLOCK_QUESTIONS = 5
ALL_PAIRS = 16
"""Up to so many hosts each connects to all others; with more, to its next `SOME_PAIRS` neighbours."""
SOME_PAIRS = 4


class Agent:
    """A process on a host that answers questions. Raises BloomeryError, with the host's name, when it does not."""

    def __init__(self, hosts: Hosts, host: Host) -> None:
        self.host = host
        command = hosts.command(host, AGENT, READ_AT_IMPORT)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
        )

    def ask(self, kind: str, **values: Any) -> dict[str, Any]:
        """One question, one answer: the next JSON object. A login shell may print what it likes around it."""
        assert self.process.stdin and self.process.stdout and self.process.stderr
        silence, asked = threading.Timer(ANSWER_S, self.process.kill), time.monotonic()
        silence.start()
        beside = ""
        try:
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps({"ask": kind, **values}) + "\n")
                self.process.stdin.flush()
            for line in self.process.stdout:
                for answer in parse_lines([line]):
                    return answer
                beside = line.strip() or beside
        finally:
            silence.cancel()
        said = [text.strip() for text in self.process.stderr if text.strip()]
        late = time.monotonic() - asked >= ANSWER_S
        end = f"no answer within {ANSWER_S:.0f} s" if late else "it ended without an answer"
        raise BloomeryError(said[-1] if said else f"{end}; it said {beside!r}" if beside else end)

    def end(self) -> None:
        """Let it go."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def _agents(hosts: Hosts) -> Iterator[list[Agent]]:
    agents = [Agent(hosts, host) for host in hosts.hosts]
    try:
        yield agents
    finally:
        for agent in agents:
            agent.end()


def visit(hosts: Hosts, folder: Path, needs: Needs, tell: Tell = lambda _: None) -> list[Finding]:
    """Everything but a burn-in. Only hosts that answer are examined; one that does not is a fault."""
    if not hosts.shell:
        tell("facts")
        return judged(gather(folder), needs)
    with _agents(hosts) as agents:
        tell("facts")
        answers = _at_once(agents, lambda agent: agent.ask("facts", folder=str(folder)))
        findings = [_silent(agent, answer) for agent, answer in answers if isinstance(answer, BloomeryError)]
        there = [(agent, answer) for agent, answer in answers if not isinstance(answer, BloomeryError)]
        facts = [Facts.checked({**answer, "host": agent.host.name}, where=agent.host.name) for agent, answer in there]
        for agent, one in zip((agent for agent, _ in there), facts, strict=True):
            own = {"ranks": agent.host.slots}
            if agent.host.slots > 1:  # 1 is what a file without slots means
                own["gpus"] = min(needs.gpus, agent.host.slots)
            findings += judged(one, needs.model_copy(update=own))
        if len(there) > 1:
            tell("hosts beside each other")
            findings += alike(facts)
            findings += _beside([agent for agent, _ in there])
    return findings


def _beside(agents: Sequence[Agent]) -> list[Finding]:
    """Whose clock is off and who cannot be reached. One question at a time tells clocks best."""
    timed = [(agent, _tried(agent, _offset)) for agent in agents]
    silent = [_silent(agent, found) for agent, found in timed if isinstance(found, BloomeryError)]
    offsets = {agent.host.name: found for agent, found in timed if isinstance(found, Offset)}
    left = [agent for agent in agents if agent.host.name in offsets]
    return silent + (clocks(offsets) + _reaching(left) if len(left) > 1 else [])


def _tried(agent: Agent, question: Callable[[Agent], T]) -> T | BloomeryError:
    """The answer, or why there is none."""
    try:
        return question(agent)
    except BloomeryError as error:
        return error


def _at_once(
    agents: Sequence[Agent], question: Callable[[Agent], dict[str, Any]]
) -> list[tuple[Agent, dict[str, Any] | BloomeryError]]:
    """The answers of all, asked at the same time."""
    with ThreadPoolExecutor(max_workers=min(64, len(agents))) as pool:
        return list(zip(agents, pool.map(lambda agent: _tried(agent, question), agents), strict=True))


def _silent(agent: Agent, error: BloomeryError) -> Finding:
    remedy = f"try `ssh {agent.host.name} true`; the same Python must be at the same path there"
    return Finding(check="reachable", host=agent.host.name, verdict="fault", found=str(error), remedy=remedy)


def _offset(agent: Agent) -> Offset:
    asked = []
    for _ in range(CLOCK_QUESTIONS):
        sent = time.time()
        there = agent.ask("clock")["time"]
        asked.append((sent, there, time.time()))
    return best_offset(asked)


def _reaching(agents: Sequence[Agent]) -> list[Finding]:
    """Every host listens where the others expect it, and they connect."""
    listening = _at_once(agents, lambda agent: agent.ask("listen", address=agent.host.reached_by))
    findings, ports = list[Finding](), dict[str, int]()
    for agent, answer in listening:
        problem = str(answer) if isinstance(answer, BloomeryError) else answer.get("problem", "")
        if problem:
            remedy = "correct address= in the host file"
            findings.append(
                Finding(check="reachable", host=agent.host.name, verdict="fault", found=problem, remedy=remedy)
            )
        elif isinstance(answer, dict):
            ports[agent.host.name] = answer["port"]
    targets = {agent: _others(agents, i, ports) for i, agent in enumerate(agents)}
    tried = _at_once(
        agents, lambda agent: agent.ask("connect", to=[(o.host.reached_by, ports[o.host.name]) for o in targets[agent]])
    )
    attempts = {
        (agent.host.name, other.host.name): problem
        for agent, answer in tried
        if isinstance(answer, dict)
        for other, problem in zip(targets[agent], answer["problems"], strict=True)
    }
    findings += [_silent(agent, answer) for agent, answer in tried if isinstance(answer, BloomeryError)]
    return findings + (reachable(attempts) if attempts else [])


def _others(agents: Sequence[Agent], i: int, ports: dict[str, int]) -> list[Agent]:
    """Whom the i-th connects to."""
    distance = len(agents) - 1 if len(agents) <= ALL_PAIRS else SOME_PAIRS
    others = [agents[(i + step) % len(agents)] for step in range(1, distance + 1)]
    return [other for other in others if other.host.name in ports]
