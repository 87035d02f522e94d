"""Qwen-Image."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy.latents import latent_statistics
from fastflowgrpo.policy.packed import PackedPolicy
from fastflowgrpo.policy.protocol import Conditioning
from fastflowgrpo.policy.sd3 import SD3Policy
from fastflowgrpo.policy.source_images import source_sizes


class QwenImagePolicy(PackedPolicy):
    """The transformer of a `QwenImagePipeline`.

    Guidance is linear here, v = v_uncond + g (v_cond - v_uncond), as in the other families. The pipeline also scales
    each token's prediction back to the norm of the conditional one.
    """

    lora_targets = SD3Policy.lora_targets
    has_attention_mask = True

    def __init__(self, pipeline: QwenImagePipeline, config: PolicyConfig):
        super().__init__(pipeline, config)
        self._mean, self._std = latent_statistics(pipeline.vae)

    def freeze_unused_weights(self) -> None:
        last = self.module.transformer_blocks[-1]  # the output does not depend on its text stream
        for part in (last.attn.to_add_out, last.txt_mlp):
            part.requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, mask = self.pipeline.encode_prompt(prompts, max_sequence_length=self.sequence_length)
        return self.padded(embeds, mask, self.sequence_length)

    def padded(self, embeds: Tensor, mask: Tensor | None, length: int) -> Conditioning:
        """Return what the pipeline's `encode_prompt` gives, padded or cut to a length.

        All prompts get the same length, so that a sample does not depend on the others in its batch.
        """
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        padding = length - embeds.shape[1]
        return {
            "encoder_hidden_states": F.pad(embeds.to(self.dtype), (0, 0, 0, padding)),
            "encoder_hidden_states_mask": F.pad(mask.bool(), (0, padding)),
        }

    def example_conditioning(self, batch_size: int) -> Conditioning:
        return self.example_embeddings(batch_size, self.sequence_length)

    def example_embeddings(self, batch_size: int, length: int) -> Conditioning:
        """Return tensors like those of `padded`, with arbitrary contents."""
        size, width = (batch_size, length), self.module.config.joint_attention_dim
        return {
            "encoder_hidden_states": torch.empty(*size, width, dtype=self.dtype, device=self.device),
            "encoder_hidden_states_mask": torch.ones(size, dtype=torch.bool, device=self.device),
        }

    def extra_inputs(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        sizes = [latents.shape[-2:], *source_sizes(conditioning)]
        return {"img_shapes": [[(1, height // 2, width // 2) for height, width in sizes]] * len(latents)}

    def decode_batch(self, latents: Tensor) -> Tensor:
        latents = latents.unsqueeze(2) * self._std + self._mean
        return self.pipeline.vae.decode(latents, return_dict=False)[0][:, :, 0]

    def encode_batch(self, pixels: Tensor) -> Tensor:
        latents = self.pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
        return ((latents - self._mean) / self._std).squeeze(2)
