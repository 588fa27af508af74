"""Wrong input is answered by one line: where, what was found, what is accepted, the nearest match."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.spec.catalog import read_cluster, read_run
from bloomery.spec.errors import InputError
from bloomery.spec.files import MAX_BYTES, read_yaml

VALID = """
name: tiny
model: {layers: 2, hidden: 32, heads: 4, vocab: 512, max_seq_len: 64}
cluster: this-machine
train: {seq_len: 32, global_batch: 4, steps: 2}
"""


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problem(folder: Path, text: str, *assignments: str) -> str:
    with pytest.raises(InputError) as caught:
        read_run(written(folder, text), assignments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("wrong", "path", "nearest"),
    [
        ("modell: tiny-1m", "modell", "model"),
        ("train.global_bach: 4", "train.global_bach", "global_batch"),
        ("train.optimizer.beta: 0.9", "train.optimizer.beta", "betas"),
        ("model.moe.expert: 4", "model.moe.expert", "experts"),
        ("cluster.storage.write_bytes: 4", "cluster.storage.write_bytes", "write_bytes_per_s"),
    ],
)
def test_an_unknown_key_at_any_depth_names_its_path_and_the_nearest(
    tmp_path: Path, wrong: str, path: str, nearest: str
) -> None:
    key, value = wrong.split(": ")
    base = VALID.replace("cluster: this-machine", "cluster: {extends: this-machine}")
    message = problem(tmp_path, base, f"{key}={value}")
    assert f"--set {path}: unknown key" in message
    assert f"did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
    ("was", "now", "path"),
    [
        ("cluster: this-machine", "cluster: {like: this-machine}", "cluster.like"),
        ("cluster: this-machine", "cluster: {preset: this-machine}", "cluster.preset"),
        ("cluster: this-machine", "cluster: {extends: generic-8xh100, accelerator: {name: x, like: h200}}",
         "cluster.accelerator.like"),
        ("model: {", "model: {base: tiny-1m, ", "model.base"),
    ],
)  # fmt: skip
def test_what_the_catalog_has_can_be_extended_and_an_unknown_key_there_says_so(
    tmp_path: Path, was: str, now: str, path: str
) -> None:
    assert was in VALID
    message = problem(tmp_path, VALID.replace(was, now))
    assert f"run.yaml: {path}: unknown key; accepted: " in message and ", extends" in message


def test_an_unknown_key_of_a_cluster_files_accelerator_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "name: mine\naccelerator: {name: x, like: h200}\n", "machine.yaml")
    with pytest.raises(InputError, match=r"machine\.yaml: cluster\.accelerator\.like: unknown key; .*, extends"):
        read_cluster(path)


def test_an_unknown_key_elsewhere_speaks_of_no_catalog(tmp_path: Path) -> None:
    assert "extends" not in problem(tmp_path, VALID, "train.like=x")


def test_an_unknown_key_inside_a_list_of_tiers_names_the_item(tmp_path: Path) -> None:
    tier = "{name: net, span: 8, bandwith_bytes_per_s: 1e9, ports_per_node: 1, latency_s: 0}"
    text = VALID.replace("cluster: this-machine", f"cluster: {{extends: generic-8xh100, tiers: [{tier}]}}")
    message = problem(tmp_path, text)
    assert "cluster.tiers.0.bandwith_bytes_per_s" in message
    assert "did you mean 'bandwidth_bytes_per_s'?" in message


def test_a_wrong_choice_lists_the_choices(tmp_path: Path) -> None:
    message = problem(tmp_path, VALID, "train.dtype=bfloat")
    assert "train.dtype" in message
    assert "float64, float32, bfloat16" in message
    assert "did you mean 'bfloat16'?" in message


@pytest.mark.parametrize("value", ["maybe", "Auto", "3"])
def test_a_choice_or_true_or_false_is_told_as_one_list(tmp_path: Path, value: str) -> None:
    message = problem(tmp_path, VALID, f"train.compile={value}")
    assert "--set train.compile: not an accepted value; found " in message
    assert value in message
    assert "; accepted: auto, true, false" in message
    assert ("did you mean 'auto'?" in message) == (value == "Auto")


def test_a_wrong_choice_elsewhere_is_no_choice_here(tmp_path: Path) -> None:
    message = problem(tmp_path, VALID, "layout=5", "train.dtype=float33")
    assert "--set layout: a mapping is expected; found 5; accepted: auto, cp," in message
    assert "float64" not in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "model.vocab: this key is required" in problem(tmp_path, VALID.replace("vocab: 512, ", ""))


def test_a_wrong_type_shows_what_was_found(tmp_path: Path) -> None:
    message = problem(tmp_path, VALID, "train.seq_len=many")
    assert "train.seq_len" in message
    assert "'many'" in message


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train=4", "train: a mapping is expected; found 4; accepted: averaging, checkpoint_every"),
        ("align=null", "align: a list is expected"),
        ("train.steps=1.5", "train.steps: a whole number is expected; found 1.5"),
        ("train.steps=0", "train.steps: at least 1 is expected; found 0"),
        ("train.optimizer.lr=0", "train.optimizer.lr: more than 0 is expected; found 0"),
        ("name=null", "name: text is expected"),
        ("layout=tp2", "layout: a mapping is expected; found 'tp2'; accepted: auto, cp, cp_method, dp"),
        ("layout.tp=0", "layout.tp: at least 1 is expected"),
        ("model.layers=1000000000", "model.layers: at most 10000 is expected; found 1000000000"),
        ("model.moe={experts: 1000000000, top_k: 1, expert_ffn_hidden: 8}", "model.moe.experts: at most 100000"),
    ],
)
def test_a_wrong_type_is_told_in_the_words_of_the_file_not_of_python(
    tmp_path: Path, assignment: str, words: str
) -> None:
    assert f"--set {words}" in problem(tmp_path, VALID, assignment)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../../home", "-rf", "' '", "'a\\nb'"])
def test_a_run_or_stage_is_a_folder_below_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    assert "--set name: a plain folder name" in problem(tmp_path, VALID, f"name={name}")
    assert "align.0.name: a plain folder name" in problem(tmp_path, VALID, f"align=[{{name: {name}}}]")


def test_alignment_stages_have_names_of_their_own_and_one_file_of_pairs(tmp_path: Path) -> None:
    assert "a name of its own" in problem(tmp_path, VALID, "align=[{name: a}, {name: a}]")
    assert "pairs of the first" in problem(tmp_path, VALID, "align=[{name: a}, {name: b, pairs: b.jsonl}]")
    assert "first one's max_pairs" in problem(tmp_path, VALID, "align=[{name: a}, {name: b, max_pairs: 9}]")


def test_the_first_words_of_a_family_of_models_list_the_family(tmp_path: Path) -> None:
    text = VALID.replace("model: {layers: 2, hidden: 32, heads: 4, vocab: 512, max_seq_len: 64}", "model: gpt2")
    assert "accepted: gpt2-small, gpt2-medium, gpt2-large, gpt2-xl" in problem(tmp_path, text)


def test_tokens_and_steps_together_are_refused(tmp_path: Path) -> None:
    assert "give tokens or steps, not both" in problem(tmp_path, VALID, "train.tokens=1000")


def test_a_sequence_longer_than_the_model_knows_is_refused(tmp_path: Path) -> None:
    assert "exceeds model.max_seq_len 64" in problem(tmp_path, VALID, "train.seq_len=65")


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "x: {b: 1, b: 2}\n"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="stands twice"):
        read_yaml(written(tmp_path, text))


def test_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="aliases"):
        read_yaml(written(tmp_path, "a: &a [1, 2]\nb: [*a, *a]\n"))


def test_tags_that_would_make_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(written(tmp_path, "a: !!python/object/apply:os.getcwd []\n"))


def test_a_file_beyond_the_size_limit_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="larger than"):
        read_yaml(written(tmp_path, "#" * (MAX_BYTES + 1)))


def test_a_list_at_the_top_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a mapping is expected"):
        read_yaml(written(tmp_path, "- 1\n"))


def test_deep_nesting_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_yaml(written(tmp_path, "a: " + "[" * 20_000))


@pytest.mark.parametrize("words", ["model=nosuch", "cluster=nosuch"])
def test_a_name_that_is_in_no_catalog_is_said_where_it_was_given(tmp_path: Path, words: str) -> None:
    message = problem(tmp_path, VALID, words)
    assert message.startswith(f"--set {words.partition('=')[0]}: not in the catalog")
