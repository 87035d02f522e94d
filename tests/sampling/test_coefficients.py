import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflowgrpo.kernels.sde_step import sde_step
from fastflowgrpo.sampling.coefficients import DYNAMICS, resolve_log_prob, step_coefficients

SCHEDULES = {
    "uniform": [1.0, 0.75, 0.5, 0.25, 0.0],
    "shifted": [1.0, 0.947, 0.857, 0.667, 0.3, 0.0],
    "from below 1": [0.8, 0.5, 0.1, 0.0],
    "one step": [1.0, 0.0],
}


def written_out_step(dynamics, sigmas, i, level, x, v):
    """Mean and std of step i by the formulas of the papers, one number at a time."""
    sigma, sigma_next = sigmas[i], sigmas[i + 1]
    dt = sigma_next - sigma
    if dynamics == "flow_sde":
        s = level * math.sqrt(sigma / (1 - (sigmas[1] if i == 0 else sigma)))
        mean = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * math.sqrt(-dt)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    if dynamics == "flow_cps":
        std = sigma_next * math.sin(level * math.pi / 2)
        return (1 - sigma_next) * x0 + math.sqrt(max(sigma_next**2 - std**2, 0)) * x1, std
    if dynamics == "dance_sde":
        return x + (v + level**2 * (x - (1 - sigma) * x0) / (2 * sigma**2)) * dt, level * math.sqrt(-dt)
    return x + v * dt, 0.0


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_formulas(dynamics, level, sigmas):
    coefficients = step_coefficients(sigmas, dynamics, level)
    for i, (x, v) in enumerate([(0.3, -1.2), (-0.8, 0.4), (1.7, 2.1), (0.0, 1.0), (1.0, 0.0)][: len(sigmas) - 1]):
        mean, std = written_out_step(dynamics, sigmas, i, level, x, v)
        assert (coefficients.c_x[i] * x + coefficients.c_v[i] * v).item() == pytest.approx(mean, rel=1e-12, abs=1e-14)
        assert coefficients.std[i].item() == pytest.approx(std, rel=1e-12, abs=1e-14)
    assert coefficients.sigma.tolist() == sigmas[:-1]
    assert coefficients.dt.tolist() == [b - a for a, b in pairwise(sigmas)]
    assert coefficients.c_x.dtype == torch.float64


