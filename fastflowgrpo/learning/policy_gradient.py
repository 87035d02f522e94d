"""Policy gradients on the sampled steps, with the losses of `fastflowgrpo.kernels.grpo_loss`.

grpo        Flow-GRPO, arXiv 2505.05470
grpo_guard  GRPO-Guard, arXiv 2510.22319, with the velocities that the rollout kept
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from fastflowgrpo.config import Config
from fastflowgrpo.kernels.grpo_loss import grpo_step_loss
from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import guided_velocity
from fastflowgrpo.learning.guards import mask_by_divergence, norm_guard, norm_ratio
from fastflowgrpo.learning.objective import Batch, Objective, Statistics
from fastflowgrpo.learning.step_reader import KeptSteps, StepReader
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.policy.guidance import guidance_at
from fastflowgrpo.sampling.coefficients import StepCoefficients, resolve_log_prob
from fastflowgrpo.sampling.conditioning import expand_row, repeat_rows


class GRPO(Objective):
    """The clipped policy gradient of Flow-GRPO on the window's steps, with a KL to the reference.

    `update.trust_region: divergence` replaces the clip by the mask of `guards`.
    """

    uses_log_probs = True
    uses_guard_ratio: ClassVar[bool] = False
    """Whether the ratio is GRPO-Guard's."""

    def __init__(self, config: Config, policy: Policy, coefficients: StepCoefficients, window_size: int):
        super().__init__(config, policy, coefficients, window_size)
        self.reader = StepReader(policy.device)

    def prefetch(self, batch: Batch, rows: Tensor, slots: Tensor) -> None:
        self.reader.prefetch(batch.trajectory, rows, slots)

    @classmethod
    def keeps_velocities(cls, config: Config) -> bool:
        return cls.uses_guard_ratio or config.update.trust_region == "divergence"

    def loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Statistics]:
        """The loss of `grpo_step_loss` of each pair (sample, step), and the norm guard.

        Only the policy's conditional velocity carries a gradient; its unconditional velocity and the reference's are
        computed without one.
        """
        trajectory, device, update = batch.trajectory, self.policy.device, self.config.update
        step = self.coefficients.at(trajectory.steps[rows, slots], device)
        advantages = batch.advantages[rows].float().to(device, non_blocking=True)
        distinct, repeated = self.distinct_pairs(rows, slots)
        on_host = rows, slots
        rows, slots = rows.to(device, non_blocking=True), slots.to(device, non_blocking=True)
        kept = self.reader.read(trajectory, on_host, (rows, slots))
        sample, prev_sample = kept.sample, kept.prev_sample
        conditioning = repeat_rows(batch.conditioning, rows // self.group_size)
        inputs = sample[distinct], step.sigma[distinct], repeat_rows(conditioning, distinct)
        stale = on_host[0] < batch.stale
        velocity_uncond = self.unconditional_velocity(batch, kept, stale, *inputs, repeated)
        guidance = velocity_uncond, guidance_at(self.policy, self.config.rollout.guidance, step.sigma)
        velocity_ref, kl_scale, own_statistics = None, 1.0, Statistics()
        if update.kl_weight or update.norm_guard_weight:
            chosen = self.kl_pairs(trajectory.seeds[rows], slots)
            of_chosen = repeat_rows(conditioning, chosen)
            conditionings = of_chosen, expand_row(batch.unconditional, of_chosen)
            velocity_ref = self.reference_velocity(sample[chosen], step.sigma[chosen], *conditionings)
        velocity = self.policy.velocity(*inputs)[repeated]
        if velocity_ref is not None and len(velocity_ref) < len(rows):
            kl_scale = len(rows) / len(velocity_ref)
            # The other pairs are their own reference: a KL and a norm guard of 0, without a gradient.
            guided = guided_velocity(velocity.detach(), *guidance)
            velocity_ref = guided.index_copy(0, chosen, velocity_ref.to(guided.dtype))
        if update.trust_region == "divergence":
            assert kept.velocity is not None
            velocities = guided_velocity(velocity.detach(), *guidance), kept.velocity
            advantages, own_statistics = mask_by_divergence(
                *velocities, sample, prev_sample, step, advantages, update.divergence_limit
            )
        loss, statistics = grpo_step_loss(
            velocity,
            sample,
            prev_sample,
            step.c_x,
            step.c_v,
            step.std,
            step.dt,
            trajectory.log_probs[rows, slots],
            advantages,
            clip_range=update.clip_range if update.trust_region == "clip" else math.inf,
            advantage_clip=self.config.advantage.clip,
            velocity_ref=velocity_ref,
            velocity_old=kept.velocity if self.uses_guard_ratio else None,
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance[1],
            kl=update.kl,
            kl_weight=kl_scale * update.kl_weight,
            log_prob=resolve_log_prob(self.config.rollout.log_prob, self.config.rollout.dynamics),
        )
        if velocity_ref is not None:
            ratio = norm_ratio(guided_velocity(velocity, *guidance), velocity_ref)
            if update.norm_guard_weight:
                loss = loss + kl_scale * update.norm_guard_weight * norm_guard(ratio)
            # Their means over the micro-batch are those of the pairs with a reference.
            own_statistics |= {"kl": kl_scale * statistics["kl"], "norm_ratio": 1 + kl_scale * (ratio.detach() - 1)}
        statistics |= own_statistics
        return loss, statistics | self.stale_statistics(stale, statistics)

    @torch.no_grad()
    def unconditional_velocity(
        self,
        batch: Batch,
        kept: KeptSteps,
        stale: Tensor,
        sample: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        repeated: Tensor | slice,
    ) -> Tensor | None:
        """The unconditional velocity of each pair, kept or computed at the distinct inputs; None without guidance."""
        if batch.has_rollout_weights and self.config.rollout.keep_unconditional and not stale.any():
            return kept.unconditional
        unconditional = expand_row(batch.unconditional, conditioning)
        return None if unconditional is None else self.policy.velocity(sample, sigma, unconditional)[repeated]

    def distinct_pairs(self, rows: Tensor, slots: Tensor) -> tuple[Tensor | slice, Tensor | slice]:
        """The pairs of a micro-batch whose inputs differ, and for each pair the one among them that has its inputs.

        With equal noise the samples of a group are equal at their first step, and so are their velocities.

        Args:
            rows, slots: int64 (N,) on the CPU.

        Returns:
            Indices int64 (n,) and (N,) on the policy's device; slices of all pairs where all inputs differ.
        """
        if not self.config.rollout.same_noise:
            return slice(None), slice(None)
        first_row = torch.where(slots == 0, rows - rows % self.group_size, rows)
        inputs, repeated = torch.stack([slots, first_row]).unique(dim=1, return_inverse=True)
        distinct = torch.empty(inputs.shape[1], dtype=torch.int64)
        distinct[repeated] = torch.arange(len(rows))
        device = self.policy.device
        return distinct.to(device, non_blocking=True), repeated.to(device, non_blocking=True)

    def kl_pairs(self, seeds: Tensor, slots: Tensor) -> Tensor:
        """The pairs of a micro-batch that have a KL and a norm guard: a share `update.kl_share`, rounded up, at random.

        Args:
            seeds, slots: int64 (N,), which the draw is a function of.

        Returns:
            int64 (n,), sorted indices of pairs.
        """
        count = math.ceil(self.config.update.kl_share * len(seeds))
        if count == len(seeds):
            return torch.arange(count, device=seeds.device)
        offset = self.config.rollout.num_steps + 1 + slots  # beyond those of the rollout's noise
        return philox_normal(seeds, offset, (len(seeds), 1))[:, 0].topk(count).indices.sort().values

    def stale_statistics(self, stale: Tensor, statistics: Statistics) -> Statistics:
        """With `rollout.ahead`: which pairs are stale, bool (N,) on the CPU, and which of these are clipped as well."""
        if not self.config.rollout.ahead:
            return {}
        stopped = statistics["clipped_above"] + statistics["clipped_below"]
        share = stale.to(stopped, non_blocking=True)
        return {"stale_pairs": share, "stale_clipped": stopped * share}

    @torch.no_grad()
    def reference_velocity(
        self, sample: Tensor, sigma: Tensor, conditioning: Conditioning, unconditional: Conditioning | None
    ) -> Tensor:
        """The velocity of the reference policy, with guidance: (N, ...) of samples (N, ...) at sigma (N,)."""
        velocity_uncond = None
        with self.policy.reference():
            velocity = self.policy.velocity(sample, sigma, conditioning)
            if unconditional is not None:
                velocity_uncond = self.policy.velocity(sample, sigma, unconditional)
        return guided_velocity(velocity, velocity_uncond, guidance_at(self.policy, self.config.rollout.guidance, sigma))


class GRPOGuard(GRPO):
    """The policy gradient with GRPO-Guard's ratio, which needs the velocities that sampled the steps."""

    uses_guard_ratio = True
