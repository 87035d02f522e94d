"""What the training loop needs of a model, one small file per family over its diffusers pipeline."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fastflowgrpo.config import PolicyConfig
from fastflowgrpo.errors import UserError
from fastflowgrpo.policy.flux import FluxPolicy
from fastflowgrpo.policy.qwen_image import QwenImagePolicy
from fastflowgrpo.policy.sd3 import SD3Policy
from fastflowgrpo.policy.wan import WanPolicy
from fastflowgrpo.shapes import PIPELINE

Conditioning = dict[str, Tensor]
"""Prompt embeddings as the transformer takes them, one row per prompt in every tensor."""

FAMILIES: dict[str, Callable[[DiffusionPipeline, PolicyConfig], "Policy"]] = {
    "StableDiffusion3Pipeline": SD3Policy,
    "FluxPipeline": FluxPolicy,
    "QwenImagePipeline": QwenImagePolicy,
    "WanPipeline": WanPolicy,
}


class Policy(Protocol):
    """A flow-matching model under training. Rollout and update call the same `velocity`."""

    dtype: torch.dtype
    device: torch.device
    transformer: torch.nn.Module
    """What `velocity` calls; the trainer puts the wrapped one here."""

    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings of prompts, a row each. No gradient."""

    def latent_shape(self, height: int | None, width: int | None, num_frames: int | None = None) -> tuple[int, ...]:
        """Shape of one latent sample for a size in pixels and, for a video, frames; by default the model's own."""

    def sigmas(self, num_steps: int, shape: tuple[int, ...]) -> Tensor:
        """The schedule of the model's own pipeline for latents of a shape: (num_steps + 1,), float32 on the CPU, ending
        with 0."""

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """v = x_1 - x_0 at (B, ...) latents; sigma (B,) float32, a conditioning row per sample."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images, uint8 (B, 3, H, W), or videos, uint8 (B, F, 3, H, W), of clean latents. No gradient."""

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained, all float32."""

    def reference(self) -> AbstractContextManager[None]:
        """Inside it, `velocity` is the model's as it was loaded."""

    def save(self, folder: Path) -> None:
        """Write the trained weights so that the family's diffusers pipeline loads them."""

    def encoder_key(self) -> str:
        """What `encode` depends on besides the prompt, as a hash."""

    def drop_encoders(self) -> None:
        """Free the memory of the text encoders; `encode` is not called again."""


def load_policy(model: str, config: PolicyConfig, device: torch.device | str = "cpu") -> Policy:
    """Load a diffusers pipeline for training.

    Args:
        model: a local folder in diffusers' layout, a hub id, or "shapes" for the bundled model.
        config: dtype, adapter and embedding settings.
        device: where it runs.

    Raises:
        UserError: if there is no such pipeline or its family is not supported.
    """
    if config.lora_rank is None and config.lora is None:
        config = replace(config, lora_rank=0 if model == "shapes" else 32)
    if model == "shapes":
        model = str(PIPELINE)
    try:
        index = DiffusionPipeline.load_config(model)
        name = index["_class_name"]
        if name not in FAMILIES:
            raise UserError(
                f'model "{model}" is a {name}; supported: {", ".join(FAMILIES)}. '
                "docs/models.md says how to add a family"
            )
        pipeline_class = getattr(diffusers, name)
        # A pipeline saved without a component (SD3 without T5) loads only if told so.
        absent = [key for key, value in index.items() if isinstance(value, list) and value[0] is None]
        pipeline = pipeline_class.from_pretrained(model, dtype=getattr(torch, config.dtype), **dict.fromkeys(absent))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f'model "{model}" is neither a diffusers folder nor a hub id that can be read ({reason}); '
            "a gated model needs `hf auth login`"
        ) from error
    return FAMILIES[name](pipeline.to(device), config)
