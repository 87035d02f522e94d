"""Stable Diffusion 3 and 3.5."""

import torch
from torch import Tensor

from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.latents import latent_size, no_frames


class SD3Policy(DiffusersPolicy):
    """The transformer of a `StableDiffusion3Pipeline`. Latents are (C, H, W)."""

    # the Flow-GRPO paper's
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    @property
    def default_sequence_length(self) -> int:  # type: ignore[override]
        """T5's tokens, which follow CLIP's."""
        return 0 if self.pipeline.text_encoder_3 is None else 256

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.sequence_length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        no_frames(num_frames)
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        size = latent_size(height, width, factor, self.pipeline.patch_size, (default, default))
        return (self.module.config.in_channels, *size)

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        return self.transformer(hidden_states=latents, timestep=timestep, return_dict=False, **conditioning)[0]
