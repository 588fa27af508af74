"""Judgements that need several hosts: who differs, who cannot be reached, whose clock is off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bloomery.cluster.doctor.facts import Facts
from bloomery.cluster.doctor.finding import Finding, Verdict

SKEW_ADVICE_S, SKEW_FAULT_S = 0.1, 1.0


@dataclass(frozen=True)
class Offset:
    """A host's clock beside ours: `seconds` ahead, known to within `within_s`."""

    seconds: float
    within_s: float


def offset(sent: float, there: float, received: float) -> Offset:
    """From our clock at a question sent and its answer received, and the other's in between (as NTP, RFC 5905)."""
    return Offset(there - (sent + received) / 2, (received - sent) / 2)


def best_offset(asked: Sequence[tuple[float, float, float]]) -> Offset:
    """The tightest of several: the quickest answer says most."""
    return min((offset(*one) for one in asked), key=lambda found: found.within_s)


def clocks(offsets: Mapping[str, Offset]) -> list[Finding]:
    """Who is ahead or behind the others' median by more than can be measured of both."""
    findings = []
    for host, found in offsets.items():
        others = [one for name, one in offsets.items() if name != host]
        ahead = found.seconds - median(one.seconds for one in others)
        within_s = found.within_s + median(one.within_s for one in others)
        sure = max(0.0, abs(ahead) - within_s)
        verdict: Verdict = "fault" if sure >= SKEW_FAULT_S else "advice" if sure >= SKEW_ADVICE_S else "good"
        text = f"{abs(ahead):.3f} s {'ahead' if ahead > 0 else 'behind'} (to within {within_s:.3f} s)"
        remedy = "start chronyd or systemd-timesyncd" if verdict != "good" else ""
        findings.append(Finding(check="clock", host=host, verdict=verdict, found=text, remedy=remedy))
    return findings


def alike(facts: Sequence[Facts]) -> list[Finding]:
    """Versions and devices that differ between hosts."""
    findings = []
    names = list(dict.fromkeys(name for one in facts for name in one.versions))
    values = {name: {one.host: one.versions.get(name, "none") for one in facts} for name in names}
    values["GPUs"] = {one.host: f"{len(one.gpus)} x {one.gpus[0].name}" if one.gpus else "none" for one in facts}
    values["cores"] = {one.host: str(one.cores_allowed) for one in facts}
    for name, by_host in values.items():
        verdict: Verdict = "advice" if name in ("python", "cores") else "fault"
        remedy = "install the same everywhere" if name in names else "leave it out, or let it work alone"
        for host, others in differing(by_host).items():
            found = f"{name} {by_host[host]}, {others}"
            findings.append(Finding(check="alike", host=host, verdict=verdict, found=found, remedy=remedy))
    together = Finding(check="alike", host="all", verdict="good", found="the same versions, devices and cores")
    return findings or [together]


def differing(by_host: Mapping[str, str]) -> dict[str, str]:
    """Each host that has another value than most, with what those have. Where no value is more usual than another,
    nobody can say who is wrong: all are named, each with one that differs.

    >>> differing({"a": "1", "b": "1", "c": "2"})
    {'c': 'others 1'}
    >>> differing({"a": "1", "b": "2"})
    {'a': 'b has 2', 'b': 'a has 1'}
    """
    counts = Counter(by_host.values()).most_common()
    if len(counts) == 1:
        return {}
    usual = counts[0][0]
    if counts[0][1] > counts[1][1]:
        return {host: f"others {usual}" for host, value in by_host.items() if value != usual}
    other = {value: next(host for host, its in by_host.items() if its != value) for value, _ in counts}
    return {host: f"{other[value]} has {by_host[other[value]]}" for host, value in by_host.items()}


def reachable(attempts: Mapping[tuple[str, str], str]) -> list[Finding]:
    """From what happened when each host connected to others, by (from, to); empty text where it went well."""
    failed = {pair: problem for pair, problem in attempts.items() if problem}
    hosts = list(dict.fromkeys(host for pair in attempts for host in pair))
    shut = [host for host in hosts if _all_failed(attempts, failed, host, end=1)]
    cut_off = [host for host in hosts if host not in shut and _all_failed(attempts, failed, host, end=0)]
    findings = []
    for host in (*shut, *cut_off):
        found = "nobody connects to it" if host in shut else "it connects to nobody"
        problem = next(problem for pair, problem in failed.items() if host in pair)
        remedy = "open its ports to the others (firewall), or correct its address or route"
        findings.append(
            Finding(check="reachable", host=host, verdict="fault", found=f"{found}: {problem}", remedy=remedy)
        )
    for (source, host), problem in failed.items():
        if source not in (*shut, *cut_off) and host not in (*shut, *cut_off):
            found = f"{source} does not connect to it: {problem}"
            remedy = f"look at the route and the firewall between {source} and {host}"
            findings.append(Finding(check="reachable", host=host, verdict="fault", found=found, remedy=remedy))
    well = Finding(check="reachable", host="all", verdict="good", found=f"{len(attempts)} connections between hosts")
    return findings or [well]


def _all_failed(
    attempts: Mapping[tuple[str, str], str], failed: Mapping[tuple[str, str], str], host: str, *, end: int
) -> bool:
    """Whether no attempt with the host at this end (0: from it, 1: to it) went well."""
    mine = [pair for pair in attempts if pair[end] == host]
    return bool(mine) and all(pair in failed for pair in mine)
