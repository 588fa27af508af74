"""From a burn-in's figures to findings: which rank or host is slow, by how much, and since when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bloomery.cluster.doctor.finding import Finding
from bloomery.cluster.doctor.history import Record, slow_since, than_before
from bloomery.cluster.doctor.slowness import TURNS, Turns, of_hosts, slow_links, slow_ones
from bloomery.cluster.hostfile import Hosts
from bloomery.cluster.measuring import Tell, run_ranks

BURN_IN = "bloomery.cluster.doctor.burn_in"
STARTING_S = 120.0
COMPUTE_PARTS = {"product": "matrix products", "memory": "memory"}
LINK = "link"
REMEDIES = {
    "product": "look at clocks, cooling and other work there; leave it out until then",
    "memory": "look at other work and memory modules there; leave it out until then",
    LINK: "look at its cable, port and duplex; leave it out until then",
}


def burn_in(hosts: Hosts, seconds: float, tell: Tell) -> list[dict[str, Any]]:
    """Run the burn-in on every rank. Raises BloomeryError that names a rank that fails."""
    tell(f"burn-in, {hosts.ranks} rank{'s' * (hosts.ranks > 1)}, {seconds:g} s")
    settings = {"seconds": seconds, "turns": TURNS}
    return run_ranks(BURN_IN, hosts, settings, seconds * 3 + STARTING_S, tell)


def compared(
    hosts: Hosts, results: Sequence[Mapping[str, Any]], history: Sequence[Record], time: str
) -> tuple[list[Finding], list[Record]]:
    """Findings about every rank and link, and what is to be remembered of them."""
    ranks = [_who(hosts, host.name, local) for host in hosts.hosts for local in range(host.slots)]
    links = _links(hosts, results)
    tests = len(ranks) * len(COMPUTE_PARTS) + len(of_hosts(links))
    findings, records = list[Finding](), list[Record]()
    for part, words in COMPUTE_PARTS.items():
        seconds = {rank: result["seconds"][part] for rank, result in zip(ranks, results, strict=True)}
        found, kept = _told(part, words, seconds, slow_ones(seconds, tests), history, time)
        findings += _together(hosts, found)
        records += kept
    if links:
        found, kept = _told(LINK, LINK, of_hosts(links), slow_links(links, tests), history, time)
        findings += found
        records += kept
        if not found:
            middle = 1e-6 / median(map(median, links.values()))
            text = f"links at {middle:,.0f} MB/s (median of {len(links)})"
            findings.append(Finding(check="burn-in", host="all", verdict="good", found=text))
    if not any(finding.verdict != "good" for finding in findings):
        laps = min(int(result["laps"]) for result in results)
        text = f"{hosts.ranks} rank{'s' * (hosts.ranks > 1)} alike over {laps} laps"
        findings.append(Finding(check="burn-in", host="all", verdict="good", found=text))
    return findings, records


def _who(hosts: Hosts, name: str, local: int) -> str:
    """What a rank is called: its host, where it is the only one there."""
    alone = all(host.slots == 1 for host in hosts.hosts)
    return name if alone else f"{name}:{local}"


def _told(
    part: str,
    words: str,
    seconds: Mapping[str, Turns],
    slow: Mapping[str, float],
    history: Sequence[Record],
    time: str,
) -> tuple[list[Finding], list[Record]]:
    """A finding for everybody who is slower than the peers, or than itself before; a record for each."""
    findings = []
    values = {who: float(median(turns)) for who, turns in seconds.items()}
    for who, value in values.items():
        since = slow_since(history, who, part)
        if who in slow:
            text = f"{words} {slow[who]:.0%} slower than its peers, {f'since {since}' if since else 'first seen now'}"
            findings.append(Finding(check="burn-in", host=who, verdict="fault", found=text, remedy=REMEDIES[part]))
            continue
        before = than_before(history, who, part, value)
        if before is not None:
            text = f"{words} {before:.0%} slower than here before"
            findings.append(Finding(check="burn-in", host=who, verdict="advice", found=text, remedy=REMEDIES[part]))
    records = [
        Record(time=time, who=who, what=part, value=float(f"{value:.4g}"), slower=round(slow.get(who, 0.0), 3))
        for who, value in values.items()
    ]
    return findings, records


def _together(hosts: Hosts, findings: list[Finding]) -> list[Finding]:
    """Where all ranks of a host are slow alike, the host is named once instead of each rank."""
    for host in hosts.hosts:
        ranks = [_who(hosts, host.name, local) for local in range(host.slots)]
        theirs = [finding for finding in findings if finding.host in ranks]
        if host.slots > 1 and len(theirs) == host.slots and len({finding.verdict for finding in theirs}) == 1:
            others = [finding for finding in findings if finding not in theirs]
            findings = [*others, theirs[0].model_copy(update={"host": host.name})]
    return findings


def _links(hosts: Hosts, results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Turns]:
    """Seconds of a byte between two hosts, turn by turn: both measured it, the longer counts."""
    first, links = 0, dict[tuple[str, str], Turns]()
    for number, host in enumerate(hosts.hosts):
        for other, rates in results[first].get("pairs", {}).items():
            pair = (hosts.hosts[min(number, int(other))].name, hosts.hosts[max(number, int(other))].name)
            seconds = [1 / rate for rate in rates]
            links[pair] = list(map(max, seconds, links.get(pair, seconds)))
        first += host.slots
    return links
