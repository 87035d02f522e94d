"""Sampling with the ODE: evaluation images, rollouts without log-probs, and the steps before a window.

Two solvers go through the schedule of the model's pipeline:

    euler       x_next = x + dt v
    dpm_solver  DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) for flow matching, alpha = 1 - sigma:
                with lambda = log(alpha / sigma), h = lambda_next - lambda and r = h_previous / h
                x_next = sigma_next / sigma x + alpha_next (1 - e^-h) [x0 + (x0 - x0_previous) / (2 r)],
                x0 = x - sigma v

The second needs one velocity per step, as the first, and its error falls with the square of the step. The first step,
which has no x0_previous, and the last one, to sigma = 0, are of first order.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastflowgrpo.kernels.sde_step import guided_velocity, sde_step
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.sampling.coefficients import StepCoefficients, step_coefficients
from fastflowgrpo.sampling.conditioning import expand_row

SOLVERS = ("euler", "dpm_solver")


@torch.no_grad()
def sample_ode(
    policy: Policy,
    conditioning: Conditioning,
    num_steps: int,
    noise: Tensor,
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: float = 1.0,
    solver: str = "euler",
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Clean latents (B, ...) in the policy's dtype, by the ODE from given noise.

    Args:
        policy: computes the velocities.
        conditioning: one row per sample.
        num_steps: denoising steps.
        noise: (B, ...), the initial noise.
        unconditional: the empty prompt's conditioning, one row; needed if guidance_scale is not 1.
        guidance_scale: classifier-free guidance scale.
        solver: "euler" or "dpm_solver".
        on_step: called after each step.

    Raises:
        ValueError: for another solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(SOLVERS)}")
    sigmas = policy.sigmas(num_steps, tuple(noise.shape[1:]))
    if solver == "dpm_solver":
        sample = noise.to(policy.device, policy.dtype)
        return dpm_solver_steps(policy, sample, conditioning, sigmas, unconditional, guidance_scale, on_step)
    coefficients = step_coefficients(sigmas, "ode")
    sample, steps = noise.to(policy.device, policy.dtype), range(num_steps)
    return ode_steps(policy, sample, conditioning, coefficients, steps, unconditional, guidance_scale, on_step)


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


def dpm_solver_steps(
    policy: Policy,
    sample: Tensor,
    conditioning: Conditioning,
    sigmas: Tensor,
    unconditional: Conditioning | None,
    guidance_scale: float,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The sample (B, ...) after all steps of a schedule by DPM-Solver++ 2M, computed in float32.

    Args:
        sigmas: (num_steps + 1,), ends with 0.
        conditioning, unconditional, guidance_scale, on_step: as in `ode_steps`.
    """
    factors = dpm_solver_factors(sigmas).tolist()
    unconditional = expand_row(unconditional, len(sample))
    sigma = sigmas.to(policy.device, torch.float32, non_blocking=True)
    previous_clean = torch.zeros_like(sample, dtype=torch.float32)
    for i, (of_sample, of_clean, of_previous) in enumerate(factors):
        branches = branch_velocities(policy, sample, sigma[i].expand(len(sample)), conditioning, unconditional)
        velocity = guided_velocity(*branches, guidance_scale).float()
        clean = sample.float() - sigma[i] * velocity
        sample = (of_sample * sample + of_clean * clean + of_previous * previous_clean).to(policy.dtype)
        previous_clean = clean
        on_step()
    return sample


def dpm_solver_factors(sigmas: Tensor) -> Tensor:
    """Factors of x, x0 and x0_previous in each step of DPM-Solver++ 2M.

    Args:
        sigmas: (num_steps + 1,), strictly decreasing from at most 1 to 0.

    Returns:
        (num_steps, 3) float64.
    """
    sigma = sigmas.double()
    log_ratio = torch.log((1 - sigma) / sigma)  # lambda: -inf at sigma = 1 and inf at 0
    h = log_ratio.diff()
    data = (1 - sigma[1:]) * -torch.expm1(-h)
    # 1 / (2 r) = h / (2 h_previous): 0 without a previous step, after one from sigma = 1, and in the last step
    correction = torch.zeros_like(h)
    correction[1:-1] = h[1:-1] / (2 * h[:-2])
    return torch.stack([sigma[1:] / sigma[:-1], data * (1 + correction), -data * correction], 1)


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
