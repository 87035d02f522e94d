"""Sampling with the ODE: evaluation images, rollouts without log-probs, and the steps outside a window.

Two solvers go through the schedule of the model's pipeline, or through a part of it:

    euler       x_next = x + dt v
    dpm_solver  DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) for flow matching, alpha = 1 - sigma:
                with lambda = log(alpha / sigma), h = lambda_next - lambda and r = h_previous / h
                x_next = sigma_next / sigma x + alpha_next (1 - e^-h) [x0 + (x0 - x0_previous) / (2 r)],
                x0 = x - sigma v

The second needs one velocity per step, as the first, and its error falls with the square of the step. The first step,
which has no x0_previous, and the last one, to sigma = 0, are of first order.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastflowgrpo.kernels.sde_step import guided_velocity, sde_step
from fastflowgrpo.policy import Conditioning, Policy
from fastflowgrpo.policy.guidance import GuidanceScale, guidance_at
from fastflowgrpo.sampling.coefficients import StepCoefficients, step_coefficients
from fastflowgrpo.sampling.conditioning import expand_row, repeat_rows

SOLVERS = ("euler", "dpm_solver")


@torch.no_grad()
def sample_ode(
    policy: Policy,
    conditioning: Conditioning,
    num_steps: int,
    noise: Tensor,
    *,
    unconditional: Conditioning | None = None,
    guidance_scale: GuidanceScale = 1.0,
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
        guidance_scale: classifier-free guidance scale, or two of them, see `guidance_at`.
        solver: "euler" or "dpm_solver".
        on_step: called after each step.

    Raises:
        ValueError: for another solver.
    """
    _check_solver(solver)
    sigmas = policy.sigmas(num_steps, tuple(noise.shape[1:]))
    sample, guidance = noise.to(policy.device, policy.dtype), (unconditional, guidance_scale)
    if solver == "dpm_solver":
        same = torch.zeros(len(sample), dtype=torch.int64)
        return solve_rows(policy, sample, conditioning, [sigmas], same, solver, *guidance, on_step)
    coefficients, steps = step_coefficients(sigmas, "ode"), range(num_steps)
    return ode_steps(policy, sample, conditioning, coefficients, steps, *guidance, on_step)


def ode_steps(
    policy: Policy,
    sample: Tensor,
    conditioning: Conditioning,
    coefficients: StepCoefficients,
    steps: Iterable[int],
    unconditional: Conditioning | None,
    guidance_scale: GuidanceScale,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The sample (B, ...) after Euler steps of the ODE.

    Args:
        steps: indices into the schedule of `coefficients`, of which only sigma and dt are used.
        conditioning, unconditional, guidance_scale: as in `sample_ode`.
        on_step: called after each step.
    """
    sigma = coefficients.sigma.to(policy.device, torch.float32, non_blocking=True)
    unconditional = expand_row(unconditional, conditioning)
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
            guidance_scale=guidance_at(policy, guidance_scale, step_sigma),
        )
        on_step()
    return sample


def solve_rows(
    policy: Policy,
    sample: Tensor,
    conditioning: Conditioning,
    schedules: Sequence[Tensor],
    schedule_of: Tensor,
    solver: str,
    unconditional: Conditioning | None,
    guidance_scale: GuidanceScale,
    on_step: Callable[[], object] = lambda: None,
    num_passes: int = 0,
) -> Tensor:
    """The sample (B, ...) after each row went through its own schedule, computed in float32.

    Every row begins with the first pass; a row whose schedule has ended takes no part in the further ones.

    Args:
        conditioning: one row per sample.
        schedules: sigmas (num_steps + 1,) each, which decrease strictly; for `dpm_solver` to 0.
        schedule_of: int64 (B,) on the CPU, the index of each sample's schedule.
        solver, unconditional, guidance_scale: as in `sample_ode`, with its errors.
        on_step: called after each pass.
        num_passes: passes to run at least; those beyond the longest schedule have one sample and change nothing.
    """
    _check_solver(solver)
    # (num_steps, B, 5), padded with zeros: sigma and the factors of x, v, x0 and x0_previous
    table = pad_sequence([_solver_table(sigmas.double(), solver) for sigmas in schedules])
    table = table[:, schedule_of].to(policy.device, torch.float32, non_blocking=True)
    num_steps = torch.tensor([len(sigmas) - 1 for sigmas in schedules])[schedule_of]
    previous_clean = torch.zeros_like(sample, dtype=torch.float32)
    begin = 0
    for end in num_steps[num_steps > 0].unique().tolist():
        rows = torch.from_numpy(np.flatnonzero(num_steps > begin)).to(policy.device, non_blocking=True)
        part, previous, of_rows = sample[rows], previous_clean[rows], repeat_rows(conditioning, rows)
        uncond_of_rows = expand_row(unconditional, of_rows)
        for step in table[begin:end, rows]:
            sigma, of_x, of_v, of_clean, of_previous = (value.view(-1, *[1] * (sample.ndim - 1)) for value in step.T)
            branches = branch_velocities(policy, part, sigma.flatten(), of_rows, uncond_of_rows)
            scale = guidance_at(policy, guidance_scale, sigma.flatten())
            velocity = guided_velocity(*branches, scale).float()
            clean = part.float() - sigma * velocity
            part = (of_x * part + of_v * velocity + of_clean * clean + of_previous * previous).to(policy.dtype)
            previous = clean
            on_step()
        sample, previous_clean = sample.index_copy(0, rows, part), previous_clean.index_copy(0, rows, previous)
        begin = end
    for _ in range(begin, num_passes):
        one = sample[:1], torch.ones(1, device=policy.device), repeat_rows(conditioning, slice(1))
        branch_velocities(policy, *one, expand_row(unconditional, one[2]))
        on_step()
    return sample


def _check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: choose one of {', '.join(SOLVERS)}")


def _solver_table(sigmas: Tensor, solver: str) -> Tensor:
    """The rows of a schedule in `solve_rows`' table, (num_steps, 5)."""
    sigma, dt = sigmas[:-1, None], sigmas.diff()[:, None]
    zero = torch.zeros_like(dt)
    if solver == "euler":
        return torch.cat([sigma, zero + 1, dt, zero, zero], 1)
    factors = dpm_solver_factors(sigmas)
    return torch.cat([sigma, factors[:, :1], zero, factors[:, 1:]], 1)


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