@pytest.mark.parametrize("first", [1 - 2**-24, 1.0, 1 + 2**-23])
def test_first_step_is_recognised_by_its_index(first):
    """A float32 schedule starts at 1 up to rounding; the first step must not jump there."""
    exact = step_coefficients([1.0, 0.9, 0.0])
    rounded = step_coefficients([first, 0.9, 0.0])
    torch.testing.assert_close(rounded.std, exact.std, rtol=1e-5, atol=0)
    torch.testing.assert_close(rounded.c_x, exact.c_x, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dynamics", "level"), [("ode", 0.7), *((name, 0) for name in DYNAMICS)])
def test_without_noise_it_is_the_euler_step_exactly(dynamics, level):
    coefficients = step_coefficients(SCHEDULES["shifted"], dynamics, level)
    assert (coefficients.c_x == 1).all()
    assert torch.equal(coefficients.c_v, coefficients.dt)
    assert (coefficients.std == 0).all()


def test_ode_takes_increasing_schedules():
    coefficients = step_coefficients([0.0, 0.5, 1.0], "ode")
    assert coefficients.c_v.tolist() == [0.5, 0.5]


@given(
    steps=st.lists(st.floats(0.01, 1), min_size=1, max_size=12),
    level=st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_flow_cps_keeps_signal_and_noise_coefficients(steps, level):
    """With the true velocity, x_next is (1 - sigma_next) x_0 + noise with std sigma_next, for any number of steps."""
    sigmas = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0).flip(0)
    sigmas = sigmas / sigmas[0]
    c = step_coefficients(sigmas, "flow_cps", level)
    # x = (1 - sigma) x_0 + sigma x_1 and v = x_1 - x_0
    torch.testing.assert_close(c.c_x * (1 - c.sigma) - c.c_v, 1 - sigmas[1:], rtol=1e-12, atol=1e-12)
    kept = c.c_x * c.sigma + c.c_v
    torch.testing.assert_close((kept**2 + c.std**2).sqrt(), sigmas[1:], rtol=1e-12, atol=1e-12)


class GaussianFlow:
    """Data N(m, s0^2 I): the marginals and the velocity E[x_1 - x_0 | x] = slope x + offset have closed forms."""

    def __init__(self, m=0.8, s0=0.5):
        self.m, self.s0 = m, s0

    def mean(self, sigma):
        return (1 - sigma) * self.m

    def variance(self, sigma):
        return (1 - sigma) ** 2 * self.s0**2 + sigma**2

    def velocity(self, sigma):
        slope = (sigma - (1 - sigma) * self.s0**2) / self.variance(sigma)
        return slope, -slope * self.mean(sigma) - self.m

    def marginal_errors(self, sigmas, coefficients):
        """After each step, the error of the mean and the relative error of the variance of a population that started on
        its marginal; exact, since the velocity is linear."""
        mean, variance = self.mean(sigmas[0]), self.variance(sigmas[0])
        errors = []
        for i, sigma in enumerate(sigmas[:-1]):
            slope, offset = self.velocity(sigma)
            factor = coefficients.c_x[i] + coefficients.c_v[i] * slope
            mean = factor * mean + coefficients.c_v[i] * offset
            variance = factor**2 * variance + coefficients.std[i] ** 2
            errors.append((mean - self.mean(sigmas[i + 1]), variance / self.variance(sigmas[i + 1]) - 1))
        mean_errors, variance_errors = torch.tensor(errors, dtype=torch.float64).abs().unbind(1)
        return mean_errors, variance_errors


@pytest.mark.parametrize(("dynamics", "level"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("ode", 0)])
def test_marginals_converge_at_first_order(dynamics, level):
    # from sigma = 0.9: at 1 the diffusion of flow_sde has a pole, where the order is lower
    worst = []
    for num_steps in (160, 640):
        sigmas = torch.linspace(0.9, 0, num_steps + 1, dtype=torch.float64)
        means, variances = GaussianFlow().marginal_errors(sigmas, step_coefficients(sigmas, dynamics, level))
        assert means.max() < 1e-12
        worst.append(variances.max())
    assert worst[1] < 0.005
    assert 3.8 < worst[0] / worst[1] < 4.2


def test_flow_sde_forgets_its_first_step():
    """The whole schedule from sigma = 1, with the rule for the first step, ends at the distribution of the data."""
    final = []
    for num_steps in (40, 160, 640):
        sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        means, variances = GaussianFlow().marginal_errors(sigmas, step_coefficients(sigmas, "flow_sde", 0.7))
        assert means.max() < 1e-12
        assert variances[-1] < 0.011
        final.append(variances[sigmas[1:] <= 0.5].max())
    assert final[0] > 2 * final[1] > 4 * final[2]


@pytest.mark.parametrize(
    ("dynamics", "level", "num_steps", "start", "s0", "bias"),
    [
        ("flow_sde", 0.7, 160, 0.9, 0.5, 0.008),
        ("dance_sde", 0.3, 160, 0.9, 0.5, 0.014),
        # the data is a point, so the variance is the noise part's, which any number of steps keeps
        ("flow_cps", 0.5, 5, 1.0, 0.0, 0.0),
        ("flow_cps", 0.8, 40, 1.0, 0.0, 0.0),
    ],
)
def test_particles_keep_mean_and_variance(dynamics, level, num_steps, start, s0, bias):
    """`bias` bounds the discretisation error of the variance, as marginal_errors gives it."""
    flow = GaussianFlow(s0=s0)
    sigmas = torch.linspace(start, 0, num_steps + 1, dtype=torch.float64)
    coefficients = step_coefficients(sigmas, dynamics, level)
    assert flow.marginal_errors(sigmas[:-1], coefficients)[1].max() <= bias + 1e-12
    generator = torch.Generator().manual_seed(0)
    sample = flow.mean(start) + flow.variance(start) ** 0.5 * torch.randn(512, 128, generator=generator)
    for i, sigma in enumerate(sigmas[:-1].tolist()):
        slope, offset = flow.velocity(sigma)
        c = coefficients.at(torch.full((512,), i))
        sample, _ = sde_step(slope * sample + offset, sample, c.c_x, c.c_v, c.std, generator=generator)
        deviation = flow.variance(sigmas[i + 1].item()) ** 0.5
        count = sample.numel()
        assert abs(sample.mean().item() - flow.mean(sigmas[i + 1].item())) < 5 * deviation / count**0.5 + 1e-6
        if deviation > 0:
            assert abs(sample.var().item() / deviation**2 - 1) < 5 * (2 / count) ** 0.5 + bias


def test_at_gathers_float32_rows():
    coefficients = step_coefficients(SCHEDULES["shifted"])
    rows = coefficients.at(torch.tensor([3, 0, 3]))
    for name in ("sigma", "dt", "c_x", "c_v", "std"):
        value = getattr(rows, name)
        assert value.dtype == torch.float32
        assert torch.equal(value, getattr(coefficients, name)[[3, 0, 3]].float())


def test_at_puts_the_rows_on_the_device():
    assert step_coefficients([1.0, 0.0]).at(torch.tensor([0]), "meta").std.device.type == "meta"


def test_window_is_stochastic_inside_and_ode_outside():
    sigmas = SCHEDULES["shifted"]
    stochastic, ode = step_coefficients(sigmas), step_coefficients(sigmas, "ode")
    window = stochastic.window(1, 2)
    for name in ("sigma", "dt", "c_x", "c_v", "std"):
        inside, outside = getattr(stochastic, name), getattr(ode, name)
        assert torch.equal(getattr(window, name), torch.cat([outside[:1], inside[1:3], outside[3:]]))


def test_ode_outside_selects_by_row():
    rows = step_coefficients(SCHEDULES["shifted"]).at(torch.tensor([2, 2, 1]))
    chosen = rows.ode_outside(torch.tensor([True, False, True]))
    assert chosen.std.tolist() == [rows.std[0].item(), 0.0, rows.std[2].item()]
    assert chosen.c_x.tolist() == [rows.c_x[0].item(), 1.0, rows.c_x[2].item()]
    assert chosen.c_v[1] == rows.dt[1]
    assert chosen.c_v.dtype == torch.float32


def test_coefficients_do_not_share_the_schedule():
    sigmas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    coefficients = step_coefficients(sigmas, "ode")
    sigmas.zero_()
    assert coefficients.sigma.tolist() == [1.0, 0.5]


def test_auto_log_prob():
    assert {name: resolve_log_prob("auto", name) for name in DYNAMICS} == {
        "flow_sde": "normalised",
        "flow_cps": "unnormalised",
        "dance_sde": "normalised",
        "ode": "normalised",
    }
    assert resolve_log_prob("normalised", "flow_cps") == "normalised"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 0.0], "flowsde"), "unknown dynamics 'flowsde': choose one of flow_sde, flow_cps, dance_sde, ode"),
        (([1.0, 0.0], "flow_sde", -0.1), "noise_level -0.1 is out of range: flow_sde needs it a finite number"),
        (([1.0, 0.0], "flow_sde", math.nan), "noise_level nan is out of range"),
        (([1.0, 0.0], "flow_cps", 1.5), "noise_level 1.5 is out of range: flow_cps needs it between 0 and 1"),
        (([1.0],), r"sigmas has shape \(1,\): give one value per step and a final 0"),
        (([[1.0, 0.0]],), r"sigmas has shape \(1, 2\)"),
        (([0.0, 0.5, 1.0],), "sigmas must decrease strictly"),
        (([1.0, 0.5, 0.5, 0.0],), "sigmas must decrease strictly"),
        (([1.0, math.nan, 0.0],), "sigmas must decrease strictly"),
        (([1.0, 0.5],), "sigmas must end with 0, got 0.5: append it"),
        (([1000.0, 500.0, 0.0],), "sigmas must start at 1 or below, got 1000.0: divide timesteps"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        step_coefficients(*arguments)


@pytest.mark.parametrize(("start", "size"), [(-1, 2), (0, 0), (3, 3), (5, 1)])
def test_window_that_does_not_fit(start, size):
    with pytest.raises(ValueError, match="does not fit a schedule of 5 steps: choose start >= 0"):
        step_coefficients(SCHEDULES["shifted"]).window(start, size)


def test_unknown_log_prob():
    with pytest.raises(ValueError, match="unknown log_prob 'mean': choose one of auto, normalised, unnormalised"):
        resolve_log_prob("mean", "flow_sde")
