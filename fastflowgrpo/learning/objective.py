"""The interface of an objective: which samples it trains on, and the loss of a micro-batch.

A micro-batch is a list of pairs (row, slot). The row is a sample of the batch. The slot is the number of one of the
things that the sample is trained on: the stochastic steps of its trajectory for policy gradients, noise draws for the
others. (A preference pair, of two samples, is always called that.)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastflowgrpo.config import Config
from fastflowgrpo.learning.advantages import group_advantages
from fastflowgrpo.learning.snapshot import WeightSnapshot
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.sampling.coefficients import StepCoefficients
from fastflowgrpo.sampling.rollout import Trajectory
from fastflowgrpo.scoring.contract import Scores

Statistics = dict[str, Tensor]
"""Detached statistics of a micro-batch by name, (N,) each."""
MicroBatches = list[tuple[Tensor, Tensor]]
"""The pairs of each micro-batch: rows and slots, int64 (N,) each on the CPU."""


@dataclass
class Batch:
    """The groups that this process trains on in an epoch: G groups of `group_size` samples, group after group."""

    trajectory: Trajectory
    conditioning: Conditioning
    """One row per group."""
    unconditional: Conditioning | None
    """The empty prompt, one row; None without guidance."""
    advantages: Tensor
    """(B,), from `Objective.advantages`; 0 and NaN are not trained on."""
    stale: int = 0
    """The first so many samples were sampled with weights that are an epoch older (`rollout.ahead`)."""
    has_rollout_weights: bool = True
    """Whether the policy still has the weights that sampled the others."""


class Objective(ABC):
    """The loss of `update.algorithm`.

    Args:
        config: of the run.
        policy: under training.
        coefficients: of the rollout's steps.
        window_size: stochastic steps of each sample.
    """

    uses_log_probs: ClassVar[bool] = False
    """Whether it trains on sampled steps, which the rollout then keeps with their log-probs."""
    one_pair_per_group: ClassVar[bool] = False
    """Whether it has one pair per group and slot instead of one per sample and slot."""
    uses_reference: ClassVar[bool] = False
    """Whether the loss needs the reference's velocity even without a KL."""
    uses_old_policy: ClassVar[bool] = False
    """Whether an old policy samples and is compared with: weights that follow the trained ones slowly."""
    old_policy: WeightSnapshot
    """The old policy's weights, which the learner sets where they are used."""

    def __init__(self, config: Config, policy: Policy, coefficients: StepCoefficients, window_size: int):
        self.config, self.policy, self.coefficients = config, policy, coefficients
        self.group_size = config.rollout.group_size
        self.halvings = 0
        """How often `update.batch_size` is halved; the learner does so where memory is short."""
        self.slots = window_size if self.uses_log_probs else config.update.noise_draws

    @classmethod
    def samples_per_pair(cls, config: Config) -> int:
        """Samples that one pair passes through the model."""
        return 1

    @classmethod
    def keeps_velocities(cls, config: Config) -> bool:
        """Whether the rollout also keeps the velocities of the sampled steps."""
        return False

    def advantages(self, scores: Scores, reward_weights: Mapping[str, float]) -> Tensor:
        """The weight of each sample in the loss; by default its group-relative advantage, as `config.advantage` says.

        Args:
            scores: of all samples of the epoch, group after group; NaN is a missing score.
            reward_weights: weight of each named reward.

        Returns:
            (all samples of the epoch,) float64, NaN where a score is missing: such a sample is not trained on.
        """
        rewards = torch.stack([scores.details[name] for name in reward_weights], 1)
        group_ids = torch.arange(len(rewards) // self.group_size).repeat_interleave(self.group_size)
        settings = self.config.advantage
        weights = list(reward_weights.values())
        return group_advantages(rewards, group_ids, settings.std, weights=weights, mode=settings.mode)

    @abstractmethod
    def loss(self, batch: Batch, rows: Tensor, slots: Tensor) -> tuple[Tensor, Statistics]:
        """Loss of each pair, (N,), and its statistics; rows and slots are int64 (N,) on the CPU."""

    def prefetch(self, batch: Batch, rows: Tensor, slots: Tensor) -> None:  # noqa: B027  most read nothing from the host
        """Start to read what the loss of these pairs needs; they are the next whose loss is computed."""

    def micro_batches(self, batch: Batch, begin: int, count: int) -> MicroBatches:
        """The pairs of samples begin, ..., begin + count - 1 in micro-batches (rows, slots) of `batch_size`.

        They are ordered slot after slot, and within a slot as the rollout sampled them. So with equal batch sizes, and
        with every sample trained on, a micro-batch is a batch of the rollout, and its replay has the same bits.
        """
        rows = begin + torch.nonzero(self.is_trained(batch.advantages[begin : begin + count]))[:, 0]
        if not len(rows):
            return []
        slots = torch.arange(self.slots).repeat_interleave(len(rows))
        return list(zip(rows.repeat(self.slots).split(self.pairs), slots.split(self.pairs), strict=True))

    @property
    def pairs(self) -> int:
        """The pairs of a micro-batch, at least one."""
        return max(1, (self.config.update.batch_size >> self.halvings) // self.samples_per_pair(self.config))

    @property
    def batch_size(self) -> int:
        """The samples that a micro-batch passes through the model."""
        return self.pairs * self.samples_per_pair(self.config)

    def is_trained(self, advantages: Tensor) -> Tensor:
        """Which samples have pairs, bool of the shape of their advantages."""
        return (advantages != 0) & ~advantages.isnan()
