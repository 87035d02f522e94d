"""The clipped policy-gradient loss of Flow-GRPO, from log-probs or from velocities.

    ratio  = exp(log_prob - old_log_prob)
    A      = clip(advantage, -advantage_clip, advantage_clip)
    policy = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))
    loss   = policy + kl_weight kl

Source: Flow-GRPO (arXiv 2505.05470). The KL to the reference policy is per element and has one definition for every
dynamics:

    exact      mean of (mean - mean_ref)^2 / (2 std^2) = c_v^2 / (2 std^2) mean of (v - v_ref)^2
    flow_grpo  exact (-dt), as in the code of Flow-GRPO: it divides by the diffusion std^2 / (-dt) instead of std^2
    velocity   mean of (v - v_ref)^2

GRPO-Guard (arXiv 2510.22319) centres the ratio, gives it the same spread at every step, and divides by the step size:

    log ratio = (log_prob - old_log_prob + mean of (mean - mean_old)^2 / (2 std^2)) std
              = mean of (mean - mean_old) (prev_sample - mean_old) / std
    policy    = as above / (-dt)

The first form is the paper's and shows the correction. The second is equal and is the one computed, because no two
log-probs cancel in it. The factor 1 / (-dt) is the paper's for Flow-GRPO and is used for every dynamics here; other
code bases use another factor for `dance_sde`. The KL has no such factor.

A pair whose std is 0 is an ODE step: it has no policy gradient, and its only KL is `velocity`.

This file has the public functions and the reference in plain torch; `grpo_loss_triton` has the Triton kernels.
"""

import math

import torch

from fastflowgrpo.kernels.backend import use_triton
from fastflowgrpo.kernels.sde_step import (
    check_guidance,
    check_log_prob,
    check_per_row,
    check_shapes,
    compute_dtype,
    gaussian_log_prob,
    guided_velocity,
    per_row,
    step_mean,
)

KL_KINDS = ("flow_grpo", "exact", "velocity")


def grpo_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_range: float,
    advantage_clip: float = 5.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy loss of each (sample, step) pair, not reduced, differentiable in `log_prob` only.

    Args:
        log_prob: (B,), under the policy.
        old_log_prob: (B,), under the policy that sampled the step.
        advantage: (B,).
        clip_range: the ratio is clipped to [1 - clip_range, 1 + clip_range]; math.inf turns this off.
        advantage_clip: advantages are clipped to [-advantage_clip, advantage_clip]; math.inf turns this off.
        backend: "auto", "reference" or "triton", see `choose_backend`. The reference computes float64 and second
            derivatives.

    Returns:
        The loss (B,), and detached statistics (B,): `ratio`, `log_prob_difference`, `policy_loss`, and
        `clipped_above` and `clipped_below`, which are 1 where the clip stops the gradient: above for a positive
        advantage, below for a negative one. float32, or float64 if `log_prob` is.

    Raises:
        ValueError: shapes differ, a setting is out of range, or the backend cannot compute this.
    """
    _check_pairs(log_prob.shape, old_log_prob, advantage, clip_range, advantage_clip)
    if use_triton(backend, log_prob):
        from fastflowgrpo.kernels import grpo_loss_triton

        bounds = (1 - clip_range, 1 + clip_range, float(advantage_clip))
        return grpo_loss_triton.policy_loss(log_prob, old_log_prob, advantage, *bounds)
    log_prob = log_prob.to(compute_dtype(log_prob))
    difference = log_prob - old_log_prob.detach().to(log_prob.dtype)
    return _policy_loss(difference, difference, advantage, clip_range, advantage_clip)


def _policy_loss(
    log_ratio: torch.Tensor, difference: torch.Tensor, advantage: torch.Tensor, clip_range: float, advantage_clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped loss and its statistics in plain torch."""
    ratio = log_ratio.exp()
    advantage = advantage.detach().to(ratio.dtype).clamp(-advantage_clip, advantage_clip)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    stats = {
        "ratio": ratio.detach(),
        "log_prob_difference": difference.detach(),
        "policy_loss": loss.detach(),
        "clipped_above": ((ratio > 1 + clip_range) & (advantage > 0)).to(loss.dtype),
        "clipped_below": ((ratio < 1 - clip_range) & (advantage < 0)).to(loss.dtype),
    }
    return loss, stats


