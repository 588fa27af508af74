"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1) as a plain module.

Training expands the latent of each token to keys and values of every head. Generation keeps the latents alone and
attends in their space: the projections up to keys and values are moved to the query and to the output, which is the
same sum in another order. Each head's rotary part follows the halves convention (`names` permutes DeepSeek's weights).

Shape suffixes: b batch, s sequence, d hidden, h heads, n plain (nope) width, r rotated (rope) width, w both, v value
width, c width of the latent.
"""

from __future__ import annotations

from torch import Tensor, cat, einsum, nn
from torch.nn import functional as F

from bloomery.model.attention import Attend, KeyValues
from bloomery.model.norm import RMSNorm
from bloomery.model.projection import Linear
from bloomery.model.view import View, attend
from bloomery.spec.attention import YarnScaling
from bloomery.spec.model import Model


class LatentAttention(nn.Module):
    """Queries, keys and values through latents; the rotated part of the key is shared by all heads."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        mla = model.mla
        assert mla is not None
        self.widths = (mla.qk_nope_head_dim, mla.qk_rope_head_dim)
        self.latent, self.value = mla.kv_lora_rank, mla.v_head_dim
        sharper = model.rope_scaling.score_factor if isinstance(model.rope_scaling, YarnScaling) else 1.0
        self.scale = mla.head_dim**-0.5 * sharper
        if mla.q_lora_rank:
            self.q_a = Linear(model.hidden, mla.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(mla.q_lora_rank, eps=model.norm_eps)
            self.q_b = Linear(mla.q_lora_rank, model.query_width, bias=False)
        else:
            self.q = Linear(model.hidden, model.query_width, bias=False)
        self.through_latent = bool(mla.q_lora_rank)
        self.kv_a = Linear(model.hidden, mla.kv_lora_rank + mla.qk_rope_head_dim, bias=False)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, eps=model.norm_eps)
        self.kv_b = Linear(mla.kv_lora_rank, model.heads * (mla.qk_nope_head_dim + mla.v_head_dim), bias=False)
        self.o: nn.Module = Linear(model.output_width, model.hidden, bias=False)
        self.attend: Attend = attend

    def forward(self, x_bsd: Tensor, view: View, past: KeyValues | None = None) -> Tensor:
        """x: (batch, seq, hidden). With `past`, latents of earlier positions are read too and these join."""
        q_bsw = self.q_b(self.q_a_norm(self.q_a(x_bsd))) if self.through_latent else self.q(x_bsd)
        q_bhsw = q_bsw.unflatten(-1, (-1, sum(self.widths))).transpose(1, 2)
        q_bhsn, q_bhsr = q_bhsw.split(self.widths, dim=-1)
        c_bsc, k_bsr = self.kv_a(x_bsd).split((self.latent, self.widths[1]), dim=-1)
        c_bsc, k_b1sr = self.kv_a_norm(c_bsc), view.rotated(k_bsr.unsqueeze(1))
        read = self._expanded if past is None else self._absorbed
        y_bhsv = read(q_bhsn, view.rotated(q_bhsr), c_bsc, k_b1sr, view, past)
        return self.o(y_bhsv.transpose(1, 2).flatten(2))

    def _expanded(
        self, q_bhsn: Tensor, q_bhsr: Tensor, c_bsc: Tensor, k_b1sr: Tensor, view: View, _: KeyValues | None
    ) -> Tensor:
        """Keys and values of every head; values as wide as keys, since fused kernels and rings of ranks want one."""
        kv_bhsw = self.kv_b(c_bsc).unflatten(-1, (-1, self.widths[0] + self.value)).transpose(1, 2)
        k_bhsn, v_bhsv = kv_bhsw.split((self.widths[0], self.value), dim=-1)
        v_bhsw = F.pad(v_bhsv, (0, sum(self.widths) - self.value))
        k_bhsw = cat((k_bhsn, k_b1sr.expand(-1, k_bhsn.shape[1], -1, -1)), dim=-1)
        y_bhsw = self.attend(cat((q_bhsn, q_bhsr), dim=-1), k_bhsw, v_bhsw, view, self.scale)
        return y_bhsw[..., : self.value]

    def _absorbed(
        self, q_bhsn: Tensor, q_bhsr: Tensor, c_bsc: Tensor, k_b1sr: Tensor, view: View, past: KeyValues | None
    ) -> Tensor:
        """One key and one value for all heads: the latents themselves, this call's joined to those before."""
        assert past is not None
        k_b1sr, c_b1sc = past.extend(k_b1sr, c_bsc.unsqueeze(1))
        up_hwc = self.kv_b.weight.unflatten(0, (-1, self.widths[0] + self.value))
        q_bhsc = einsum("bhsn,hnc->bhsc", q_bhsn, up_hwc[:, : self.widths[0]])
        q_bhsw, k_b1sw = cat((q_bhsc, q_bhsr), dim=-1), cat((c_b1sc, k_b1sr), dim=-1)
        y_bhsc = self.attend(q_bhsw, k_b1sw, c_b1sc, view, self.scale)
        return einsum("bhsc,hvc->bhsv", y_bhsc, up_hwc[:, self.widths[0] :])
