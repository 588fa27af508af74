"""What keeps training from diverging, by name. Everything is off by default; query-key normalisation is the model's
(`model.qk_norm`). `bloomery diagnose RUN_DIR` says which would have helped a run."""

from __future__ import annotations

from pydantic import Field

from bloomery.spec.base import Noun

USUAL = {"z_loss": 1e-4, "embedding_gradient": 0.1, "adaptive_clip": 2.0}
"""Values from the sources, to begin with."""


class Stabilisers(Noun):
    """Each is the same computation under every layout.

    `z_loss`: this times the squared logarithm of the softmax's sum is added for each target, which keeps logits from
    drifting away (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5: 1e-4; small models: Wortsman et al. 2023,
    2309.14322). It is in the gradient and not in the loss that is shown, which stays comparable.

    `embedding_gradient`: the gradient that reaches the token embedding from the first layer, times this (GLM-130B, Zeng
    et al. 2022, 2210.02414, section 2.2: 0.1). Adam forgets the factor but for its epsilon; what changes is the
    embedding's part of the global norm that clipping looks at.

    `adaptive_clip`: the gradient of each group of modules (`spec.modules.GROUPS`) is clipped to so many times its usual
    norm, before the global norm is. Usual is the median of the last `guard.warm_up` good steps; AGGC (2601.11864) keeps
    a moving average for each group instead.
    """

    z_loss: float = Field(default=0.0, ge=0, description="1e-4 in PaLM; 0: none")
    embedding_gradient: float = Field(default=1.0, gt=0, le=1, description="0.1 in GLM-130B; 1: untouched")
    adaptive_clip: float = Field(default=0.0, ge=0, description="times a group's usual gradient norm, as in 2; 0: none")


UNTOUCHED = Stabilisers()
"""None of them."""
