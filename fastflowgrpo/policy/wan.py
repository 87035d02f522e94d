"""Wan 2.1 and 2.2, text to video."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.experts import Experts
from fastflowgrpo.policy.latents import latent_size, latent_statistics
from fastflowgrpo.policy.protocol import Conditioning

DEFAULT_SIZE, DEFAULT_FRAMES = (480, 832), 81  # the pipeline's own


class WanPolicy(DiffusersPolicy):
    """The transformer of a `WanPipeline`. Latents are (C, F, H, W), videos (F, 3, H, W).

    The pipeline ships a UniPC solver. Here Euler steps go through the same sigmas, which its `flow_shift` shifts, and
    timesteps are not rounded to integers as UniPC's are. Wan 2.2's pipeline gives TI2V-5B a timestep per token, which
    is the same for all tokens without a source image; here there is one per video, and so less to compute.

    Wan 2.2 A14B has two transformers, of which `boundary_ratio` chooses one for each noise level. Both are trained, or
    one if all trained steps are its.
    """

    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    makes_videos = True

    def __init__(self, pipeline: WanPipeline, config: PolicyConfig):
        parts = pipeline.transformer, pipeline.transformer_2, pipeline.config.boundary_ratio
        if len({part is None for part in parts[1:]}) == 2 or parts[0] is None:
            raise UserError("this pipeline needs a transformer, or a transformer, a transformer_2 and a boundary_ratio")
        scheduler = pipeline.scheduler
        if not (isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("use_flow_sigmas")):
            raise UserError(
                f"the scheduler of this model, {type(scheduler).__name__}, does not use flow-matching sigmas"
            )
        super().__init__(pipeline, config)
        self.boundary = pipeline.config.boundary_ratio
        self._mean, self._std = latent_statistics(pipeline.vae)
        self._untrained: str | None = None

    def trained_module(self) -> Any:
        pipeline = self.pipeline
        if pipeline.transformer_2 is None:
            return pipeline.transformer
        boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
        return Experts(pipeline.transformer, pipeline.transformer_2, boundary)

    def train_only_at(self, sigmas: Tensor) -> None:
        if self.boundary is not None:
            noisy = sigmas >= self.boundary
            if noisy.all() or not noisy.any():
                self._untrained = "transformer_2" if noisy.all() else "transformer"
                self.transformers[self._untrained].requires_grad_(False)

    def warnings(self, guided: bool) -> list[str]:
        found = super().warnings(guided)
        if self._untrained is not None:
            side = "from" if self._untrained == "transformer_2" else "below"
            found.append(
                f"all trained steps are {side} the noise level {self.boundary:g}, the boundary of the two "
                f"transformers: {self._untrained} is not trained; rollout.window_start chooses the steps"
            )
        return found

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.sequence_length
        )
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def example_conditioning(self, batch_size: int) -> Conditioning:
        shape = (batch_size, self.sequence_length, self.pipeline.transformer.config.text_dim)
        return {"encoder_hidden_states": torch.empty(shape, dtype=self.dtype, device=self.device)}

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        config, factor = self.pipeline.transformer.config, self.pipeline.vae_scale_factor_temporal
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
