"""What is wrong with one GPU hides nothing that is worse with another."""

from __future__ import annotations

from bloomery.cluster.doctor.devices import gpus
from bloomery.cluster.doctor.facts import Facts
from bloomery.cluster.doctor.needs import Needs
from bloomery.cluster.doctor.nvidia import Gpu


def host(*devices: Gpu, xids: tuple[str, ...] = ()) -> Facts:
    """A host with these GPUs."""
    return Facts(host="n1", gpus=devices, xids=xids)


def test_a_fault_of_a_later_gpu_outweighs_advice_on_an_earlier_one() -> None:
    narrow, broken = Gpu(index=0, name="H100", link=(8, 16)), Gpu(index=5, name="H100", remap_failed=True)
    assert gpus(host(narrow, broken), Needs())[:2] == ("fault", "GPU 5: row remapping failed")
    assert gpus(host(narrow), Needs())[0] == "advice"


def test_all_faults_are_named_and_the_first_ones_in_full() -> None:
    broken = [Gpu(index=i, name="H100", uncorrected=1) for i in range(4)]
    verdict, found, remedy = gpus(host(*broken, xids=("0000:3b:00 Xid 79: fell off the bus",)), Needs())
    assert verdict == "fault"
    assert found.startswith("0000:3b:00 Xid 79: fell off the bus; GPU 0: 1 uncorrected")
    assert found.endswith("GPU 1: 1 uncorrected memory errors; 2 more")
    assert remedy.count("replace it") == 1
