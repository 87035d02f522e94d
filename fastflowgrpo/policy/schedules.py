"""The noise schedules of the families whose pipelines pass sigmas and a shift to their scheduler."""

from copy import deepcopy

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


def token_shift(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """Return the shift mu of FLUX.1, Qwen-Image and Z-Image, which grows with the tokens of an image."""
    config = scheduler.config
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def shifted_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, mu: float) -> Tensor:
    """Return sigmas from 1 to 0, evenly spaced and then shifted: (num_steps + 1,), float32 on the CPU.

    Args:
        scheduler: stays as it is.
        num_steps: sampling steps.
        mu: the shift; a scheduler without dynamic shifting has its own.
    """
    scheduler = deepcopy(scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    return scheduler.sigmas.cpu()
