"""Sampling an epoch's groups: each batch is scored while the next one is sampled.

With `rollout.ahead` the first groups of the next epoch are sampled too, before the scores of this one are awaited, and
are scored beside the update. Their samples are stale: the weights that sampled them are an epoch older. Their prompts,
windows and noise are those of the epoch that they belong to.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastflowgrpo.config import Config
from fastflowgrpo.console import progress
from fastflowgrpo.distributed import Processes
from fastflowgrpo.policy import Conditioning
from fastflowgrpo.policy.embeddings import EmbeddingCache
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.sampling.groups import GroupSampler
from fastflowgrpo.sampling.host_trajectory import HostTrajectory
from fastflowgrpo.sampling.rollout import Trajectory, sample_seeds
from fastflowgrpo.scoring.contract import Scores
from fastflowgrpo.scoring.exploration import explore
from fastflowgrpo.scoring.pipeline import MAX_BATCHES_IN_FLIGHT, Scoring


class Sampled(NamedTuple):
    """A process's groups of an epoch."""

    trajectory: Trajectory
    conditioning: Conditioning
    """One row per group."""
    unconditional: Conditioning | None
    """The empty prompt's, one row, with guidance."""
    shown: Tensor
    """The images of the first groups, if they are shown."""
    scores: Scores
    candidates: Scores | None
    """The candidates' scores, if there are any."""
    stale: int
    """The first so many samples were sampled an epoch ahead."""


@dataclass
class Drawn:
    """Some of a process's groups of an epoch, one after the other."""

    parts: list[Trajectory] = field(default_factory=list)
    """Batch after batch."""
    shown: list[Tensor] = field(default_factory=list)
    """The images of those groups that are shown."""
    is_scored: bool = True
    """Whether their scores have been asked for; not yet, if a checkpoint has brought them."""

    @property
    def num_samples(self) -> int:
        """Samples of these groups."""
        return sum(len(part.final) for part in self.parts)


@dataclass
class _Groups:
    """What a process's groups of an epoch are sampled from."""

    epoch: int
    prompts: list[Prompt]
    seeds: list[int]
    noise_seeds: Tensor
    """int64 (groups, group_size)."""
    conditioning: Conditioning
    unconditional: Conditioning | None


