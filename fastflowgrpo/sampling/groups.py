"""Sampling the groups of a rollout as the settings say."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflowgrpo.config import RolloutConfig
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.sampling.coefficients import StepCoefficients, resolve_log_prob
from fastflowgrpo.sampling.rollout import Trajectory, sample_clean_groups, sample_groups, sliding_start, window_starts


class GroupSampler:
    """Samples groups with the policy's present weights.

    Args:
        rollout: the settings.
        policy, shape: as in `sample_groups`.
        coefficients: of the whole schedule.
        keep_steps, keep_velocities: what the update needs of the steps in the windows.
        equal_passes: whether all processes must run equally many passes, as with a sharded model.
        fill_up_to: fewer groups than these are sampled with repeats of the last one, which are left out: a compiled
            model would compile another batch size.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        policy: Policy,
        coefficients: StepCoefficients,
        shape: tuple[int, ...],
        *,
        keep_steps: bool,
        keep_velocities: bool,
        equal_passes: bool,
        fill_up_to: int = 0,
    ):
        self.rollout, self.policy, self.coefficients, self.shape = rollout, policy, coefficients, shape
        self.fill_up_to = fill_up_to
        # The last step is an ODE step and is never trained.
        self.window_size = rollout.window_size or rollout.num_steps - 1
        self.start_range = rollout.window_start if rollout.window_size else (0, 1)
        self.possible_starts = range(*self.start_range) if equal_passes and not rollout.window_stride else ()
        self.kept: dict[str, Any] = {"keep_steps": keep_steps, "keep_velocities": keep_velocities}

    @property
    def trained_steps(self) -> slice:
        """The steps that may be in a window."""
        low, high = self.start_range
        return slice(low, high - 1 + self.window_size)

    def starts(self, epoch: int, seeds: Sequence[int]) -> list[int]:
        """The first stochastic step of each group, by the groups' seeds."""
        rollout, (low, high) = self.rollout, self.start_range
        if rollout.window_stride:
            return [sliding_start(low, high, rollout.window_stride, rollout.window_epochs, epoch)] * len(seeds)
        return window_starts(low, high, seeds)

    def sample(
        self,
        starts: Sequence[int],
        seeds: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        on_step: Callable[[], object],
    ) -> Trajectory:
        """Sample groups.

        Args:
            starts: first stochastic step of each group.
            seeds: int64 (B,), of all samples.
            conditioning: one row per group.
            unconditional: the empty prompt's, one row, with guidance.
            on_step: called once per denoising step, for a progress bar.
        """
        samples, groups = len(seeds), len(starts)
        if groups < self.fill_up_to:
            filled = torch.arange(self.fill_up_to).clamp(max=groups - 1)
            starts, seeds = [starts[i] for i in filled], seeds.view(groups, -1)[filled].flatten()
            conditioning = {name: tensor[filled.to(tensor.device)] for name, tensor in conditioning.items()}
            return self.sample(starts, seeds, conditioning, unconditional, on_step).part(slice(samples))
        rollout = self.rollout
        shared: dict[str, Any] = {
            "unconditional": unconditional,
            "guidance_scale": rollout.guidance,
            "solver": rollout.solver,
            "on_step": on_step,
        }
        if rollout.dynamics == "ode":
            arguments = rollout.num_steps, rollout.group_size, seeds, self.shape
            return sample_clean_groups(self.policy, conditioning, *arguments, **shared)
        return sample_groups(
            self.policy,
            conditioning,
            self.coefficients,
            starts,
            self.window_size,
            rollout.group_size,
            seeds,
            self.shape,
            same_noise=rollout.same_noise,
            tail_steps=rollout.tail_steps,
            possible_starts=self.possible_starts,
            log_prob=resolve_log_prob(rollout.log_prob, rollout.dynamics),
            keep_unconditional=rollout.keep_unconditional,
            **self.kept,
            **shared,
        )
