"""Everything that can be refused is refused before a process starts, and a refusal changes nothing that is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bloomery.cluster import prepare
from bloomery.cluster.supervisor import run_lock
from bloomery.data.build import build
from bloomery.data.tokenizer import load, train
from bloomery.evaluate.opening import open_run
from bloomery.spec import commit
from bloomery.spec.catalog import cluster
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, to_yaml
from bloomery.spec.float8 import Float8
from bloomery.spec.job import Job, read_job, write_job
from bloomery.spec.layout import Layout
from bloomery.spec.parameters import all_parameters, parameter_count
from bloomery.spec.run import AlignStage, Optimizer, Run
from bloomery.spec.seal import write_sums


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A tiny run with its token shards built."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"Iron number {number} is made from ore with charcoal. " * 30)
    described = Run.checked(
        {
            "name": "tiny",
            "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": 600, "max_seq_len": 64},
            "cluster": cluster("this-machine").model_dump(),
            "layout": {},
            "train": {"seq_len": 32, "global_batch": 4, "steps": 2},
            "data": {"vocab": 512, "text": [str(text)]},
            "align": [{"name": "sft", "steps": 2, "global_batch": 4}],
            "out": str(tmp_path / "runs"),
        }
    )
    build(described.data, prepare.data_folder(described))
    return described


def changed(run: Run, **values: object) -> Run:
    """The run with other settings of its training."""
    return run.model_copy(update={"train": run.train.model_copy(update=values)})


def finish(folder: Path) -> None:
    """As if training had come to its end: a checkpoint folder and the event."""
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    (folder / "events.jsonl").write_text('{"event": "finished", "step": 2}\n')


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.*") if path.name != ".lock"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"steps": 3}, "steps"),
        ({"seed": 1}, "seed"),
        ({"seq_len": 16}, "seq"),
        ({"optimizer": Optimizer(min_lr=1e-5)}, r"another optimizer \(min_lr 0\.0001, now 1e-05\)"),
    ],
)
def test_a_resume_under_another_description_is_refused_and_nothing_is_rewritten(
    run: Run, values: dict[str, object], named: str
) -> None:
    folder, _ = prepare.prepare_pretraining(run, world_size=None, fresh=False)
    finish(folder)
    before = contents(folder)
    with pytest.raises(InputError, match=named):
        prepare.prepare_pretraining(changed(run, **values), world_size=None, fresh=False)
    assert contents(folder) == before
    prepare.prepare_pretraining(changed(run, **values), world_size=None, fresh=True)
    assert not (folder / "checkpoints").exists()


def test_the_plan_of_a_finished_run_is_the_one_it_was_started_with(run: Run) -> None:
    folder, _ = prepare.prepare_pretraining(run, world_size=None, fresh=False)
    finish(folder)
    before = contents(folder)
    other = run.model_copy(update={"layout": run.layout.model_copy(update={"dp": 2})})  # type: ignore[union-attr]
    _, job = prepare.prepare_pretraining(other, world_size=None, fresh=False)
    assert job.layout.dp == 1
    assert contents(folder) == before


def test_a_layout_whose_gradients_cannot_be_compared_is_refused_by_a_dry_run_too(run: Run) -> None:
    guarded = changed(run, guard=run.train.guard.model_copy(update={"recompute_every": 100}))
    deep = guarded.model_copy(update={"layout": Layout(pp=2)})
    with pytest.raises(InputError, match=r"layout: .*train\.guard\.recompute_every\) needs pp = 1"):
        prepare.chosen_layout(deep, None)
    assert prepare.chosen_layout(deep.model_copy(update={"layout": "auto"}), None).pp == 1


def test_fresh_removes_what_a_run_writes_and_nothing_else(run: Run) -> None:
    folder, _ = prepare.prepare_pretraining(run, world_size=None, fresh=False)
    finish(folder)
    (folder / "notes.txt").write_text("mine")
    prepare.prepare_pretraining(run, world_size=None, fresh=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "data" / "train" / "manifest.json").is_file()
    assert not (folder / "checkpoints").exists()


def test_fresh_does_not_touch_a_run_that_is_being_trained(run: Run) -> None:
    folder, _ = prepare.prepare_pretraining(run, world_size=None, fresh=False)
    finish(folder)
    with run_lock(folder), pytest.raises(InputError, match="another process"):
        prepare.prepare_pretraining(run, world_size=None, fresh=True)
    assert (folder / "checkpoints" / "step_000002").is_dir()


@pytest.mark.parametrize(("steps", "number"), [(2, 1), (150, 2), (1000, 3)])
def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_folder_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, steps: int, number: int
) -> None:
    usage = shutil.disk_usage(run.out)._replace(free=1000)
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=f"no space left for checkpoints: {number} of them"):
        prepare.prepare_pretraining(changed(run, steps=steps), world_size=None, fresh=False)
    assert not (Path(run.out) / "tiny" / "run.yaml").exists()


def test_text_that_is_too_short_to_hold_out_is_refused_before_training_not_after_it(run: Run) -> None:
    long = run.model_copy(update={"model": run.model.model_copy(update={"max_seq_len": 4096})})
    with pytest.raises(InputError, match=r"train: .* too few for train\.seq_len 4000; name more text"):
        prepare.prepare_pretraining(changed(long, seq_len=4000), world_size=None, fresh=False)
    tokens = int(read_json(prepare.data_folder(run) / "heldout" / "manifest.json")["tokens"])
    with pytest.raises(InputError, match=r"heldout: .* too few for .*; raise data\.holdout or name more text"):
        prepare.prepare_pretraining(changed(long, seq_len=tokens), world_size=None, fresh=False)


def test_shards_of_another_tokenizer_than_the_one_there_are_not_trained_on(run: Run) -> None:
    folder = prepare.data_folder(run)
    train(iter(["Another text. "] * 20), 300).save(folder)
    write_sums(folder, ["tokenizer.json"])
    with pytest.raises(InputError, match=r"report\.json: made with another tokenizer than the one there"):
        prepare.prepare_pretraining(run, world_size=None, fresh=False)


def test_a_tokenizer_larger_than_the_model_is_refused(run: Run) -> None:
    small = run.model_copy(update={"model": run.model.model_copy(update={"vocab": 300})})
    with pytest.raises(InputError, match=r"lower data\.vocab"):
        prepare.prepare_pretraining(small, world_size=None, fresh=False)


def test_float8_is_refused_where_there_are_no_units_unless_it_may_be_emulated(run: Run) -> None:
    refused = r"train\.dtype: .* has no float8 units .*; found 'float8'; accepted: auto, .*float32"
    with pytest.raises(InputError, match=refused):
        prepare.prepare_pretraining(changed(run, dtype="float8"), world_size=None, fresh=False)
    emulated = changed(run, dtype="float8", float8=Float8(emulate=True))
    _, job = prepare.prepare_pretraining(emulated, world_size=None, fresh=False)
    assert (job.dtype, job.float8) == ("float8", Float8(emulate=True))
    with pytest.raises(InputError, match=r"train\.dtype: .*micro_batch \* 24 / cp, must be a multiple of 16; found"):
        prepare.prepare_pretraining(changed(emulated, seq_len=24), world_size=None, fresh=True)


def test_an_interrupted_build_is_no_data(run: Run) -> None:
    (prepare.data_folder(run) / "report.json").unlink()
    with pytest.raises(InputError, match="data build"):
        prepare.prepare_pretraining(run, world_size=None, fresh=False)


def test_alignment_without_pairs_says_where_they_come_from(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(prepare.data_folder(run) / "pairs")
    with pytest.raises(InputError, match=r"align\.0\.pairs"):
        prepare.prepare_alignment(run, run.align[0], tmp_path, tmp_path / "sft", fresh=False)


def test_an_alignment_batch_that_the_ranks_do_not_divide_is_refused_before_pre_training(run: Run) -> None:
    stages = (run.align[0], run.align[0].model_copy(update={"name": "more", "global_batch": 3}))
    two = run.model_copy(update={"layout": Layout(dp=2, micro_batch=2), "align": stages})
    with pytest.raises(InputError, match=r"align\.1\.global_batch: dp\*micro_batch must divide global_batch 3; found"):
        prepare.prepare_pretraining(two, world_size=None, fresh=False)


def test_an_alignment_batch_smaller_than_a_micro_batch_is_one(run: Run, tmp_path: Path) -> None:
    stage = run.align[0].model_copy(update={"global_batch": 2})
    wide = run.model_copy(update={"layout": Layout(micro_batch=4), "align": (stage,)})
    _, job = prepare.prepare_pretraining(wide, world_size=None, fresh=False)
    assert job.layout.micro_batch == 4
    initial = checkpoint(tmp_path / "step_000002", "{}")
    _, job = prepare.prepare_alignment(wide, stage, initial, tmp_path / "sft", fresh=False)
    assert (job.layout.micro_batch, job.global_batch) == (2, 2)


def redescribed(run: Run, **values: object) -> Run:
    """The run with other settings of its data."""
    return run.model_copy(update={"data": run.data.model_copy(update=values)})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"text": ("elsewhere",)}, r"data\.text .*text, now elsewhere"),
        ({"text": ()}, r"data\.text .*, now this machine's own"),
        ({"vocab": 500}, r"data\.vocab 512, now 500"),
        ({"holdout": 0.2}, r"data\.holdout 0\.01, now 0\.2"),
    ],
)
def test_shards_of_another_text_are_not_trained_on(run: Run, values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=rf"built from other text \({said}\); `bloomery data build RUN\.yaml`"):
        prepare.prepare_pretraining(redescribed(run, **values), world_size=None, fresh=False)


def test_text_that_changed_under_its_name_is_built_again_before_a_run_begins_and_not_asked_for_when_it_goes_on(
    run: Run,
) -> None:
    data, grown = prepare.data_folder(run), Path(run.data.text[0]) / "0.txt"
    folder, _ = prepare.prepare_pretraining(run, world_size=None, fresh=False)
    grown.write_text("More of it than there was. " * 90)
    words = r"built from other text \(data\.text .*text holds other files now\); `bloomery data build"
    with pytest.raises(InputError, match=words):
        prepare.prepare_pretraining(run, world_size=None, fresh=False)
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    prepare.prepare_pretraining(run, world_size=None, fresh=False)
    with pytest.raises(InputError, match=words):
        prepare.prepare_pretraining(run, world_size=None, fresh=True)
    build(run.data, data)
    prepare.prepare_pretraining(run, world_size=None, fresh=True)


def test_the_same_text_in_another_place_or_spelling_is_no_other_text(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare.prepare_pretraining(redescribed(run, text=("text",)), world_size=None, fresh=False)
    shutil.move(tmp_path / "text", tmp_path / "moved")
    prepare.prepare_pretraining(run, world_size=None, fresh=False)
    prepare.prepare_pretraining(redescribed(run, text=("moved",)), world_size=None, fresh=False)


def test_a_description_that_names_shards_and_no_text_takes_what_is_there(run: Run) -> None:
    folder = prepare.data_folder(run)
    prepare.prepare_pretraining(redescribed(run, text=(), folder=str(folder)), world_size=None, fresh=False)


def test_a_build_from_before_its_origin_was_kept_is_still_trained_on(run: Run) -> None:
    path = prepare.data_folder(run) / "report.json"
    values = json.loads(path.read_text())
    del values["origin"], values["sha256"]
    path.write_text(json.dumps(values))
    prepare.prepare_pretraining(redescribed(run, vocab=500), world_size=None, fresh=False)


def checkpoint(folder: Path, content: str) -> Path:
    """A checkpoint folder with something for a commit."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commit.json").write_text(content)
    return folder


