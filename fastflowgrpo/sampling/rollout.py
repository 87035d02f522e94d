"""Sampling the groups of an epoch, and keeping the steps that the update trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import guided_velocity, sde_step
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.sampling.coefficients import StepCoefficients
from fastflowgrpo.sampling.conditioning import expand_row, repeat_rows
from fastflowgrpo.sampling.ode import branch_velocities, ode_steps, sample_ode


@dataclass
class Trajectory:
    """The trained steps of B samples, S per sample. Step j of a sample goes from latents[:, j] to latents[:, j + 1]."""

    latents: Tensor
    """(B, S + 1, ...) in the policy's dtype; (B, 0, ...) if the steps are not kept."""
    velocities: Tensor
    """(B, S, ...): the velocity of each step after guidance, in the policy's dtype without guidance and in float32 with
    it; (B, 0, ...) if the velocities are not kept."""
    log_probs: Tensor
    """(B, S) float32: log-prob of each step under the policy that sampled it."""
    steps: Tensor
    """(B, S) int64 on the CPU: index of each step in the schedule."""
    seeds: Tensor
    """(B,) int64: seed of all noise of a sample, at offset 0 for the initial noise and at i + 1 for step i."""
    final: Tensor
    """(B, ...): the clean latents."""
    unconditional: Tensor
    """(B, S, ...) in the policy's dtype: the unconditional velocity of each step; (B, 0, ...) if they are not kept."""

    @classmethod
    def cat(cls, parts: Sequence["Trajectory"]) -> "Trajectory":
        """The samples of several trajectories, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def sliding_start(low: int, high: int, stride: int, epochs: int, epoch: int) -> int:
    """First step of a window that slides from `low` to `high - 1` and stays there (MixGRPO, arXiv 2507.21802).

    Args:
        low, high: range of the first step, `high` excluded.
        stride: steps per move.
        epochs: epochs between two moves.
        epoch: number of the epoch, from 0.
    """
    return min(low + stride * (epoch // epochs), high - 1)


def window_starts(low: int, high: int, seeds: Sequence[int]) -> list[int]:
    """First step of each group's window, drawn from [low, high) by the group's seed."""
    return [int(np.random.default_rng(seed).integers(low, high)) for seed in seeds]


def sample_seeds(seeds: Sequence[int], group_size: int) -> Tensor:
    """The seed of each sample of each group, int64 (B,), from the group's seed and the sample's position in it."""
    states = [np.random.SeedSequence(seed).generate_state(group_size, np.uint64) for seed in seeds]
    return torch.from_numpy(np.concatenate(states).view(np.int64))


@torch.no_grad()
def sample_groups(
    policy: Policy,
    conditioning: Conditioning,
    coefficients: StepCoefficients,
    starts: Sequence[int],
    window_size: int,
    group_size: int,
    seeds: Tensor,
    shape: tuple[int, ...],
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    same_noise: bool = False,
    log_prob: str = "normalised",
    keep_steps: bool = True,
    keep_velocities: bool = False,
    keep_unconditional: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> Trajectory:
    """Samples group_size images per prompt, by the SDE inside each group's window and by the ODE outside it.

    The host does not wait for the device between the first step and the last.

    Args:
        conditioning: one row per group.
        coefficients: stochastic coefficients of the whole schedule.
        starts: first step of each group's window, the same for all its samples.
        window_size: steps of a window.
        group_size: samples per group.
        seeds: (B,) int64, group after group; all noise of a sample depends on its seed only, see `sample_seeds`.
        shape: shape of one latent sample.
        policy, unconditional, guidance_scale: as in `sample_ode`.
        same_noise: start all samples of a group from the same initial noise.
        log_prob: "normalised" or "unnormalised", see `sde_step`.
        keep_steps: keep the steps of the windows; otherwise the trajectory has only the clean latents and the seeds.
        keep_velocities: keep the velocities of these steps too.
        keep_unconditional: keep their unconditional velocities; needs `unconditional`.
        on_step: called once per denoising step, for a progress bar.
    """
    schedule = _window_schedule(coefficients, starts, window_size, group_size, policy.device)
    noise_seeds = seeds.to(policy.device, non_blocking=True)
    initial_seeds = noise_seeds[::group_size] if same_noise else noise_seeds
    sample = philox_normal(initial_seeds, 0, (len(initial_seeds), *shape)).to(policy.dtype)
    begin = 0
    if same_noise:
        # until the first window the samples of a group are equal: compute them once per group
        begin, guidance = min(starts), (unconditional, guidance_scale)
        sample = ode_steps(policy, sample, conditioning, coefficients, range(begin), *guidance, on_step)
        sample = sample.repeat_interleave(group_size, 0)
    conditioning = repeat_rows(conditioning, schedule.group.to(policy.device, non_blocking=True))
    unconditional = expand_row(unconditional, len(sample))
    keep_velocities, keep_unconditional = keep_velocities and keep_steps, keep_unconditional and keep_steps
    kept = _KeptSteps(
        sample, schedule, window_size * keep_steps, keep_velocities, keep_unconditional, unconditional is not None
    )
    for i in range(begin, len(schedule.sigma)):
        velocity, velocity_uncond = branch_velocities(policy, sample, schedule.sigma[i], conditioning, unconditional)
        next_sample, step_log_prob = sde_step(
            velocity,
            sample,
            *schedule.coefficients(i),
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance_scale,
            seed=noise_seeds if schedule.draws_noise[i] else None,
            offset=i + 1,
            log_prob=log_prob,
        )
        if keep_velocities:
            velocity = guided_velocity(velocity, velocity_uncond, guidance_scale)
        kept.store(i, sample, next_sample, step_log_prob, velocity, velocity_uncond)
        sample = next_sample
        on_step()
    return kept.trajectory(noise_seeds, sample)


@torch.no_grad()
def sample_clean_groups(
    policy: Policy,
    conditioning: Conditioning,
    num_steps: int,
    group_size: int,
    seeds: Tensor,
    shape: tuple[int, ...],
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    solver: str = "euler",
    on_step: Callable[[], object] = lambda: None,
) -> Trajectory:
    """Samples group_size images per prompt by the ODE; the trajectory has only the clean latents and the seeds.

    Args:
        num_steps, solver: as in `sample_ode`.
        conditioning, group_size, seeds, shape, unconditional, guidance_scale, on_step: as in `sample_groups`.
    """
    noise_seeds = seeds.to(policy.device, non_blocking=True)
    group = torch.arange(len(seeds)).to(policy.device, non_blocking=True) // group_size
    clean = sample_ode(
        policy,
        repeat_rows(conditioning, group),
        num_steps,
        philox_normal(noise_seeds, 0, (len(noise_seeds), *shape)),
        unconditional=unconditional,
        guidance_scale=guidance_scale,
        solver=solver,
        on_step=on_step,
    )
    none = clean.new_empty(len(clean), 0, *shape)
    empty = none.float().flatten(1)
    steps = torch.empty(len(clean), 0, dtype=torch.int64)
    return Trajectory(none, none, empty, steps, noise_seeds, clean, none)


@dataclass
class _WindowSchedule:
    """The steps of B samples: stochastic inside the window of the sample's group, ODE outside it."""

    group: Tensor
    """int64 (B,) on the CPU: the group of each sample."""
    first_step: Tensor
    """int64 (B,) on the CPU: the first step of each sample's window."""
    in_window: Tensor
    """bool (B, num_steps) on the CPU."""
    draws_noise: list[bool]
    """For each step, whether any sample draws noise."""
    sigma: Tensor
    """float32 (num_steps, B) on the device of the policy, like c_x, c_v and std."""
    c_x: Tensor
    c_v: Tensor
    std: Tensor

    def coefficients(self, step: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """c_x, c_v and std (B,) of a step; std is the number 0 if no sample draws noise."""
        return self.c_x[step], self.c_v[step], self.std[step] if self.draws_noise[step] else 0.0


def _window_schedule(
    coefficients: StepCoefficients, starts: Sequence[int], window_size: int, group_size: int, device: torch.device
) -> _WindowSchedule:
    group = torch.arange(len(starts)).repeat_interleave(group_size)
    first_step = torch.tensor(starts)[group]
    step = torch.arange(len(coefficients.dt))
    in_window = (step >= first_step[:, None]) & (step < first_step[:, None] + window_size)
    rows = coefficients.ode_outside(in_window)
    per_step = (rows.sigma.expand_as(in_window), rows.c_x, rows.c_v, rows.std)
    on_device = (tensor.T.to(device, torch.float32, non_blocking=True) for tensor in per_step)
    return _WindowSchedule(group, first_step, in_window, (rows.std > 0).any(0).tolist(), *on_device)


class _KeptSteps:
    """The steps inside each sample's window, copied into preallocated tensors.

    Args:
        sample: (B, ...), gives shape, dtype and device of the latents.
        schedule: schedule of these samples.
        count: steps to keep of each sample, 0 or the size of the window.
        keep_velocities, keep_unconditional: keep the velocities of these steps too, and the unconditional ones.
        guided: the velocities are guided, so they are kept in float32 and not in the dtype of the latents.
    """

    def __init__(
        self,
        sample: Tensor,
        schedule: _WindowSchedule,
        count: int,
        keep_velocities: bool,
        keep_unconditional: bool,
        guided: bool,
    ):
        batch_size, *shape = sample.shape
        velocity_dtype = torch.float32 if guided else sample.dtype
        self.steps = schedule.first_step[:, None] + torch.arange(count)
        self.latents = sample.new_empty(batch_size, count + (count > 0), *shape)
        self.velocities = sample.new_empty(batch_size, count * keep_velocities, *shape, dtype=velocity_dtype)
        self.unconditional = sample.new_empty(batch_size, count * keep_unconditional, *shape)
        self.log_probs = torch.empty(batch_size, count, device=sample.device)
        # for each step: the samples whose window contains it, and their slots
        rows = [torch.from_numpy(np.flatnonzero(samples)) for samples in schedule.in_window.T]
        slots = [step - schedule.first_step[samples] for step, samples in enumerate(rows)]
        self.rows, self.slots = (
            [index.to(sample.device, non_blocking=True) for index in indices] for indices in (rows, slots)
        )

    def store(
        self,
        step: int,
        sample: Tensor,
        next_sample: Tensor,
        log_prob: Tensor,
        velocity: Tensor,
        velocity_uncond: Tensor | None,
    ) -> None:
        """Copy a step of the schedule for the samples whose window contains it."""
        rows, slots = self.rows[step], self.slots[step]
        if self.steps.shape[1]:
            self.latents[rows, slots] = sample[rows]
            self.latents[rows, slots + 1] = next_sample[rows]
            self.log_probs[rows, slots] = log_prob[rows]
        if self.velocities.shape[1]:
            self.velocities[rows, slots] = velocity[rows].to(self.velocities.dtype)
        if velocity_uncond is not None and self.unconditional.shape[1]:
            self.unconditional[rows, slots] = velocity_uncond[rows]

    def trajectory(self, seeds: Tensor, final: Tensor) -> Trajectory:
        """The kept steps, with the seeds and the clean latents of all samples."""
        return Trajectory(self.latents, self.velocities, self.log_probs, self.steps, seeds, final, self.unconditional)
