"""What stands above what: extended files, the file itself, `--set`; and how numbers are read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bloomery.spec.catalog import cluster as catalog_cluster
from bloomery.spec.catalog import read_run
from bloomery.spec.errors import InputError
from bloomery.spec.files import override, parse_yaml, read_yaml, to_yaml, write_atomically


def test_a_file_extends_another_mapping_by_mapping(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: 1\nb: {c: 2, d: 3}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\nb: {d: 4}\n")
    assert read_yaml(tmp_path / "run.yaml") == {"a": 1, "b": {"c": 2, "d": 4}}


def test_extending_goes_one_level_deep(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: 1\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    (tmp_path / "c.yaml").write_text("extends: b.yaml\n")
    with pytest.raises(InputError, match="must not itself extend"):
        read_yaml(tmp_path / "c.yaml")


def test_an_extended_file_that_is_missing_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("x: 1\n")
    (tmp_path / "run.yaml").write_text("extends: bas.yaml\n")
    with pytest.raises(InputError, match=r"did you mean 'base\.yaml'"):
        read_yaml(tmp_path / "run.yaml")


def test_set_reads_its_value_as_yaml_and_keeps_the_rest() -> None:
    values = override({"train": {"steps": 3, "seed": 1}}, ["train.steps=8", "layout={tp: 2}", "name=x"])
    assert values == {"train": {"steps": 8, "seed": 1}, "layout": {"tp": 2}, "name": "x"}


def test_the_last_set_wins() -> None:
    assert override({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_set_below_a_catalog_name_extends_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: tiny-5m\ncluster: generic-8xa100\n")
    run = read_run(tmp_path / "run.yaml", ["model.layers=6", "cluster.nodes=4"])
    assert (run.model.layers, run.model.hidden, run.cluster.size) == (6, 192, 32)


def test_set_below_an_accelerators_name_changes_that_accelerator(tmp_path: Path) -> None:
    own = "tiers: [{name: pcie, span: 2, bandwidth_bytes_per_s: 2e10, ports_per_node: 2, latency_s: 1e-5}]"
    for cluster in ("generic-8xa100", f"{{name: mine, accelerators_per_node: 2, accelerator: a100-80gb, {own}}}"):
        (tmp_path / "run.yaml").write_text(f"model: tiny-5m\ncluster: {cluster}\n")
        plain = read_run(tmp_path / "run.yaml").cluster.accelerator
        chip = read_run(tmp_path / "run.yaml", ["cluster.accelerator.memory_bytes=60e9"]).cluster.accelerator
        assert chip == plain.model_copy(update={"memory_bytes": 60e9})


MACHINE = catalog_cluster("this-machine").model_dump(mode="json")


@pytest.mark.parametrize(
    ("cluster", "assignments", "part"),
    [
        ("this-machine", ["cluster.accelerator.memory_bytes=1.0e+9"], "accelerator"),
        ("this-machine", ["cluster.tiers.0.latency_s=1"], "tiers"),
        ("{extends: this-machine, accelerator: {memory_bytes: 1.0e+9}}", [], "accelerator"),
        ("{extends: this-machine, accelerator: h100-sxm}", [], "accelerator"),
        ("machine.yaml", ["cluster.accelerator.memory_bytes=1.0e+9"], "accelerator"),
        (MACHINE, ["cluster.tiers.0.latency_s=1"], "tiers"),
    ],
)
def test_what_is_said_beside_the_cuts_of_a_machine_is_refused(
    tmp_path: Path, cluster: object, assignments: list[str], part: str
) -> None:
    (tmp_path / "machine.yaml").write_text(to_yaml(MACHINE))
    described = f"{{cluster: {cluster}}}" if isinstance(cluster, str) else to_yaml({"cluster": cluster})
    (tmp_path / "run.yaml").write_text(to_yaml({"model": "tiny-5m", **parse_yaml(described, "")}))
    with pytest.raises(
        InputError, match=rf"cluster\.{part}: .*cut by cut.*accepted: cluster\.cuts\.0\.{part}, cluster\.cuts\.1\."
    ):
        read_run(tmp_path / "run.yaml", assignments)


def test_an_item_of_a_list_below_a_name_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: tiny-5m\ncluster: this-machine\n")
    machine = read_run(tmp_path / "run.yaml", ["cluster.cuts.1.accelerator.memory_bytes=1e9"]).cluster
    assert machine.cut(2).accelerator.memory_bytes == 1e9
    assert machine.cuts[0] == catalog_cluster("this-machine").cuts[0]


def test_set_replaces_a_cluster_by_a_file_beside_the_run(tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_text("extends: other.yaml\nname: mine\n")
    (tmp_path / "other.yaml").write_text(
        "accelerators_per_node: 2\naccelerator: l40s\n"
        "tiers: [{name: pcie, span: 2, bandwidth_bytes_per_s: 2e10, ports_per_node: 2, latency_s: 1e-5}]\n"
    )
    (tmp_path / "run.yaml").write_text("model: tiny-5m\ncluster: {extends: generic-8xa100, nodes: 2}\n")
    run = read_run(tmp_path / "run.yaml", ["cluster=machine.yaml"])
    assert (run.cluster.name, run.cluster.size, run.cluster.accelerator.name) == ("mine", 2, "l40s")


@pytest.mark.parametrize("assignment", ["train.steps", "=3", "a..b=3"])
def test_a_set_that_is_no_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(InputError, match="--set"):
        override({}, [assignment])


def test_a_set_below_a_word_that_names_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"--set layout.recompute.*auto"):
        override({"layout": "auto"}, ["layout.recompute=full"])
    assert override({"layout": "auto"}, ["layout={tp: 2}", "layout.dp=2"]) == {"layout": {"tp": 2, "dp": 2}}


def test_a_number_in_a_set_names_an_item_of_a_list() -> None:
    values = {"align": [{"name": "sft", "steps": 5}, {"name": "more"}]}
    assert override(values, ["align.0.steps=2"])["align"] == [{"name": "sft", "steps": 2}, {"name": "more"}]
    assert values["align"][0]["steps"] == 5
    for path in ("align.2.steps=1", "align.sft.steps=1"):
        with pytest.raises(InputError, match="not an item of this list"):
            override(values, [path])


@pytest.mark.parametrize("text", ["1e9", "1E+9", "1.0e9", "1_000_000_000"])
def test_numbers_are_numbers(text: str) -> None:
    assert parse_yaml(f"x: {text}", "text")["x"] == 1e9


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    values = {"b": [1, 2.5, None, True], "a": {"text": "größer 中文", "number": 1e-5}}
    write_atomically(tmp_path / "deep" / "file.yaml", to_yaml(values))
    assert read_yaml(tmp_path / "deep" / "file.yaml") == values
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "file.yaml"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_that_it_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "file.txt", "text")
    assert caught.value.filename == str(tmp_path / "file.txt")
    assert not list(tmp_path.iterdir())


def test_numbers_that_yaml_reads_in_another_base_stay_text() -> None:
    assert parse_yaml("{a: 010, b: 1:30.5, c: 24:00:00, d: 0, e: -7, f: 1_000, g: 0.5}", "f") == {
        "a": "010", "b": "1:30.5", "c": "24:00:00", "d": 0, "e": -7, "f": 1000, "g": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' stands twice"),
        ("a: &x 1\nb: *x\n", "line 2: aliases"),
        (f"a: {'9' * 5000}\n", "not valid YAML: Exceeds the limit"),
        ("a: \0", "not valid YAML"),
    ],
)
def test_wrong_yaml_is_one_line_that_says_where(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("*", r"\*")) as caught:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(caught.value)


def test_a_set_without_a_value_is_refused_and_null_clears() -> None:
    with pytest.raises(InputError, match="no value; null or '' clears a key"):
        override({"train": {"steps": 3}}, ["train.steps="])
    assert override({"train": {"steps": 3}}, ["train.steps=null"]) == {"train": {"steps": None}}


def test_a_fault_names_the_file_that_says_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: tiny-5m\ncluster: this-machine\ntrain: {stps: 3}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\ntrain: {seed: 1}\n")
    with pytest.raises(InputError, match=r"base\.yaml: train\.stps: unknown key"):
        read_run(tmp_path / "run.yaml")
    (tmp_path / "base.yaml").write_text("model: tiny-5m\ncluster: this-machine\n")
    with pytest.raises(InputError, match=r"^--set train\.steps: a plain number is expected"):
        read_run(tmp_path / "run.yaml", ["train.steps=two"])
    (tmp_path / "run.yaml").write_text("extends: base.yaml\ntrain: {seed: x}\n")
    with pytest.raises(InputError, match=r"run\.yaml: train\.seed"):
        read_run(tmp_path / "run.yaml", ["train.steps=2"])


def test_a_file_cannot_extend_a_name_of_the_catalog_and_is_told_where_to(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("extends: this-machine\n")
    with pytest.raises(InputError, match="a file beside this one"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["a\0b", "\x1b[31m", "a\nb"])
def test_a_folder_of_unprintable_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.yaml").write_text("model: tiny-5m\ncluster: this-machine\n")
    values = {"model": "tiny-5m", "cluster": "this-machine", "out": name}
    (tmp_path / "run.yaml").write_text(to_yaml(values))
    with pytest.raises(InputError, match="printable"):
        read_run(tmp_path / "run.yaml")
