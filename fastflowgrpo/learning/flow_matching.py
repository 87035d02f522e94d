"""The flow-matching error of clean latents, which the objectives without log-probs learn from.

    x_t = (1 - t) x_0 + t x_1,    e = mean over elements of (v(x_t, t) - (x_1 - x_0))^2

The noise x_1 and the level t, uniform on [0, 1], are functions of the sample's seed and the number of the draw, so
that the policy and the reference see the same. v is the conditional velocity: guidance shapes the samples, not the
loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.learning.objective import Batch
from fastflowgrpo.policy import Policy
from fastflowgrpo.sampling.conditioning import repeat_rows


def noise_draw(seeds: Tensor, draws: Tensor, num_steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Noise and level of numbered draws.

    Args:
        seeds, draws: int64 (N,), of samples and the number of a draw of each.
        num_steps: steps of the rollout, whose noise is independent of these draws.
        shape: (N, ...), of the noise.

    Returns:
        Noise, standard normal, and level (N,), uniform on [0, 1].
    """
    offset = num_steps + 1 + 2 * draws
    level = torch.special.ndtr(philox_normal(seeds, offset + 1, (len(seeds), 1)))[:, 0]
    return philox_normal(seeds, offset, shape), level


def flow_matching_errors(
    policy: Policy, batch: Batch, rows: Tensor, noise_rows: Tensor, draws: Tensor, num_steps: int, group_size: int
) -> Tensor:
    """Flow-matching errors (N,) float32 of clean latents.

    Args:
        rows: int64 (N,), the samples.
        noise_rows: int64 (N,), the samples whose seeds give noise and level.
        draws: int64 (N,), the numbers of the draws.
        num_steps, group_size: of the rollout.
    """
    trajectory = batch.trajectory
    rows, noise_rows, draws = (index.to(policy.device, non_blocking=True) for index in (rows, noise_rows, draws))
    clean = trajectory.final[rows].float()
    noise, level = noise_draw(trajectory.seeds[noise_rows], draws, num_steps, clean.shape)
    t = level.view(-1, *[1] * (clean.ndim - 1))
    conditioning = repeat_rows(batch.conditioning, rows // group_size)
    velocity = policy.velocity(((1 - t) * clean + t * noise).to(policy.dtype), level, conditioning)
    return (velocity.float() - (noise - clean)).square().flatten(1).mean(1)
