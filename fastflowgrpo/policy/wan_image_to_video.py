"""Wan 2.1 and 2.2, image to video: the video begins with the source image."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.protocol import SOURCE, Conditioning
from fastflowgrpo.policy.source_images import text_embeddings
from fastflowgrpo.policy.wan import WanPolicy
from fastflowgrpo.prompts.images import read_image

TEXT_TOKENS = 512  # by whose number diffusers' layers tell the image's tokens from the text's


class WanImageToVideoPolicy(WanPolicy):
    """The transformer of a `WanImageToVideoPipeline`.

    Wan 2.1 and Wan 2.2 A14B get the latents of a video of the source and grey frames as further channels, with a mask
    of the first frame. Wan 2.1 also gets CLIP's tokens of the source.

    Wan 2.2 TI2V-5B (`expand_timesteps`) gets the source as the first latent frame, at timestep 0, whatever the
    sample has there. The pipeline puts the source into the result at the end. Here the velocity of that frame is the
    one that leads to the source, so that the result has it too, and the frame adds nothing to the loss.
    """

    edits_images, max_sources = True, 1

    def __init__(self, pipeline: WanImageToVideoPipeline, config: PolicyConfig):
        takes_tokens = pipeline.transformer.config.image_dim is not None
        if takes_tokens:
            self.lora_targets = (*WanPolicy.lora_targets, "add_k_proj", "add_v_proj")
        super().__init__(pipeline, config)
        if takes_tokens and self.sequence_length != TEXT_TOKENS:
            raise UserError(
                f"policy.max_sequence_length {self.sequence_length}: Wan 2.1 image to video takes {TEXT_TOKENS}"
            )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        # The same as the pipeline's own method, which fails where ftfy is not installed.
        embeds = WanPipeline._get_t5_prompt_embeds(self.pipeline, prompts, max_sequence_length=self.sequence_length)
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    @torch.no_grad()
    def encode_sources(self, images: Sequence[Path | bytes], shape: tuple[int, ...]) -> Tensor:
        pipeline, vae, (height, width) = self.pipeline, self.pipeline.vae, self.image_size(shape)
        following = 0 if pipeline.config.expand_timesteps else (shape[1] - 1) * pipeline.vae_scale_factor_temporal
        video = torch.zeros(1, 3, 1 + following, height, width, dtype=vae.dtype, device=self.device)
        video[:, :, 0] = read_image(images[0], height, width).to(self.device, vae.dtype) / 127.5 - 1
        latents = (vae.encode(video).latent_dist.mode() - self._mean) / self._std
        return latents.unsqueeze(1).to(self.dtype)

    @torch.no_grad()
    def encode_edit(self, prompt: str, images: Sequence[Path | bytes], shape: tuple[int, ...]) -> Conditioning:
        conditioning = super().encode_edit(prompt, images, shape)
        if self.pipeline.transformer.config.image_dim is not None:
            tokens = self.pipeline.encode_image(read_image(images[0], *self.image_size(shape)), self.device)
            conditioning["encoder_hidden_states_image"] = tokens.to(self.dtype)
        return conditioning

    def example_edit(self, batch_size: int, shape: tuple[int, ...], num_images: int) -> Conditioning:
        frames = 1 if self.pipeline.config.expand_timesteps else shape[1]
        conditioning = super().example_edit(batch_size, (shape[0], frames, *shape[2:]), num_images)
        width = self.pipeline.transformer.config.image_dim
        if width is not None:
            vision = self.pipeline.image_encoder.config
            size = (batch_size, (vision.image_size // vision.patch_size) ** 2 + 1, width)
            conditioning["encoder_hidden_states_image"] = torch.empty(size, dtype=self.dtype, device=self.device)
        return conditioning

    def image_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        factor = self.pipeline.vae_scale_factor_spatial
        return shape[-2] * factor, shape[-1] * factor

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        source, conditioning = conditioning[SOURCE].flatten(1, 2), text_embeddings(conditioning)
        if self.pipeline.config.expand_timesteps:
            return self._predict_after_first(latents, sigma, source, conditioning)
        batch_size, _, *size = latents.shape
        mask = latents.new_zeros(batch_size, self.pipeline.vae_scale_factor_temporal, *size)
        mask[:, :, 0] = 1
        return super().predict(torch.cat([latents, mask, source], 1), sigma, conditioning)

    def _predict_after_first(
        self, latents: Tensor, sigma: Tensor, source: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The velocity (B, C, F, H, W), of the first frame towards the source, (B, C, 1, H, W)."""
        frames, height, width = latents.shape[2:]
        _, *patch = self.pipeline.transformer.config.patch_size
        tokens = height // patch[0] * (width // patch[1])
        after_first = torch.arange(frames, device=self.device).sign().repeat_interleave(tokens)
        video = torch.cat([source, latents[:, :, 1:]], 2)
        velocity = super().predict(video, sigma[:, None] * after_first, conditioning)
        towards_source = (latents[:, :, :1].float() - source) / sigma.view(-1, 1, 1, 1, 1)
        return torch.cat([towards_source.to(velocity.dtype), velocity[:, :, 1:]], 2)
