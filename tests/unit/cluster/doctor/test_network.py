"""Variables are read as gloo and NCCL read them, and only interfaces with hardware behind them are recommended."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.cluster.doctor.facts import Facts, Interface, ports_of_adapters
from bloomery.cluster.doctor.needs import Needs
from bloomery.cluster.doctor.network import network

LINKS = {
    "lo": Interface(up=True, device=False, addresses=("127.0.0.1",)),
    "eth0": Interface(up=True, mbit_per_s=1000, addresses=("10.0.0.1",)),
    "eth1": Interface(up=False),
    "docker0": Interface(up=True, device=False, mbit_per_s=10_000, addresses=("172.17.0.1",)),
}
PORTS = {"mlx5_0:1": True, "mlx5_1:1": False, "mlx5_2:1": True, "mlx5_2:2": False, "mlx5_10:1": True}


@pytest.mark.parametrize(
    ("variable", "value", "verdict", "words"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "good", ""),
        ("NCCL_SOCKET_IFNAME", "ib,eth", "good", ""),
        ("NCCL_SOCKET_IFNAME", "ib", "fault", "no interface ib"),
        ("NCCL_SOCKET_IFNAME", "eth1", "fault", "interface eth1 is down"),
        ("NCCL_SOCKET_IFNAME", "=eth", "fault", "no interface eth"),
        ("NCCL_SOCKET_IFNAME", "=eth0,eth1", "fault", "interface eth1 is down"),
        ("NCCL_SOCKET_IFNAME", "^eth", "good", ""),
        ("GLOO_SOCKET_IFNAME", "eth", "fault", "no interface eth"),
        ("GLOO_SOCKET_IFNAME", "eth0", "good", ""),
        ("NCCL_IB_HCA", "^mlx5_9", "good", ""),
        ("NCCL_IB_HCA", "^=mlx5_9:1", "good", ""),
        ("NCCL_IB_HCA", "mlx5", "good", ""),
        ("NCCL_IB_HCA", "mlx5:1", "good", ""),
        ("NCCL_IB_HCA", "=mlx5", "fault", "no adapter mlx5"),
        ("NCCL_IB_HCA", "mlx5_0,mlx5_1", "fault", "adapter mlx5_1 is down"),
        ("NCCL_IB_HCA", "mlx5_0,mlx5_7", "fault", "no adapter mlx5_7"),
        ("NCCL_IB_HCA", "=mlx5_2", "good", ""),
        ("NCCL_IB_HCA", "=mlx5_2:2", "fault", "adapter mlx5_2:2 is down"),
    ],
)
def test_a_variable_is_a_fault_where_it_leaves_nothing_that_is_up(
    variable: str, value: str, verdict: str, words: str
) -> None:
    facts = Facts(host="n1", interfaces=LINKS, infiniband=PORTS, variables={variable: value})
    found = network(facts, Needs(hosts=2))
    assert (found[0], words in found[1]) == (verdict, True), found


def test_a_bridge_of_containers_is_no_faster_interface() -> None:
    named = {"GLOO_SOCKET_IFNAME": "eth0"}
    fast = Interface(up=True, mbit_per_s=10_000, addresses=("10.1.0.1",))
    assert network(Facts(host="n1", interfaces=LINKS, variables=named), Needs())[0] == "good"
    facts = Facts(host="n1", interfaces={**LINKS, "eth2": fast}, variables=named)
    assert network(facts, Needs())[2] == "name eth2 instead"


def test_the_state_of_every_port_is_read(tmp_path: Path) -> None:
    for port, state in {"mlx5_0/ports/1": "4: ACTIVE", "mlx5_1/ports/1": "1: DOWN"}.items():
        (tmp_path / port).mkdir(parents=True)
        (tmp_path / port / "state").write_text(f"{state}\n")
    assert ports_of_adapters(tmp_path) == {"mlx5_0:1": True, "mlx5_1:1": False}
    assert ports_of_adapters(tmp_path / "none") == {}
