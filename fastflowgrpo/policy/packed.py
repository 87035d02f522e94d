"""What FLUX.1 and Qwen-Image share: their transformers take latents packed into tokens."""

from abc import abstractmethod
from copy import deepcopy
from typing import Any

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.latents import latent_size, no_frames, pack, unpack


class PackedPolicy(DiffusersPolicy):
    """Latents are (C, H, W), packed into tokens of 2 x 2 for the transformer alone."""

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        no_frames(num_frames)
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        return (self.module.config.in_channels // 4, *latent_size(height, width, factor, 2, (default, default)))

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        """The schedule of the pipeline, shifted by the number of tokens of a sample (C, H, W)."""
        scheduler = deepcopy(self.pipeline.scheduler)
        config = scheduler.config
        mu = calculate_shift(
            shape[1] // 2 * (shape[2] // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return scheduler.sigmas.cpu()

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        velocity = self.transformer(
            hidden_states=pack(latents),
            # rounded as the pipelines round it
            timestep=(sigma * 1000).to(latents.dtype) / 1000,
            return_dict=False,
            **conditioning,
            **self.inputs(latents, sigma, conditioning),
        )[0]
        return unpack(velocity, *latents.shape[-2:])

    @abstractmethod
    def inputs(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        """What the family's transformer takes besides."""
