"""`Model`: the structure of a decoder-only transformer, as numbers and choices. No tensors here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bloomery.spec.base import Noun


class MixtureOfExperts(Noun):
    """Routed experts in place of the feed-forward block (from layer `first_dense_layers` on)."""

    experts: int = Field(ge=2)
    top_k: int = Field(ge=1)
    expert_ffn_hidden: int = Field(ge=1)
    shared_experts: int = Field(default=0, ge=0)
    first_dense_layers: int = Field(default=0, ge=0)


class Model(Noun):
    """Structure of a decoder-only transformer.

    `kv_heads`, `head_dim` and `ffn_hidden` have the field's usual defaults (heads, hidden / heads, 4 x hidden) and
    are always filled in after validation.
    """

    name: str = "model"
    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    ffn_hidden: int = Field(default=0, ge=0)
    vocab: int = Field(ge=2)
    max_seq_len: int = Field(default=2048, ge=1)
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = Field(default=1e-5, gt=0)
    activation: Literal["gelu", "swiglu"] = "swiglu"
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = Field(default=10000.0, gt=0)
    bias: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = False
    mask: Literal["causal", "prefix"] = "causal"
    init: Literal["gpt2", "zero_output"] = Field(default="gpt2", description="how projections into the stream start")
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
            filled["head_dim"] = filled.get("head_dim") or hidden // heads
            filled["ffn_hidden"] = filled.get("ffn_hidden") or 4 * hidden
        return filled

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary positions")
        if self.moe and self.moe.top_k > self.moe.experts:
            raise ValueError(f"moe.top_k {self.moe.top_k} exceeds moe.experts {self.moe.experts}")
        return self

    @property
    def gated(self) -> bool:
        """True when the feed-forward block has a gate projection beside up and down."""
        return self.activation == "swiglu"

    @property
    def query_width(self) -> int:
        """heads x head_dim: the width of the query and of the attention output."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """kv_heads x head_dim: the width of keys and of values."""
        return self.kv_heads * self.head_dim
