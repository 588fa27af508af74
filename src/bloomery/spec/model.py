"""`Model`: the structure of a decoder-only transformer, as numbers and choices. No tensors here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bloomery.spec.attention import LatentAttention, RopeScaling
from bloomery.spec.base import Noun

MAX_LAYERS, MAX_EXPERTS = 10_000, 100_000
"""Far beyond any model there is: what is counted out one by one must stay countable."""


class MixtureOfExperts(Noun):
    """Routed experts in place of the feed-forward block (from layer `first_dense_layers` on). No token is dropped.

    A token goes to the `top_k` experts of highest score: a softmax over all experts (Shazeer et al. 2017, 1701.06538)
    or a sigmoid of each (DeepSeek-V3, 2412.19437). Their outputs are weighted by these scores, made to add up to one
    with `normalize_top_k` (Mixtral, 2401.04088: the same as a softmax over the chosen), times `routed_scaling_factor`.
    It is the default where several are chosen: the weight of a single expert would always be one, and no loss would
    reach its router (Switch Transformers, 2101.03961, keeps the score).
    With `groups` > 1 only experts of the `top_groups` best groups are considered (DeepSeek-V2, 2405.04434); a group is
    as good as its best expert or as the sum of its two best.

    `balancing`: `aux_loss` adds `aux_loss_coefficient` times the loss of Switch Transformers (2101.03961) for each
    sequence; `bias` adds a number to each expert's score for the choice alone and moves it by `bias_update_rate` after
    each step, up for experts with too few tokens and down for those with too many (Wang et al. 2024, 2408.15664).
    `z_loss_coefficient`: of the mean squared log-sum-exp of the router's logits (ST-MoE, 2202.08906).
    """

    experts: int = Field(ge=2, le=MAX_EXPERTS, description="routed experts of a layer")
    top_k: int = Field(ge=1, description="experts of a token")
    expert_ffn_hidden: int = Field(ge=1, description="width inside one expert")
    shared_experts: int = Field(default=0, ge=0, description="experts that all tokens pass")
    first_dense_layers: int = Field(default=0, ge=0, le=MAX_LAYERS, description="layers before the first with experts")
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    groups: int = Field(default=1, ge=1)
    top_groups: int = Field(default=1, ge=1)
    group_score: Literal["best", "two_best"] = "best"
    balancing: Literal["aux_loss", "bias", "none"] = "aux_loss"
    aux_loss_coefficient: float = Field(default=0.01, ge=0)
    bias_update_rate: float = Field(default=0.001, ge=0)
    z_loss_coefficient: float = Field(default=0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {"normalize_top_k": False, **values} if values.get("top_k") == 1 else values

    @model_validator(mode="after")
    def _check(self) -> MixtureOfExperts:
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(f"groups {self.groups} must divide experts {self.experts} and be at least top_groups")
        reachable = self.experts // self.groups * self.top_groups
        if self.top_k > reachable:
            of = f" in {self.top_groups} groups" if self.groups > 1 else ""
            raise ValueError(f"top_k {self.top_k} exceeds the {reachable} experts{of}")
        if self.group_score == "two_best" and self.experts // self.groups < 2:
            raise ValueError("group_score two_best needs two experts in a group")
        return self


class Model(Noun):
    """Structure of a decoder-only transformer.

    `kv_heads`, `head_dim` and `ffn_hidden` have the field's usual defaults (heads, hidden / heads, 4 x hidden) and
    are always filled in after validation. `head_dim` is that of queries and keys.

    `gelu` is the exact one, `gelu_tanh` GPT-2's approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415), `relu2` the
    squared ReLU (So et al. 2021, arXiv 2109.08668). `qk_norm`: RMSNorm over each head's query and key before they are
    rotated (Henry et al. 2020, arXiv 2010.04245, as in Qwen 3). `sliding_window`: a token sees itself and so many minus
    one before it (Beltagy et al. 2020, arXiv 2004.05150).

    `value_embeddings`: every layer has a table of values by token, added to what its projection makes of the stream;
    `embedding_skip`: every layer reads the token embedding again, each channel times a weight that starts at zero
    (both modded-nanogpt, github.com/KellerJordan/modded-nanogpt, records of November and December 2024).
    """

    name: str = "model"
    layers: int = Field(ge=1, le=MAX_LAYERS, description="transformer layers")
    hidden: int = Field(ge=1, description="width of the residual stream")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int = Field(default=0, ge=0, description="heads of keys and values; 0: as many as query heads")
    head_dim: int = Field(default=0, ge=0, description="width of a head; 0: hidden / heads")
    ffn_hidden: int = Field(default=0, ge=0, description="width inside the feed-forward block; 0: 4 x hidden")
    vocab: int = Field(ge=2, description="rows of the embedding; at least the tokenizer's")
    max_seq_len: int = Field(default=2048, ge=1, description="longest sequence, of generation too")
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-5, gt=0)
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = Field(
        default="swiglu", description="of the feed-forward block; swiglu has a gate beside"
    )
    position: Literal["rope", "learned"] = Field(default="rope", description="rotary, or a learned table")
    rope_theta: float = Field(default=10000.0, gt=0, description="base of rotary frequencies")
    rope_scaling: RopeScaling | None = None
    bias: bool = Field(default=False, description="of every projection and norm")
    qkv_bias: bool = Field(default=False, description="of queries, keys and values alone")
    tie_embeddings: bool = Field(default=False, description="the head is the embedding")
    mask: Literal["causal", "prefix"] = Field(
        default="causal", description="prefix: given first tokens see each other whole"
    )
    init: Literal["gpt2", "unit_stream"] = Field(default="gpt2", description="how weights start, see `model.init`")
    qk_norm: bool = Field(default=False, description="RMSNorm of each head's query and key")
    value_embeddings: bool = Field(default=False, description="a table of values by token in every layer")
    embedding_skip: bool = Field(default=False, description="every layer reads the token embedding again")
    sliding_window: int | None = Field(
        default=None, ge=1, description="tokens that one sees, itself counted; null: all before it"
    )
    mla: LatentAttention | None = None
    moe: MixtureOfExperts | None = None
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        heads, hidden = filled.get("heads"), filled.get("hidden")
        if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            filled["kv_heads"] = filled.get("kv_heads") or heads
            filled["head_dim"] = filled.get("head_dim") or _latent_head_dim(filled.get("mla")) or hidden // heads
            filled["ffn_hidden"] = filled.get("ffn_hidden") or 4 * hidden
        return filled

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.head_dim < 1:
            raise ValueError(f"hidden {self.hidden} is less than heads {self.heads}: a head would have no dimension")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.position == "rope" and self.rotary_width % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary positions")
        if self.position != "rope" and self.rope_scaling is not None:
            raise ValueError("rope_scaling needs position rope")
        if self.mla is not None:
            self._check_latent(self.mla)
        if self.moe is not None and self.moe.first_dense_layers >= self.layers:
            dense = f"moe.first_dense_layers {self.moe.first_dense_layers}"
            raise ValueError(f"{dense} leaves none of {self.layers} layers to experts; leave moe out")
        if self.init == "unit_stream" and self.tie_embeddings:
            raise ValueError("init unit_stream needs an untied head: it starts embeddings at one and the head at zero")
        return self

    def _check_latent(self, mla: LatentAttention) -> None:
        """What stands beside latent attention must agree with it."""
        if self.kv_heads != self.heads:
            raise ValueError(f"mla gives every head its own keys: kv_heads {self.kv_heads} must be heads {self.heads}")
        if self.head_dim != mla.head_dim:
            raise ValueError(f"head_dim {self.head_dim} must be mla's qk_nope_head_dim + qk_rope_head_dim")
        if mla.v_head_dim > mla.head_dim:
            raise ValueError(f"mla.v_head_dim {mla.v_head_dim} must not exceed the keys' {mla.head_dim}")
        for name, wrong in (
            ("position learned", self.position != "rope"),
            ("qk_norm", self.qk_norm),
            ("value_embeddings", self.value_embeddings),
            ("bias", self.bias or self.qkv_bias),
            ("norm layernorm", self.norm != "rmsnorm"),
        ):
            if wrong:
                raise ValueError(f"mla does not go with {name}")

    def is_routed(self, layer: int) -> bool:
        """True when the layer's feed-forward block is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.first_dense_layers

    @property
    def gated(self) -> bool:
        """True when the feed-forward block has a gate projection beside up and down."""
        return self.activation == "swiglu"

    @property
    def query_width(self) -> int:
        """heads x head_dim: the width of the query."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """kv_heads x head_dim: the width of the keys."""
        return self.kv_heads * self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of one head's value: head_dim but under latent attention."""
        return self.mla.v_head_dim if self.mla else self.head_dim

    @property
    def value_width(self) -> int:
        """kv_heads x value_head_dim: the width of the values."""
        return self.kv_heads * self.value_head_dim

    @property
    def output_width(self) -> int:
        """heads x value_head_dim: the width of what attention gives to its output projection."""
        return self.heads * self.value_head_dim

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that rotary positions turn."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim


def _latent_head_dim(mla: object) -> int:
    """head_dim as latent attention decides it, before validation (0: it does not, or is not yet valid)."""
    values = mla.model_dump() if isinstance(mla, LatentAttention) else mla
    parts = [values.get(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim")] if isinstance(values, dict) else []
    return sum(part for part in parts if isinstance(part, int))
