"""How several families lay out and scale their latents, in functions."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor

from fastflowgrpo.errors import UserError


def latent_size(
    height: int | None, width: int | None, factor: int, patch: int, default: tuple[int, int]
) -> tuple[int, int]:
    """(H, W) of the latents of an image size in pixels.

    Args:
        height, width: in pixels; None for the default.
        factor: pixels per latent, along a side.
        patch: latents per token, along a side.
        default: (height, width) in pixels.

    Raises:
        UserError: the size is no multiple of a token's.
    """
    sizes = []
    for name, size, other in (("height", height, default[0]), ("width", width, default[1])):
        size = other if size is None else size
        if size <= 0 or size % (factor * patch):
            multiple = factor * patch
            raise UserError(f"rollout.{name} {size} is not a positive multiple of {multiple}, as this model needs")
        sizes.append(size // factor)
    return sizes[0], sizes[1]


def no_frames(num_frames: int | None) -> None:
    """Raises UserError if a model of images is asked for a video."""
    if num_frames is not None:
        raise UserError(f"rollout.num_frames {num_frames}: this model makes images, leave it out")


def pack(latents: Tensor) -> Tensor:
    """Tokens (B, H / 2 * W / 2, 4 C) of latents (B, C, H, W), as FLUX's and Qwen-Image's pipelines pack them."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, height, width) of the tokens that `pack` makes of them."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def latent_statistics(vae: AutoencoderKLWan | AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of Wan's VAE, and of Qwen-Image's, which is made like it."""
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
