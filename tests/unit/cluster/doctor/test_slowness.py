"""Whoever is slower than the peers is named with the share, and nobody for noise: simulated burn-ins by the thousand.

The noise is shaped as on the two shared cores this was written on: every turn's own jitter with heavy tails (Student's
t, three degrees of freedom), disturbances that come and stay for some turns (half longer on average, at times several
times as long), a drift that all have in common, and lasting differences between healthy hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bloomery.cluster.doctor.compare import compared
from bloomery.cluster.doctor.pairs import rounds_of_pairs
from bloomery.cluster.doctor.slowness import FALSE_ALARMS, TURNS, by_chance, slow_links, slow_ones
from bloomery.cluster.hostfile import Host, Hosts

SIZES = (2, 3, 4, 8, 64)
POWER = 0.95
STAYS = 0.65
DISTURBED = 0.5
DRIFT = 0.05


@dataclass(frozen=True)
class Machine:
    """`jitter`: scale of a turn's, a logarithm; `disturbed`: probability a turn that something begins to disturb;
    `lasting`: standard deviation between healthy hosts; `found`: how many times slower a host is found for certain."""

    jitter: float
    disturbed: float
    lasting: float
    found: float

    def seconds(self, random: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Of `count` healthy hosts or links, turn by turn."""
        now = random.random(count) < self.disturbed / (self.disturbed + 1 - STAYS)
        logs = self.jitter * np.abs(random.standard_t(3, (count, TURNS))) + self.lasting * random.normal(
            size=(count, 1)
        )
        for turn in range(TURNS):
            now = random.random(count) < np.where(now, STAYS, self.disturbed)
            logs[:, turn] += now * random.exponential(DISTURBED, count)
        return np.exp(logs + np.cumsum(random.normal(0, DRIFT, TURNS)))


MACHINES = {"quiet": Machine(0.02, 0.01, 0.02, 1.5), "loud": Machine(0.2, 0.08, 0.03, 3.0)}


def burn_in(
    machine: Machine, count: int, random: np.random.Generator, slower: dict[str, dict[int, float]]
) -> tuple[Hosts, list[dict[str, Any]]]:
    """What the ranks of a burn-in would say. `slower`: by part, how many times a host is."""
    hosts = Hosts(tuple(Host(f"h{i}") for i in range(count)), ("ssh",))
    parts = {}
    for part in ("product", "memory"):
        parts[part] = machine.seconds(random, count)
        for host, times in slower.get(part, {}).items():
            parts[part][host] *= times
    rates = dict[tuple[int, int], list[float]]()
    pairs = [pair for met in rounds_of_pairs(count) for pair in met]
    for pair, seconds in zip(pairs, machine.seconds(random, len(pairs)), strict=True):
        worst = max(slower.get("link", {}).get(host, 1.0) for host in pair)
        rates[pair] = list(1e8 / seconds / worst)
    return hosts, [
        {
            "laps": TURNS,
            "seconds": {part: list(seconds[rank]) for part, seconds in parts.items()},
            "pairs": {sum(pair) - rank: rate for pair, rate in rates.items() if rank in pair},
        }
        for rank in range(count)
    ]


def named(hosts: Hosts, results: Sequence[dict[str, Any]]) -> set[str]:
    """Hosts with a fault."""
    findings, _ = compared(hosts, results, [], "t0")
    return {finding.host for finding in findings if finding.verdict == "fault"}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("count", SIZES)
