"""FLUX.2: dev, which takes a guidance as an input, and klein."""

from functools import lru_cache
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from torch.nn import functional as F

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.latents import latent_size, reject_num_frames
from fastflowgrpo.policy.protocol import Conditioning
from fastflowgrpo.policy.schedules import shifted_sigmas
from fastflowgrpo.policy.sd3 import SD3Policy
from fastflowgrpo.policy.source_images import SEVERAL, source_sizes, text_embeddings, with_source_tokens


class Flux2Policy(DiffusersPolicy):
    """The transformer of a `Flux2Pipeline`, whose call has no classifier-free guidance.

    Latents are (C, H, W), one per token: 2 x 2 of the VAE's, normalised by the statistics of its batch norm.

    Prompts may have reference images, whose tokens follow those of the sample, with 10, 20, ... as the first of their
    coordinates. The pipelines keep the size of a reference of up to a megapixel. Here it gets the size of the result
    or `policy.source_height` x `policy.source_width`.
    """

    max_sources, sources_of_any_size = SEVERAL, True

    lora_targets = (
        *SD3Policy.lora_targets,
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",
    )

    def __init__(self, pipeline: Flux2Pipeline | Flux2KleinPipeline, config: PolicyConfig):
        super().__init__(pipeline, config)
        norm = pipeline.vae.bn
        self._mean = norm.running_mean.view(1, -1, 1, 1)
        self._std = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps)
        # Computed on the host, and the copy to the device waits for it: once for each size and length.
        self._positions = lru_cache(maxsize=8)(self._image_positions)
        self._text_positions = lru_cache(maxsize=8)(
            lambda length: pipeline._prepare_text_ids(torch.empty(1, length, 1)).to(self.device)
        )

    @classmethod
    def guidance_arguments(cls, config: PolicyConfig, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": config.distilled_guidance}

    @property
    def pipeline_guides(self) -> bool:
        return False

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=self.sequence_length)
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def example_conditioning(self, batch_size: int) -> Conditioning:
        shape = (batch_size, self.sequence_length, self.module.config.joint_attention_dim)
        return {"encoder_hidden_states": torch.empty(shape, dtype=self.dtype, device=self.device)}

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        reject_num_frames(num_frames)
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        return (self.module.config.in_channels, *latent_size(height, width, 2 * factor, 1, (default, default)))

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        mu = compute_empirical_mu(shape[1] * shape[2], num_steps)
        return shifted_sigmas(self.pipeline.scheduler, num_steps, mu)

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        distilled = self.module.config.guidance_embeds
        tokens = _pack(latents)
        velocity = self.transformer(
            hidden_states=with_source_tokens(tokens, conditioning, _pack),
            # the pipelines round it like this
            timestep=(sigma * 1000).to(latents.dtype) / 1000,
            guidance=torch.full_like(sigma, self.config.distilled_guidance) if distilled else None,
            txt_ids=self._text_positions(conditioning["encoder_hidden_states"].shape[1]),
            img_ids=self._positions(*latents.shape[-2:], *source_sizes(conditioning)),
            return_dict=False,
            **text_embeddings(conditioning),
        )[0]
        return velocity[:, : tokens.shape[1]].transpose(1, 2).reshape(latents.shape)

    def _image_positions(self, height: int, width: int, *references: tuple[int, int]) -> Tensor:
        """Return the coordinates of the tokens of a sample and of its references, of (height, width) each."""
        positions = [self.pipeline._prepare_latent_ids(torch.empty(1, 1, height, width))]
        if references:
            positions.append(self.pipeline._prepare_image_ids([torch.empty(1, 1, *size) for size in references]))
        return torch.cat(positions, 1).to(self.device)

    def decode_batch(self, latents: Tensor) -> Tensor:
        latents = F.pixel_shuffle(latents * self._std + self._mean, 2)
        return self.pipeline.vae.decode(latents, return_dict=False)[0]

    def encode_batch(self, pixels: Tensor) -> Tensor:
        return (F.pixel_unshuffle(self.pipeline.vae.encode(pixels).latent_dist.mode(), 2) - self._mean) / self._std

    def image_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        height, width = super().image_size(shape)
        return 2 * height, 2 * width


class Flux2KleinPolicy(Flux2Policy):
    """The transformer of a `Flux2KleinPipeline`: a distilled model, or a base model that is guided."""

    @classmethod
    def guidance_arguments(cls, config: PolicyConfig, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale}

    @property
    def is_few_step(self) -> bool:
        return self.pipeline.config.is_distilled

    @property
    def pipeline_guides(self) -> bool:
        return not self.pipeline.config.is_distilled


def _pack(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, H W, C)."""
    return latents.flatten(2).transpose(1, 2)
