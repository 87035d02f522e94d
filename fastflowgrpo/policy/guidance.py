"""Classifier-free guidance by two scales, for a model whose noise levels are shared by two transformers."""

import torch
from torch import Tensor

from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.protocol import Policy

GuidanceScale = float | tuple[float, float]
"""A scale for all noise levels, or two: from the policy's `boundary` on, and below it."""


def guidance_at(policy: Policy, guidance_scale: GuidanceScale, sigma: Tensor) -> float | Tensor:
    """Return the scale of all samples, or of each one at its noise level, sigma (B,)."""
    if not isinstance(guidance_scale, tuple):
        return guidance_scale
    assert policy.boundary is not None
    return torch.where(sigma >= policy.boundary, *guidance_scale)


def check_guidance(policy: Policy, *guidance_scales: GuidanceScale) -> None:
    """Raise UserError for two scales where the policy has no boundary between them."""
    if policy.boundary is None and any(isinstance(scale, tuple) for scale in guidance_scales):
        raise UserError(
            "guidance_scale_2: this model has one transformer, a second scale is for two (Wan 2.2 A14B): leave it out"
        )