def test_healthy_hosts_are_accused_no_more_often_than_designed(count: int, machine: str) -> None:
    random = np.random.default_rng(count)
    burn_ins = 100 if count > 8 else 500
    alarms = sum(bool(named(*burn_in(MACHINES[machine], count, random, {}))) for _ in range(burn_ins))
    assert alarms <= FALSE_ALARMS * burn_ins


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("part", ["product", "link"])
@pytest.mark.parametrize("count", SIZES)
def test_a_slow_host_is_found_and_nobody_else(count: int, part: str, machine: str) -> None:
    if part == "link" and count == 2:
        pytest.skip("of two hosts nobody can tell whose link it is")
    random = np.random.default_rng(count)
    slower = {part: {1: MACHINES[machine].found}}
    burn_ins = 40 if count > 8 else 200
    found = [named(*burn_in(MACHINES[machine], count, random, slower)) for _ in range(burn_ins)]
    assert sum("h1" in who for who in found) >= POWER * burn_ins
    assert sum(bool(who - {"h1"}) for who in found) <= max(1, 2 * FALSE_ALARMS * burn_ins)


@pytest.mark.parametrize("count", [4, 8, 64])
def test_some_slow_hosts_do_not_move_what_they_are_measured_by_nor_accuse_those_they_meet(count: int) -> None:
    random = np.random.default_rng(count)
    slow = dict.fromkeys(range(1, count // 4 + 1), 3.0)
    for part in ("product", "link"):
        who = named(*burn_in(MACHINES["quiet"], count, random, {part: slow}))
        assert who == {f"h{host}" for host in slow}, part


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("slower", [0.45, 4.0])
def test_the_share_is_right(ranks: int, slower: float) -> None:
    seconds = MACHINES["quiet"].seconds(np.random.default_rng(ranks), ranks)
    seconds[1] *= (1 + slower) * median(seconds[0] / seconds[1])
    found = slow_ones(dict(zip(map(str, range(ranks)), seconds, strict=True)), tests=2)
    assert found["1"] == pytest.approx(slower, abs=0.1 * (1 + slower))


def test_what_lasts_for_some_turns_is_not_what_a_host_is() -> None:
    quiet = np.ones((3, TURNS))
    quiet[1, : TURNS // 2 + 2] = 10.0
    assert slow_ones(dict(zip("abc", quiet, strict=True)), tests=9) == {}
    quiet[1, :20] = 10.0
    assert slow_ones(dict(zip("abc", quiet, strict=True)), tests=9) == {"b": pytest.approx(9.0)}


def test_where_peers_differ_among_themselves_a_difference_must_be_larger_to_count() -> None:
    spread = {f"r{i}": [1.0 + 0.1 * i] * TURNS for i in range(8)}
    assert slow_ones(spread, tests=16) == {}
    assert set(slow_ones({**spread, "r8": [9.0] * TURNS}, tests=18)) == {"r8"}


@pytest.mark.parametrize(("ranks", "least"), [(2, 0.33), (3, 0.19), (4, 0.15), (64, 0.15)])
def test_beside_few_peers_a_difference_must_be_larger_to_count(ranks: int, least: float) -> None:
    for slower, who in ((least - 0.02, set()), (least + 0.02, {"0"})):
        seconds = {str(rank): [1.0 + slower * (rank == 0)] * TURNS for rank in range(ranks)}
        assert set(slow_ones(seconds, tests=3 * ranks)) == who


def test_one_alone_is_nobodys_peer_and_of_two_the_slower_is_named_but_for_a_link() -> None:
    one, slow = [1.0] * TURNS, [2.0] * TURNS
    assert slow_ones({"a": slow}, tests=2) == {}
    assert slow_ones({"a": one, "b": slow}, tests=4) == {"b": pytest.approx(1.0)}
    assert slow_links({("a", "b"): slow}, tests=4) == {}
    assert slow_links({("a", "b"): one, ("a", "c"): slow, ("b", "c"): slow}, tests=9) == {"c": pytest.approx(1.0)}
    assert slow_links({("a", "b"): one, ("a", "c"): one, ("b", "c"): slow}, tests=9) == {}


def test_turns_enough_to_be_sure_of_one_among_ten_thousand() -> None:
    assert by_chance(TURNS, TURNS) == 0.5**TURNS <= FALSE_ALARMS / 100_000
    assert by_chance(0, TURNS) == 1.0
    assert by_chance(20, TURNS) == pytest.approx(12951 / 2**24)