def test_an_alignment_asks_for_the_pairs_that_were_built(run: Run, tmp_path: Path) -> None:
    pairs, initial = tmp_path / "pairs.jsonl", checkpoint(tmp_path / "step_000002", "{}")
    pairs.write_text('{"prompt": "a", "response": "b"}')
    stage = run.align[0].model_copy(update={"pairs": str(pairs)})
    named = run.model_copy(update={"align": (stage,)})
    with pytest.raises(InputError, match=r"built from other pairs \(align\.0\.pairs made from the text, now .*pairs"):
        prepare.prepare_alignment(named, stage, initial, tmp_path / "sft", fresh=False)
    build(run.data, prepare.data_folder(run), pairs_file=str(pairs))
    prepare.prepare_alignment(named, stage, initial, tmp_path / "sft", fresh=False)
    pairs.write_text('{"prompt": "a", "response": "c"}')
    with pytest.raises(InputError, match=r"pairs\.jsonl has another content now"):
        prepare.prepare_alignment(named, stage, initial, tmp_path / "sft", fresh=False)


def test_pairs_whose_prompts_do_not_fit_are_refused_before_training(run: Run, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "0 1 2 3 4 5 6 7 8 9 " * 9, "response": "b"}))
    stage = run.align[0].model_copy(update={"pairs": str(pairs)})
    build(run.data, prepare.data_folder(run), pairs_file=str(pairs))
    with pytest.raises(InputError, match="no pair's prompt fits in seq_len 32"):
        prepare.prepare_alignment(
            run.model_copy(update={"align": (stage,)}), stage, tmp_path, tmp_path / "sft", fresh=False
        )


