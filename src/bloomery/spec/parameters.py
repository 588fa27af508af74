"""Every parameter of a `Model`: name, global shape and kind. The one list that the modules, the memory model,
the shard table and the checkpoint agree on (tests hold them together).

Names are those of `bloomery.model`'s modules; `layers.{i}.` prefixes what a layer holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from bloomery.spec.attention import LatentAttention
from bloomery.spec.model import MixtureOfExperts, Model

Kind = Literal["embedding", "matrix", "norm", "bias", "buffer"]
"""A buffer is no weight: no optimizer touches it and it has no gradient, but a checkpoint carries it."""


@dataclass(frozen=True)
class Parameter:
    """One tensor. `tp_dim`: the dimension tensor parallelism cuts (None: replicated).

    `expert`: of all routed experts, stacked in dimension 0, which expert parallelism cuts; ZeRO 2 and 3 cut dimension
    1, so that few experts lie on many ranks without padding, ZeRO 1 whole experts, whose state is then one block.

    `tp_partial`: replicated, but used where a tensor-parallel rank's backward pass sees its own part only: its heads,
    or its part of the experts, whose answers a router weighs.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    tp_dim: int | None = None
    expert: bool = False
    tp_partial: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def ep_dim(self) -> int | None:
        """The dimension expert parallelism cuts."""
        return 0 if self.expert else None

    @property
    def wide(self) -> bool:
        """Whether it may be read in float32 where arithmetic is narrower: norms, routers and buffers, about a
        thousandth of a model. ZeRO 2 and 3 gather it as it is and all else in arithmetic's format, so that no layout
        rounds what another does not."""
        return self.kind in ("norm", "buffer") or self.name.endswith(".router.weight")

    @property
    def data_dim(self) -> int:
        """The dimension ZeRO 2 and 3 cut; ZeRO 1 cuts dimension 0."""
        return 1 if self.expert else 0

    def local_shape(self, tp: int, ep: int = 1) -> tuple[int, ...]:
        """The shape one of `tp` x `ep` ranks holds, before ZeRO."""
        cuts = {self.tp_dim: tp, self.ep_dim: ep}
        return tuple(n // cuts.get(dim, 1) for dim, n in enumerate(self.shape))

    def partial_over_tp(self, sequence_parallel: bool) -> bool:
        """True when a tensor-parallel rank has only its part of the gradient of this uncut tensor, to be summed.

        Under sequence parallelism each has seen its own tokens; those marked `tp_partial` are either way.
        """
        if self.tp_dim is not None or self.kind == "buffer":
            return False
        return sequence_parallel or self.tp_partial


def _linear(name: str, n_out: int, n_in: int, bias: bool, tp_dim: int | None, experts: int = 0) -> list[Parameter]:
    """A projection (out, in): cut by column (tp_dim 0) its bias is cut too, cut by row (1) the bias is replicated.

    With `experts`, so many of them in one tensor, the experts in dimension 0.
    """
    stack, stacked = ((experts,), 1) if experts else ((), 0)
    place = None if tp_dim is None else tp_dim + stacked
    weight = Parameter(f"{name}.weight", (*stack, n_out, n_in), "matrix", place, bool(experts))
    if not bias:
        return [weight]
    place = place if tp_dim == 0 else None
    return [weight, Parameter(f"{name}.bias", (*stack, n_out), "bias", place, bool(experts))]


def _norm(model: Model, name: str) -> list[Parameter]:
    weight = Parameter(f"{name}.weight", (model.hidden,), "norm")
    return [weight] if model.norm == "rmsnorm" else [weight, Parameter(f"{name}.bias", (model.hidden,), "norm")]


def _inner_norm(name: str, width: int) -> Parameter:
    """An RMSNorm inside the attention block."""
    return Parameter(f"{name}.weight", (width,), "norm", tp_partial=True)


@lru_cache(maxsize=4096)
def attention_parameters(model: Model, prefix: str) -> tuple[Parameter, ...]:
    """The parameters of one attention block, in the module's order."""
    if model.mla is not None:
        return tuple(_latent_attention(model, model.mla, prefix))
    qkv_bias = model.bias or model.qkv_bias
    parameters = _linear(f"{prefix}.q", model.query_width, model.hidden, qkv_bias, 0)
    parameters += _linear(f"{prefix}.k", model.kv_width, model.hidden, qkv_bias, 0)
    parameters += _linear(f"{prefix}.v", model.value_width, model.hidden, qkv_bias, 0)
    if model.value_embeddings:
        parameters.append(
            Parameter(f"{prefix}.value_embedding.weight", (model.vocab, model.value_width), "embedding", 1)
        )
    if model.qk_norm:
        parameters += [_inner_norm(f"{prefix}.{name}_norm", model.head_dim) for name in ("q", "k")]
    return tuple(parameters + _linear(f"{prefix}.o", model.hidden, model.output_width, model.bias, 1))


def _latent_attention(model: Model, mla: LatentAttention, prefix: str) -> list[Parameter]:
    """Down-projections to the latents are replicated over tensor-parallel ranks, those up to the heads are cut."""

    def down(name: str, width: int) -> Parameter:
        return Parameter(f"{prefix}.{name}.weight", (width, model.hidden), "matrix", tp_partial=True)

    if mla.q_lora_rank:
        parameters = [down("q_a", mla.q_lora_rank), _inner_norm(f"{prefix}.q_a_norm", mla.q_lora_rank)]
        parameters += _linear(f"{prefix}.q_b", model.query_width, mla.q_lora_rank, False, 0)
    else:
        parameters = _linear(f"{prefix}.q", model.query_width, model.hidden, False, 0)
    parameters += [down("kv_a", mla.kv_lora_rank + mla.qk_rope_head_dim)]
    parameters += [_inner_norm(f"{prefix}.kv_a_norm", mla.kv_lora_rank)]
    up = model.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    parameters += _linear(f"{prefix}.kv_b", up, mla.kv_lora_rank, False, 0)
    return parameters + _linear(f"{prefix}.o", model.hidden, model.output_width, False, 1)


def _feed_forward(model: Model, name: str, width: int, experts: int = 0) -> list[Parameter]:
    gate = _linear(f"{name}.gate", width, model.hidden, model.bias, 0, experts) if model.gated else []
    up = _linear(f"{name}.up", width, model.hidden, model.bias, 0, experts)
    return gate + up + _linear(f"{name}.down", model.hidden, width, model.bias, 1, experts)


def _mixture(model: Model, moe: MixtureOfExperts, name: str) -> list[Parameter]:
    parameters = [Parameter(f"{name}.router.weight", (moe.experts, model.hidden), "matrix", tp_partial=True)]
    if moe.balancing == "bias":
        parameters.append(Parameter(f"{name}.router.bias", (moe.experts,), "buffer"))
    parameters += _feed_forward(model, f"{name}.experts", moe.expert_ffn_hidden, moe.experts)
    if moe.shared_experts:
        parameters += _feed_forward(model, f"{name}.shared", moe.shared_experts * moe.expert_ffn_hidden)
    return parameters


def is_hidden_matrix(parameter: Parameter) -> bool:
    """True for what maps hidden states to hidden states: Muon's. A router's rows are classes, like a head's."""
    name = parameter.name
    return parameter.kind == "matrix" and name.startswith("layers.") and not name.endswith(".router.weight")


@lru_cache(maxsize=4096)
def layer_parameters(model: Model, layer: int) -> tuple[Parameter, ...]:
    """The parameters of layer `layer`, in the modules' order."""
    return tuple(_layer(model, layer))


def _layer(model: Model, layer: int) -> list[Parameter]:
    prefix = f"layers.{layer}"
    parameters = [Parameter(f"{prefix}.skip.weight", (model.hidden,), "bias")] if model.embedding_skip else []
    parameters += _norm(model, f"{prefix}.attention_norm")
    parameters += attention_parameters(model, f"{prefix}.attention")
    parameters += _norm(model, f"{prefix}.ffn_norm")
    if model.moe is not None and model.is_routed(layer):
        return parameters + _mixture(model, model.moe, f"{prefix}.ffn")
    return parameters + _feed_forward(model, f"{prefix}.ffn", model.ffn_hidden)


@lru_cache(maxsize=1024)
def embedding_parameters(model: Model) -> tuple[Parameter, ...]:
    """What the first stage holds before its layers."""
    tokens = Parameter("embedding.weight", (model.vocab, model.hidden), "embedding", 0)
    if model.position != "learned":
        return (tokens,)
    return (tokens, Parameter("position.weight", (model.max_seq_len, model.hidden), "embedding"))


@lru_cache(maxsize=1024)
def head_parameters(model: Model) -> tuple[Parameter, ...]:
    """What the last stage holds after its layers; a tied head shares `embedding.weight` and adds nothing."""
    head = [] if model.tie_embeddings else [Parameter("head.weight", (model.vocab, model.hidden), "matrix", 0)]
    return tuple(_norm(model, "norm") + head)


def owning_name(model: Model, name: str) -> str:
    """The name in the list of the parameter that a module calls `name`: a tied head's weight is the embedding's."""
    return "embedding.weight" if model.tie_embeddings and name == "head.weight" else name


def all_parameters(model: Model) -> list[Parameter]:
    """Every parameter once, in order."""
    layers = [parameter for layer in range(model.layers) for parameter in layer_parameters(model, layer)]
    return [*embedding_parameters(model), *layers, *head_parameters(model)]


def parameter_count(model: Model, *, active: bool = False) -> int:
    """Number of parameters; with `active`, those one token passes through (MoE: top_k of the routed experts)."""
    outside = sum(p.size for p in embedding_parameters(model) + head_parameters(model))
    dense = min(model.moe.first_dense_layers, model.layers) if model.moe else model.layers
    inside = dense * layer_parameter_count(model, 0, active=active) if dense else 0
    if dense < model.layers:
        inside += (model.layers - dense) * layer_parameter_count(model, dense, active=active)
    return outside + inside


def layer_parameter_count(model: Model, layer: int, *, active: bool = False) -> int:
    """Parameters of one layer; with `active`, those one token passes through (of a table of values a row at most)."""
    parameters = layer_parameters(model, layer)
    whole = sum(p.size for p in parameters)
    if not active:
        return whole
    whole -= sum(p.size for p in parameters if p.kind == "embedding")
    if model.moe is None:
        return whole
    routed = sum(p.size for p in parameters if p.expert)
    return whole - routed + routed * model.moe.top_k // model.moe.experts
