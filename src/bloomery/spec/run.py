"""`Run`: everything one `run.yaml` says."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from bloomery.spec.base import Noun, written
from bloomery.spec.cluster import Cluster
from bloomery.spec.course import Course, RampStage, ramp_problem, ramp_steps
from bloomery.spec.float8 import Float8
from bloomery.spec.launch import Launch
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.reliability import GuardSettings, Supervision
from bloomery.spec.stabilisers import Stabilisers


def _folder_name(name: str) -> str:
    """A run or stage is a folder of that name: one that points elsewhere could have another folder cleared."""
    if not name or name[0] in ".- " or any(letter in "/\\" or not letter.isprintable() for letter in name):
        raise ValueError("a plain folder name is expected (no /, no leading dot, dash or blank)")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


def _path_name(name: str) -> str:
    """What a file system can have, bytes that are no UTF-8 among it; but nothing that a terminal obeys."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError("a name of printable characters is expected") from None
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise ValueError("a name of printable characters is expected")
    return name


PathName = Annotated[str, AfterValidator(_path_name)]


def step_window(text: str) -> tuple[int, int]:
    """First and last step of a window written `10-12` (both counted, from 1). Raises ValueError for anything else."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError("two steps are expected, as in 10-12")
    return int(first), int(last)


def _step_window(text: str) -> str:
    if text:
        step_window(text)
    return text


StepWindow = Annotated[str, AfterValidator(_step_window)]


Beta = Annotated[float, Field(ge=0, lt=1)]


class Data(Noun):
    """Text in, token shards out. `text` names files or folders; empty means the text this machine already has."""

    text: tuple[PathName, ...] = Field(default=(), description="folders or files of text; empty: what this machine has")
    folder: PathName = Field(default="", description="of the token shards; empty: data in the run's folder")
    vocab: int = Field(default=8192, ge=300, description="of the tokenizer that is trained")
    max_bytes: int = Field(default=64_000_000, ge=1, description="stop reading after this much text")
    holdout: float = Field(default=0.01, gt=0, lt=0.5, description="share of documents kept for evaluation")
    shard_tokens: int = Field(default=4_000_000, ge=1024, description="tokens in one file")
    min_characters: int = Field(
        default=200,
        ge=1,
        description=(
            "shorter documents are dropped and counted; a Chinese, Japanese or Korean character counts as eight"
        ),
    )


USUAL_LR = 1e-3
ALIGNMENT_RATES = {"lr": 3e-4, "min_lr": 3e-5}
"""Learning rates where none is given."""


class Optimizer(Noun):
    """The optimizer and its learning-rate schedule. `warmup` and `decay` are shares of the steps.

    `muon` moves the layers' matrices by Muon and the rest by AdamW; `lr` is one scale for both. The factors multiply
    it for what AdamW moves. `min_lr` is a tenth of `lr` where it is not given.
    """

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: matrices of layers by Muon, the rest by AdamW"
    )
    lr: float = Field(default=USUAL_LR, gt=0, description="highest learning rate")
    min_lr: float = Field(default=USUAL_LR / 10, ge=0, description="lowest; a tenth of lr where it is not given")
    embedding_lr_factor: float = Field(default=1.0, gt=0, description="times lr, of embeddings")
    head_lr_factor: float = Field(default=1.0, gt=0, description="of a head that is not tied to the embedding")
    scaling: Literal["none", "mup"] = Field(default="none", description="mup: `lr` is that of width `base_hidden`")
    base_hidden: int = Field(default=128, ge=1, description="width that lr is tuned at, for mup")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW's")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's")
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices and embeddings")
    clip: float = Field(default=1.0, gt=0, description="largest global gradient norm")
    schedule: Literal["cosine", "wsd", "constant"] = Field(default="cosine", description="wsd: flat, then down")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    decay: float = Field(default=0.2, gt=0, le=1, description="WSD: share of the steps that decays")

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: object) -> object:
        if not isinstance(values, dict) or "min_lr" in values:
            return values
        lr = values.get("lr", USUAL_LR)
        return {**values, "min_lr": lr / 10} if isinstance(lr, int | float) else values

    @model_validator(mode="after")
    def _falls(self, info: ValidationInfo) -> Optimizer:
        if self.min_lr > self.lr and written(info):
            raise ValueError(f"min_lr {self.min_lr:g} must not exceed lr {self.lr:g}")
        return self

    @model_validator(mode="after")
    def _scales_from(self, info: ValidationInfo) -> Optimizer:
        if self.scaling == "none" and self.stated("base_hidden") and written(info):
            raise ValueError(f"base_hidden {self.base_hidden} does nothing without scaling mup")
        return self

    def shrink(self, hidden: int) -> float:
        """How much narrower the width is that `lr` belongs to; 1 where rates do not scale."""
        return self.base_hidden / hidden if self.scaling == "mup" else 1.0

    def start_scale(self, hidden: int) -> float:
        """What matrices that read the stream start with, beside their start at that width (`model.init`)."""
        return float(self.shrink(hidden) ** 0.5)


class Averaging(Noun):
    """A running average of the weights: what is evaluated, exported and aligned once it has begun."""

    method: Literal["none", "ema", "uniform"] = "none"
    decay: float = Field(default=0.999, gt=0, lt=1, description="of ema, at each update")
    every: int = Field(default=1, ge=1, description="steps from update to update")
    start: float = Field(default=0.0, ge=0, lt=1, description="share of the steps before it begins")

    @model_validator(mode="after")
    def _decays(self, info: ValidationInfo) -> Averaging:
        if self.method != "ema" and self.stated("decay") and written(info):
            raise ValueError(f"decay {self.decay:g} does nothing under method {self.method}; ema has one")
        return self

    @property
    def kept(self) -> int:
        """How many averages of the weights there are."""
        return 0 if self.method == "none" else 1

    @property
    def updates_per_step(self) -> float:
        """Of the average, while it is kept."""
        return 0.0 if self.method == "none" else 1 / self.every

    def first_step(self, n_steps: int) -> int:
        """The step, counted from 1, after which a run of `n_steps` begins it."""
        return max(1, round(self.start * n_steps))

    def updates(self, n_steps: int) -> int:
        """How often it is updated in a run of `n_steps`."""
        return 0 if self.method == "none" else 1 + (n_steps - self.first_step(n_steps)) // self.every


MOST_SEQUENCE, MOST_BATCH = 1 << 30, 1 << 30
"""Far beyond any training there is: layouts are searched by divisors of the batch."""


class Train(Noun):
    """Pre-training. `global_batch` is in sequences; the budget is `tokens` or `steps`."""

    seq_len: int = Field(default=256, ge=2, le=MOST_SEQUENCE, description="tokens of a sample")
    global_batch: int = Field(default=16, ge=1, le=MOST_BATCH, description="sequences of a step")
    tokens: int | None = Field(default=None, ge=1, description="budget; or steps")
    steps: int | None = Field(default=None, ge=1, description="budget; or tokens")
    ramp: tuple[RampStage, ...] = Field(
        default=(), description="smaller batches or shorter sequences at the start, stage by stage"
    )
    seed: int = Field(default=0, ge=0, description="of initial weights and of the order of samples")
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float8"] = Field(
        default="auto", description="auto: the fastest that is safe on the accelerator"
    )
    float8: Float8 = Float8()
    compile: bool | Literal["auto"] = Field(
        default="auto", description="layers and loss by torch.compile; auto: where the run is long enough to pay for it"
    )
    optimizer: Optimizer = Optimizer()
    averaging: Averaging = Averaging()
    checkpoint_every: int = Field(default=100, ge=1, description="steps")
    memory_every: int = Field(
        default=0, ge=0, description="copies of the state in the host's memory every so many steps; 0: none"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="so many newest stay")
    keep_every: int = Field(
        default=0,
        ge=0,
        description="checkpoints of every so many steps (a multiple of checkpoint_every) stay for good; 0: none",
    )
    guard: GuardSettings = GuardSettings()
    supervision: Supervision = Supervision()
    stabilisers: Stabilisers = Stabilisers()
    evaluate_every: int = Field(default=0, ge=0, description="0: only at the end")
    log_every: int = Field(default=1, ge=1, description="steps")
    document_mask: bool = Field(
        default=False, description="tokens see their own document only, not others packed into the same sequence"
    )
    metrics: tuple[Literal["tensorboard", "wandb", "swanlab", "mlflow", "prometheus"], ...] = Field(
        default=("tensorboard",), description="where figures go besides the run's own files"
    )
    profile: StepWindow = Field(default="", description="steps to profile, as in 10-12")

    @model_validator(mode="after")
    def _one_budget(self) -> Train:
        if self.tokens is not None and self.steps is not None:
            raise ValueError("give tokens or steps, not both (`--set train.tokens=null`, or steps, clears one)")
        return self

    @model_validator(mode="after")
    def _possible_ramp(self) -> Train:
        problem = ramp_problem(self.ramp, global_batch=self.global_batch, seq_len=self.seq_len)
        if problem is None and self.course.last.steps < 1:
            problem = (
                f"ramp: its {self.course.last.first_step} steps leave none of {self.n_steps} to the run's own batch"
            )
        if problem is None and self.ramp and self.supervision.elastic:
            problem = (
                "ramp and supervision.elastic: fewer ranks might not divide the smaller batches; choose one of them"
            )
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _window_in_run(self) -> Train:
        if self.profile and step_window(self.profile)[0] > self.n_steps:
            raise ValueError(f"profile: {self.profile} begins after the last of {self.n_steps} steps")
        return self

    @model_validator(mode="after")
    def _keeps_what_it_saves(self, info: ValidationInfo) -> Train:
        kept, saved = self.keep_every, self.checkpoint_every
        if kept % saved and saved % (kept or 1) and written(info):
            near = " and ".join(str(step) for step in (kept - kept % saved, kept - kept % saved + saved) if step)
            problem = f"keep_every {kept} is no multiple of checkpoint_every {saved}, which alone are saved"
            raise ValueError(f"{problem}; the nearest: {near}")
        return self

    @model_validator(mode="after")
    def _average_of_several(self, info: ValidationInfo) -> Train:
        if self.averaging.updates(self.n_steps) == 1 and written(info):
            problem = f"one update in {self.n_steps} steps is no average: every {self.averaging.every}"
            raise ValueError(f"averaging: {problem}, start {self.averaging.start:g}")
        return self

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the budget, the ramp's among them (100 where neither tokens nor steps is given)."""
        if self.steps is not None:
            return self.steps
        if self.tokens is None:
            return 100
        sizes = {"global_batch": self.global_batch, "seq_len": self.seq_len}
        ramp = Course.of(self.ramp, **sizes, steps=sum(ramp_steps(stage, **sizes) for stage in self.ramp))
        used = ramp.last
        left = self.tokens - used.first_token
        return used.first_step + max(0 if self.ramp else 1, round(left / used.tokens))

    @property
    def course(self) -> Course:
        """The batch and the length of sequences of every step."""
        return Course.of(self.ramp, global_batch=self.global_batch, seq_len=self.seq_len, steps=self.n_steps)


