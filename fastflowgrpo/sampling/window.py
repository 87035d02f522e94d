"""The steps of groups inside, before and after their windows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastflowgrpo.sampling.coefficients import StepCoefficients


def tail_schedule(sigmas: Tensor, tail_steps: int | None) -> Tensor:
    """Sigmas (m + 1,) of the steps after a window: of at most `tail_steps` that divide the interval evenly by index.

    Args:
        sigmas: (n + 1,), from the end of the window to 0.
        tail_steps: None for all n steps.
    """
    num_steps = len(sigmas) - 1
    if tail_steps is None or tail_steps >= num_steps:
        return sigmas
    position = torch.linspace(0, num_steps, tail_steps + 1, dtype=torch.float64)
    lower = position.long().clamp(max=num_steps - 1)
    return torch.lerp(sigmas[lower].double(), sigmas[lower + 1].double(), position - lower)


def rollout_passes(
    start: int, window_size: int, num_steps: int, group_size: int, same_noise: bool, tail_steps: int | None
) -> int:
    """How many samples `sample_groups` passes through the model for a group whose window begins with step `start`."""
    after = num_steps - start - window_size
    if tail_steps is not None:
        after = min(after, tail_steps)
    shared = start + 1 if same_noise else 0
    return shared + (start + window_size + after - shared) * group_size


def steps_outside(
    coefficients: StepCoefficients, starts: Sequence[int], window_size: int, tail_steps: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The sigmas of each group's steps before and after its window."""
    sigmas = torch.cat([coefficients.sigma, coefficients.sigma.new_zeros(1)])
    before = [sigmas[: start + 1] for start in starts]
    return before, [tail_schedule(sigmas[start + window_size :], tail_steps) for start in starts]


@dataclass
class WindowSchedule:
    """Steps of B samples: stochastic inside the window of the sample's group, ODE outside it."""

    group: Tensor
    """int64 (B,) on the CPU: the group of each sample."""
    distinct: tuple[slice, Tensor | slice]
    """Samples that differ before the first step, and for each of all samples the one among them that it equals: one of
    each group with equal noise, otherwise all."""
    first_step: Tensor
    """int64 (B,) on the CPU: the first step of each sample's window."""
    steps: Tensor
    """int64 (B, num_steps) on the CPU: the index in the model's schedule of each step that is taken."""
    in_window: Tensor
    """bool (B, num_steps) on the CPU."""
    draws_noise: list[bool]
    """For each step, whether any sample draws noise."""
    offsets: list[int] | list[Tensor]
    """For each step, the offset of its noise: a number, or int64 (B,) on the device of the policy."""
    sigma: Tensor
    """float32 (num_steps, B) on the device of the policy, like c_x, c_v and std."""
    c_x: Tensor
    c_v: Tensor
    std: Tensor

    def coefficients(self, step: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """c_x, c_v and std (B,) of a step; std is the number 0 if no sample draws noise."""
        return self.c_x[step], self.c_v[step], self.std[step] if self.draws_noise[step] else 0.0


def window_schedule(
    coefficients: StepCoefficients,
    starts: Sequence[int],
    window_size: int,
    group_size: int,
    device: torch.device,
    windows_together: bool,
    same_noise: bool,
) -> WindowSchedule:
    """The steps of the windows alone if they are taken together, otherwise the whole schedule for every sample."""
    group = torch.arange(len(starts)).repeat_interleave(group_size)
    first_step = torch.tensor(starts)[group]
    offsets: list[int] | list[Tensor]
    if windows_together:
        steps = first_step[:, None] + torch.arange(window_size)
        offsets = list((steps.T + 1).to(device, non_blocking=True))
    else:
        steps = torch.arange(len(coefficients.dt)).expand(len(group), -1)
        offsets = list(range(1, len(coefficients.dt) + 1))
    in_window = (steps >= first_step[:, None]) & (steps < first_step[:, None] + window_size)
    rows = StepCoefficients(*(getattr(coefficients, field.name)[steps] for field in fields(coefficients)))
    rows = rows.ode_outside(in_window)
    per_step = (rows.sigma, rows.c_x, rows.c_v, rows.std)
    distinct: tuple[slice, Tensor | slice] = slice(None), slice(None)
    if same_noise:
        distinct = slice(None, None, group_size), group.to(device, non_blocking=True)
    return WindowSchedule(
        group,
        distinct,
        first_step,
        steps,
        in_window,
        (rows.std > 0).any(0).tolist(),
        offsets,
        *(tensor.T.to(device, torch.float32, non_blocking=True) for tensor in per_step),
    )
