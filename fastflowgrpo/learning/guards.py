"""Guards in the loss against reward hacking and collapse.

**Divergence trust region**, the mask of Flow-DPPO (arXiv 2606.11025), in place of the clip of the ratio. With the means
of a stochastic step under the policy and under the one that sampled it,

    D = mean of (mean - mean_old)^2 / (2 std^2)

the policy gradient of a pair is left out where D >= `update.divergence_limit` and A (ratio - 1) > 0: the policy has
moved far enough, and in the direction in which the advantage A pushes it. The log-ratio is a noisy estimate of -D from
one sample; D itself has no noise.

**Norm guard** (arXiv 2606.27771), against velocities that grow to exaggerate what a reward likes:

    loss + norm_guard_weight relu(|v| / |v_ref| - 1)^2

with the Euclidean norms of the policy's and the reference's velocity of a pair, after guidance.
"""

import torch
from torch import Tensor

from fastflowgrpo.kernels.sde_step import step_mean
from fastflowgrpo.learning.flow_matching import mean_square
from fastflowgrpo.learning.objective import Statistics
from fastflowgrpo.sampling.coefficients import StepCoefficients


@torch.no_grad()
def mask_by_divergence(
    velocity: Tensor,
    velocity_old: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    step: StepCoefficients,
    advantages: Tensor,
    limit: float,
) -> tuple[Tensor, Statistics]:
    """Set the advantages of the pairs that the divergence trust region leaves out to 0.

    Args:
        velocity, velocity_old: (N, ...), of the policy and of the one that sampled the step, after guidance.
        sample, prev_sample: (N, ...), the two ends of the step.
        step: its coefficients (N,), with std above 0.
        advantages: (N,).
        limit: of the divergence.

    Returns:
        The advantages (N,), and statistics: the divergence D, and `clipped_above` and `clipped_below`, which are 1 for
        pairs that are left out, above for a positive advantage and below for a negative one.
    """
    mean_old = step_mean(velocity_old, sample, step.c_x, step.c_v)
    shift = step_mean(velocity, sample, step.c_x, step.c_v) - mean_old
    divergence = mean_square(shift) / (2 * step.std**2)
    # The log-ratio of the normalised log-probs, in a form in which they do not cancel.
    log_ratio = (shift * (prev_sample - mean_old)).flatten(1).mean(1) / step.std**2 - divergence
    left_out = (divergence >= limit) & (advantages * log_ratio > 0)
    statistics = {
        "divergence": divergence,
        "clipped_above": (left_out & (advantages > 0)).to(divergence.dtype),
        "clipped_below": (left_out & (advantages < 0)).to(divergence.dtype),
    }
    return torch.where(left_out, 0.0, advantages), statistics


def norm_ratio(velocity: Tensor, velocity_ref: Tensor) -> Tensor:
    """|v| / |v_ref| of velocities (N, ...), (N,), differentiable in `velocity`."""
    return torch.linalg.vector_norm(velocity.flatten(1), dim=1) / torch.linalg.vector_norm(
        velocity_ref.detach().to(velocity.dtype).flatten(1), dim=1
    )


def norm_guard(ratio: Tensor) -> Tensor:
    """The norm guard's term of each pair, (N,), from its `norm_ratio`."""
    return (ratio - 1).relu().square()
