"""What a parameter belongs to, by its name: the group whose gradient norm is watched, the module an incident names."""

from __future__ import annotations

GROUPS = ("embedding", "attention", "ffn", "norm", "head", "other")
"""Parts of a transformer that go wrong separately: a spike often starts in one of them (embedding: GLM-130B, arXiv
2210.02414; attention and head: Wortsman et al., 2309.14322; norms: SPAM, 2501.06842)."""

_OUTER = {"position": "embedding", "skip": "embedding"}


def group_of(name: str) -> str:
    """The group of a parameter.

    >>> [group_of(n) for n in ("layers.3.attention.q.weight", "layers.0.ffn_norm.weight", "norm.weight", "head.weight")]
    ['attention', 'norm', 'norm', 'head']
    """
    part = name.split(".")[2] if name.startswith("layers.") else name.split(".")[0]
    part = _OUTER.get(part, part)
    part = "norm" if part.endswith("norm") else part
    return part if part in GROUPS else "other"


def module_of(name: str) -> str:
    """The module that an incident names: a group, in layers with the layer's number.

    >>> module_of("layers.3.attention.q.weight")
    'layers.3.attention'
    """
    if not name.startswith("layers."):
        return group_of(name)
    return f"layers.{name.split('.')[1]}.{group_of(name)}"