class EpochSampler:
    """Samples a process's groups of one epoch after the other, and has them scored.

    Args:
        config: of the run.
        processes: share the groups.
        sampler: samples a batch.
        embed: embeds the prompts.
        scoring: decodes and scores.
        prompts: the prompts of the groups of all processes, by epoch.
        weights: inside it the policy has the weights that sample.
        phase: measures the time of a phase, of a batch of that number.
        num_shown: how many of this process's first groups are shown, by epoch.
    """

    def __init__(
        self,
        config: Config,
        processes: Processes,
        sampler: GroupSampler,
        embed: EmbeddingCache,
        scoring: Scoring,
        *,
        prompts: Callable[[int], list[Prompt]],
        weights: Callable[[], AbstractContextManager[None]],
        phase: Callable[..., AbstractContextManager[None]],
        num_shown: Callable[[int], int],
    ):
        self.config, self.processes, self.sampler, self.embed, self.scoring = config, processes, sampler, embed, scoring
        self.prompts, self.weights, self.phase, self.num_shown = prompts, weights, phase, num_shown
        self.ahead = Drawn()
        """The next epoch's groups that are sampled already."""

    def sample(self, epoch: int, prompts: Sequence[Prompt]) -> Sampled:
        """Sample the groups of an epoch that are not sampled yet, then the first ones of the next; wait for the scores.

        Args:
            epoch: its number.
            prompts: one per group, of all processes.
        """
        rollout, early = self.config.rollout, self.ahead
        groups, candidates = self._groups(epoch, prompts), None
        if rollout.candidates:
            candidates = self._explore(groups)
        if not early.is_scored:
            self._score(early, groups)
        stale = early.num_samples
        num_ahead = rollout.ahead // self.processes.count if epoch + 1 < self.config.epochs else 0
        missing = self._batches(stale // rollout.group_size, len(groups.prompts))
        batches = len(missing) + len(self._batches(0, num_ahead))
        with progress("rollout", rollout.num_steps * batches) as steps:
            drawn, ahead = self._draw(groups, missing, steps.update), Drawn()
            if num_ahead:
                later = self._groups(epoch + 1, self.prompts(epoch + 1), num_ahead)
                ahead = self._draw(later, self._batches(0, num_ahead), steps.update)
            with self.phase("score"):
                scores = self.scoring.finish(steps.set_postfix_str, leave=len(ahead.parts))
        parts = [*early.parts, *drawn.parts]
        shown = torch.cat([torch.empty(0, dtype=torch.uint8), *early.shown, *drawn.shown])
        trajectory = type(parts[0]).cat(parts)
        if stale:
            early.parts = [trajectory.part(slice(stale))]  # a checkpoint may need them; without a second copy
        self.ahead = ahead
        return Sampled(trajectory, groups.conditioning, groups.unconditional, shown, scores, candidates, stale)

    def _groups(self, epoch: int, prompts: Sequence[Prompt], count: int | None = None) -> _Groups:
        """This process's groups of an epoch, or the first ones of them."""
        rollout = self.config.rollout
        indices = self.processes.padded_rank_indices(len(prompts))[:count]
        own, seeds = [prompts[i] for i in indices], [group_seed(self.config.seed, epoch, i) for i in indices]
        with self.phase("encode"):
            conditioning = self.embed(own)
            unconditional = self.embed([""]) if rollout.guidance_scale != 1 else None
        noise_seeds = sample_seeds(seeds, rollout.group_size).view(-1, rollout.group_size)
        return _Groups(epoch, own, seeds, noise_seeds, conditioning, unconditional)

    def _explore(self, groups: _Groups) -> Scores:
        """Score candidates of the groups, which then start from the noise of the chosen ones."""
        of_groups = groups.prompts, groups.seeds, self.sampler.shape, groups.conditioning, groups.unconditional
        with self.weights():
            scores, groups.noise_seeds = explore(
                self.sampler.policy, self.scoring, self.config.rollout, *of_groups, self.phase
            )
        return scores

    def _batches(self, begin: int, end: int) -> list[slice]:
        """The batches of the groups begin, ..., end - 1."""
        count = self.config.rollout.batch_size // self.config.rollout.group_size
        return [slice(first, min(first + count, end)) for first in range(begin, end, count)]

    def _draw(self, groups: _Groups, batches: Sequence[slice], on_step: Callable[[], object]) -> Drawn:
        """Sample batches of the groups, and start to score each."""
        drawn = Drawn()
        for number, batch in enumerate(batches):
            with self.phase("rollout", number), self.weights():
                conditioning = {name: tensor[batch] for name, tensor in groups.conditioning.items()}
                starts = self.sampler.starts(groups.epoch, groups.seeds[batch])
                noise_seeds = groups.noise_seeds[batch].flatten()
                part = self.sampler.sample(starts, noise_seeds, conditioning, groups.unconditional, on_step)
            self._submit(part, groups, batch, number, drawn)
        return drawn

    def _submit(self, part: Trajectory, groups: _Groups, batch: slice, number: int, drawn: Drawn) -> None:
        """Start to score a batch, and add it to those that are drawn."""
        size = self.config.rollout.group_size
        with self.phase("decode", number):
            images = self.scoring.submit(part.final, groups.prompts[batch], size)
        drawn.parts.append(HostTrajectory.of(part) if self.config.rollout.offload_trajectory else part)
        if batch.start < (shown := self.num_shown(groups.epoch)):
            drawn.shown.append(images[: (shown - batch.start) * size])

    def _score(self, early: Drawn, groups: _Groups) -> None:
        """Start to score what a checkpoint has brought, in the batches in which it would have been sampled."""
        size, whole, again = self.config.rollout.group_size, Trajectory.cat(early.parts), Drawn()
        for number, batch in enumerate(self._batches(0, early.num_samples // size)):
            part = whole.part(slice(batch.start * size, batch.stop * size))
            self._submit(part, groups, batch, number, again)
        early.parts, early.shown, early.is_scored = again.parts, again.shown, True


def max_batches_in_flight(config: Config, processes: int) -> int:
    """How many batches of a process wait for their scores at once: those ahead, and the last one of an epoch."""
    images = config.rollout.ahead // processes * config.rollout.group_size
    return max(MAX_BATCHES_IN_FLIGHT, 1 + -(-images // config.rollout.batch_size))


def group_seed(seed: int, epoch: int, group: int) -> int:
    """The seed of everything random in a group: its window and its noise."""
    return int(np.random.SeedSequence((seed, epoch, group)).generate_state(1)[0])