def test_an_alignment_from_other_weights_is_refused_and_begins_with_fresh(run: Run, tmp_path: Path) -> None:
    stage, target = run.align[0], tmp_path / "sft"
    initial = checkpoint(tmp_path / "step_000002", "trained once")
    prepare.prepare_alignment(run, stage, initial, target, fresh=False)
    finish(target)
    moved = checkpoint(tmp_path / "moved" / "step_000002", "trained once")
    prepare.prepare_alignment(run, stage, moved, target, fresh=False)
    checkpoint(initial, "trained again")
    with pytest.raises(InputError, match="another starting checkpoint; --fresh"):
        prepare.prepare_alignment(run, stage, initial, target, fresh=False)
    prepare.prepare_alignment(run, stage, initial, target, fresh=True)
    assert not (target / "checkpoints").exists()


def test_each_alignment_stage_has_its_own_order_and_one_that_began_in_the_first_one_s_goes_on_in_it(
    run: Run, tmp_path: Path
) -> None:
    stages = tuple(run.align[0].model_copy(update={"name": name}) for name in ("one", "two", "three"))
    several, initial = run.model_copy(update={"align": stages}), checkpoint(tmp_path / "step_000002", "{}")

    def prepared(stage: AlignStage, *, fresh: bool = False) -> Job:
        return prepare.prepare_alignment(several, stage, initial, tmp_path / stage.name, fresh=fresh)[1]

    seeds = [prepared(stage).seed for stage in stages]
    assert len(set(seeds)) == 3 and seeds[0] == run.train.seed
    assert prepared(stages[1]).seed == seeds[1]
    write_job(tmp_path / "two", read_job(tmp_path / "two").model_copy(update={"seed": run.train.seed}))
    (tmp_path / "two" / "checkpoints" / "step_000001").mkdir(parents=True)
    assert prepared(stages[1]).seed == run.train.seed
    assert prepared(stages[1], fresh=True).seed == seeds[1]


