"""FLUX.1: dev, which takes a guidance as an input, and schnell."""

from functools import lru_cache, partial
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy.packed import PackedPolicy
from fastflowgrpo.policy.protocol import Conditioning
from fastflowgrpo.policy.sd3 import SD3Policy


class FluxPolicy(PackedPolicy):
    """The transformer of a `FluxPipeline`."""

    lora_targets = (*SD3Policy.lora_targets, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

    def __init__(self, pipeline: FluxPipeline, config: PolicyConfig):
        super().__init__(pipeline, config)
        # Computed on the host, and the copy to the device waits for it: once for each image size.
        self._positions = lru_cache(maxsize=8)(
            lambda h, w: pipeline._prepare_latent_image_ids(1, h, w, self.device, self.dtype)
        )

    @classmethod
    def guidance_arguments(cls, config: PolicyConfig, guidance_scale: float) -> dict[str, Any]:
        # the pipeline's guidance_scale is an input of the model, its true_cfg_scale classifier-free guidance
        return {**super().guidance_arguments(config, guidance_scale), "guidance_scale": config.distilled_guidance}

    @property
    def is_few_step(self) -> bool:
        return not self.module.config.guidance_embeds

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=self.sequence_length)
        return {"encoder_hidden_states": embeds.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}

    def example_conditioning(self, batch_size: int) -> Conditioning:
        config = self.module.config
        new = partial(torch.empty, dtype=self.dtype, device=self.device)
        return {
            "encoder_hidden_states": new(batch_size, self.sequence_length, config.joint_attention_dim),
            "pooled_projections": new(batch_size, config.pooled_projection_dim),
        }

    def extra_inputs(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        distilled = self.module.config.guidance_embeds
        return {
            "guidance": torch.full_like(sigma, self.config.distilled_guidance) if distilled else None,
            "txt_ids": latents.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            "img_ids": self._positions(height // 2, width // 2),
        }
