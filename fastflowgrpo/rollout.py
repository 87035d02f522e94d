"""Sampling groups of images, and what of it the update needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import sde_step
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.sde import StepCoefficients, step_coefficients


@dataclass
class Trajectory:
    """The trained steps of B samples, S each. Step j of a sample goes from latents[:, j] to latents[:, j + 1]."""

    latents: Tensor
    """(B, S + 1, ...) in the policy's dtype."""
    log_probs: Tensor
    """(B, S) float32: log-prob of each step when it was sampled."""
    steps: Tensor
    """(B, S) int64 on the CPU: index of each step in the schedule."""
    final: Tensor
    """(B, ...): the clean latents, to be decoded."""


def window_starts(low: int, high: int, seeds: Sequence[int]) -> list[int]:
    """First trained step of each group, drawn from [low, high) by the group's seed."""
    return [int(np.random.default_rng(seed).integers(low, high)) for seed in seeds]


def sample_seeds(seeds: Sequence[int], group_size: int) -> Tensor:
    """A seed for each sample of each group, (B,) int64: a function of the group's seed and the place in the group."""
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
    seeds: Sequence[int],
    shape: tuple[int, ...],
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    same_noise: bool = False,
    log_prob: str = "normalised",
    on_step: Callable[[], object] = lambda: None,
) -> Trajectory:
    """Sample group_size images for each prompt, stochastic inside each group's window and by the ODE outside.

    Nothing between the first step and the last waits for the device.

    Args:
        conditioning: a row per group.
        coefficients: the stochastic coefficients of the whole schedule.
        starts: first step of each group's window; the same for all its samples.
        seeds: one per group; all its noise is a function of it.
        shape: of one latent sample.
        unconditional: the empty prompt's conditioning, one row; needed if guidance_scale is not 1.
        on_step: called once per denoising step, for a progress bar.
    """
    num_steps, num_groups, device = len(coefficients.dt), len(starts), policy.device
    batch_size = num_groups * group_size
    group = torch.arange(num_groups).repeat_interleave(group_size)
    first = torch.tensor(starts)[group, None]
    step = torch.arange(num_steps)
    trained = (step >= first) & (step < first + window_size)
    rows = StepCoefficients(
        *(getattr(coefficients, name).expand(batch_size, -1) for name in ("sigma", "dt", "c_x", "c_v", "std"))
    ).ode_outside(trained)
    sigma, c_x, c_v, std = (
        t.T.to(device, torch.float32, non_blocking=True) for t in (rows.sigma, rows.c_x, rows.c_v, rows.std)
    )
    conditioning = repeat_rows(conditioning, group.to(device))
    unconditional = expand_row(unconditional, batch_size)

    of_sample = sample_seeds(seeds, group_size).to(device, non_blocking=True)
    of_noise = of_sample.view(-1, group_size)[:, :1].repeat_interleave(group_size) if same_noise else of_sample
    sample = philox_normal(of_noise, 0, (batch_size, *shape)).to(policy.dtype)
    latents = torch.empty(batch_size, window_size + 1, *shape, dtype=policy.dtype, device=device)
    log_probs = torch.empty(batch_size, window_size, device=device)
    inside = [torch.from_numpy(np.flatnonzero(of_step)) for of_step in trained.T]
    slots = [(i - first[of_step, 0]).to(device, non_blocking=True) for i, of_step in enumerate(inside)]
    inside = [of_step.to(device, non_blocking=True) for of_step in inside]
    for i in range(num_steps):
        velocity = policy.velocity(sample, sigma[i], conditioning)
        velocity_uncond = policy.velocity(sample, sigma[i], unconditional) if unconditional is not None else None
        next_sample, step_log_prob = sde_step(
            velocity,
            sample,
            c_x[i],
            c_v[i],
            std[i],
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance_scale,
            seed=of_sample,
            offset=i + 1,
            log_prob=log_prob,
        )
        latents[inside[i], slots[i]] = sample[inside[i]]
        latents[inside[i], slots[i] + 1] = next_sample[inside[i]]
        log_probs[inside[i], slots[i]] = step_log_prob[inside[i]]
        sample = next_sample
        on_step()
    return Trajectory(latents, log_probs, first + torch.arange(window_size), sample)


@torch.no_grad()
def sample_ode(
    policy: Policy,
    conditioning: Conditioning,
    num_steps: int,
    noise: Tensor,
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Clean latents (B, ...) by the ODE from given noise; a conditioning row per sample."""
    coefficients = step_coefficients(policy.sigmas(num_steps, tuple(noise.shape[1:])), "ode")
    batch_size, sample = len(noise), noise.to(policy.device, policy.dtype)
    sigma = coefficients.sigma.to(policy.device, torch.float32)
    unconditional = expand_row(unconditional, batch_size)
    for i in range(num_steps):
        at = sigma[i].expand(batch_size)
        velocity = policy.velocity(sample, at, conditioning)
        velocity_uncond = policy.velocity(sample, at, unconditional) if unconditional is not None else None
        sample, _ = sde_step(
            velocity,
            sample,
            1.0,
            float(coefficients.c_v[i]),
            0.0,
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance_scale,
        )
    return sample


def repeat_rows(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """The given rows of every tensor of a conditioning."""
    return {name: tensor[rows] for name, tensor in conditioning.items()}


def expand_row(conditioning: Conditioning | None, batch_size: int) -> Conditioning | None:
    """A conditioning of one row for a whole batch, without copies."""
    if conditioning is None:
        return None
    return {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in conditioning.items()}