class AlignStage(Noun):
    """One alignment stage. `pairs` names a JSON Lines file with `prompt` and `response`; empty: made from the text."""

    name: FolderName = "sft"
    method: Literal["sft"] = "sft"
    pairs: PathName = Field(default="", description="JSON Lines of prompt and response; empty: made from the text")
    max_pairs: int | None = Field(
        default=None, ge=1, description="the most pairs kept; null: all of a file, 4000 of those made from the text"
    )
    steps: int = Field(default=50, ge=1, description="of this stage")
    global_batch: int = Field(default=16, ge=1, description="pairs of a step")
    optimizer: Optimizer = Optimizer(**ALIGNMENT_RATES)

    @field_validator("optimizer", mode="before")
    @classmethod
    def _keep_defaults(cls, values: object) -> object:
        """An optimizer with some keys given still has this stage's learning rates, not pre-training's."""
        return {**ALIGNMENT_RATES, **values} if isinstance(values, dict) and "lr" not in values else values


class Evaluate(Noun):
    """Held-out evaluation and the prompts whose completions are shown."""

    max_tokens: int = Field(default=65_536, ge=1, description="held-out tokens that are read")
    prompts: tuple[str, ...] = Field(default=(), description="to complete, for the eye; empty: three of ours")
    completion_tokens: int = Field(default=48, ge=1, description="of each")


