"""The second-order solver: diffusers' formulas, its order, and what it gives a rollout."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy import load_policy
from fastflowgrpo.sampling.coefficients import step_coefficients
from fastflowgrpo.sampling.ode import dpm_solver_factors, sample_ode
from fastflowgrpo.sampling.rollout import sample_clean_groups, sample_groups, sample_seeds

MEAN, STD = 1.5, 0.4


class GaussianPolicy:
    """The exact velocity of data N(MEAN, STD^2), on a schedule that is linear in sigma."""

    dtype, device = torch.float64, torch.device("cpu")

    def sigmas(self, num_steps, shape):
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def velocity(self, latents, sigma, conditioning):
        t = sigma.double().view(-1, 1)
        variance = ((1 - t) * STD) ** 2 + t**2
        slope = (t - (1 - t) * STD**2) / variance  # of E[x_1 - x_0 | x_t] in x_t - E[x_t]
        return -MEAN + slope * (latents - (1 - t) * MEAN)


def error(solver, num_steps):
    """Of the samples of the solver: the ODE maps noise z to MEAN + STD z."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    samples = sample_ode(GaussianPolicy(), {}, num_steps, noise, solver=solver)
    return float((samples - (MEAN + STD * noise)).abs().max())


def test_the_error_falls_with_the_square_of_the_step():
    """Up to a logarithm, since lambda is infinite at the end of the schedule."""
    orders = {solver: math.log2(error(solver, 640) / error(solver, 1280)) for solver in ("euler", "dpm_solver")}
    assert orders["euler"] == pytest.approx(1, abs=0.02)
    assert 1.7 < orders["dpm_solver"] < 2.1
    assert error("dpm_solver", 20) < error("euler", 80)


@pytest.mark.parametrize(("solver", "lowest", "highest"), [("euler", 0.9, 1.1), ("dpm_solver", 1.5, 2.1)])
def test_a_shorter_tail_converges_to_the_full_one(solver, lowest, highest):
    """With the order of its solver, for groups whose windows end at different noise levels."""
    policy, num_steps = GaussianPolicy(), 1024
    coefficients = step_coefficients(policy.sigmas(num_steps, (8,)), "flow_sde", 0.7)

    def rollout(**tail):
        groups = policy, {}, coefficients, [0, 200], 200, 2, sample_seeds([5, 6], 2), (8,)
        return sample_groups(*groups, keep_steps=False, **tail).final

    exact = rollout(solver="dpm_solver")
    coarse, fine = ((rollout(tail_steps=n, solver=solver) - exact).norm(dim=1) for n in (40, 80))
    orders = (coarse / fine).log2()
    assert (lowest < orders).all() and (orders < highest).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("num_steps", [2, 3, 10])
def test_steps_are_those_of_diffusers(num_steps):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(num_steps)
    factors = dpm_solver_factors(scheduler.sigmas)
    generator = torch.Generator().manual_seed(0)
    sample = expected = torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    previous = torch.zeros_like(sample)
    for (of_sample, of_clean, of_previous), sigma, timestep in zip(
        factors, scheduler.sigmas[:-1], scheduler.timesteps, strict=True
    ):
        velocity = torch.randn(sample.shape, generator=generator, dtype=torch.float64)
        clean = sample - sigma * velocity
        sample, previous = of_sample * sample + of_clean * clean + of_previous * previous, clean
        expected = scheduler.step(velocity, timestep, expected).prev_sample
        torch.testing.assert_close(sample, expected.double(), rtol=1e-4, atol=1e-5)


def test_the_first_and_the_last_step_are_of_first_order():
    factors = dpm_solver_factors(torch.tensor([1.0, 0.7, 0.3, 0.0]))
    assert factors[0].tolist() == pytest.approx([0.7, 0.3, 0.0])
    assert factors[1, 2] == 0  # after sigma = 1
    assert factors[2].tolist() == [0.0, 1.0, 0.0]
    assert dpm_solver_factors(torch.tensor([0.9, 0.6, 0.3, 0.0]))[1, 2] < 0


def test_a_rollout_without_steps_is_the_one_of_the_ode_dynamics():
    """With euler, bit for bit; dpm_solver ends nearby."""
    policy = load_policy("shapes", PolicyConfig(lora_rank=1))
    conditioning, shape = policy.encode(["a red circle", "two squares"]), policy.latent_shape(None, None)
    coefficients = step_coefficients(policy.sigmas(20, shape), "ode")
    seeds = sample_seeds([5, 6], 3)
    expected = sample_groups(policy, conditioning, coefficients, [0, 0], 3, 3, seeds, shape, keep_steps=False)
    euler, dpm_solver = (
        sample_clean_groups(policy, conditioning, 20, 3, seeds, shape, solver=solver)
        for solver in ("euler", "dpm_solver")
    )
    assert torch.equal(euler.final, expected.final)
    assert torch.equal(euler.seeds, expected.seeds)
    assert euler.latents.shape[:2] == euler.velocities.shape[:2] == euler.log_probs.shape == (6, 0)
    exact = sample_clean_groups(policy, conditioning, 200, 3, seeds, shape).final
    errors = [(rollout.final - exact).norm() for rollout in (euler, dpm_solver)]
    assert errors[1] < 0.6 * errors[0]


def test_an_unknown_solver_is_an_error():
    with pytest.raises(ValueError, match="unknown solver 'heun': choose one of euler, dpm_solver"):
        sample_ode(GaussianPolicy(), {}, 4, torch.zeros(1, 1), solver="heun")
