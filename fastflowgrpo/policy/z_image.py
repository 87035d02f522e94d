"""Z-Image, and its distilled Turbo."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.latents import latent_size, reject_num_frames
from fastflowgrpo.policy.protocol import Conditioning
from fastflowgrpo.policy.schedules import shifted_sigmas, token_shift

DEFAULT_SIZE = (1024, 1024)  # the pipeline's own


class ZImagePolicy(DiffusersPolicy):
    """The transformer of a `ZImagePipeline`. Latents are (C, H, W).

    The transformer takes each prompt without padding. Each pass therefore waits once for the device, for their lengths.
    """

    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    has_attention_mask = True

    @classmethod
    def guidance_arguments(cls, config: PolicyConfig, guidance_scale: float) -> dict[str, Any]:
        # the pipeline computes v_cond + g (v_cond - v_uncond)
        return {"guidance_scale": guidance_scale - 1}

    @property
    def attention_head_dim(self) -> int:
        return self.module.config.dim // self.module.config.n_heads

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        features, _ = self.pipeline.encode_prompt(
            list(prompts),  # which it changes
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence_length,
        )
        room = features[0].new_zeros(self.sequence_length, features[0].shape[1])
        padded = pad_sequence([*features, room], batch_first=True)[:-1]
        lengths = torch.tensor([len(prompt) for prompt in features], device=self.device)
        return {"cap_feats": padded.to(self.dtype), "lengths": lengths}

    def example_conditioning(self, batch_size: int) -> Conditioning:
        shape = (batch_size, self.sequence_length, self.module.config.cap_feat_dim)
        return {
            "cap_feats": torch.empty(shape, dtype=self.dtype, device=self.device),
            "lengths": torch.full((batch_size,), self.sequence_length, device=self.device),
        }

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        reject_num_frames(num_frames)
        size = latent_size(height, width, self.pipeline.vae_scale_factor, 2, DEFAULT_SIZE)
        return (self.module.config.in_channels, *size)

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        scheduler = self.pipeline.scheduler
        return shifted_sigmas(scheduler, num_steps, token_shift(scheduler, shape[1] // 2 * (shape[2] // 2)))

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        prompts, lengths = list(conditioning["cap_feats"]), conditioning["lengths"]
        if not lengths.is_meta:  # in an estimate, all prompts have the full length
            prompts = [prompt[:length] for prompt, length in zip(prompts, lengths.tolist(), strict=True)]
        images, timestep = list(latents.unsqueeze(2)), (1000 - sigma * 1000) / 1000
        velocities = self.transformer(images, timestep, prompts, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)  # the model predicts data minus noise
