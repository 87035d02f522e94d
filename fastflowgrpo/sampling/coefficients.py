"""Stochastic samplers of a flow-matching model as per-step coefficients.

Conventions: x_sigma = (1 - sigma) x_0 + sigma x_1 with x_1 ~ N(0, I), velocity v = x_1 - x_0; a step goes from sigma to
sigma_next < sigma, dt = sigma_next - sigma < 0. Every sampler here is a Gaussian step

    x_next ~ N(c_x x + c_v v, std^2 I)

so three numbers per (schedule, step) are all that the sampling, the log-prob and the loss need of it:

| dynamics    | source                                   | std                                                      |
|-------------|------------------------------------------|----------------------------------------------------------|
| `flow_sde`  | Flow-GRPO, arXiv 2505.05470              | s sqrt(-dt), s = noise_level sqrt(sigma / (1 - sigma))   |
| `flow_cps`  | Flow-CPS, arXiv 2509.05952               | sigma_next sin(noise_level pi / 2)                       |
| `dance_sde` | DanceGRPO, arXiv 2505.07818              | noise_level sqrt(-dt)                                    |
| `ode`       | Euler                                    | 0                                                        |

As steps get small, `flow_sde` and `dance_sde` tend to the marginals of the ODE. `flow_cps` keeps the mean and the noise
level sigma at any number of steps, but the data part loses variance.
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

    As `step_coefficients` makes them, fields are float64 CPU tensors of shape (num_steps,), one entry per step of a
    schedule; `at` picks the float32 entries of a batch. A step with std == 0 is an ODE step: it draws no noise and has
    no log-prob.
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
            device: where the result lives; the device of `steps` by default.

        Returns:
            The entries as float32 tensors of shape (B,) on `device`.
        """
        device = steps.device if device is None else device
        table = torch.stack([getattr(self, field.name) for field in fields(self)]).to(torch.float32)
        # non_blocking: a blocking copy would wait for all work queued on the device
        rows = table.to(device, non_blocking=True)[:, steps.to(device, non_blocking=True)]
        return StepCoefficients(*rows.unbind())

    def ode_outside(self, inside: torch.Tensor) -> "StepCoefficients":
        """The same steps, ODE ones where the bool tensor `inside`, of the shape of the fields, is False."""
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

    Args:
        sigmas: (num_steps + 1,), `scheduler.sigmas` of diffusers; strictly decreasing from at most 1 to exactly 0, but
            for the ODE, which takes any schedule.
        dynamics: one of `DYNAMICS`.
        noise_level: a of `flow_sde` (0.7 in the paper) and `flow_cps` (at most 1), eta of `dance_sde`; 0 is the ODE.

    Raises:
        ValueError: for an unknown dynamics, a noise level out of its range, or sigmas that are no such schedule.
    """
    check_dynamics(dynamics, noise_level)
    schedule = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach().clone()
    if schedule.ndim != 1 or len(schedule) < 2:
        raise ValueError(
            f"sigmas has shape {tuple(schedule.shape)}: give one value per step and a final 0, shape (num_steps + 1,)"
        )
    sigma, sigma_next = schedule[:-1], schedule[1:]
    dt = sigma_next - sigma
    if dynamics == "ode" or noise_level == 0:
        return StepCoefficients(sigma, dt, c_x=torch.ones_like(dt), c_v=dt.clone(), std=torch.zeros_like(dt))
    _check_schedule(schedule)
    if dynamics == "flow_cps":
        # mean = (1 - sigma_next) x_0 + kept x_1, with x_0 = x - sigma v and x_1 = x + (1 - sigma) v
        std = sigma_next * math.sin(noise_level * math.pi / 2)
        kept = sigma_next * math.cos(noise_level * math.pi / 2)
        c_x = (1 - sigma_next) + kept
        c_v = kept * (1 - sigma) - (1 - sigma_next) * sigma
        return StepCoefficients(sigma, dt, c_x, c_v, std)
    if dynamics == "flow_sde":
        # 1 - sigma is 0 at the first step: upstream puts the next sigma there; by index, for sigma is 1 up to rounding
        data_level = 1 - sigma
        data_level[0] = 1 - schedule[1]
        diffusion = noise_level**2 * sigma / data_level
    else:
        diffusion = torch.full_like(sigma, noise_level**2)
    # mean = x + [v + diffusion / (2 sigma) (x + (1 - sigma) v)] dt
    correction = diffusion / (2 * sigma)
    c_x = 1 + correction * dt
    c_v = (1 + correction * (1 - sigma)) * dt
    return StepCoefficients(sigma, dt, c_x, c_v, std=torch.sqrt(-diffusion * dt))


def resolve_log_prob(log_prob: str, dynamics: str) -> str:
    """The log-prob definition meant by "auto": "unnormalised" for `flow_cps` as upstream, "normalised" for the others.

    Raises:
        ValueError: for a name that is neither "auto" nor one of `LOG_PROBS`.
    """
    if log_prob in LOG_PROBS:
        return log_prob
    if log_prob != "auto":
        raise ValueError(f"unknown log_prob {log_prob!r}: choose one of auto, {', '.join(LOG_PROBS)}")
    return "unnormalised" if dynamics == "flow_cps" else "normalised"


def check_dynamics(dynamics: str, noise_level: float) -> None:
    """Raises ValueError for an unknown dynamics or a noise level out of its range."""
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
