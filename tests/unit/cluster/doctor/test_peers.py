"""Who is off, unreachable or slow is named among peers, and since when."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.cluster.doctor.compare import compared
from bloomery.cluster.doctor.facts import Facts
from bloomery.cluster.doctor.history import Record, read_history, remember, slow_since, than_before
from bloomery.cluster.doctor.pairs import rounds_of_pairs
from bloomery.cluster.doctor.peers import Offset, alike, best_offset, clocks, offset, reachable
from bloomery.cluster.doctor.slowness import TURNS
from bloomery.cluster.hostfile import Host, Hosts


def test_the_offset_of_a_clock_is_found_through_the_delay_of_the_question() -> None:
    true, there_s, back_s = 3.25, 0.004, 0.010
    sent = 1000.0
    found = offset(sent, sent + there_s + true, sent + there_s + back_s)
    assert abs(found.seconds - true) <= found.within_s
    slow = (sent, sent + 0.2 + true, sent + 0.6)
    quick = (sent, sent + 0.001 + true, sent + 0.002)
    assert best_offset([slow, quick]).within_s == pytest.approx(0.001)


def test_the_host_whose_clock_is_off_is_named_unless_it_could_not_be_measured() -> None:
    offsets = {"a": Offset(0.0, 0.001), "b": Offset(0.002, 0.001), "c": Offset(-7.0, 0.001), "d": Offset(1.5, 2.0)}
    verdicts = {finding.host: finding.verdict for finding in clocks(offsets)}
    assert verdicts == {"a": "good", "b": "good", "c": "fault", "d": "good"}


def test_between_two_hosts_the_difference_counts_whole_and_for_both() -> None:
    def verdicts(b: Offset) -> dict[str, str]:
        return {finding.host: finding.verdict for finding in clocks({"a": Offset(0.0, 0.001), "b": b})}

    assert verdicts(Offset(1.9, 0.001)) == {"a": "fault", "b": "fault"}
    assert verdicts(Offset(1.5, 2.0)) == {"a": "good", "b": "good"}


def test_where_no_version_is_more_usual_all_are_named() -> None:
    facts = [Facts(host=name, versions={"torch": version}) for name, version in (("a", "2.13.0"), ("b", "2.12.0"))]
    assert {finding.host: finding.found for finding in alike(facts)} == {
        "a": "torch 2.13.0, b has 2.12.0",
        "b": "torch 2.12.0, a has 2.13.0",
    }


def test_the_odd_version_is_named_on_the_host_that_has_it() -> None:
    facts = [Facts(host=name, versions={"torch": "2.13.0", "nccl": "2.27.3"}) for name in "abc"]
    assert [finding.verdict for finding in alike(facts)] == ["good"]
    facts[1] = Facts(host="b", versions={"torch": "2.13.0", "nccl": "2.26.2"})
    (found,) = alike(facts)
    assert (found.host, found.verdict) == ("b", "fault")
    assert "nccl 2.26.2, others 2.27.3" in found.found


def test_a_host_behind_a_firewall_is_named_once_and_a_broken_route_with_its_ends() -> None:
    well = {(a, b): "" for a in "abc" for b in "abc" if a != b}
    assert [finding.verdict for finding in reachable(well)] == ["good"]
    (closed,) = reachable({**well, ("a", "c"): "timed out", ("b", "c"): "timed out"})
    assert closed.host == "c"
    assert "nobody" in closed.found
    alone = {pair: "network unreachable" for pair in well if "c" in pair}
    assert [finding.host for finding in reachable({**well, **alone})] == ["c"]
    mute = {pair: "timed out" for pair in well if pair[0] == "c"}
    (cut_off,) = reachable({**well, **mute})
    assert (cut_off.host, "it connects to nobody" in cut_off.found) == ("c", True)
    (route,) = reachable({**well, ("a", "c"): "no route to host"})
    assert (route.host, "a does not connect" in route.found) == ("c", True)


@pytest.mark.parametrize("hosts", [2, 3, 4, 5, 8])
def test_pairs_of_a_round_are_disjoint_and_few_hosts_all_meet(hosts: int) -> None:
    rounds = rounds_of_pairs(hosts)
    for pairs in rounds:
        members = [host for pair in pairs for host in pair]
        assert len(members) == len(set(members))
    met = {pair for pairs in rounds for pair in pairs}
    assert met <= {(a, b) for a in range(hosts) for b in range(a + 1, hosts)}
    assert hosts > 6 or len(met) == hosts * (hosts - 1) // 2
    assert min(sum(host in pair for pair in met) for host in range(hosts)) >= min(2, hosts - 1)


def results(seconds: dict[int, float], links: dict[tuple[int, int], float], ranks: int) -> list[dict[str, object]]:
    """What the ranks of a burn-in would say."""
    return [
        {
            "laps": 50,
            "seconds": {"product": [0.01 * (1 + seconds.get(rank, 0.0))] * TURNS, "memory": [0.002] * TURNS},
            "pairs": {str(b if a == rank else a): [rate] * TURNS for (a, b), rate in links.items() if rank in (a, b)},
        }
        for rank in range(ranks)
    ]


THREE = Hosts((Host("a"), Host("b"), Host("c")), ("ssh",))
LINKS = {(0, 1): 1e8, (0, 2): 1e8, (1, 2): 1e8}


def test_a_burn_in_of_equals_finds_nothing() -> None:
    findings, records = compared(THREE, results({}, LINKS, 3), [], "t0")
    assert {finding.verdict for finding in findings} == {"good"}
    assert all(record.slower == 0 for record in records)


def test_a_slow_host_is_named_with_the_time_since_when() -> None:
    history = list[Record]()
    for time, slower in (("t0", 0.0), ("t1", 0.5), ("t2", 0.5)):
        findings, records = compared(THREE, results({1: slower}, LINKS, 3), history, time)
        history += records
    (fault,) = [finding for finding in findings if finding.verdict == "fault"]
    assert fault.host == "b"
    assert "50% slower than its peers, since t1" in fault.found


def test_a_slow_link_is_a_fault_of_its_host() -> None:
    slow = LINKS | {(0, 2): 1e7, (1, 2): 1e7}
    findings, _ = compared(THREE, results({}, slow, 3), [], "t0")
    assert [(finding.host, finding.verdict) for finding in findings if finding.verdict == "fault"] == [("c", "fault")]


def test_a_host_all_of_whose_ranks_are_slow_is_named_once() -> None:
    hosts = Hosts((Host("a", 2), Host("b", 2), Host("c", 2)), ("ssh",))
    slow, _ = compared(hosts, results({4: 0.4, 5: 0.4}, {}, 6), [], "t0")
    assert [finding.host for finding in slow if finding.verdict == "fault"] == ["c"]
    one, _ = compared(hosts, results({4: 0.4}, {}, 6), [], "t0")
    assert [finding.host for finding in one if finding.verdict == "fault"] == ["c:0"]


def test_a_single_machine_is_measured_by_its_own_past() -> None:
    history = [Record(time=f"t{i}", who="a", what="product", value=1.0, slower=0.0) for i in range(5)]
    assert than_before(history, "a", "product", 1.05) is None
    assert than_before(history, "a", "product", 1.5) == pytest.approx(0.5)
    assert than_before(history[:2], "a", "product", 9.0) is None
    restless = [
        one.model_copy(update={"value": value}) for one, value in zip(history, (1, 1.4, 0.8, 1.2, 1), strict=True)
    ]
    assert than_before(restless, "a", "product", 1.5) is None
    assert than_before(restless, "a", "product", 9.0) == pytest.approx(8.0)


def test_the_history_is_read_back_and_what_is_no_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "doctor.jsonl"
    records = [Record(time="t0", who="a", what="link", value=1e-8, slower=0.25)]
    remember(path, records)
    with path.open("a") as stream:
        stream.write('{"time": "t1"}\nno json\n')
    remember(path, records)
    assert read_history(path) == records * 2
    assert slow_since(read_history(path), "a", "link") == "t0"
