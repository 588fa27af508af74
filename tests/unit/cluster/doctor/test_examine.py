"""A visit to several hosts: two loopback addresses of this machine stand for two of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bloomery.cluster.doctor import examine
from bloomery.cluster.doctor.checks import CHECKS
from bloomery.cluster.doctor.compare import BURN_IN, compared
from bloomery.cluster.doctor.examine import Agent, visit
from bloomery.cluster.doctor.finding import Finding
from bloomery.cluster.doctor.needs import Needs
from bloomery.cluster.hostfile import Host, Hosts, here
from bloomery.cluster.measuring import run_ranks
from bloomery.spec.errors import BloomeryError

PAIR = (Host("a", 1, "127.0.0.1", 1), Host("b", 1, "127.0.0.2", 1))


@pytest.fixture
def shell(tmp_path: Path) -> str:
    """Starts everything here; the host `gone` does not answer."""
    path = tmp_path / "shell"
    path.write_text('#!/bin/sh\n[ "$1" = gone ] && { echo "no route to host gone" >&2; exit 255; }\nshift; exec "$@"\n')
    path.chmod(0o755)
    return str(path)


def of(findings: list[Finding], check: str) -> dict[str, str]:
    """Verdict by host of one check."""
    return {finding.host: finding.verdict for finding in findings if finding.check == check}


def test_every_host_is_examined_and_hosts_try_each_other(shell: str, tmp_path: Path) -> None:
    findings = visit(Hosts(PAIR, (shell,)), tmp_path, Needs(hosts=2, peers=2))
    for check in CHECKS:
        assert set(of(findings, check)) == {"a", "b"}, check
    assert of(findings, "clock") == {"a": "good", "b": "good"}
    assert of(findings, "alike") == of(findings, "reachable") == {"all": "good"}


def test_a_host_that_does_not_answer_and_a_wrong_address_are_faults_of_their_own(shell: str, tmp_path: Path) -> None:
    hosts = (*PAIR, Host("gone"), Host("elsewhere", 1, "192.0.2.7"))
    findings = visit(Hosts(hosts, (shell,)), tmp_path, Needs(hosts=4, peers=4))
    faults = [one for one in findings if one.check == "reachable" and one.verdict == "fault"]
    said = {one.host: one.found for one in faults}
    assert set(said) == {"gone", "elsewhere"}
    assert said["gone"] == "no route to host gone"
    assert "192.0.2.7 is no address of it" in said["elsewhere"]


PRINTS_A_BANNER = """
import sys
print("Welcome to b!")
for line in sys.stdin:
    print("[1, 2]")
    print('{"time": 1.0}', flush=True)
"""
PRINTS_LATIN_1 = """
import sys
for line in sys.stdin:
    sys.stdout.buffer.write(b"Willkommen in M\\xfcnchen\\n")
    print('{"time": 1.0}', flush=True)
"""
ENDS_WITH_A_WORD = """
print("Your account has expired.", flush=True)
"""


def agent(code: str, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """An agent that runs some lines of Python."""
    monkeypatch.setattr(Hosts, "command", lambda *_: [sys.executable, "-c", code])
    return Agent(Hosts(PAIR), PAIR[1])


@pytest.mark.parametrize("code", [PRINTS_A_BANNER, PRINTS_LATIN_1])
def test_what_a_login_shell_prints_is_no_answer(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = agent(code, monkeypatch)
    assert [one.ask("clock"), one.ask("clock")] == [{"time": 1.0}] * 2
    one.end()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (ENDS_WITH_A_WORD, "it ended without an answer; it said 'Your account has expired.'"),
        ("", "it ended without an answer"),
    ],
)
def test_an_agent_that_ends_is_told_from_one_that_is_silent(
    code: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = agent(code, monkeypatch)
    with pytest.raises(BloomeryError) as caught:
        one.ask("clock")
    assert str(caught.value) == said
    monkeypatch.setattr(examine, "ANSWER_S", 0.2)
    silent = agent("import sys; sys.stdin.read()", monkeypatch)
    with pytest.raises(BloomeryError, match="no answer within"):
        silent.ask("clock")
    one.end()
    silent.end()


def test_a_host_that_ends_after_its_facts_is_a_finding_and_hides_no_other(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Agent.ask

    def dies(agent: Agent, kind: str, **values: Any) -> dict[str, Any]:
        if agent.host.name == "c" and kind != "facts":
            raise BloomeryError("it ended without an answer")
        return ask(agent, kind, **values)

    monkeypatch.setattr(Agent, "ask", dies)
    findings = visit(Hosts((*PAIR, Host("c", 1, "127.0.0.3")), (shell,)), tmp_path, Needs(hosts=3, peers=3))
    assert of(findings, "clock") == {"a": "good", "b": "good"}
    assert of(findings, "reachable") == {"c": "fault", "all": "good"}


def test_ranks_of_a_burn_in_do_the_same_laps_and_hosts_measure_their_link(shell: str) -> None:
    hosts = Hosts(PAIR, (shell,))
    results = run_ranks(BURN_IN, hosts, {"seconds": 0.3, "turns": 5}, 600)
    assert results[0]["laps"] == results[1]["laps"] >= 5
    for result in results:
        assert set(result["seconds"]) == {"product", "memory", "all_reduce"}
        assert all(len(turns) == 5 and min(turns) > 0 for turns in result["seconds"].values())
    assert {other: len(turns) for other, turns in results[0]["pairs"].items()} == {"1": 5}
    assert {other: len(turns) for other, turns in results[1]["pairs"].items()} == {"0": 5}
    _, records = compared(hosts, results, [], "t0")
    assert {(record.who, record.what) for record in records} == {
        (who, what) for who in "ab" for what in ("product", "memory", "link")
    }


def test_a_rank_alone_burns_too() -> None:
    alone = here(1)
    (result,) = run_ranks(BURN_IN, alone, {"seconds": 0.1, "turns": 2}, 600)
    assert (set(result["seconds"]), result["pairs"]) == ({"product", "memory"}, {})
    findings, _ = compared(alone, [result], [], "t0")
    assert {finding.verdict for finding in findings} == {"good"}
