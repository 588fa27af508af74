"""What a `Model` may choose about its attention beyond heads and widths: scaled rotary positions, latent attention.

Numbers only; `model.rotary` and `model.latent` compute with them.
"""

from __future__ import annotations

from math import log
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bloomery.spec.base import Noun


class LinearScaling(Noun):
    """Positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    kind: Literal["linear"]
    factor: float = Field(ge=1)


class Llama3Scaling(Noun):
    """Frequencies of long waves divided by `factor`, those of short waves kept, a blend between.

    Llama 3.1's rule (Llama team 2024, arXiv 2407.21783, section 3.4.2; the blend as its authors published it in code):
    a wave is long above original_max_seq_len / low_freq_factor and short below original_max_seq_len / high_freq_factor.
    """

    kind: Literal["llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    original_max_seq_len: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> Llama3Scaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor must be below high_freq_factor {self.high_freq_factor:g}")
        return self


class YarnScaling(Noun):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): a ramp over dimensions from kept to divided frequencies, and a factor
    on the attention scores.

    The ramp runs between the dimensions that turn `beta_fast` and `beta_slow` times in the original context, rounded
    outwards when `truncate`. `mscale` and `mscale_all_dim` are DeepSeek's (arXiv 2405.04434) split of that factor.
    """

    kind: Literal["yarn"]
    factor: float = Field(ge=1)
    original_max_seq_len: int = Field(ge=1)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float = Field(default=0.0, ge=0)
    mscale_all_dim: float = Field(default=0.0, ge=0)
    attention_factor: float | None = Field(default=None, gt=0)
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def score_factor(self) -> float:
        """What the scores of latent attention are multiplied by, rotated or not."""
        return self._mscale(self.mscale_all_dim) ** 2

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * log(self.factor) + 1.0


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]
"""One of the rules above, told apart by `kind`."""


class LatentAttention(Noun):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1), under the names of its config.

    Keys and values come from one latent of `kv_lora_rank` a token, queries from one of `q_lora_rank` (0: straight from
    the hidden state). A head's query and key have `qk_nope_head_dim` plain and `qk_rope_head_dim` rotated dimensions;
    the rotated part of the key is one for all heads.
    """

    q_lora_rank: int = Field(default=0, ge=0)
    kv_lora_rank: int = Field(ge=1)
    qk_nope_head_dim: int = Field(ge=1)
    qk_rope_head_dim: int = Field(ge=2, multiple_of=2)
    v_head_dim: int = Field(ge=1)

    @property
    def head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim
