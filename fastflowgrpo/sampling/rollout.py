"""Sampling the groups of an epoch, and keeping the steps that the update trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import guided_velocity, sde_step
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.policy.guidance import GuidanceScale, guidance_at
from fastflowgrpo.sampling.coefficients import StepCoefficients
from fastflowgrpo.sampling.conditioning import expand_row, repeat_rows
from fastflowgrpo.sampling.ode import branch_velocities, sample_ode, solve_rows
from fastflowgrpo.sampling.window import WindowSchedule, steps_outside, window_schedule


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

    def part(self, samples: slice) -> "Trajectory":
        """Some of the samples, in the same memory."""
        return type(self)(*(getattr(self, field.name)[samples] for field in fields(self)))


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
    guidance_scale: GuidanceScale = 1.0,
    same_noise: bool = False,
    tail_steps: int | None = None,
    solver: str = "euler",
    possible_starts: Sequence[int] = (),
    log_prob: str = "normalised",
    keep_steps: bool = True,
    keep_velocities: bool = False,
    keep_unconditional: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> Trajectory:
    """Samples group_size images per prompt, by the SDE inside each group's window and by the ODE outside it.

    All samples take the same step of the schedule at a time. With `same_noise`, `tail_steps` or another solver than
    "euler", all windows begin with the same pass instead: each group comes to its window by its own number of steps,
    and goes on from it by its own. So a step of the windows has the whole batch, as its replay in the update.

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
        same_noise: start all samples of a group from the same initial noise. They are equal up to the first step of
            the window, so that this one's velocity, and all steps before it, are computed once per group.
        tail_steps: most steps after the window, see `tail_schedule`.
        solver: "euler" or "dpm_solver", of the steps after the window.
        possible_starts: starts of other ranks' windows, if ranks must run equally many passes, as for a sharded model.
        log_prob: "normalised" or "unnormalised", see `sde_step`.
        keep_steps: keep the steps of the windows; otherwise the trajectory has only the clean latents and the seeds.
        keep_velocities: keep the velocities of these steps too.
        keep_unconditional: keep their unconditional velocities; needs `unconditional`.
        on_step: called once per step of the schedule, for a progress bar.
    """
    noise_seeds = seeds.to(policy.device, non_blocking=True)
    initial_seeds = noise_seeds[::group_size] if same_noise else noise_seeds
    sample = philox_normal(initial_seeds, 0, (len(initial_seeds), *shape)).to(policy.dtype)
    windows_together = same_noise or tail_steps is not None or solver != "euler"
    schedule = window_schedule(
        coefficients, starts, window_size, group_size, policy.device, windows_together, same_noise
    )
    of_groups = conditioning
    conditioning = repeat_rows(of_groups, schedule.group.to(policy.device, non_blocking=True))
    guidance = (unconditional, guidance_scale)
    if windows_together:
        before, after = steps_outside(coefficients, [*starts, *possible_starts], window_size, tail_steps)
        most = max(map(len, before)) - 1, max(map(len, after)) - 1
        on_step = _evenly(on_step, len(coefficients.sigma), most[0] + window_size + most[1])
        if same_noise:
            each = torch.arange(len(starts))
            sample = solve_rows(policy, sample, of_groups, before, each, "euler", *guidance, on_step, most[0])
            sample = sample.repeat_interleave(group_size, 0)
        else:
            rows = conditioning, before, schedule.group
            sample = solve_rows(policy, sample, *rows, "euler", *guidance, on_step, most[0])
    guided = unconditional is not None
    kept = _KeptSteps(sample, schedule, window_size * keep_steps, keep_velocities, keep_unconditional, guided)
    sample = _take_steps(policy, sample, conditioning, schedule, noise_seeds, log_prob, kept, *guidance, on_step)
    if windows_together:
        sample = solve_rows(policy, sample, conditioning, after, schedule.group, solver, *guidance, on_step, most[1])
    return kept.trajectory(noise_seeds, sample)


def _take_steps(
    policy: Policy,
    sample: Tensor,
    conditioning: Conditioning,
    schedule: WindowSchedule,
    noise_seeds: Tensor,
    log_prob: str,
    kept: "_KeptSteps",
    unconditional: Conditioning | None,
    guidance_scale: GuidanceScale,
    on_step: Callable[[], object],
) -> Tensor:
    """The sample (B, ...) after the steps of a schedule; `kept` stores those inside the windows."""
    for i in range(len(schedule.sigma)):
        distinct, repeated = schedule.distinct if i == 0 else (slice(None), slice(None))
        inputs = sample[distinct], schedule.sigma[i][distinct], repeat_rows(conditioning, distinct)
        branches = branch_velocities(policy, *inputs, expand_row(unconditional, inputs[2]))
        velocity = branches[0][repeated]
        velocity_uncond = None if branches[1] is None else branches[1][repeated]
        scale = guidance_at(policy, guidance_scale, schedule.sigma[i])
        next_sample, step_log_prob = sde_step(
            velocity,
            sample,
            *schedule.coefficients(i),
            velocity_uncond=velocity_uncond,
            guidance_scale=scale,
            seed=noise_seeds if schedule.draws_noise[i] else None,
            offset=schedule.offsets[i],
            log_prob=log_prob,
        )
        if kept.velocities.shape[1]:
            velocity = guided_velocity(velocity, velocity_uncond, scale)
        kept.store(i, sample, next_sample, step_log_prob, velocity, velocity_uncond)
        sample = next_sample
        on_step()
    return sample


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
    guidance_scale: GuidanceScale = 1.0,
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


def _evenly(on_step: Callable[[], object], count: int, passes: int) -> Callable[[], None]:
    """A function that is called after each of so many passes and calls `on_step` `count` times in all."""
    done = 0

    def after_pass() -> None:
        nonlocal done
        done += 1
        for _ in range(count * done // passes - count * (done - 1) // passes):
            on_step()

    return after_pass


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
        schedule: WindowSchedule,
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
        first_step = schedule.first_step
        slots = [step[samples] - first_step[samples] for step, samples in zip(schedule.steps.T, rows, strict=True)]
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
