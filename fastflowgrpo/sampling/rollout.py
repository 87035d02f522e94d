"""Sampling groups of images, and what of it the update needs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fastflowgrpo.kernels.philox import philox_normal
from fastflowgrpo.kernels.sde_step import guided_velocity, sde_step
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.sampling.coefficients import StepCoefficients, step_coefficients


@dataclass
class Trajectory:
    """The trained steps of B samples, S each. Step j of a sample goes from latents[:, j] to latents[:, j + 1]."""

    latents: Tensor
    """(B, S + 1, ...) in the policy's dtype; (B, 0, ...) if the steps are not kept."""
    velocities: Tensor
    """(B, S, ...): the velocity of each step, guided, as exact as it was; (B, 0, ...) if it is not kept."""
    log_probs: Tensor
    """(B, S) float32: log-prob of each step when it was sampled."""
    steps: Tensor
    """(B, S) int64 on the CPU: index of each step in the schedule."""
    seeds: Tensor
    """(B,) int64: what a sample's noise is a function of, with offsets from 0 (the initial noise) to the last step."""
    final: Tensor
    """(B, ...): the clean latents, to be decoded."""

    @classmethod
    def cat(cls, parts: Sequence["Trajectory"]) -> "Trajectory":
        """The samples of several trajectories, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def sliding_start(low: int, high: int, stride: int, epochs: int, epoch: int) -> int:
    """First trained step in an epoch of a window that moves from `low` to `high - 1` (MixGRPO, arXiv 2507.21802): by
    `stride` steps every `epochs` epochs. At the end it stays."""
    return min(low + stride * (epoch // epochs), high - 1)


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
    keep_steps: bool = True,
    keep_velocities: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> Trajectory:
    """Sample group_size images for each prompt, stochastic inside each group's window and by the ODE outside.

    Nothing between the first step and the last waits for the device. Before the first window the samples of a group
    with the same initial noise are one, and are computed once.

    Args:
        conditioning: a row per group.
        coefficients: the stochastic coefficients of the whole schedule.
        starts: first step of each group's window; the same for all its samples.
        seeds: one per group; all its noise is a function of it.
        shape: of one latent sample.
        unconditional: the empty prompt's conditioning, one row; needed if guidance_scale is not 1.
        same_noise: start all samples of a group from the same initial noise.
        keep_steps: keep the steps of the windows; without it the trajectory has the clean latents and the seeds alone.
        keep_velocities: keep the velocities of these steps too.
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

    of_sample = sample_seeds(seeds, group_size).to(device, non_blocking=True)
    shared = min(starts) if same_noise else 0
    of_noise = of_sample[::group_size] if same_noise else of_sample
    sample = philox_normal(of_noise, 0, (len(of_noise), *shape)).to(policy.dtype)
    if same_noise:
        prefix = range(shared)
        sample = _ode_steps(policy, sample, conditioning, coefficients, prefix, unconditional, guidance_scale, on_step)
        sample = sample.repeat_interleave(group_size, 0)
    conditioning = repeat_rows(conditioning, group.to(device, non_blocking=True))
    unconditional = expand_row(unconditional, batch_size)

    kept = window_size if keep_steps else 0
    latents = torch.empty(batch_size, kept + keep_steps, *shape, dtype=policy.dtype, device=device)
    # The policy's own output is exact in its dtype, what guidance makes of two is not.
    exact = policy.dtype if unconditional is None else torch.float32
    velocities = torch.empty(batch_size, kept * keep_velocities, *shape, dtype=exact, device=device)
    log_probs = torch.empty(batch_size, kept, device=device)
    noisy = (rows.std > 0).any(0).tolist()
    inside = [torch.from_numpy(np.flatnonzero(of_step)) for of_step in trained.T]
    slots = [(i - first[of_step, 0]).to(device, non_blocking=True) for i, of_step in enumerate(inside)]
    inside = [of_step.to(device, non_blocking=True) for of_step in inside]
    for i in range(shared, num_steps):
        velocity = policy.velocity(sample, sigma[i], conditioning)
        velocity_uncond = policy.velocity(sample, sigma[i], unconditional) if unconditional is not None else None
        next_sample, step_log_prob = sde_step(
            velocity,
            sample,
            c_x[i],
            c_v[i],
            std[i] if noisy[i] else 0.0,
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance_scale,
            seed=of_sample if noisy[i] else None,
            offset=i + 1,
            log_prob=log_prob,
        )
        if keep_steps:
            latents[inside[i], slots[i]] = sample[inside[i]]
            latents[inside[i], slots[i] + 1] = next_sample[inside[i]]
            log_probs[inside[i], slots[i]] = step_log_prob[inside[i]]
        if keep_steps and keep_velocities:
            guided = guided_velocity(velocity, velocity_uncond, guidance_scale)
            velocities[inside[i], slots[i]] = guided[inside[i]].to(exact)
        sample = next_sample
        on_step()
    return Trajectory(latents, velocities, log_probs, first + torch.arange(kept), of_sample, sample)


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
    sample, steps = noise.to(policy.device, policy.dtype), range(num_steps)
    return _ode_steps(policy, sample, conditioning, coefficients, steps, unconditional, guidance_scale)


def _ode_steps(
    policy: Policy,
    sample: Tensor,
    conditioning: Conditioning,
    coefficients: StepCoefficients,
    steps: Iterable[int],
    unconditional: Conditioning | None,
    guidance_scale: float,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The sample after the given steps of the schedule, taken by the ODE; a conditioning row per sample."""
    sigma = coefficients.sigma.to(policy.device, torch.float32, non_blocking=True)
    unconditional = expand_row(unconditional, len(sample))
    for i in steps:
        at = sigma[i].expand(len(sample))
        velocity = policy.velocity(sample, at, conditioning)
        velocity_uncond = policy.velocity(sample, at, unconditional) if unconditional is not None else None
        sample, _ = sde_step(
            velocity,
            sample,
            1.0,
            float(coefficients.dt[i]),
            0.0,
            velocity_uncond=velocity_uncond,
            guidance_scale=guidance_scale,
        )
        on_step()
    return sample


def repeat_rows(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """The given rows of every tensor of a conditioning."""
    return {name: tensor[rows] for name, tensor in conditioning.items()}


def expand_row(conditioning: Conditioning | None, batch_size: int) -> Conditioning | None:
    """A conditioning of one row for a whole batch, without copies."""
    if conditioning is None:
        return None
    return {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in conditioning.items()}
