"""What an epoch's samples teach: the losses that `update.algorithm` chooses from.

A unit of training is a pair (row, slot). For the policy gradients it is a sample and one of its stochastic steps, whose
loss is that of `fastflowgrpo.kernels.grpo_loss`:

    grpo        Flow-GRPO, arXiv 2505.05470
    grpo_guard  GRPO-Guard, arXiv 2510.22319, with the velocities that the rollout kept

The baselines of the Flow-GRPO paper learn from clean latents x_0 alone. There a slot numbers a draw of noise x_1 and of
a level t, uniform on [0, 1], with the error e = mean over elements of (v(x_t, t) - (x_1 - x_0))^2 of the velocity at
x_t = (1 - t) x_0 + t x_1:

    sft  e of the best sample of each group
    rwr  w e of every sample, w = n softmax(reward / rwr_temperature) over the n samples of its group: 1 on average
    dpo  -log sigmoid(-dpo_beta / 2 [(e_w - e_w_ref) - (e_l - e_l_ref)]) of each group's best sample w and worst l, with
         the same noise and level for both (Diffusion-DPO, arXiv 2311.12908; Flow-DPO, arXiv 2501.13918)

Noise and level are a function of the sample's seed and the slot, so that the policy and the reference see the same.
The velocity there is the conditional one: guidance shapes the samples, not the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflowgrpo.config import POLICY_GRADIENTS, Config
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import guided_velocity
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.sampling.coefficients import StepCoefficients, resolve_log_prob
from fastflowgrpo.sampling.conditioning import expand_row, repeat_rows
from fastflowgrpo.sampling.rollout import Trajectory

Stats = dict[str, Tensor]


@dataclass
class Batch:
    """The groups of an epoch, or of one update of it: G groups of `group_size` samples, in order."""

    trajectory: Trajectory
    conditioning: Conditioning
    """A row per group."""
    unconditional: Conditioning | None
    """The empty prompt's, one row, where there is guidance."""
    advantages: Tensor
    """(B,): how much each sample teaches; 0 is nothing, NaN that its score is missing. Of dpo 1 is the best of a group
    and -1 the worst, of sft 1 the best, of rwr the weight."""


def sample_weights(algorithm: str, rewards: Tensor, group_size: int, temperature: float = 1.0) -> Tensor:
    """What takes the place of advantages for dpo, sft and rwr, see `Batch`.

    Args:
        algorithm: "dpo", "sft" or "rwr".
        rewards: (B,), group after group; NaN is a missing score.
        group_size: samples in a group.
        temperature: of rwr.

    Returns:
        (B,) float64, NaN where the reward is. A group of equal rewards has neither best nor worst: 0 for dpo and sft.
    """
    groups = rewards.double().view(-1, group_size)
    missing = groups.isnan()
    low, high = groups.masked_fill(missing, math.inf), groups.masked_fill(missing, -math.inf)
    if algorithm == "rwr":
        weights = (high / temperature).softmax(1) * (~missing).sum(1, keepdim=True)
    else:
        weights = torch.zeros_like(groups).scatter(1, high.argmax(1, keepdim=True), 1.0)
        if algorithm == "dpo":
            weights.scatter_(1, low.argmin(1, keepdim=True), -1.0)
        weights *= high.amax(1, keepdim=True) > low.amin(1, keepdim=True)
    return weights.masked_fill(missing, math.nan).flatten()


