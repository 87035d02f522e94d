"""Wan 2.1, and Wan 2.2 TI2V-5B, text to video."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.latents import latent_size, latent_statistics
from fastflowgrpo.policy.protocol import Conditioning

DEFAULT_SIZE, DEFAULT_FRAMES = (480, 832), 81  # the pipeline's own


class WanPolicy(DiffusersPolicy):
    """The transformer of a `WanPipeline`. Latents are (C, F, H, W), videos (F, 3, H, W).

    The pipeline ships a UniPC solver. Here Euler steps go through the same sigmas, which its `flow_shift` shifts, and
    timesteps are not rounded to integers as UniPC's are. Wan 2.2's pipeline gives TI2V-5B a timestep per token, which
    is the same for all tokens without a source image; here there is one per video, and so less to compute.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    makes_videos = True

    def __init__(self, pipeline: WanPipeline, config: PolicyConfig):
        if pipeline.transformer_2 is not None or pipeline.config.boundary_ratio is not None:
            raise UserError(
                "this WanPipeline has two transformers, as Wan 2.2 A14B; Wan 2.1 and Wan 2.2 TI2V-5B are supported"
            )
        scheduler = pipeline.scheduler
        if not (isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("use_flow_sigmas")):
            raise UserError(
                f"the scheduler of this model, {type(scheduler).__name__}, does not use flow-matching sigmas"
            )
        super().__init__(pipeline, config)
        self._mean, self._std = latent_statistics(pipeline.vae)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.sequence_length
        )
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def example_conditioning(self, batch_size: int) -> Conditioning:
        shape = (batch_size, self.sequence_length, self.module.config.text_dim)
        return {"encoder_hidden_states": torch.empty(shape, dtype=self.dtype, device=self.device)}

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        config, factor = self.module.config, self.pipeline.vae_scale_factor_temporal
        num_frames = DEFAULT_FRAMES if num_frames is None else num_frames
        if num_frames % factor != 1 % factor:
            raise UserError(
                f"rollout.num_frames {num_frames} is not 1 more than a multiple of {factor}, as this model needs"
            )
        size = latent_size(height, width, self.pipeline.vae_scale_factor_spatial, config.patch_size[1], DEFAULT_SIZE)
        return (self.pipeline.vae.config.z_dim, (num_frames - 1) // factor + 1, *size)

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        return self.transformer(hidden_states=latents, timestep=timestep, return_dict=False, **conditioning)[0]

    def decode_batch(self, latents: Tensor) -> Tensor:
        video = self.pipeline.vae.decode(latents * self._std + self._mean, return_dict=False)[0]
        return video.transpose(1, 2)
