"""What FLUX.1 and Qwen-Image share: packed latents, and the names of the guidance arguments."""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.latents import latent_size, pack, reject_num_frames, unpack
from fastflowgrpo.policy.protocol import Conditioning
from fastflowgrpo.policy.schedules import shifted_sigmas, token_shift
from fastflowgrpo.policy.source_images import text_embeddings, with_source_tokens


class PackedPolicy(DiffusersPolicy):
    """Keeps latents as (C, H, W) and packs them into tokens of 2 x 2 only for the transformer."""

    @classmethod
    def guidance_arguments(cls, config: PolicyConfig, guidance_scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance_scale, "negative_prompt": ""} if guidance_scale != 1 else {}

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        reject_num_frames(num_frames)
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        return (self.module.config.in_channels // 4, *latent_size(height, width, factor, 2, (default, default)))

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        """Return the schedule of the pipeline, shifted by the number of tokens of a latent sample (C, H, W)."""
        scheduler = self.pipeline.scheduler
        return shifted_sigmas(scheduler, num_steps, token_shift(scheduler, shape[1] // 2 * (shape[2] // 2)))

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = pack(latents)
        velocity = self.transformer(
            hidden_states=with_source_tokens(tokens, conditioning, pack),
            # the pipelines round it like this
            timestep=(sigma * 1000).to(latents.dtype) / 1000,
            return_dict=False,
            **text_embeddings(conditioning),
            **self.extra_inputs(latents, sigma, conditioning),
        )[0]
        return unpack(velocity[:, : tokens.shape[1]], *latents.shape[-2:])

    @abstractmethod
    def extra_inputs(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return the arguments that only this family's transformer takes."""
