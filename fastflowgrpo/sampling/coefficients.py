"""Stochastic samplers of a flow-matching model as per-step coefficients.

Conventions: x_sigma = (1 - sigma) x_0 + sigma x_1 with x_1 ~ N(0, I), velocity v = x_1 - x_0; a step goes from sigma to
sigma_next < sigma, dt = sigma_next - sigma < 0. Every sampler here is a Gaussian step

    x_next ~ N(c_x x + c_v v, std^2 I)

so the sampling, the log-prob and the loss need three numbers per step of a schedule. `step_coefficients` computes them
and shows how they follow from the papers:

| dynamics    | source                                   | std                                                      |
|-------------|------------------------------------------|----------------------------------------------------------|
| `flow_sde`  | Flow-GRPO, arXiv 2505.05470              | s sqrt(-dt), s = noise_level sqrt(sigma / (1 - sigma))   |
| `flow_cps`  | Flow-CPS, arXiv 2509.05952               | sigma_next sin(noise_level pi / 2)                       |
| `dance_sde` | DanceGRPO, arXiv 2505.07818              | noise_level sqrt(-dt)                                    |
| `ode`       | Euler                                    | 0                                                        |

With small steps, `flow_sde` and `dance_sde` have the marginals of the ODE. `flow_cps` keeps the mean and the noise
level sigma at any number of steps, but its data part loses variance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from fastflowgrpo.kernels.sde_step import LOG_PROBS

DYNAMICS = ("flow_sde", "flow_cps", "dance_sde", "ode")


@dataclass(frozen=True)
class StepCoefficients:
    """Coefficients of denoising steps: x_next = c_x x + c_v v + std noise.

    `step_coefficients` returns float64 CPU tensors (num_steps,), one entry per step of a schedule; `at` takes the
    float32 entries of a batch from them. A step with std == 0 is an ODE step: it draws no noise and has no log-prob.
    """

    sigma: torch.Tensor
    """Noise level that the step starts from, in (0, 1]."""
    dt: torch.Tensor
    """sigma_next - sigma, negative."""
    c_x: torch.Tensor
    """Factor of the sample in the mean."""
    c_v: torch.Tensor
    """Factor of the velocity in the mean."""
    std: torch.Tensor
    """Standard deviation of the next sample."""

    def at(self, steps: torch.Tensor, device: torch.device | str | None = None) -> "StepCoefficients":
        """Coefficients of the given steps, one per row of a batch, without waiting for the device.

        Args:
            steps: int64 (B,), indices into the schedule.
            device: device of the result, by default the device of `steps`.

        Returns:
            The entries as float32 tensors of shape (B,) on `device`.
        """
        device = steps.device if device is None else device
        table = torch.stack([getattr(self, field.name) for field in fields(self)]).to(torch.float32)
        # non_blocking: a blocking copy would wait for all work queued on the device
        rows = table.to(device, non_blocking=True)[:, steps.to(device, non_blocking=True)]
        return StepCoefficients(*rows.unbind())

    def ode_outside(self, inside: torch.Tensor) -> "StepCoefficients":
        """The same steps, as ODE steps where `inside` is False; a bool tensor that broadcasts with the fields."""
        return StepCoefficients(
            sigma=self.sigma,
            dt=self.dt,
            c_x=torch.where(inside, self.c_x, 1.0),
            c_v=torch.where(inside, self.c_v, self.dt),
            std=torch.where(inside, self.std, 0.0),
        )

    def window(self, start: int, size: int) -> "StepCoefficients":
        """The schedule with only steps start, ..., start + size - 1 stochastic, the others ODE.

        Raises:
            ValueError: if the window is empty or leaves the schedule.
        """
        num_steps = len(self.sigma)
        if start < 0 or size < 1 or start + size > num_steps:
            raise ValueError(
                f"window of {size} steps from step {start} does not fit a schedule of {num_steps} steps: "
                f"choose start >= 0, size >= 1 and start + size <= {num_steps}"
            )
        step = torch.arange(num_steps, device=self.sigma.device)
        return self.ode_outside((step >= start) & (step < start + size))


def step_coefficients(
    sigmas: torch.Tensor | Sequence[float], dynamics: str = "flow_sde", noise_level: float = 0.7
) -> StepCoefficients:
    """Coefficients of every step of a schedule, in float64 on the CPU.

    The papers write a step with the predictions x_0 = x - sigma v and x_1 = x + (1 - sigma) v:

        flow_sde   mean = x + [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dt,               std = s sqrt(-dt)
        dance_sde  mean = x + [v + eta^2 / (2 sigma^2) (x - (1 - sigma) x_0)] dt,         std = eta sqrt(-dt)
        flow_cps   mean = (1 - sigma_next) x_0 + sqrt(sigma_next^2 - std^2) x_1,          std = sigma_next sin(a pi / 2)

    with s = a sqrt(sigma / (1 - sigma)); a and eta are the noise level. In both SDEs the bracket is v + g^2 / (2 sigma)
    x_1, with g = s or g = eta, since x + (1 - sigma) v = x_1 and x - (1 - sigma) x_0 = sigma x_1. So

        mean = x + [v + k x_1] dt,    k = g^2 / (2 sigma)
             = (1 + k dt) x + [1 + k (1 - sigma)] dt v
        c_x  = 1 + k dt,    c_v = [1 + k (1 - sigma)] dt

    and for `flow_cps`, with kept = sqrt(sigma_next^2 - std^2) = sigma_next cos(a pi / 2),

        mean = (1 - sigma_next) (x - sigma v) + kept [x + (1 - sigma) v]
        c_x  = (1 - sigma_next) + kept,    c_v = kept (1 - sigma) - (1 - sigma_next) sigma

    Args:
        sigmas: (num_steps + 1,), `scheduler.sigmas` of diffusers. They decrease strictly from at most 1 to exactly 0;
            the ODE takes any schedule.
        dynamics: one of `DYNAMICS`.
        noise_level: a of `flow_sde` (0.7 in the paper) and `flow_cps` (at most 1), eta of `dance_sde`; 0 is the ODE.

    Raises:
        ValueError: the dynamics is unknown, the noise level is out of range, or sigmas is not such a schedule.
    """
    check_dynamics(dynamics, noise_level)
    schedule = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach().clone()
    if schedule.ndim != 1 or len(schedule) < 2:
        raise ValueError(
            f"sigmas has shape {tuple(schedule.shape)}: give one value per step and a final 0, shape (num_steps + 1,)"
        )
    if dynamics == "ode" or noise_level == 0:
        dt = schedule.diff()
        return StepCoefficients(schedule[:-1], dt, c_x=torch.ones_like(dt), c_v=dt.clone(), std=torch.zeros_like(dt))
    _check_schedule(schedule)
    if dynamics == "flow_cps":
        return _cps_coefficients(schedule, noise_level)
    return _sde_coefficients(schedule, dynamics, noise_level)


def _sde_coefficients(schedule: torch.Tensor, dynamics: str, noise_level: float) -> StepCoefficients:
    sigma, dt = schedule[:-1], schedule.diff()
    diffusion = torch.full_like(sigma, noise_level**2)  # g^2
    if dynamics == "flow_sde":
        # 1 - sigma is 0 at the first step, where Flow-GRPO's code uses the next sigma. This goes by index, because the
        # first sigma may differ from 1 by rounding.
        data_level = 1 - sigma
        data_level[0] = 1 - schedule[1]
        diffusion = noise_level**2 * sigma / data_level
    k = diffusion / (2 * sigma)
    c_x = 1 + k * dt
    c_v = (1 + k * (1 - sigma)) * dt
    return StepCoefficients(sigma, dt, c_x, c_v, std=torch.sqrt(-diffusion * dt))


def _cps_coefficients(schedule: torch.Tensor, noise_level: float) -> StepCoefficients:
    sigma, sigma_next = schedule[:-1], schedule[1:]
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    kept = sigma_next * math.cos(noise_level * math.pi / 2)
    c_x = (1 - sigma_next) + kept
    c_v = kept * (1 - sigma) - (1 - sigma_next) * sigma
    return StepCoefficients(sigma, schedule.diff(), c_x, c_v, std)


def resolve_log_prob(log_prob: str, dynamics: str) -> str:
    """The log-prob definition that "auto" means: "unnormalised" for `flow_cps`, as in the code of Flow-GRPO, and
    "normalised" for the others. Any other name of `LOG_PROBS` is returned unchanged.

    Raises:
        ValueError: the name is neither "auto" nor one of `LOG_PROBS`.
    """
    if log_prob in LOG_PROBS:
        return log_prob
    if log_prob != "auto":
        raise ValueError(f"unknown log_prob {log_prob!r}: choose one of auto, {', '.join(LOG_PROBS)}")
    return "unnormalised" if dynamics == "flow_cps" else "normalised"


def check_dynamics(dynamics: str, noise_level: float) -> None:
    """Raises ValueError if the dynamics is unknown or the noise level is out of its range."""
    if dynamics not in DYNAMICS:
        raise ValueError(f"unknown dynamics {dynamics!r}: choose one of {', '.join(DYNAMICS)}")
    highest = 1.0 if dynamics == "flow_cps" else math.inf
    if not (0 <= noise_level <= highest and math.isfinite(noise_level)):
        allowed = "between 0 and 1" if dynamics == "flow_cps" else "a finite number, at least 0"
        raise ValueError(f"noise_level {noise_level} is out of range: {dynamics} needs it {allowed}")


def _check_schedule(schedule: torch.Tensor) -> None:
    if not bool((schedule[1:] < schedule[:-1]).all()):
        raise ValueError(f"sigmas must decrease strictly, from noise to data: {schedule.tolist()}")
    # a shifted float32 schedule can start one rounding error above 1
    if schedule[0] > 1 + 1e-6:
        raise ValueError(f"sigmas must start at 1 or below, got {schedule[0]}: divide timesteps by num_train_timesteps")
    if schedule[-1] != 0:
        raise ValueError(f"sigmas must end with 0, got {schedule[-1]}: append it to the sigmas of the steps")