class Run(Noun):
    """The whole description. `layout: auto` asks the planner; `compare` names layouts to show beside the best."""

    name: FolderName = "run"
    model: Model
    cluster: Cluster
    layout: Layout | Literal["auto"] = "auto"
    compare: dict[str, Layout] = {}
    data: Data = Data()
    train: Train = Train()
    align: tuple[AlignStage, ...] = ()
    evaluate: Evaluate = Evaluate()
    launch: Launch = Launch()
    out: PathName = "runs"

    @model_validator(mode="after")
    def _fits(self) -> Run:
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(f"train.seq_len {self.train.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}")
        if self.model.mask == "prefix" and any(
            stage.seq_len not in (None, self.train.seq_len) for stage in self.train.ramp
        ):
            raise ValueError(
                "train.ramp cuts samples into shorter ones, which a prefix (model.mask) spans: grow batches only"
            )
        optimizer = self.train.optimizer
        if optimizer.scaling == "mup" and self.model.init != "unit_stream":
            # A head that starts at one size moves the logits the more the wider it is.
            raise ValueError("train.optimizer.scaling mup needs model.init unit_stream")
        names = [stage.name for stage in self.align]
        if len(set(names)) < len(names):
            raise ValueError(f"align: every stage needs a name of its own, not {', '.join(names)}")
        if any(stage.pairs not in ("", self.align[0].pairs) for stage in self.align):
            raise ValueError("align: all stages read the pairs of the first one; name no others")
        return self

    @model_validator(mode="after")
    def _nothing_in_vain(self, info: ValidationInfo) -> Run:
        if not written(info):
            return self
        factors = {"train": self.train.optimizer}
        factors.update({f"align.{i}": stage.optimizer for i, stage in enumerate(self.align)})
        for place, one in factors.items():
            if self.model.tie_embeddings and one.stated("head_lr_factor"):
                # A tied head is the embedding and moves with it.
                raise ValueError(f"{place}.optimizer.head_lr_factor does nothing under model.tie_embeddings")
        if any(stage.max_pairs not in (None, self.align[0].max_pairs) for stage in self.align):
            raise ValueError("align: all stages read as many pairs as the first one's max_pairs says; say no other")
        return self
