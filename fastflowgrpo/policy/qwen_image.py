"""Qwen-Image."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy.latents import latent_statistics
from fastflowgrpo.policy.packed import PackedPolicy
from fastflowgrpo.policy.sd3 import SD3Policy


class QwenImagePolicy(PackedPolicy):
    """The transformer of a `QwenImagePipeline`.

    Guidance is linear, v = v_uncond + g (v_cond - v_uncond), as the step and the loss have it. The pipeline then scales
    each token's prediction back to the norm of the conditional one, which is not done here.
    """

    lora_targets = SD3Policy.lora_targets
    masked = True

    def __init__(self, pipeline: QwenImagePipeline, config: PolicyConfig):
        super().__init__(pipeline, config)
        self._mean, self._std = latent_statistics(pipeline.vae)

    @staticmethod
    def freeze_unread(transformer: Any) -> None:
        last = transformer.transformer_blocks[-1]  # nothing reads its text stream
        for part in (last.attn.to_add_out, last.txt_mlp):
            part.requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipeline.encode_prompt(prompts, max_sequence_length=self.sequence_length)
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        # All prompts at one length, so that a sample does not depend on which others it is batched with.
        padding = self.sequence_length - embeds.shape[1]
        return {
            "encoder_hidden_states": F.pad(embeds, (0, 0, 0, padding)),
            "encoder_hidden_states_mask": F.pad(mask.bool(), (0, padding)),
        }

    def inputs(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        return {"img_shapes": [[(1, height // 2, width // 2)]] * len(latents)}

    def decode_part(self, latents: Tensor) -> Tensor:
        latents = latents.unsqueeze(2) * self._std + self._mean
        return self.pipeline.vae.decode(latents, return_dict=False)[0][:, :, 0]
