"""FLUX.1: dev, which takes a guidance as an input, and schnell."""

from functools import lru_cache

import torch
from diffusers import FluxPipeline
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.latents import latent_size, no_frames, pack, packed_sigmas, unpack
from fastflowgrpo.policy.sd3 import SD3Policy


class FluxPolicy(DiffusersPolicy):
    """The transformer of a `FluxPipeline`. Latents are (C, H, W), packed into tokens for the transformer alone."""

    lora_targets = (*SD3Policy.lora_targets, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

    def __init__(self, pipeline: FluxPipeline, config: PolicyConfig):
        super().__init__(pipeline, config)
        # Made on the host: once for each image size, for the copy to the device waits for it.
        self._positions = lru_cache(maxsize=8)(
            lambda h, w: pipeline._prepare_latent_image_ids(1, h, w, self.device, self.dtype)
        )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=self.sequence_length)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        no_frames(num_frames)
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        return (self.module.config.in_channels // 4, *latent_size(height, width, factor, 2, (default, default)))

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        return packed_sigmas(self.pipeline, num_steps, shape)

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        height, width = latents.shape[-2:]
        distilled = self.module.config.guidance_embeds
        velocity = self.transformer(
            hidden_states=pack(latents),
            # rounded as the pipeline rounds it
            timestep=(sigma * 1000).to(latents.dtype) / 1000,
            guidance=torch.full_like(sigma, self.config.distilled_guidance) if distilled else None,
            txt_ids=latents.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            img_ids=self._positions(height // 2, width // 2),
            return_dict=False,
            **conditioning,
        )[0]
        return unpack(velocity, height, width)
