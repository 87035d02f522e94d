"""Forward-process methods: policy optimisation on noised clean latents, without log-probs of sampled steps.

With x_t and u = x_1 - x_0 of `flow_matching`, means over the elements of a sample, the group-relative advantage A and
the velocities v of the policy, v_old of the old policy that sampled, v_ref of the reference:

**nft**, DiffusionNFT (arXiv 2509.16117)

    r  = clip(A, -c, c) / (2 c) + 1 / 2
    v+ = v_old + b (v - v_old),    v- = v_old - b (v - v_old)
    L  = mean((x_t - t v - x_0)^2) / sg(max(mean|x_t - t v - x_0|, 1e-5))    of v+ and v-
    loss = c / b [r L+ + (1 - r) L-] + kl_weight mean((v - v_ref)^2)

At theta = theta_old its gradient is A grad [mean((x_t - t v - x_0)^2) / sg(mean|x_t - t v - x_0|)], whatever b is.

**awm**, advantage-weighted matching (arXiv 2509.25050)

    e       = mean((v - u)^2),    log p = -(t / p) [(e + 1e-10)^p - 1e-10^p],    p = 1 / 4
    ratio   = exp(log p - log p_old)
    loss    = max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)) + old_weight mean((v - v_old)^2)
              + kl_weight mean((v - v_ref)^2)

with A clipped to [-c, c]. The ratio is to the old policy, whose velocity both terms need.

After s optimiser updates the old policy has followed by theta_old <- d theta_old + (1 - d) theta at the end of each
epoch, with d = min(old_decay_slope max(s - old_decay_start, 0), old_decay_max).
"""

from abc import abstractmethod

import torch
from torch import Tensor

from fastflowgrpo.learning.flow_matching import NoisedObjective, NoisyLatents, mean_square
from fastflowgrpo.learning.guards import norm_guard, norm_ratio
from fastflowgrpo.learning.objective import Batch, Statistics

POWER = 0.25
LEAST_ERROR = 1e-10


class _ForwardProcess(NoisedObjective):
    """What both methods share: velocities of three policies at the same noise, and the KL."""

    uses_old_policy = True

    def loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Statistics]:
        update = self.config.update
        noisy = self.add_noise(batch, rows, slots)
        clip = self.config.advantage.clip
        advantages = batch.advantages[rows].float().clamp(-clip, clip).to(noisy.clean.device, non_blocking=True)
        # Before the policy's own pass, whose graph a change of the weights would spoil.
        with torch.no_grad():
            with self.old_policy.active():
                velocity_old = noisy.velocity(self.policy)
            if update.kl_weight or update.norm_guard_weight:
                with self.policy.reference():
                    velocity_ref = noisy.velocity(self.policy)
        velocity = noisy.velocity(self.policy)
        loss, statistics = self.policy_loss(noisy, velocity, velocity_old, advantages)
        statistics |= {"policy_loss": loss, "old_distance": mean_square(velocity - velocity_old)}
        if update.kl_weight or update.norm_guard_weight:
            kl, ratio = mean_square(velocity - velocity_ref), norm_ratio(velocity, velocity_ref)
            loss = loss + update.kl_weight * kl
            if update.norm_guard_weight:
                loss = loss + update.norm_guard_weight * norm_guard(ratio)
            statistics |= {"kl": kl, "norm_ratio": ratio}
        return loss, {name: value.detach() for name, value in statistics.items()}

    @abstractmethod
    def policy_loss(
        self, noisy: NoisyLatents, velocity: Tensor, velocity_old: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Statistics]:
        """The loss of each pair but for the KL, (N,), and statistics.

        Args:
            noisy: the latents.
            velocity, velocity_old: (N, ...) float32, of the policy and the old policy.
            advantages: (N,) float32, clipped.
        """


class NFT(_ForwardProcess):
    """DiffusionNFT: towards the velocity of better samples and away from that of worse ones."""

    def policy_loss(
        self, noisy: NoisyLatents, velocity: Tensor, velocity_old: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Statistics]:
        b, clip = self.config.update.nft_beta, self.config.advantage.clip
        optimality = advantages / (2 * clip) + 0.5
        change = b * (velocity - velocity_old)
        positive, negative = (
            self.weighted_error(noisy, velocity_old + change),
            self.weighted_error(noisy, velocity_old - change),
        )
        return clip / b * (optimality * positive + (1 - optimality) * negative), {}

    @staticmethod
    def weighted_error(noisy: NoisyLatents, velocity: Tensor) -> Tensor:
        """The squared error of the predicted x_0 over its detached mean absolute error, (N,)."""
        # x_t - t v - x_0 = t (u - v)
        error = noisy.t * (noisy.noise - noisy.clean - velocity)
        return mean_square(error) / error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)


class AWM(_ForwardProcess):
    """Advantage-weighted matching: a clipped policy gradient on the flow-matching error as a log-likelihood."""

    def policy_loss(
        self, noisy: NoisyLatents, velocity: Tensor, velocity_old: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Statistics]:
        update = self.config.update
        log_ratio = self.log_likelihood(noisy, velocity) - self.log_likelihood(noisy, velocity_old)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - update.awm_clip_range, 1 + update.awm_clip_range)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        statistics = {
            "awm_ratio": ratio,
            "clipped_above": ((ratio > clipped) & (advantages > 0)).to(ratio.dtype),
            "clipped_below": ((ratio < clipped) & (advantages < 0)).to(ratio.dtype),
        }
        return loss + update.old_weight * mean_square(velocity - velocity_old), statistics

    @staticmethod
    def log_likelihood(noisy: NoisyLatents, velocity: Tensor) -> Tensor:
        """log p of a velocity, (N,)."""
        error = noisy.error(velocity)
        return -noisy.level / POWER * ((error + LEAST_ERROR) ** POWER - LEAST_ERROR**POWER)
