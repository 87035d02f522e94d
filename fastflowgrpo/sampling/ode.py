"""Sampling with the ODE, by Euler steps: evaluation images, and the steps before a window."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastflowgrpo.kernels.sde_step import sde_step
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.sampling.coefficients import StepCoefficients, step_coefficients
from fastflowgrpo.sampling.conditioning import expand_row


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
    """Clean latents (B, ...) in the policy's dtype, by the ODE from given noise.

    Args:
        policy: computes the velocities.
        conditioning: one row per sample.
        num_steps: denoising steps.
        noise: (B, ...), the initial noise.
        unconditional: the empty prompt's conditioning, one row; needed if guidance_scale is not 1.
        guidance_scale: classifier-free guidance scale.
    """
    coefficients = step_coefficients(policy.sigmas(num_steps, tuple(noise.shape[1:])), "ode")
    sample, steps = noise.to(policy.device, policy.dtype), range(num_steps)
    return ode_steps(policy, sample, conditioning, coefficients, steps, unconditional, guidance_scale)


def ode_steps(
    policy: Policy,
    sample: Tensor,
    conditioning: Conditioning,
    coefficients: StepCoefficients,
    steps: Iterable[int],
    unconditional: Conditioning | None,
    guidance_scale: float,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The sample (B, ...) after Euler steps of the ODE.

    Args:
        steps: indices into the schedule of `coefficients`, of which only sigma and dt are used.
        conditioning, unconditional, guidance_scale: as in `sample_ode`.
        on_step: called after each step.
    """
    sigma = coefficients.sigma.to(policy.device, torch.float32, non_blocking=True)
    unconditional = expand_row(unconditional, len(sample))
    for i in steps:
        step_sigma = sigma[i].expand(len(sample))
        velocity, velocity_uncond = branch_velocities(policy, sample, step_sigma, conditioning, unconditional)
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


def branch_velocities(
    policy: Policy, sample: Tensor, sigma: Tensor, conditioning: Conditioning, unconditional: Conditioning | None
) -> tuple[Tensor, Tensor | None]:
    """The conditional and the unconditional velocity (B, ...); the latter is None if there is no `unconditional`.

    Args:
        sample: (B, ...).
        sigma: (B,), noise level of each sample.
        conditioning, unconditional: one row per sample.
    """
    velocity = policy.velocity(sample, sigma, conditioning)
    return velocity, None if unconditional is None else policy.velocity(sample, sigma, unconditional)