def test_a_tokenizer_that_was_exchanged_under_a_run_is_noticed(run: Run, tmp_path: Path) -> None:
    folder, data = prepare.run_folder(run), prepare.data_folder(run)
    prepare.prepare_pretraining(run, world_size=None, fresh=False)
    finish(folder)
    before = load(data)
    assert open_run(folder).tokenizer().size == before.size
    train(iter(["other words than those " * 20]), 400).save(data)
    write_sums(data, ["tokenizer.json"])
    with pytest.raises(InputError, match="not the tokenizer this run was trained with"):
        open_run(folder).tokenizer()
    with pytest.raises(InputError, match="not the tokenizer this run was trained with"):
        prepare.prepare_alignment(run, run.align[0], tmp_path, tmp_path / "sft", fresh=False)
    other = redescribed(run, vocab=300)
    build(other.data, data)
    prepare.prepare_pretraining(other, world_size=None, fresh=True)
    assert open_run(folder).tokenizer().size != before.size


@pytest.fixture
def imported(run: Run) -> Path:
    """The run's folder as an import leaves it: a description and weights, no job."""
    folder = prepare.run_folder(run)
    (folder / "run.yaml").write_text(to_yaml(run.model_dump(mode="json")))
    place = folder / "checkpoints" / "step_000000"
    place.mkdir(parents=True)
    shapes = {parameter.name: tuple(parameter.shape) for parameter in all_parameters(run.model)}
    tensors = {name: commit.TensorRecord(shape=shape, parts=()) for name, shape in shapes.items()}
    described = commit.Commit(
        format=commit.FORMAT, step=0, cursor=0, run_hash=commit.IMPORTED, data_hash=commit.IMPORTED, layout=Layout(),
        guard={}, tensors=tensors, files={},
    )  # fmt: skip
    commit.write_commit(place, described)
    return folder


@pytest.mark.parametrize("fresh", [False, True])
def test_imported_weights_are_trained_on_and_never_removed(run: Run, imported: Path, fresh: bool) -> None:
    later = imported / "checkpoints" / "step_000002"
    later.mkdir()
    prepare.prepare_pretraining(run, world_size=None, fresh=fresh)
    assert (imported / "checkpoints" / "step_000000" / "commit.json").is_file()
    assert later.exists() != fresh
    assert (imported / "job.json").is_file()


