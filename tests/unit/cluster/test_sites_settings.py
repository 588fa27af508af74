"""What a launch would lose, or have changed behind its back, is refused before anything is submitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from bloomery.cluster.sites import kubernetes, skypilot, slurm
from bloomery.cluster.sites.order import Order, order
from bloomery.spec.catalog import read_run
from bloomery.spec.errors import InputError

ROOT = Path(__file__).parents[3]


def ordered(*assignments: str) -> Order:
    """Llama 3 8B on one host of 8 H100."""
    fixed = ["cluster.nodes=1", "layout={tp: 8, dp: 1}"]
    return order(read_run(ROOT / "examples" / "llama3-8b.yaml", [*fixed, *assignments]), None)


@pytest.mark.parametrize("site", [kubernetes, skypilot])
@pytest.mark.parametrize(
    "said", ["out=/scratch/runs", "out=../x", "out=/workshop", "data.folder=/data", "out=/work/.."]
)
def test_a_folder_off_the_shared_volume_is_refused(site: ModuleType, said: str) -> None:
    key, _, folder = said.partition("=")
    with pytest.raises(
        InputError, match=f"^{key}: not on the volume .* found '{folder}'; accepted: a folder below /wo"
    ):
        site.text(ordered(said))


@pytest.mark.parametrize("site", [kubernetes, skypilot])
@pytest.mark.parametrize(
    "said", ["out=/work", "out=a/../b", "data.folder=/work/x/../shards", "data.text=[/home/me/corpus]"]
)
def test_what_lies_on_it_or_is_not_read_there_is_launched(site: ModuleType, said: str) -> None:
    assert site.text(ordered(said, f"launch.{site.__name__.rpartition('.')[2]}.mount=/work/"))


@pytest.mark.parametrize(("kind", "name"), [("jobset", "bloomery"), ("trainjob", "node")])
def test_a_volume_that_the_site_lays_over_the_pod_counts(kind: str, name: str) -> None:
    mount = "{name: shards, mountPath: /data}"
    pod = f"{{containers: [{{name: {name}, volumeMounts: [{mount}]}}], volumes: [{{name: shards, nfs: {{}}}}]}}"
    told = [f"launch.kubernetes.kind={kind}", f"launch.kubernetes.pod={pod}"]
    assert kubernetes.text(ordered(*told, "data.folder=/data/en"))
    with pytest.raises(InputError, match="accepted: a folder below /work or /data"):
        kubernetes.text(ordered(*told, "data.folder=/date"))


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--nodes=1", "nodes"),
        ("--output=x", "output"),
        ("--outp=x", "output"),
        ("--signal=B:TERM@5", "signal"),
        ("--no-requeue", "no-requeue"),
        ("--ntasks=1", "ntasks"),
        ("--array=0-3", "array"),
        ("--chdir=/tmp", "chdir"),
    ],
)
def test_an_option_that_the_batch_script_says_itself_is_refused(option: str, name: str) -> None:
    said = rf"launch\.slurm\.options\.0: --{name} is what bloomery launch itself tells sbatch.*found '{option}'"
    with pytest.raises(InputError, match=said):
        ordered(f"launch.slurm.options=['{option}']")


@pytest.mark.parametrize("option", ["--nodelist=a1", "--error=x", "--mem=500G", "--gpus-per-node=h100:8", "--nice"])
def test_other_options_are_the_sites_own(option: str) -> None:
    assert f"#SBATCH {option}\n" in slurm.script([ordered(f"launch.slurm.options=['{option}']")], Path("log"))


def test_a_percent_sign_in_a_folder_is_not_a_number_of_the_job_for_slurm() -> None:
    one = ordered("name=half 50%j")
    text = slurm.script([one], one.folder / "launch" / "%j.log")
    assert "/half 50%%j/launch/%j.log'" in text and "/half 50%j'\n" in text


def probed(name: str, gib: float) -> Order:
    """One on accelerators under the name that their driver has for them, as in a probed cluster file."""
    one = ordered()
    accelerator = one.run.cluster.accelerator.model_copy(update={"name": name, "memory_bytes": gib * 2**30})
    cluster = one.run.cluster.model_copy(update={"accelerator": accelerator})
    return replace(one, run=one.run.model_copy(update={"cluster": cluster}))


@pytest.mark.parametrize(
    ("name", "gib", "sold_as"),
    [
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA H100 80GB HBM3", 79.2, "H100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX4090"),
        ("AMD Instinct MI300X", 192.0, "MI300X"),
    ],
)
def test_skypilot_is_asked_for_what_was_probed(name: str, gib: float, sold_as: str) -> None:
    assert skypilot.task(probed(name, gib))["resources"]["accelerators"] == f"{sold_as}:8"


@pytest.mark.parametrize(("name", "gib"), [("NVIDIA H100 NVL", 93.1), ("Some Other GPU", 80.0)])
def test_skypilot_is_not_asked_for_a_guess(name: str, gib: float) -> None:
    with pytest.raises(InputError, match="SkyPilot has no name"):
        skypilot.task(probed(name, gib))


@pytest.mark.parametrize(
    ("name", "resource"),
    [
        ("AMD Instinct MI300X", "amd.com/gpu"),
        ("mi355x", "amd.com/gpu"),
        ("NVIDIA H200", "nvidia.com/gpu"),
        ("mine", "nvidia.com/gpu"),
    ],
)
def test_kubernetes_is_asked_for_the_makers_resource(name: str, resource: str) -> None:
    assert f"{resource}: 8" in kubernetes.text(probed(name, 192.0))
