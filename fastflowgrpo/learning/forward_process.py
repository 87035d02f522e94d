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

**dgpo**, direct group preference optimisation (arXiv 2510.08425), with e as above and all n samples of a group at the
same t and x_1

    w    = sg(sigmoid(dgpo_beta / n sum_i A_i (e_i - e_ref_i)))
    loss = 1 / n sum_i [w A_i e_i + kl_weight mean((v_i - v_ref_i)^2)]

A sample's w A e is left out where q = exp(e_old - e) has moved far enough already: q > 1 + eps with A > 0, or
q < 1 - eps with A < 0. The gradient of the rest is that of -log sigmoid(-dgpo_beta / n sum_i A_i (e_i - e_ref_i)) over
dgpo_beta.

After s optimiser updates the old policy has followed by theta_old <- d theta_old + (1 - d) theta at the end of each
epoch, with d = min(old_decay_slope max(s - old_decay_start, 0), old_decay_max).
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastflowgrpo.config import Config
from fastflowgrpo.learning.flow_matching import NoisedObjective, NoisyLatents, mean_square
from fastflowgrpo.learning.guards import norm_guard, norm_ratio
from fastflowgrpo.learning.objective import Batch, Statistics

POWER = 0.25
LEAST_ERROR = 1e-10


@dataclass
class Velocities:
    """Velocities at the same latents, (N, ...) float32; only the policy's has a gradient."""

    policy: Tensor
    old: Tensor
    reference: Tensor | None
    """None where neither the loss nor a KL needs it."""


class _ForwardProcess(NoisedObjective):
    """What the methods share: velocities of three policies at the same noise, and the KL."""

    uses_old_policy = True

    def loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Statistics]:
        update = self.config.update
        samples, draws, noise_rows = self.samples(rows, slots)
        noisy = self.add_noise(batch, samples, draws, noise_rows)
        clip = self.config.advantage.clip
        advantages = batch.advantages[samples].float().nan_to_num().clamp(-clip, clip)
        advantages = advantages.to(noisy.clean.device, non_blocking=True)
        velocities = self.velocities(noisy)
        loss, statistics = self.policy_loss(noisy, velocities, advantages)
        statistics |= {"policy_loss": loss, "old_distance": mean_square(velocities.policy - velocities.old)}
        if update.kl_weight or update.norm_guard_weight:
            assert velocities.reference is not None
            kl = mean_square(velocities.policy - velocities.reference)
            ratio = norm_ratio(velocities.policy, velocities.reference)
            loss = loss + update.kl_weight * kl
            if update.norm_guard_weight:
                loss = loss + update.norm_guard_weight * norm_guard(ratio)
            statistics |= {"kl": kl, "norm_ratio": ratio}
        of_pairs = {name: value.detach().view(len(rows), -1).mean(1) for name, value in statistics.items()}
        return loss.view(len(rows), -1).mean(1), of_pairs

    def samples(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The samples of each pair, their draws, and the samples whose seeds give their noise: pair after pair."""
        return rows, slots, rows

    def velocities(self, noisy: NoisyLatents) -> Velocities:
        update, reference = self.config.update, None
        # Before the policy's own pass, whose graph a change of the weights would spoil.
        with torch.no_grad():
            with self.old_policy.active():
                old = noisy.velocity(self.policy)
            if self.uses_reference or update.kl_weight or update.norm_guard_weight:
                with self.policy.reference():
                    reference = noisy.velocity(self.policy)
        return Velocities(noisy.velocity(self.policy), old, reference)

    @abstractmethod
    def policy_loss(self, noisy: NoisyLatents, velocities: Velocities, advantages: Tensor) -> tuple[Tensor, Statistics]:
        """The loss of each sample but for the KL, (N,), and statistics.

        Args:
            noisy: the latents.
            velocities: at them.
            advantages: (N,) float32, clipped.
        """


class NFT(_ForwardProcess):
    """DiffusionNFT: towards the velocity of better samples and away from that of worse ones."""

    def policy_loss(self, noisy: NoisyLatents, velocities: Velocities, advantages: Tensor) -> tuple[Tensor, Statistics]:
        b, clip = self.config.update.nft_beta, self.config.advantage.clip
        optimality = advantages / (2 * clip) + 0.5
        change = b * (velocities.policy - velocities.old)
        positive, negative = (
            self.weighted_error(noisy, velocities.old + change),
            self.weighted_error(noisy, velocities.old - change),
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

    def policy_loss(self, noisy: NoisyLatents, velocities: Velocities, advantages: Tensor) -> tuple[Tensor, Statistics]:
        update = self.config.update
        log_ratio = self.log_likelihood(noisy, velocities.policy) - self.log_likelihood(noisy, velocities.old)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - update.awm_clip_range, 1 + update.awm_clip_range)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        statistics = {
            "awm_ratio": ratio,
            "clipped_above": ((ratio > clipped) & (advantages > 0)).to(ratio.dtype),
            "clipped_below": ((ratio < clipped) & (advantages < 0)).to(ratio.dtype),
        }
        return loss + update.old_weight * mean_square(velocities.policy - velocities.old), statistics

    @staticmethod
    def log_likelihood(noisy: NoisyLatents, velocity: Tensor) -> Tensor:
        """log p of a velocity, (N,)."""
        error = noisy.error(velocity)
        return -noisy.level / POWER * ((error + LEAST_ERROR) ** POWER - LEAST_ERROR**POWER)


class DGPO(_ForwardProcess):
    """Direct group preference optimisation. A pair is a whole group, for which its first trained sample stands."""

    one_pair_per_group = True
    uses_reference = True

    @classmethod
    def samples_per_pair(cls, config: Config) -> int:
        return config.rollout.group_size

    def is_trained(self, advantages: Tensor) -> Tensor:
        trained = super().is_trained(advantages).view(-1, self.group_size)
        return (trained & (trained.cumsum(1) == 1)).flatten()

    def samples(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = (rows // self.group_size * self.group_size).repeat_interleave(self.group_size)
        number = torch.arange(self.group_size).repeat(len(rows))
        return first + number, slots.repeat_interleave(self.group_size), first

    def policy_loss(self, noisy: NoisyLatents, velocities: Velocities, advantages: Tensor) -> tuple[Tensor, Statistics]:
        assert velocities.reference is not None
        update = self.config.update
        error, old, reference = map(noisy.error, (velocities.policy, velocities.old, velocities.reference))
        preferences = (advantages * (error.detach() - reference)).view(-1, self.group_size).mean(1)
        weight = torch.sigmoid(update.dgpo_beta * preferences).repeat_interleave(self.group_size)
        ratio = (old - error.detach()).exp()
        above = (ratio > 1 + update.dgpo_clip_range) & (advantages > 0)
        below = (ratio < 1 - update.dgpo_clip_range) & (advantages < 0)
        loss = (weight * advantages * error).masked_fill(above | below, 0.0)
        statistics = {
            "dgpo_weight": weight,
            "clipped_above": above.to(loss.dtype),
            "clipped_below": below.to(loss.dtype),
        }
        return loss, statistics
