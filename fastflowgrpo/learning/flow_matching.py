"""Clean latents mixed with noise, which the objectives without log-probs learn from.

    x_t = (1 - t) x_0 + t x_1,    e = mean over elements of (v(x_t, t) - (x_1 - x_0))^2

The noise x_1 and the level t are functions of the sample's seed and the number of the draw, so that the policy, the
old policy and the reference see the same. v is the conditional velocity: guidance shapes the samples, not the loss.

`update.noise_levels` is where t comes from:

    uniform     U(0, 1)
    stratified  draw j of n is from U(j / n, (j + 1) / n)
    rollout     the levels of the rollout's steps but the last: draw j of n is from the j-th of n equal parts of them
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.learning.objective import Batch, Objective
from fastflowgrpo.policy import Conditioning, Policy
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


class NoisedObjective(Objective):
    """An objective on the velocity at clean latents that are mixed with noise."""

    def add_noise(self, batch: Batch, rows: Tensor, draws: Tensor, noise_rows: Tensor | None = None) -> "NoisyLatents":
        """Mix samples of a batch with noise.

        Args:
            batch: with the clean latents, on whose device the result is.
            rows: int64 (N,), the samples.
            draws: int64 (N,), the numbers of the draws.
            noise_rows: int64 (N,), the samples whose seeds give noise and level; by default `rows`.
        """
        final, seeds = batch.trajectory.final, batch.trajectory.seeds
        noise_rows = rows if noise_rows is None else noise_rows
        rows, noise_rows, draws = (index.to(final.device, non_blocking=True) for index in (rows, noise_rows, draws))
        clean = final[rows].float()
        noise, uniform = noise_draw(seeds[noise_rows], draws, self.config.rollout.num_steps, clean.shape)
        level = self.noise_levels(uniform, draws)
        return NoisyLatents(clean, noise, level, repeat_rows(batch.conditioning, rows // self.group_size))

    def noise_levels(self, uniform: Tensor, draws: Tensor) -> Tensor:
        """Noise levels as `update.noise_levels` says, float32 (N,).

        Args:
            uniform: float32 (N,), uniform on [0, 1].
            draws: int64 (N,), the numbers of the draws.
        """
        if self.config.update.noise_levels == "uniform":
            return uniform
        stratum = draws + uniform
        if self.config.update.noise_levels == "stratified":
            return stratum / self.slots
        sigmas = self.coefficients.sigma[:-1].to(uniform.device, torch.float32, non_blocking=True)
        step = (stratum * (len(sigmas) / self.slots)).long()
        return sigmas[step.clamp(max=len(sigmas) - 1)]


@dataclass
class NoisyLatents:
    """Clean latents of N samples, each mixed with its own noise."""

    clean: Tensor
    """x_0, (N, ...) float32."""
    noise: Tensor
    """x_1, (N, ...) float32."""
    level: Tensor
    """t, (N,) float32."""
    conditioning: Conditioning
    """One row per sample."""

    @property
    def t(self) -> Tensor:
        """The levels, of a shape that broadcasts with the latents."""
        return self.level.view(-1, *[1] * (self.clean.ndim - 1))

    def velocity(self, policy: Policy) -> Tensor:
        """The policy's velocity at x_t, (N, ...) float32."""
        mixed = (1 - self.t) * self.clean + self.t * self.noise
        return policy.velocity(mixed.to(policy.dtype), self.level, self.conditioning).float()

    def error(self, velocity: Tensor) -> Tensor:
        """The flow-matching error e of a velocity, (N,) float32."""
        return mean_square(velocity - (self.noise - self.clean))


def mean_square(tensor: Tensor) -> Tensor:
    """The mean of the squared elements of each row, (N,)."""
    return tensor.square().flatten(1).mean(1)
