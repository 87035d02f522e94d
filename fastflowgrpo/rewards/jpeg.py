"""JPEG size as a reward (DDPO, arXiv 2305.13301). It needs no model, and shows quickly whether training works."""

import io
from dataclasses import dataclass

import torch
from PIL import Image

from fastflowgrpo.scoring.contract import Reward, RewardBatch, Scores


def kilobytes(images: torch.Tensor) -> torch.Tensor:
    """Encode images uint8 (B, 3, H, W) as JPEG of quality 95, and return the sizes float32 (B,) in kB of 1000 bytes."""
    sizes = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


@dataclass(frozen=True)
class JPEGSize:
    """A reward: `factor` times the size in kB; the detail `kilobytes` is the size."""

    factor: float
    pointwise = True

    def __call__(self, batch: RewardBatch) -> Scores:
        size = kilobytes(batch.images)
        return Scores(self.factor * size, {"kilobytes": size})


def jpeg_compressibility() -> Reward:
    """Make a reward for images that compress well: -size / 500, with the size in kB at JPEG quality 95."""
    return JPEGSize(-1 / 500)


def jpeg_incompressibility() -> Reward:
    """Make a reward for images that compress badly: size / 500, exactly the negative of `jpeg_compressibility`.
    (Flow-GRPO's own code does not divide by 500 here.)"""
    return JPEGSize(1 / 500)