def noise_draw(seeds: Tensor, slots: Tensor, num_steps: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Noise, standard normal of `shape`, and level (N,), uniform on [0, 1], of the draws `slots` of samples with these
    seeds, (N,) int64 each. They are independent of the rollout's noise, of `num_steps` steps."""
    offset = num_steps + 1 + 2 * slots
    level = torch.special.ndtr(philox_normal(seeds, offset + 1, (len(seeds), 1)))[:, 0]
    return philox_normal(seeds, offset, shape), level


class Objective:
    """The loss that the settings choose.

    Args:
        config: of the run.
        policy: under training.
        coefficients: of the rollout's steps.
        window_size: steps of each sample that a policy gradient trains.
    """

    def __init__(self, config: Config, policy: Policy, coefficients: StepCoefficients, window_size: int):
        self.config, self.policy, self.coefficients = config, policy, coefficients
        self.algorithm = config.update.algorithm
        self.log_prob = resolve_log_prob(config.rollout.log_prob, config.rollout.dynamics)
        self.slots = window_size if self.algorithm in POLICY_GRADIENTS else config.update.noise_draws

    def micro_batches(self, batch: Batch, begin: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches (rows, slots) of the pairs of `count` samples: of those that teach, and of dpo the best of each
        group, which stands for the pair. Slot after slot, in the order of the rollout: with equal batch sizes the
        replay of a step is the rollout's own batch, bit for bit."""
        advantages = batch.advantages[begin : begin + count]
        size = self.config.update.batch_size
        if self.algorithm == "dpo":
            advantages, size = advantages.clamp(min=0), max(1, size // 2)  # each unit is two samples
        rows = begin + torch.nonzero((advantages != 0) & ~advantages.isnan())[:, 0]
        slots = torch.arange(self.slots).repeat_interleave(len(rows))
        return list(zip(rows.repeat(self.slots).split(size), slots.split(size), strict=True)) if len(rows) else []

    def loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Stats]:
        """Loss and statistics of pairs, (N,) each."""
        if self.algorithm in POLICY_GRADIENTS:
            return self._policy_gradient(batch, rows, slots)
        if self.algorithm == "dpo":
            return self._preference(batch, rows, slots)
        error = self._error(batch, rows, rows, slots)
        loss = batch.advantages[rows].to(error.device, error.dtype, non_blocking=True) * error
        return loss, {"loss": loss.detach(), "flow_matching_error": error.detach()}

    def _policy_gradient(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Stats]:
        config, guidance = self.config.update, self.config.rollout.guidance_scale
        trajectory, policy = batch.trajectory, self.policy
        at = self.coefficients.at(trajectory.steps[rows, slots], policy.device)
        advantages = batch.advantages[rows].float().to(policy.device, non_blocking=True)
        rows, slots = (index.to(policy.device, non_blocking=True) for index in (rows, slots))
        sample = trajectory.latents[rows, slots]
        conditioning = repeat_rows(batch.conditioning, rows // self.config.rollout.group_size)
        unconditional = expand_row(batch.unconditional, len(rows))

        velocity_ref = velocity_uncond = None
        with torch.no_grad():
            if unconditional is not None:
                velocity_uncond = policy.velocity(sample, at.sigma, unconditional)
            if config.kl_weight:
                with policy.reference():
                    velocity_ref = policy.velocity(sample, at.sigma, conditioning)
                    uncond_ref = policy.velocity(sample, at.sigma, unconditional) if unconditional is not None else None
                velocity_ref = guided_velocity(velocity_ref, uncond_ref, guidance)
        return grpo_step_loss(
            policy.velocity(sample, at.sigma, conditioning),
            sample,
            trajectory.latents[rows, slots + 1],
            at.c_x,
            at.c_v,
            at.std,
            at.dt,
            trajectory.log_probs[rows, slots],
            advantages,
            clip_range=config.clip_range,
            advantage_clip=self.config.advantage.clip,
            velocity_ref=velocity_ref,
            velocity_old=trajectory.velocities[rows, slots] if self.algorithm == "grpo_guard" else None,
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance,
            kl=config.kl,
            kl_weight=config.kl_weight,
            log_prob=self.log_prob,
        )

    def _preference(self, batch: Batch, best: Tensor, slots: Tensor) -> tuple[Tensor, Stats]:
        size = self.config.rollout.group_size
        group = best // size
        worst = size * group + batch.advantages.view(-1, size)[group].nan_to_num().argmin(1)
        both, noise, slots = torch.cat([best, worst]), torch.cat([best, best]), torch.cat([slots, slots])
        with torch.no_grad(), self.policy.reference():
            reference = self._error(batch, both, noise, slots)
        fall_best, fall_worst = (reference - self._error(batch, both, noise, slots)).chunk(2)
        margin = fall_best - fall_worst
        loss = -F.logsigmoid(self.config.update.dpo_beta / 2 * margin)
        stats = {"loss": loss, "dpo_accuracy": margin > 0, "dpo_fall_best": fall_best, "dpo_fall_worst": fall_worst}
        return loss, {name: value.detach().float() for name, value in stats.items()}

    def _error(self, batch: Batch, rows: Tensor, noise_of: Tensor, slots: Tensor) -> Tensor:
        """Flow-matching errors (N,) of the clean latents of `rows`, at the draws `slots` of the samples `noise_of`."""
        policy, trajectory = self.policy, batch.trajectory
        rows, noise_of, slots = (index.to(policy.device, non_blocking=True) for index in (rows, noise_of, slots))
        clean = trajectory.final[rows].float()
        noise, level = noise_draw(trajectory.seeds[noise_of], slots, self.config.rollout.num_steps, clean.shape)
        mix = level.view(-1, *[1] * (clean.ndim - 1))
        conditioning = repeat_rows(batch.conditioning, rows // self.config.rollout.group_size)
        velocity = policy.velocity(((1 - mix) * clean + mix * noise).to(policy.dtype), level, conditioning)
        return (velocity.float() - (noise - clean)).square().flatten(1).mean(1)
