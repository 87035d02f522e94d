"""Diversity: how different the images of one prompt are."""

from collections.abc import Callable

import torch
from torch import Tensor


def rms_distances(groups: Tensor) -> Tensor:
    """The RMS difference between two samples of a group, averaged over the pairs of the group.

    Args:
        groups: (P, n, ...), n samples of each of P groups.

    Returns:
        (P,) float32; NaN if n is 1.
    """
    return torch.stack([torch.pdist(group.flatten(1).float()).mean() for group in groups]) / groups[0, 0].numel() ** 0.5


def cosine_distances(groups: Tensor) -> Tensor:
    """1 - cosine between two unit embeddings of a group, averaged over the pairs of the group: (P, n, D) -> (P,)."""
    n = groups.shape[1]
    return 1 - (groups.sum(1).square().sum(-1) - n) / (n * (n - 1))


def diversity(
    images: Tensor, latent_distances: Tensor, embed_images: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The mean distance between two images of each prompt, measured in several ways.

    Args:
        images: (P, n, 3, H, W) uint8 on the CPU, n images of each of P prompts.
        latent_distances: (P,), the `rms_distances` of the images' latents.
        embed_images: maps uint8 images (B, 3, H, W) to unit embeddings (B, D), such as CLIP's.

    Returns:
        Tensors (P,) float32: "pixels" (RMS difference of the values 0 to 255), "latents", and with `embed_images`
        "CLIP" (1 - cosine). Empty if n is 1.
    """
    if images.shape[1] == 1:
        return {}
    distances = {"pixels": rms_distances(images), "latents": latent_distances}
    if embed_images is not None:
        embeddings = embed_images(images.flatten(0, 1)).cpu()
        distances["CLIP"] = cosine_distances(embeddings.unflatten(0, images.shape[:2]))
    return distances