def test_damaged_imported_weights_are_refused_until_training_has_left_them(run: Run, imported: Path) -> None:
    place = imported / "checkpoints" / "step_000000"
    missing = {"rank_00000.safetensors": commit.FileRecord(bytes=1, sha256="0" * 64)}
    commit.write_commit(place, commit.read_commit(place).model_copy(update={"files": missing}))
    before = contents(imported)
    with pytest.raises(InputError, match=r"imported weights are damaged; import .*safetensors: missing or torn"):
        prepare.prepare_pretraining(run, world_size=None, fresh=False)
    assert contents(imported) == before
    (imported / "checkpoints" / "step_000002").mkdir()
    prepare.prepare_pretraining(run, world_size=None, fresh=False)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("values", [{"layers": 1}, {"rope_theta": 500.0}])
def test_imported_weights_of_another_model_are_refused_and_nothing_is_rewritten(
    run: Run, imported: Path, values: dict[str, object], fresh: bool
) -> None:
    before = contents(imported)
    other = run.model_copy(update={"model": run.model.model_copy(update=values)})
    with pytest.raises(InputError, match="weights imported here are of another model"):
        prepare.prepare_pretraining(other, world_size=None, fresh=fresh)
    assert contents(imported) == before


@pytest.mark.parametrize(
    ("compile", "steps", "expected"),
    [("auto", 2, False), ("auto", 10**9, True), (True, 2, True), (False, 10**9, False)],
)
def test_layers_are_compiled_where_asked_or_where_the_run_is_long_enough(
    run: Run, compile: bool | str, steps: int, expected: bool
) -> None:
    _, job = prepare.prepare_pretraining(changed(run, compile=compile, steps=steps), world_size=1, fresh=False)
    assert job.compiled is expected


@pytest.mark.parametrize(
    ("layout", "words"),
    [(Layout(recompute="selective"), "recompute: none or full"), (Layout(offload="activations"), "offload: none")],
)
def test_compilation_is_refused_where_the_engine_decides_what_layers_keep(run: Run, layout: Layout, words: str) -> None:
    wanted = changed(run, compile=True).model_copy(update={"layout": layout})
    with pytest.raises(InputError, match=words):
        prepare.prepare_pretraining(wanted, world_size=1, fresh=False)
    left = changed(run, compile="auto", steps=10**9).model_copy(update={"layout": layout})
    assert not prepare.prepare_pretraining(left, world_size=1, fresh=False)[1].compiled


@pytest.mark.parametrize(
    ("there", "steps", "number"),
    [((), 1000, 3), ((100, 200), 1000, 1), ((50,), 150, 2), ((100, 150), 250, 1), ((100,), 100, 1)],
)
def test_room_is_asked_for_checkpoints_to_come_beside_those_that_no_schedule_made(
    tmp_path: Path, there: tuple[int, ...], steps: int, number: int
) -> None:
    for step in (0, *there):  # 0: imported weights, which stay beside those that it keeps
        (tmp_path / f"step_{step:06d}").mkdir()
    assert commit.checkpoints_to_come(tmp_path, keep=2, every=100, steps=steps) == number


@pytest.mark.parametrize(
    ("there", "keep_every", "number"),
    [((), 10, 100), ((), 100, 3 + 10), ((), 15, 3 + 33), ((100, 200, 210, 220), 100, 1 + 8), ((100, 990), 100, 1)],
)
def test_room_is_asked_for_checkpoints_that_stay_for_good(
    tmp_path: Path, there: tuple[int, ...], keep_every: int, number: int
) -> None:
    for step in there:
        (tmp_path / f"step_{step:06d}").mkdir()
    assert commit.checkpoints_to_come(tmp_path, keep=2, every=10, steps=1000, keep_every=keep_every) == number


def test_the_disk_must_hold_what_stays_for_good(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    one = commit.checkpoint_bytes(parameter_count(run.model), 0)
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * one))
    prepare.prepare_pretraining(changed(run, steps=100, checkpoint_every=10), world_size=1, fresh=False)
    with pytest.raises(InputError, match=r"10 of them take .* keep fewer \(train.keep_checkpoints, train.keep_every\)"):
        kept = changed(run, steps=100, checkpoint_every=10, keep_every=10)
        prepare.prepare_pretraining(kept, world_size=1, fresh=True)
