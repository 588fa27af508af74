"""Mixtures of experts as Hugging Face's configurations spell them, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bloomery.evaluate.config_keys import NUMBER, TEXT, TRUTH, WHOLE, WHOLES, check_kinds, require_keys
from bloomery.spec.errors import InputError
from bloomery.spec.model import MixtureOfExperts

Config = Mapping[str, Any]
Values = dict[str, Any]

_MIXTRAL = {
    "experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn_hidden": "intermediate_size",
    "aux_loss_coefficient": "router_aux_loss_coef",
}
_QWEN3 = {
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn_hidden": "moe_intermediate_size",
    "normalize_top_k": "norm_topk_prob",
    "aux_loss_coefficient": "router_aux_loss_coef",
}
_DEEPSEEK = {
    "experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn_hidden": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "first_dense_layers": "first_k_dense_replace",
    "normalize_top_k": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
}
_DEEPSEEK_V2 = {**_DEEPSEEK, "aux_loss_coefficient": "aux_loss_alpha"}
_KINDS = {
    **dict.fromkeys((*_MIXTRAL.values(), *_QWEN3.values(), *_DEEPSEEK.values(), "n_group", "topk_group"), WHOLE),
    **dict.fromkeys(("router_aux_loss_coef", "aux_loss_alpha", "routed_scaling_factor"), NUMBER),
    "norm_topk_prob": TRUTH,
    "topk_method": TEXT,
    "mlp_only_layers": WHOLES,
    "decoder_sparse_step": WHOLE,
}
_NEEDED = ("experts", "top_k", "expert_ffn_hidden")


def _read(config: Config, names: dict[str, str], where: str) -> Values:
    check_kinds(config, _KINDS, where)
    require_keys(config, (names[ours] for ours in _NEEDED), where)
    return {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}


def _written(moe: MixtureOfExperts, names: dict[str, str]) -> Values:
    return {theirs: getattr(moe, ours) for ours, theirs in names.items()}


def mixtral(config: Config, where: str) -> Values:
    """A softmax over the chosen is one over all, made to add up to one again."""
    return {**_read(config, _MIXTRAL, where), "normalize_top_k": True}


def to_mixtral(moe: MixtureOfExperts) -> Values:
    """`intermediate_size` is an expert's width there."""
    return _written(moe, _MIXTRAL)


def qwen3_moe(config: Config, where: str) -> Values:
    """`mlp_only_layers` may name the first layers only. Raises InputError for dense layers anywhere else."""
    # The family's own files say `num_experts`; transformers 5 writes the name that all families share.
    config = {"num_experts": config.get("num_local_experts"), **config}
    routed = _read(config, _QWEN3, where)
    dense, step = sorted(config.get("mlp_only_layers") or []), config.get("decoder_sparse_step", 1)
    if dense != list(range(len(dense))) or step != 1:
        found = {"mlp_only_layers": dense, "decoder_sparse_step": step}
        raise InputError("dense layers must be the first ones", where=where, found=found)
    return {"normalize_top_k": False, **routed, "first_dense_layers": len(dense)}


def to_qwen3_moe(moe: MixtureOfExperts) -> Values:
    """Dense layers by number."""
    dense = list(range(moe.first_dense_layers))
    return {**_written(moe, _QWEN3), "mlp_only_layers": dense, "decoder_sparse_step": 1}


def deepseek_v2(config: Config, where: str) -> Values:
    """Softmax scores, the best expert of a group stands for it. Raises InputError for another `topk_method`."""
    routed, methods = _read(config, _DEEPSEEK_V2, where), {"greedy": False, "group_limited_greedy": True}
    method = config.get("topk_method", "greedy")
    if method not in methods:
        raise InputError("not supported", where=f"{where}: topk_method", found=method, accepted=methods)
    groups = {"groups": config.get("n_group") or 1, "top_groups": config.get("topk_group") or 1}
    return {"normalize_top_k": False, **routed, **(groups if methods[method] else {})}


def to_deepseek_v2(moe: MixtureOfExperts) -> Values:
    """Groups only where there are several."""
    grouped = moe.groups > 1
    groups = {"n_group": moe.groups if grouped else None, "topk_group": moe.top_groups if grouped else None}
    return {**_written(moe, _DEEPSEEK_V2), **groups, "topk_method": "group_limited_greedy" if grouped else "greedy"}


def deepseek_v3(config: Config, where: str) -> Values:
    """Sigmoid scores, balanced by a bias; the two best experts of a group stand for it."""
    routed = _read(config, _DEEPSEEK, where)
    groups = {"groups": config.get("n_group") or 1, "top_groups": config.get("topk_group") or 1}
    # With one group its figure decides nothing.
    score = {"group_score": "two_best"} if groups["groups"] > 1 else {}
    return {**routed, **groups, **score, "scoring": "sigmoid", "balancing": "bias"}


def to_deepseek_v3(moe: MixtureOfExperts) -> Values:
    """Groups always."""
    return {**_written(moe, _DEEPSEEK), "n_group": moe.groups, "topk_group": moe.top_groups}