def grpo_step_loss(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    c_x: float | torch.Tensor,
    c_v: float | torch.Tensor,
    std: float | torch.Tensor,
    dt: float | torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    clip_range: float,
    advantage_clip: float = 5.0,
    velocity_ref: torch.Tensor | None = None,
    velocity_old: torch.Tensor | None = None,
    velocity_uncond: torch.Tensor | None = None,
    guidance_scale: float | torch.Tensor = 1.0,
    kl: str = "flow_grpo",
    kl_weight: float = 0.0,
    log_prob: str = "normalised",
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of each (sample, step) pair from the velocity, not reduced, differentiable in `velocity` only.

    The module has the equations. It computes in float32 (float64 if an input is), with the log-prob of `sde_step`.

    Args:
        velocity: (B, ...), the policy's output; with guidance, the output of the conditional branch.
        sample, prev_sample: (B, ...), the two ends of the step as it was sampled.
        c_x, c_v, std, dt: coefficients of the step, a number or one per pair, float32 (B,).
        old_log_prob, advantage, clip_range, advantage_clip: as in `grpo_loss`.
        velocity_ref: (B, ...), the reference policy's velocity after guidance; without it there is no KL.
        velocity_old: (B, ...), the velocity that sampled the step, after guidance; with it the loss is GRPO-Guard's.
            Keep it in float32 if there is guidance: rounding moves the ratio.
        velocity_uncond: (B, ...), the policy's unconditional branch; it carries no gradient.
        guidance_scale: classifier-free guidance scale, a number or one per pair, as in `sde_step`.
        kl: "flow_grpo", "exact" or "velocity".
        kl_weight: weight of the KL, at least 0.
        log_prob: "normalised" or "unnormalised", see `sde_step`.
        backend: "auto", "reference" or "triton", see `choose_backend`. Triton reads each tensor once forward and once
            backward; the reference computes float64 and second derivatives.

    Returns:
        The loss (B,) and the statistics of `grpo_loss`, with `kl` (B,) added if `velocity_ref` is given. With
        `velocity_old` they are GRPO-Guard's, and `policy_loss` is divided by -dt.

    Raises:
        ValueError: shapes differ, a setting is out of range, a KL weight has no reference, or the backend cannot
            compute this.
    """
    _check_kl(kl, kl_weight, velocity_ref)
    check_shapes(
        sample,
        velocity=velocity,
        prev_sample=prev_sample,
        velocity_ref=velocity_ref,
        velocity_old=velocity_old,
        velocity_uncond=velocity_uncond,
    )
    _check_pairs(sample.shape[:1], old_log_prob, advantage, clip_range, advantage_clip)
    if isinstance(guidance_scale, torch.Tensor):
        velocity = guided_velocity(velocity, velocity_uncond, guidance_scale)
        velocity_uncond, guidance_scale = None, 1.0
    step = (velocity, sample, prev_sample, c_x, c_v, std, dt, old_log_prob, advantage)
    others = (velocity_ref, velocity_old, velocity_uncond)
    if use_triton(backend, velocity, sample, prev_sample, *others):
        from fastflowgrpo.kernels import grpo_loss_triton

        check_guidance(velocity_uncond, guidance_scale)
        check_log_prob(log_prob)
        for name, value in (("c_x", c_x), ("c_v", c_v), ("std", std), ("dt", dt)):
            check_per_row(value, sample.shape[0], name)
        bounds = (1 - clip_range, 1 + clip_range, float(advantage_clip))
        options = (kl, float(kl_weight), log_prob == "normalised")
        return grpo_loss_triton.step_loss(*step, *others, float(guidance_scale), *bounds, *options)
    return _reference_step_loss(*step, *others, guidance_scale, clip_range, advantage_clip, kl, kl_weight, log_prob)


def _reference_step_loss(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    prev_sample: torch.Tensor,
    c_x: float | torch.Tensor,
    c_v: float | torch.Tensor,
    std: float | torch.Tensor,
    dt: float | torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    velocity_ref: torch.Tensor | None,
    velocity_old: torch.Tensor | None,
    velocity_uncond: torch.Tensor | None,
    guidance_scale: float,
    clip_range: float,
    advantage_clip: float,
    kl: str,
    kl_weight: float,
    log_prob: str,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The equations of the module in plain torch."""
    guided = guided_velocity(velocity, velocity_uncond, guidance_scale)
    mean = step_mean(guided, sample, c_x, c_v)
    new_log_prob = gaussian_log_prob(prev_sample, mean, std, log_prob, backend="reference")
    log_ratio = difference = new_log_prob - old_log_prob.detach().to(new_log_prob.dtype)
    if velocity_old is not None:
        mean_old = step_mean(velocity_old.detach(), sample, c_x, c_v).to(mean.dtype)
        log_ratio = _guard_log_ratio(mean, mean_old, prev_sample, per_row(std, difference, "std"))
    loss, stats = _policy_loss(log_ratio, difference, advantage, clip_range, advantage_clip)
    if velocity_old is not None:
        loss = loss / -per_row(dt, loss, "dt")
        stats["policy_loss"] = loss.detach()
    if velocity_ref is not None:
        shift = guided - velocity_ref.detach().to(guided.dtype)
        divergence = _kl(kl, shift, c_v, per_row(std, difference, "std"), dt)
        stats["kl"] = divergence.detach()
        loss = loss + kl_weight * divergence
    return loss, stats


def _guard_log_ratio(
    mean: torch.Tensor, mean_old: torch.Tensor, prev_sample: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """GRPO-Guard's log ratio (B,), 0 at ODE steps."""
    overlap = ((mean - mean_old) * (prev_sample.to(mean.dtype) - mean_old)).flatten(1).mean(1)
    # 1 instead of 0 keeps the gradient of the masked rows finite
    return torch.where(std > 0, overlap / torch.where(std > 0, std, 1.0), 0.0)


def _kl(
    kl: str, velocity_shift: torch.Tensor, c_v: float | torch.Tensor, std: torch.Tensor, dt: float | torch.Tensor
) -> torch.Tensor:
    """The KL (B,) to the reference policy, from the difference of the two velocities (B, ...)."""
    divergence = velocity_shift.square().flatten(1).mean(1)
    if kl == "velocity":
        return divergence
    scale = torch.where(std > 0, 0.5 * (per_row(c_v, divergence, "c_v") / std).square(), 0.0)
    if kl == "exact":
        return scale * divergence
    return -per_row(dt, divergence, "dt") * (scale * divergence)


def _check_kl(kl: str, kl_weight: float, velocity_ref: torch.Tensor | None) -> None:
    if kl not in KL_KINDS:
        raise ValueError(f"unknown kl {kl!r}: choose one of {', '.join(KL_KINDS)}")
    if not (kl_weight >= 0 and math.isfinite(kl_weight)):
        raise ValueError(f"kl_weight {kl_weight} is out of range: it must be a finite number, at least 0")
    if kl_weight > 0 and velocity_ref is None:
        raise ValueError(f"kl_weight {kl_weight} needs velocity_ref, the reference policy's velocity")


def _check_pairs(
    shape: torch.Size, old_log_prob: torch.Tensor, advantage: torch.Tensor, clip_range: float, advantage_clip: float
) -> None:
    if not (0 < clip_range < 1 or clip_range == math.inf):
        raise ValueError(
            f"clip_range {clip_range} is out of range: it must lie between 0 and 1, for example 1e-4 "
            "(math.inf: no clipping)"
        )
    if not advantage_clip > 0:
        raise ValueError(
            f"advantage_clip {advantage_clip} is out of range: it must be positive (math.inf: no clipping)"
        )
    for name, value in (("old_log_prob", old_log_prob), ("advantage", advantage)):
        if value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but log_prob has {tuple(shape)}: "
                "give one value per (sample, step) pair"
            )
