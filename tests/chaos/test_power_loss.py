"""F3: power fails at any moment; what is on disk then is used to go on, and nothing promised is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from crash_states import Recorder, after_a_cut, recorded
from runs import Figure, chance

from bloomery.data.build import build, read_report
from bloomery.data.shards import verify
from bloomery.data.tokenizer import load
from bloomery.model.weights import CheckpointReader
from bloomery.spec.commit import checkpoint_folders, newest_good, read_commit, read_fence, take_fence
from bloomery.spec.errors import BloomeryError
from bloomery.spec.layout import Layout
from bloomery.spec.run import Data
from bloomery.train import checkpoint
from bloomery.train.checkpoint import Keep

CUTS = 500
WORLD = 2


def state_at(step: int) -> list[dict[str, torch.Tensor]]:
    """What each rank holds after `step` steps."""
    return [{f"weight{rank}": torch.full((600,), step + rank / 10)} for rank in range(WORLD)]


def save(run: Path, step: int, fence: int, number: int) -> None:
    """Save as the writers of two ranks do, one after the other."""
    partial = run / "checkpoints" / f"writing_{step:06d}_{fence}_{number}"
    state = {"step": step, "cursor": step, "run_hash": "r", "data_hash": "d", "guard": {}, "fence": fence}
    for rank, tensors in enumerate(state_at(step)):
        file = checkpoint.shard_name(rank)
        index = {
            key: {"shape": value.shape, "part": {"file": file, "key": key, "offsets": (0,), "shape": value.shape}}
            for key, value in tensors.items()
        }
        checkpoint.write_part(partial, rank, tensors, index, Layout(dp=WORLD), state)
    checkpoint.commit(partial, Layout(dp=WORLD), state, Keep(2))


def recovered(run: Path) -> int:
    """The step a start goes on from, as `train.session` finds it; -1 from the beginning."""
    checkpoints = run / "checkpoints"
    checkpoint.settle_unfinished(checkpoints, read_fence(run), Keep(2))
    for folder in checkpoint_folders(checkpoints):
        try:
            commit = read_commit(folder)
        except BloomeryError:
            checkpoint.set_aside(folder, "damaged")
            continue
        with CheckpointReader(folder, commit) as reader:
            for tensors in state_at(commit.step):
                for key, value in tensors.items():
                    assert torch.equal(reader.read(key, tuple(value.shape), (0,)), value), "silently other weights"
        return commit.step
    return -1


def cut_at_random(
    recorder: Recorder, name: str, tmp_path: Path, usable: Callable[[Path, int], bool]
) -> tuple[int, int]:
    """Unusable states, and different ones, of CUTS."""
    draw, bad, kinds = chance(f"F3 {name}"), 0, set[str]()
    for _ in range(CUTS):
        at, target = draw.randrange(len(recorder.log) + 1), tmp_path / "left"
        after_a_cut(recorder, at, draw, target)
        kinds.add(str(sorted((str(path.relative_to(target)), path.stat().st_size) for path in target.rglob("*"))))
        bad += not usable(target, at)
        shutil.rmtree(target)
    return bad, len(kinds)


def test_f3_power_loss_while_saving(tmp_path: Path, figure: Figure) -> None:
    run = tmp_path / "run"
    run.mkdir()
    promised = list[tuple[int, int, int]]()  # after so many changes: the newest step, and the fencing number
    with recorded(run) as recorder:
        for number, (step, start) in enumerate([(3, 1), (6, 0), (9, 0), (6, 1), (9, 0), (12, 0), (15, 1), (18, 0)]):
            if start:
                fence = take_fence(run)
                promised.append((len(recorder.log), promised[-1][1] if promised else -1, fence))
            if step == 6 and start:
                checkpoint.set_aside(run / "checkpoints" / "step_000009", "rewound")
                promised.append((len(recorder.log), 6, fence))
            save(run, step, fence, number)
            promised.append((len(recorder.log), step, fence))

    def usable(left: Path, at: int) -> bool:
        (step, fence) = next(((s, f) for n, s, f in reversed(promised) if n <= at), (-1, 0))
        # After a rewind the state before it is as good.
        found = recovered(left)
        good = found >= min(step, 6) if 6 <= step <= 9 else found >= step
        if read_fence(left) < fence or not good:
            return False
        save(left, 21, take_fence(left), 99)
        return newest_good(left / "checkpoints")[0] == left / "checkpoints" / "step_000021"

    bad, kinds = cut_at_random(recorder, "saving", tmp_path, usable)
    figure("F3", f"power cut while saving ({len(recorder.log)} changes)", "0 unusable states of 500",
           f"{bad} unusable of {CUTS} ({kinds} different)", bad == 0)  # fmt: skip
    assert bad == 0 and kinds > CUTS // 5


def test_f3_power_loss_while_building_data(tmp_path: Path, figure: Figure) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"Chapter {number}. " + f"Some words about {number} and iron. " * 20)
    settings = Data(text=(str(text),), vocab=300, min_characters=50)
    root = tmp_path / "root"
    root.mkdir()
    with recorded(root) as recorder:
        build(settings, root / "data")
    whole = read_report(root / "data")
    assert whole is not None

    def usable(left: Path, _: int) -> bool:
        build(settings, left / "data")
        for part in ("train", "heldout"):
            verify(left / "data" / part)
        return load(left / "data").size == whole.vocab_used

    bad, kinds = cut_at_random(recorder, "data", tmp_path, usable)
    figure("F3", f"power cut in data build ({len(recorder.log)} changes)", "0 unusable states of 500",
           f"{bad} unusable of {CUTS} ({kinds} different)", bad == 0)  # fmt: skip
    assert bad == 0
