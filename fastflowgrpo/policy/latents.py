"""Functions that several families share: the sizes, packing and statistics of latents."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor

from fastflowgrpo.errors import UserError


def latent_size(
    height: int | None,
    width: int | None,
    factor: int,
    patch: int,
    default: tuple[int, int],
    most_tokens: int | None = None,
) -> tuple[int, int]:
    """Return (H, W) of the latents for an image size in pixels.

    Args:
        height, width: in pixels; None for the default.
        factor: pixels per latent along a side.
        patch: latents per token along a side.
        default: (height, width) in pixels.
        most_tokens: for how many along a side the model has positions; None if for any number.

    Raises:
        UserError: the size is not a multiple of a token's, or larger than the model's positions.
    """
    sizes, multiple = [], factor * patch
    for name, size, default_size in (("height", height, default[0]), ("width", width, default[1])):
        size = default_size if size is None else size
        if size <= 0 or size % multiple:
            raise UserError(f"rollout.{name} {size} is not a positive multiple of {multiple}, as this model needs")
        if most_tokens is not None and size > most_tokens * multiple:
            raise UserError(
                f"rollout.{name} {size} is more than {most_tokens * multiple}, the most that this model takes"
            )
        sizes.append(size // factor)
    return sizes[0], sizes[1]


def reject_num_frames(num_frames: int | None) -> None:
    """Raise UserError if an image model is asked for a video."""
    if num_frames is not None:
        raise UserError(f"rollout.num_frames {num_frames}: this model makes images, leave it out")


def pack(latents: Tensor) -> Tensor:
    """Pack latents (B, C, H, W) into tokens (B, H / 2 * W / 2, 4 C), as FLUX's and Qwen-Image's pipelines do."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack`: tokens to latents (B, C, height, width)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def latent_statistics(vae: AutoencoderKLWan | AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents, (1, C, 1, 1, 1), for Wan's and Qwen-Image's VAEs."""
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
