"""Weighted flow matching to the sampled images, two baselines of the Flow-GRPO paper (arXiv 2505.05470, appendix C).

    sft  e of the best sample of each group
    rwr  w e of every sample, w = n softmax(reward / rwr_temperature) over the n samples of its group: 1 on average

with the error e of `flow_matching`.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from fastflowgrpo.learning.flow_matching import NoisedObjective
from fastflowgrpo.learning.objective import Batch, Statistics
from fastflowgrpo.scoring.contract import Scores


class _WeightedRegression(NoisedObjective):
    """The loss w e with the weights w in place of advantages."""

    def advantages(self, scores: Scores, reward_weights: Mapping[str, float]) -> Tensor:
        groups = scores.values.double().view(-1, self.group_size)
        return self.group_weights(groups).masked_fill(groups.isnan(), math.nan).flatten()

    @abstractmethod
    def group_weights(self, rewards: Tensor) -> Tensor:
        """The weights of samples, (G, n) float64 of rewards (G, n), of which NaN is missing."""

    def loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Statistics]:
        noisy = self.add_noise(batch, rows, slots)
        errors = noisy.error(noisy.velocity(self.policy))
        loss = batch.advantages[rows].to(errors.device, errors.dtype, non_blocking=True) * errors
        return loss, {"loss": loss.detach(), "flow_matching_error": errors.detach()}


class SFT(_WeightedRegression):
    """Flow matching to the best sample of each group. A group of equal rewards is left out."""

    one_pair_per_group = True

    def group_weights(self, rewards: Tensor) -> Tensor:
        return best_and_worst(rewards).clamp(min=0)


class RWR(_WeightedRegression):
    """Flow matching to every sample, weighted by the softmax of its reward. Follows the paper; its code weighs by raw
    rewards."""

    def group_weights(self, rewards: Tensor) -> Tensor:
        missing = rewards.isnan()
        scaled = rewards.masked_fill(missing, -math.inf) / self.config.update.rwr_temperature
        return scaled.softmax(1) * (~missing).sum(1, keepdim=True)


def best_and_worst(rewards: Tensor) -> Tensor:
    """1 at the best sample of each group, -1 at the worst, 0 elsewhere and in groups of equal rewards.

    Args:
        rewards: (G, n) float64, a row per group; NaN is a missing score.

    Returns:
        (G, n) float64.
    """
    missing = rewards.isnan()
    low, high = rewards.masked_fill(missing, math.inf), rewards.masked_fill(missing, -math.inf)
    marks = torch.zeros_like(rewards).scatter(1, high.argmax(1, keepdim=True), 1.0)
    marks.scatter_(1, low.argmin(1, keepdim=True), -1.0)
    return marks * (high.amax(1, keepdim=True) > low.amin(1, keepdim=True))
