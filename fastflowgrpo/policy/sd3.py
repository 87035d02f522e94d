"""Stable Diffusion 3 and 3.5."""

from collections.abc import Collection
from functools import partial

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import XFormersJointAttnProcessor
from diffusers.utils import is_xformers_available
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.policy.base import DiffusersPolicy
from fastflowgrpo.policy.latents import latent_size, reject_num_frames
from fastflowgrpo.policy.protocol import SOURCE, Conditioning
from fastflowgrpo.policy.source_images import text_embeddings


class SD3Policy(DiffusersPolicy):
    """The transformer of a `StableDiffusion3Pipeline`. Latents are (C, H, W).

    A transformer that takes twice the channels that it gives edits images: the further ones are those of the source.
    """

    # those of the Flow-GRPO paper
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

    def __init__(self, pipeline: StableDiffusion3Pipeline, config: PolicyConfig):
        super().__init__(pipeline, config)
        self.edits_images = self.module.config.in_channels == 2 * self.module.config.out_channels
        self.max_sources = int(self.edits_images)

    @classmethod
    def default_sequence_length(cls, absent: Collection[str]) -> int:
        """Return the tokens of T5, which follow CLIP's."""
        return 0 if "text_encoder_3" in absent else 256

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.sequence_length
        )
        return {"encoder_hidden_states": embeds.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}

    def example_conditioning(self, batch_size: int) -> Conditioning:
        config = self.module.config
        tokens = self.pipeline.text_encoder.config.max_position_embeddings + self.sequence_length
        new = partial(torch.empty, dtype=self.dtype, device=self.device)
        return {
            "encoder_hidden_states": new(batch_size, tokens, config.joint_attention_dim),
            "pooled_projections": new(batch_size, config.pooled_projection_dim),
        }

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        reject_num_frames(num_frames)
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        config = self.module.config
        most = config.pos_embed_max_size
        size = latent_size(height, width, factor, self.pipeline.patch_size, (default, default), most)
        return (config.out_channels, *size)

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        if SOURCE in conditioning:
            latents = torch.cat([latents, conditioning[SOURCE].flatten(1, 2)], 1)
        return self.transformer(
            hidden_states=latents, timestep=timestep, return_dict=False, **text_embeddings(conditioning)
        )[0]

    def _attention_sample(self, name: str) -> Tensor:
        # diffusers' dispatcher does not know SD3's layers; apart from their own attention there is one for xformers.
        if name != "xformers":
            raise ValueError("Stable Diffusion 3 has only xformers besides the default")
        if not is_xformers_available():
            raise ModuleNotFoundError("it is not installed (pip install xformers)")
        self.module.set_attn_processor(XFormersJointAttnProcessor())
        layer = self.module.transformer_blocks[0].attn
        tokens = torch.zeros(1, 16, layer.query_dim, dtype=self.dtype, device=self.device, requires_grad=True)
        return layer(tokens, tokens)[0]
